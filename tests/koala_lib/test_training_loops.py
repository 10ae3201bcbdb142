"""What other people's training loops do to an optimizer: groups reused, weights frozen, micro-batches, closures."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.optim import ZeroRedundancyOptimizer

from koala_lib import Apollo, KoalaM, KoalaPlusPlus, KoalaV
from tests.support.cases import (
    CASES,
    Case,
    Net,
    advance,
    assert_same,
    each_case,
    each_filter,
    evaluate,
    kept,
    losses_of,
    snapshot,
    trained,
    weights,
)

# ---- groups and what comes in a user's dictionary


def fresh(optimizer: Any) -> Any:
    return optimizer


def copied(optimizer: Any) -> Any:
    return copy.deepcopy(optimizer)


def pickled(optimizer: Any) -> Any:
    return pickle.loads(pickle.dumps(optimizer))


def loaded(optimizer: Any) -> Any:
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return optimizer


def train_both(mine: nn.Module, params: list[Tensor], other: nn.Module, optimizer: Any, k: int) -> Tensor:
    """Losses of two networks; ``params`` are the first one's, which a copied optimizer has for itself."""
    optimizer.zero_grad()
    values = dict(zip(dict(mine.named_parameters()), params, strict=True))
    losses = torch.func.functional_call(Loss(mine), {f"net.{name}": p for name, p in values.items()}, (k,))
    losses = losses + losses_of(other, k)
    losses.mean().backward()
    return losses


class Loss(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, k: int) -> Tensor:
        return losses_of(self.net, k)


@each_case
@pytest.mark.parametrize("again", [copied, pickled, loaded])
def test_parameters_are_added_after_a_load_as_before_it(case: Case, again: Callable[[Any], Any]) -> None:
    ends = []
    for way in (fresh, again):
        first, second = Net(), Net(seed=1)
        optimizer = way(case(first.parameters()))
        mine = list(optimizer.param_groups[0]["params"])
        optimizer.add_param_group({"params": list(second.parameters()), "lr": 0.5})
        for k in range(3):
            optimizer.step(partial(train_both, first, mine, second, optimizer, k))
        ends.append(torch.cat([*(p.detach().reshape(-1) for p in mine), weights(second)]))
    assert torch.equal(*ends)


@each_case
def test_group_dictionaries_can_be_used_again(case: Case) -> None:
    net = Net()
    groups = [{"params": [net.weight, net.bias], "lr": 0.3}, {"params": [net.out, net.scale, net.empty]}]
    before = [dict(group) for group in groups]
    first = case(groups)
    advance(net, first, range(2))
    assert [group.keys() for group in groups] == [group.keys() for group in before]
    assert all(group["params"] is old["params"] for group, old in zip(groups, before, strict=True))
    new, same = case(groups), case(copy.deepcopy(first.param_groups))
    assert snapshot(Net(), new)["group.0.lr"] == 0.3
    for again in (new, same):
        state = again.state_dict()["param_groups"][0]
        start = case(Net().parameters()).state_dict()["param_groups"][0]
        for name in set(start) - {"params", "lr", "base_lr"}:
            assert (
                state[name] == start[name]
                if not isinstance(start[name], Tensor)
                else torch.equal(state[name], start[name])
            ), name


# ---- options that somebody changes in the param groups, as schedulers change lr

CHANGES: dict[str, list[Any]] = {
    "lr": [0.3],
    "weight_decay": [0.1],
    "initial_variance": [0.3],
    "initial_velocity_variance": [0.3],
    "initial_covariance": [0.05],
    "initial_measurement_noise": [2.0],
    "process_noise": [0.3, None],
    "measurement_noise": [0.3, None],
    "noise_decay": [0.5],
    "target_risk": ["absolute", "relative"],
    "blocks": ["global", "tensor"],
    "formulas": ["released", "paper"],
    "min_grad_norm": [1e9],
    "momentum": [0.5],
    "velocity_noise": [0.1],
    "symmetric": [False, True],
    "positive_semidefinite": [True, False],
    "beta": [0.5],
    "eps": [0.1],
    "sigma": [0.3],
    "warmup_steps": [9],
    "warmup_init_lr": [0.2],
    "decoupled_weight_decay": [True, False],
    "eps_scaling": ["literal", "released"],
    "maximize": [True],
}
PLACES = {"foreach", "fused", "differentiable"}  # these choose where the same numbers are computed
ACTS_WITH: dict[Any, dict[str, Any]] = {  # what an option needs to make a difference, or to be legal
    "noise_decay": {"measurement_noise": None},
    (KoalaV, "formulas"): {"process_noise": 0.1, "weight_decay": 0.1},
    (KoalaM, "formulas"): {"process_noise": None},
    "symmetric": {"positive_semidefinite": False},
    "positive_semidefinite": {"symmetric": True},
    "eps": {"sigma": 0.3},
    "eps_scaling": {"sigma": 0.3},
    "decoupled_weight_decay": {"weight_decay": 0.1},
}


