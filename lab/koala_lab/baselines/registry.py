"""Every optimizer that a table names, by name.

Ours come from :mod:`koala_lib.optim`, the others from ``torch.optim`` and ``pytorch_optimizer``;
``tests/test_baselines.py`` holds each of the latter to its paper's formula.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Method:
    """How an optimizer is made, and what those who train with it must know."""

    make: Factory
    own_forward: bool = False  # runs forward and backward itself, since it needs more than a minibatch's gradient
    own_warm_up: bool = False  # a run's own warm-up would make two of them
    second_order: bool = False  # differentiates the gradients: backward() must keep their graph (create_graph=True)

    def __call__(self, *args: Any, **options: Any) -> Optimizer:
        """Return an optimizer of the parameters, or, with a forward pass of its own, of a module and its losses."""
        return self.make(*args, **options)


OPTIMIZERS: dict[str, Method] = {
    "koala_v": Method(KoalaV),
    "koala_m": Method(KoalaM),
    "koala_plus_plus": Method(KoalaPlusPlus),
    "meka": Method(Meka, own_forward=True),
    "adameka": Method(partial(Meka, direction="adam"), own_forward=True),
    "meka_previous_hessian": Method(MekaPreviousHessian, own_forward=True),
    "meka_without_model_error": Method(MekaWithoutModelError, own_forward=True),
    "apollo": Method(Apollo, own_warm_up=True),
    "apollo_variant": Method(ApolloVariant, own_warm_up=True),
    "sgd": Method(torch.optim.SGD),
    "adam": Method(torch.optim.Adam),
    "adamw": Method(torch.optim.AdamW),
    "adamax": Method(torch.optim.Adamax),
    "amsgrad": Method(partial(torch.optim.Adam, amsgrad=True)),
    "yogi": Method(_extra("Yogi")),
    "adamp": Method(_adamp),
    "fromage": Method(_extra("Fromage")),
    "adabelief": Method(_extra("AdaBelief")),
    "adadelta": Method(torch.optim.Adadelta),
    "radam": Method(torch.optim.RAdam),
    "adahessian": Method(_adahessian, second_order=True),
    "sdlbfgs": Method(SdLBFGS),
    "svrg": Method(Svrg, own_forward=True),
}


def create(name: str, module: nn.Module, loss_fn: LossFunction | None, **options: Any) -> Optimizer:
    """Return the optimizer of a module.

    Args:
        name: of :data:`OPTIMIZERS`.
        module: what it trains.
        loss_fn: losses of the samples, of what ``module`` returns and of targets; ``None`` where there is no such
            function.
        options: the optimizer's own.

    Raises:
        ValueError: for an optimizer that runs the forward pass, where there is no loss function.
    """
    method = OPTIMIZERS[name]
    if not method.own_forward:
        return method(module.parameters(), **options)
    if loss_fn is None:
        raise ValueError(
            f"optimizer={name!r} runs the forward pass itself and needs a loss of outputs and targets, which this task "
            "does not have; it has one with task='classification' and float32"
        )
    return method(module, loss_fn, **options)


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
