"""Every optimizer that a table names, by name.

Ours come from :mod:`koala_lib.optim`, the others from ``torch.optim`` and ``pytorch_optimizer``;
``tests/test_baselines.py`` holds each of the latter to its paper's formula.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from koala_lab.baselines.apollo_variants import ApolloVariant
from koala_lab.baselines.meka_variants import MekaPreviousHessian, MekaWithoutModelError
from koala_lab.baselines.sdlbfgs import SdLBFGS
from koala_lab.baselines.svrg import Svrg
from koala_lib.optim import Apollo, KoalaM, KoalaPlusPlus, KoalaV, Meka

Factory = Callable[..., Optimizer]
LossFunction = Callable[[Tensor, Tensor], Tensor]  # outputs, targets -> one loss per sample


def _strict(cls: type[Optimizer], params: Iterable[Tensor], options: dict[str, Any]) -> Optimizer:
    """Return an optimizer of ``pytorch_optimizer``, strict about its keywords, which it is not itself."""
    known = [p.name for p in inspect.signature(cls).parameters.values() if p.kind is not p.VAR_KEYWORD]
    for option in options:
        if option not in known:
            raise TypeError(f"{cls.__name__} has no argument {option!r}; it has {', '.join(known[1:])}")
    return cls(params, **options)


def _extra(name: str) -> Factory:
    """Return a class of ``pytorch_optimizer``, imported at its first use."""

    def create(params: Iterable[Tensor], **options: Any) -> Optimizer:
        import pytorch_optimizer

        return _strict(getattr(pytorch_optimizer, name), params, options)

    return create


@cache
def _adahessian_class() -> type[Optimizer]:
    import pytorch_optimizer

    # Its backward() keeps the graph; zero_grad(), which drops the gradients, breaks the cycle that torch warns of.
    warnings.filterwarnings("ignore", message=r"Using backward\(\) with create_graph=True")

    class AdaHessian(pytorch_optimizer.AdaHessian):
        """With the spatial averaging of its paper (Yao et al., AAAI 2021, eq. 10), over the kernels of convolutions."""

        @staticmethod
        def compute_hutchinson_hessian(param_groups: Any, state: Any, *args: Any, **options: Any) -> None:
            pytorch_optimizer.AdaHessian.compute_hutchinson_hessian(param_groups, state, *args, **options)
            for kept in state.values():
                if "hessian" in kept and kept["hessian"].dim() == 4:
                    kept["hessian"].copy_(kept["hessian"].mean((2, 3), keepdim=True))

    return AdaHessian


def _adahessian(params: Iterable[Tensor], **options: Any) -> Optimizer:
    return _strict(_adahessian_class(), params, options)


def _adamp(params: Iterable[Tensor], **options: Any) -> Optimizer:
    params = list(params)
    for p in params:  # its .view refuses channels_last weights; gradients follow the layout of the weights
        p.data = p.data.contiguous()
    return _extra("AdamP")(params, **options)


OPTIMIZERS: dict[str, Factory] = {
    "koala_v": KoalaV,
    "koala_m": KoalaM,
    "koala_plus_plus": KoalaPlusPlus,
    "apollo": Apollo,
    "apollo_variant": ApolloVariant,
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "adamax": torch.optim.Adamax,
    "amsgrad": partial(torch.optim.Adam, amsgrad=True),
    "yogi": _extra("Yogi"),
    "adamp": _adamp,
    "fromage": _extra("Fromage"),
    "adabelief": _extra("AdaBelief"),
    "adadelta": torch.optim.Adadelta,
    "radam": torch.optim.RAdam,
    "adahessian": _adahessian,
    "sdlbfgs": SdLBFGS,
}

# Their step differentiates the gradients: backward() must keep the graph of the gradients (create_graph=True).
SECOND_ORDER = frozenset({"adahessian"})

# They warm up by themselves: a run's own warm-up would make two of them.
OWN_WARM_UP = frozenset({"apollo", "apollo_variant"})

# These run forward and backward themselves, since they need more than the gradient of a minibatch.
OWN_FORWARD: dict[str, Factory] = {
    "meka": Meka,
    "adameka": partial(Meka, direction="adam"),
    "meka_previous_hessian": MekaPreviousHessian,
    "meka_without_model_error": MekaWithoutModelError,
    "svrg": Svrg,
}


def create(name: str, module: nn.Module, loss_fn: LossFunction | None, **options: Any) -> Optimizer:
    """Return the optimizer of a module.

    Args:
        name: of :data:`OPTIMIZERS` or :data:`OWN_FORWARD`.
        module: what it trains.
        loss_fn: losses of the samples, of what ``module`` returns and of targets; ``None`` where there is no such
            function.
        options: the optimizer's own.

    Raises:
        ValueError: for an optimizer that runs the forward pass, where there is no loss function.
    """
    if name not in OWN_FORWARD:
        return OPTIMIZERS[name](module.parameters(), **options)
    if loss_fn is None:
        raise ValueError(
            f"optimizer={name!r} runs the forward pass itself and needs a loss of outputs and targets, which this task "
            "does not have; it has one with task='classification' and float32"
        )
    return OWN_FORWARD[name](module, loss_fn, **options)


def lookahead(optimizer: Optimizer, *, k: int = 5, alpha: float = 0.5) -> Optimizer:
    """Wrap an optimizer into Lookahead (Zhang et al., NeurIPS 2019, Algorithm 1).

    Args:
        optimizer: the inner optimizer; KOALA's must be stepped with a closure.
        k: inner steps to one outer step.
        alpha: the outer step: every ``k`` steps slow weights move by ``alpha (fast - slow)``, and fast restarts there.
    """
    from pytorch_optimizer import Lookahead

    wrapped: Optimizer = Lookahead(optimizer, k=k, alpha=alpha)
    return wrapped