def in_which_it_acts(case: Case, name: str, net: Net) -> Any:
    return case(two_halves(net), **ACTS_WITH.get((case.factory, name), ACTS_WITH.get(name, {})))


def two_halves(net: Net) -> list[dict[str, Any]]:
    return [{"params": [net.weight, net.bias]}, {"params": [net.out, net.scale, net.empty]}]


CHANGED = [
    (case, name, value)
    for case in CASES
    for name in case(Net().parameters()).defaults
    if name not in PLACES
    for value in CHANGES[name]
    if in_which_it_acts(case, name, Net()).defaults[name] != value
    if value is not None or name == "measurement_noise" or case.factory is KoalaM  # else there is no estimate
]


@pytest.mark.parametrize(("case", "name", "value"), CHANGED, ids=str)
def test_an_option_changed_in_the_groups_acts_or_is_refused(case: Case, name: str, value: Any) -> None:
    def run(*, change: bool) -> tuple[Tensor, Tensor]:
        net = Net()
        optimizer = in_which_it_acts(case, name, net)
        advance(net, optimizer, range(2))
        before = weights(net)
        for group in optimizer.param_groups if change else ():
            group[name] = value
        if change and name.startswith("initial_"):
            with pytest.raises(ValueError, match=f"{name} was changed from .* reads it in the constructor only") as e:
                advance(net, optimizer, [2])
            assert "\n" not in str(e.value)
            assert torch.equal(weights(net), before)
            for group in optimizer.param_groups:
                group[name] = optimizer.defaults[name]
        advance(net, optimizer, range(2, 5))
        return before, weights(net)

    (start, plain), (same, changed) = run(change=False), run(change=True)
    assert torch.equal(start, same)
    assert torch.equal(plain, changed) == name.startswith("initial_")


@each_case
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.1, "0.1", None, True])
@pytest.mark.parametrize("name", ["lr", "weight_decay"])
def test_a_rate_that_is_none_is_refused_and_moves_nothing(case: Case, name: str, value: Any) -> None:
    """As of a schedule that divides by zero."""
    net = Net()
    optimizer = case(two_halves(net))
    advance(net, optimizer, range(2))
    before = snapshot(net, optimizer)
    old, optimizer.param_groups[1][name] = optimizer.param_groups[1][name], value
    with pytest.raises((ValueError, TypeError), match=f"^{name} must be a .*number"):
        advance(net, optimizer, [2])
    optimizer.param_groups[1][name] = old
    assert_same(snapshot(net, optimizer), before)


@each_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_network_that_is_converted_takes_the_state_along(case: Case, dtype: torch.dtype) -> None:
    """As ``model.to(dtype)`` or ``model.to(device)`` after some steps, which know nothing of the optimizer."""
    net, optimizer = trained(case, 2)
    other = Net(dtype)
    expected = case(other.parameters())
    expected.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    other.load_state_dict(net.state_dict())
    net.to(dtype)
    advance(net, optimizer, range(2, 4))
    advance(other, expected, range(2, 4))
    assert_same(snapshot(net, optimizer), snapshot(other, expected))


@each_filter
def test_predict_in_inference_mode_is_refused(case: Case) -> None:
    """As from an unguarded hook in a framework's validation, before the first step even."""
    net = Net()
    optimizer = case(net.parameters())
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"inference_mode.*where torch.is_grad_enabled\(\)"):
        optimizer.predict()
    advance(net, optimizer, [0])


