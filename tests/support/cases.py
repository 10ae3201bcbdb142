"""The optimizers under test and the small problem they are tested on. A new optimizer joins :data:`CASES`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from koala_lib import Apollo, KoalaM, KoalaPlusPlus, KoalaV


@dataclass(frozen=True)
class Case:
    """One optimizer with one useful set of options."""

    name: str
    factory: Callable[..., Any]
    kwargs: dict[str, Any] = field(default_factory=dict)
    state: frozenset[str] = frozenset()  # the tensors it keeps per parameter, a count of steps aside

    def __call__(self, params: Any, **more: Any) -> Any:
        return self.factory(params, **{**self.kwargs, **more})

    def __str__(self) -> str:
        return self.name

    @property
    def filters(self) -> bool:
        """Whether it filters the loss, that is: knows predict(), observe() and step(loss=...)."""
        return hasattr(self.factory, "predict")


VELOCITY, AVERAGE = frozenset({"velocity"}), frozenset({"average"})
RELEASED = {"formulas": "released", "weight_decay": 0.02}
HESSIAN = frozenset({"mean", "curvature"})
APOLLO = {"lr": 0.5, "sigma": 1.0, "warmup_steps": 3}
PRODUCT = frozenset({"gradient", "product"})
PRINTED = {"blocks": "global", "target_risk": "absolute", "measurement_noise": 0.5, "lr": 0.1}

CASES = [
    Case("V", KoalaV),
    Case("V-adaptive", KoalaV, {"process_noise": None, "weight_decay": 0.02}, AVERAGE),
    Case("V-released", KoalaV, RELEASED),
    Case("V-printed", KoalaV, PRINTED),
    Case("M", KoalaM, {}, VELOCITY | AVERAGE),
    Case("M-fixed", KoalaM, {"process_noise": 0.02, "weight_decay": 0.02}, VELOCITY),
    Case("M-released", KoalaM, RELEASED, VELOCITY | AVERAGE),
    Case("M-printed", KoalaM, PRINTED, VELOCITY | AVERAGE),
    Case("M-foreach", KoalaM, {"foreach": True, "weight_decay": 0.02}, VELOCITY | AVERAGE),
    Case("++", KoalaPlusPlus, {}, PRODUCT),
    Case("++-vanilla", KoalaPlusPlus, {"symmetric": False, "weight_decay": 0.02}, PRODUCT),
    Case("++-semidefinite", KoalaPlusPlus, {"positive_semidefinite": True, "measurement_noise": 0.5}, PRODUCT),
    Case("Apollo", Apollo, APOLLO, HESSIAN),
    Case("Apollo-W", Apollo, APOLLO | {"weight_decay": 0.02, "decoupled_weight_decay": True}, HESSIAN | {"direction"}),
]
FILTERS = [case for case in CASES if case.filters]
each_case = pytest.mark.parametrize("case", CASES, ids=str)
each_filter = pytest.mark.parametrize("case", FILTERS, ids=str)


class Net(nn.Module):
    """3 -> 4 -> 1, with a 0-dim and an empty parameter."""

    def __init__(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for name, shape in {"weight": (3, 4), "bias": (4,), "out": (4,), "scale": (), "empty": (0, 3)}.items():
            value = torch.randn(shape, generator=generator, dtype=torch.float64) / 2
            self.register_parameter(name, nn.Parameter(value.to(dtype)))

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.tanh(inputs.to(self.weight.dtype) @ self.weight + self.bias.to(self.weight.dtype))
        return hidden.to(self.out.dtype) @ self.out * self.scale + self.empty.sum()


def losses_of(net: nn.Module, k: int, batch: int = 6, rows: slice = slice(None)) -> Tensor:
    """Squared errors (batch,) on the k-th minibatch, or on some rows of it."""
    generator = torch.Generator().manual_seed(1000 + k)
    inputs = torch.randn(batch, 3, generator=generator, dtype=torch.float64)
    targets = torch.sin(inputs.sum(1)) + 0.3 * torch.randn(batch, generator=generator, dtype=torch.float64)
    outputs = net(inputs[rows])
    losses: Tensor = (outputs - targets[rows].to(outputs.dtype)) ** 2 / 2
    return losses


def evaluate(net: nn.Module, optimizer: Any, k: int) -> Tensor:
    """Forward and backward pass on the k-th minibatch."""
    optimizer.zero_grad()
    losses = losses_of(net, k)
    losses.mean().backward()
    return losses


def advance(net: nn.Module, optimizer: Any, steps: range | list[int]) -> None:
    """The given steps in the form that every optimizer knows, ``step(closure)``."""
    for k in steps:
        optimizer.step(lambda k=k: evaluate(net, optimizer, k))


def weights(net: nn.Module) -> Tensor:
    """All weights as one float64 vector."""
    return torch.cat([p.detach().double().reshape(-1) for p in net.parameters()])


def kept(optimizer: Any, p: Tensor) -> dict[str, Tensor]:
    """What an optimizer keeps for a parameter beside a count of steps."""
    return {name: value for name, value in optimizer.state[p].items() if name != "step"}


def snapshot(net: nn.Module, optimizer: Any) -> dict[str, Any]:
    """A copy of all that training continues from, by name."""
    saved = {f"weights.{name}": value for name, value in net.state_dict().items()}
    state = optimizer.state_dict()
    saved |= {f"state.{i}.{name}": value for i, entry in state["state"].items() for name, value in entry.items()}
    saved |= {
        f"group.{i}.{name}": value for i, group in enumerate(state["param_groups"]) for name, value in group.items()
    }
    return copy.deepcopy(saved)


def assert_same(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    """Two snapshots agree bit by bit, dtypes included."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(
                actual[name], value, rtol=0, atol=0, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}"
            )
        else:
            assert (type(actual[name]), actual[name]) == (type(value), value), name


def trained(case: Case, steps: int, dtype: torch.dtype = torch.float64, **more: Any) -> tuple[Net, Any]:
    """A net and its optimizer after the given number of steps."""
    net = Net(dtype)
    optimizer = case(net.parameters(), **more)
    advance(net, optimizer, range(steps))
    return net, optimizer