@each_filter
def test_an_option_changed_in_one_group_or_to_nonsense_is_refused(case: Case) -> None:
    net = Net()
    optimizer = case(two_halves(net))
    advance(net, optimizer, range(2))
    before = weights(net)
    for groups, value, message in (
        ([1], 0.5, "noise_decay=0.5 in a param group: Koala.* all of them have the same noise_decay .here 0.9"),
        ([0, 1], 1.5, "noise_decay must be a finite number >= 0 and < 1, got 1.5"),
    ):
        for i in groups:
            optimizer.param_groups[i]["noise_decay"] = value
        with pytest.raises(ValueError, match=message):
            advance(net, optimizer, [2])
        assert torch.equal(weights(net), before)
        for group in optimizer.param_groups:
            group["noise_decay"] = 0.9
    advance(net, optimizer, [2])
    assert not torch.equal(weights(net), before)


def test_a_changed_noise_is_the_one_in_the_filter() -> None:
    """By hand: P^ = P + Q, and R is the new one."""
    x = nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    optimizer = KoalaV([x], measurement_noise=1.0)
    optimizer.param_groups[0].update(process_noise=3.0, measurement_noise=2.0)
    optimizer.predict()
    assert optimizer.filter_state()["variance"] == pytest.approx(0.1 + 3.0)
    loss = (x**2 / 2).sum()
    loss.backward()
    optimizer.step(loss=loss)
    assert x.item() == pytest.approx(2 - 3.1 * 2 / (3.1 * 4 + 2) * 2)
    assert optimizer.filter_state() == pytest.approx(
        {"variance": 2 / (3.1 * 4 + 2) * 3.1, "process_noise": 3.0, "measurement_noise": 2.0}
    )


def test_apollo_forgets_a_direction_that_is_no_longer_kept() -> None:
    net = Net()
    optimizer = Apollo(net.parameters(), lr=0.5, sigma=1.0, weight_decay=0.02, decoupled_weight_decay=True)
    for k, decoupled in enumerate((True, False, True)):
        optimizer.param_groups[0]["decoupled_weight_decay"] = decoupled
        if k == 2:
            expected = [(s["mean"] / s["curvature"].abs().clamp(min=1.0)) for s in optimizer.state.values()]
            optimizer._initialise()
            for state, d in zip(optimizer.state.values(), expected, strict=True):
                assert torch.equal(state["direction"], d)
        advance(net, optimizer, [k])
        assert ("direction" in optimizer.state[net.weight]) == decoupled


# ---- states that do not fit


@each_case
@pytest.mark.parametrize("other", ["larger", "in another order"])
def test_a_state_of_other_shapes_is_refused_and_changes_nothing(case: Case, other: str) -> None:
    _, optimizer = trained(case, 2)
    saved, net = optimizer.state_dict(), Net()
    if other == "larger":
        net.weight = nn.Parameter(torch.ones(3, 5, dtype=torch.float64))
    params = list(net.parameters())
    again = case(params if other == "larger" else params[::-1])
    before = snapshot(net, again)
    if not saved["state"]:  # nothing is kept for a weight by itself
        again.load_state_dict(saved)
        return
    with pytest.raises(ValueError, match=r"this state_dict holds '\w+' of shape .* for a parameter of shape .*order"):
        again.load_state_dict(saved)
    assert_same(snapshot(net, again), before)


@each_case
def test_a_state_without_an_option_or_of_no_finite_filter_is_refused(case: Case) -> None:
    net, optimizer = trained(case, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["param_groups"][0]["weight_decay"]
    with pytest.raises(ValueError, match="a param group of this state_dict has no weight_decay: it was not saved by"):
        optimizer.load_state_dict(saved)
    if case.filters:
        saved = copy.deepcopy(optimizer.state_dict())
        saved["param_groups"][0]["filter"][0] = float("nan")
        with pytest.raises(ValueError, match=r"the filter in this state_dict of Koala\w+ is not finite"):
            optimizer.load_state_dict(saved)
    advance(net, optimizer, [2])


# ---- frozen weights


@each_case
def test_weights_frozen_in_mid_training_stay_and_do_not_count(case: Case) -> None:
    net, other = Net(), Net()
    optimizer, alone = case(net.parameters()), case(other.parameters())
    advance(net, optimizer, range(3))
    advance(other, alone, range(3))
    for of in (net, other):
        of.bias.requires_grad_(False)
        of.bias.grad = None
    alone.param_groups[0]["params"] = [p for p in other.parameters() if p is not other.bias]
    before = net.bias.detach().clone()
    advance(net, optimizer, range(3, 6))
    advance(other, alone, range(3, 6))
    assert torch.equal(net.bias, before)
    assert torch.equal(weights(net), weights(other))
    net.bias.requires_grad_(True)
    advance(net, optimizer, [6])
    assert not torch.equal(net.bias, before)


@each_case
def test_weights_frozen_from_the_start_are_as_if_they_were_not_there(case: Case) -> None:
    net, other = Net(), Net()
    for of in (net, other):
        of.weight.requires_grad_(False)
    optimizer = case(net.parameters())
    alone = case([p for p in other.parameters() if p.requires_grad])
    advance(net, optimizer, range(4))
    advance(other, alone, range(4))
    assert torch.equal(weights(net), weights(other))
    assert not kept(optimizer, net.weight)
    net.weight.requires_grad_(True)
    before = net.weight.detach().clone()
    advance(net, optimizer, range(4, 6))
    assert not torch.equal(net.weight, before)


# ---- micro-batches, however predict is called


def micro_step(net: nn.Module, optimizer: Any, k: int, order: str) -> None:
    """One step on a minibatch in three parts, with a hook's predict() before each forward pass."""
    parts = [slice(0, 2), slice(2, 4), slice(4, 6)]
    if order == "zero first":
        optimizer.zero_grad()
    for i, rows in enumerate(parts):
        optimizer.predict()
        losses = losses_of(net, k, rows=rows)
        optimizer.observe(losses)
        if order == "zero before backward" and i == 0:  # Lightning's order
            optimizer.zero_grad()
        (losses.mean() / len(parts)).backward()


@each_filter
@pytest.mark.parametrize("order", ["zero first", "zero before backward"])
def test_losses_of_micro_batches_add_up_however_often_predict_is_called(case: Case, order: str) -> None:
    net, whole = Net(), Net()
    optimizer, other = case(net.parameters()), case(whole.parameters())
    for k in range(4):
        micro_step(net, optimizer, k, order)
        optimizer.step()
    advance(whole, other, range(4))
    assert torch.allclose(weights(net), weights(whole), rtol=1e-12, atol=1e-12)
    assert optimizer.filter_state() == pytest.approx(other.filter_state(), rel=1e-9, abs=1e-12)


@each_filter
@pytest.mark.parametrize("order", ["zero first", "zero before backward"])
@pytest.mark.parametrize("to_none", [True, False])
def test_a_step_that_a_scaler_skipped_is_repeated(case: Case, order: str, to_none: bool) -> None:
    net, plain = Net(), Net()
    optimizer, other = case(net.parameters()), case(plain.parameters())
    clear = optimizer.zero_grad
    optimizer.zero_grad = lambda: clear(set_to_none=to_none)
    for k in range(4):
        if k == 2:
            micro_step(net, optimizer, 77, order)  # and no step: its gradients overflowed
        micro_step(net, optimizer, k, order)
        optimizer.step()
    advance(plain, other, range(4))
    assert torch.allclose(weights(net), weights(plain), rtol=1e-12, atol=1e-12)


@each_filter
def test_losses_whose_gradients_somebody_else_cleared_do_not_count(case: Case) -> None:
    """As ``model.zero_grad()`` does between ``predict`` and the forward pass, after a step that a scaler skipped."""
    net, plain = Net(), Net()
    optimizer, other = case(net.parameters()), case(plain.parameters())
    for k in range(3):
        for j in [77, k] if k == 1 else [k]:
            optimizer.predict()
            net.zero_grad()
            losses = losses_of(net, j)
            optimizer.observe(losses)
            losses.mean().backward()
        optimizer.step()
    advance(plain, other, range(3))
    assert torch.equal(weights(net), weights(plain))
    assert optimizer.filter_state() == other.filter_state()


# ---- closures of frameworks


@each_filter
def test_a_closure_that_returns_nothing_is_a_bare_step_after_observe(case: Case) -> None:
    net, plain = Net(), Net()
    optimizer, other = case(net.parameters()), case(plain.parameters())
    for k in range(3):
        optimizer.predict()
        losses = evaluate(net, optimizer, k)
        if k == 1:
            optimizer.step(lambda: None, loss=losses)
        else:
            optimizer.observe(losses)
            optimizer.step(lambda: None)
    advance(plain, other, range(3))
    assert torch.equal(weights(net), weights(plain))


@each_filter
def test_a_closure_that_skips_its_batch_is_a_step_without_observation(case: Case) -> None:
    """As Lightning's closure does where ``training_step`` returns None: gradients are cleared, there is no loss."""
    net = Net()
    optimizer = case(net.parameters())
    advance(net, optimizer, range(2))
    assert optimizer.step(lambda: optimizer.zero_grad()) is None
    assert optimizer.skipped_steps == 1
    advance(net, optimizer, [2])
    assert optimizer.skipped_steps == 1

    def forgets_to_return() -> None:
        evaluate(net, optimizer, 3)

    with pytest.raises(TypeError, match="closure must return the losses, got None"):
        optimizer.step(forgets_to_return)


@each_filter
@pytest.mark.parametrize(
    "wrap",
    [lambda x: (x, x), lambda x: {"loss": x}, lambda x: [x], lambda x: x.detach().numpy()],
    ids=["tuple", "dict", "list", "ndarray"],
)
def test_a_closure_that_returns_a_collection_is_told_so_in_a_line(case: Case, wrap: Callable[[Tensor], Any]) -> None:
    net = Net()
    optimizer = case(net.parameters())
    with pytest.raises(
        TypeError, match=r"losses must be a tensor or a float, got a (tuple|dict|list|ndarray)"
    ) as error:
        optimizer.step(lambda: wrap(evaluate(net, optimizer, 0)))
    assert len(str(error.value)) < 70


@each_filter
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_losses_that_a_closure_observes_count_and_not_what_it_returns(case: Case, scale: float) -> None:
    """As in Lightning, which returns the loss divided by the number of micro-batches, and skorch, which validates."""
    net, plain = Net(), Net()
    optimizer, other = case(net.parameters()), case(plain.parameters())

    def closure(k: int) -> Tensor:
        losses = losses_of(net, k)
        optimizer.observe(losses)
        optimizer.zero_grad()
        losses.mean().backward()
        return losses.mean() * scale

    for k in range(3):
        optimizer.step(partial(closure, k))
    advance(plain, other, range(3))
    assert torch.equal(weights(net), weights(plain))
    assert optimizer.filter_state() == other.filter_state()


@each_filter
@pytest.mark.parametrize("clears", [True, False])
def test_micro_batches_before_a_closure_count_unless_it_clears_their_gradients(case: Case, clears: bool) -> None:
    net, plain = Net(), Net()
    optimizer, other = case(net.parameters()), case(plain.parameters())
    parts = [slice(3, 6)] if clears else [slice(0, 3), slice(3, 6)]

    def part(of: Net, by: Any, rows: slice, k: int) -> Tensor:
        losses = losses_of(of, k, rows=rows)
        by.observe(losses)
        losses.sum().backward()
        return losses.mean()

    def closure(k: int) -> Tensor:
        if clears:
            optimizer.zero_grad()
        return part(net, optimizer, slice(3, 6), k)

    for k in range(3):
        optimizer.zero_grad()
        optimizer.predict()
        part(net, optimizer, slice(0, 3), k)
        optimizer.step(partial(closure, k))
        other.zero_grad()
        other.predict()
        for rows in parts:
            part(plain, other, rows, k)
        other.step()
    assert torch.equal(weights(net), weights(plain))
    assert optimizer.filter_state() == other.filter_state()


# ---- wrappers that act for an optimizer


class Wrapper:
    """As Lightning's and Fabric's: a subclass of the optimizer's class that asks it for the attributes it lacks."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        self.__class__ = type("Wrapped", (Wrapper, type(optimizer)), {})

    def step(self) -> None:
        self.optimizer.step()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.optimizer, name)


@each_filter
def test_a_wrapper_that_borrows_the_methods_shares_what_they_note(case: Case) -> None:
    net, plain = Net(), Net()
    optimizer, other = Wrapper(case(net.parameters())), case(plain.parameters())
    for k in range(3):
        optimizer.predict()
        optimizer.observe(evaluate(net, optimizer, k))
        optimizer.step()
    advance(plain, other, range(3))
    assert torch.equal(weights(net), weights(plain))
    assert optimizer.filter_state() == other.filter_state()


# ---- negative losses


@each_filter
def test_negative_mean_losses_are_counted(case: Case) -> None:
    net = Net()
    optimizer = case(net.parameters())
    for k, shift in enumerate((0.0, 50.0, 50.0, 0.0)):
        optimizer.step(lambda k=k, shift=shift: evaluate(net, optimizer, k) - shift)
    assert optimizer.negative_losses == 2
    again = case(Net().parameters())
    again.load_state_dict(optimizer.state_dict())
    assert again.negative_losses == 2


# ---- many groups


@pytest.mark.parametrize("make", [KoalaV, KoalaM, KoalaPlusPlus, Apollo])
def test_groups_with_equal_options_are_stepped_together(make: Any) -> None:
    params = [nn.Parameter(torch.ones(2)) for _ in range(40)]
    optimizer = make([{"params": [p]} for p in params])
    for p in params:
        p.grad = torch.ones(2)
    from koala_lib.optim._engine.passes import Passes

    optimizer._initialise()
    assert len(Passes(optimizer, (), with_gradient=True).buckets) == 1
    optimizer.param_groups[20]["lr"] = 0.5
    assert len(Passes(optimizer, (), with_gradient=True).buckets) == 2


@each_case
def test_a_step_prints_no_weights(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Options are compared as text between groups; the weights, whose text is long and waits for a device, are not."""
    net = Net()
    first, *rest = net.parameters()
    optimizer = case([{"params": [first], "lr": 0.5}, {"params": rest}])

    def printed(tensor: Tensor, **options: Any) -> str:
        raise AssertionError("a tensor is printed")

    monkeypatch.setattr(Tensor, "__repr__", printed)
    monkeypatch.setattr(nn.Parameter, "__repr__", printed)
    advance(net, optimizer, range(2))


# ---- copies


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
def test_a_copy_keeps_its_process_group() -> None:
    optimizer = KoalaM([nn.Parameter(torch.ones(2))], process_group=dist.group.WORLD)
    assert copy.deepcopy(optimizer)._process_group is dist.group.WORLD


@pytest.mark.usefixtures("one_rank")
def test_a_wrapper_that_borrows_the_methods_has_the_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net()
    optimizer = Wrapper(KoalaM(net.parameters(), process_group=dist.group.WORLD))
    assert optimizer._process_group is dist.group.WORLD
    monkeypatch.setattr(dist, "get_world_size", lambda *_: 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.predict()


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("make", [KoalaV, KoalaM, KoalaPlusPlus, Apollo])
def test_wrappers_that_take_weights_apart_are_refused(make: Any) -> None:
    whole = ZeroRedundancyOptimizer if make is not Apollo else None
    for flat in (True, False):
        net = FullyShardedDataParallel(nn.Linear(3, 2), use_orig_params=not flat, device_id=torch.device("cpu"))
        with pytest.raises(TypeError, match=r"FSDP1.*use torch.distributed.fsdp.fully_shard"):
            make(net.parameters())
    if whole is not None:
        with pytest.raises(TypeError, match=r"ZeroRedundancyOptimizer.*use torch.distributed.fsdp.fully_shard"):
            whole(nn.Linear(3, 2).parameters(), optimizer_class=make)


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("told", [None, False, "group"])
def test_several_ranks_without_a_group_are_warned_once(told: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net()
    optimizer = KoalaM(net.parameters(), process_group=dist.group.WORLD if told == "group" else told)
    monkeypatch.setattr(dist, "get_world_size", lambda *_: 2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        advance(net, optimizer, range(3))
    found = [str(w.message) for w in caught if "process_group" in str(w.message)]
    assert len(found) == (told is None)
    assert not found or "KoalaM runs on 2 ranks without a process_group" in found[0]


def test_one_process_needs_no_group() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net = Net()
        advance(net, KoalaM(net.parameters()), [0])
