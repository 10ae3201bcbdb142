"""What everybody expects of a torch.optim.Optimizer, for every optimizer in `optimizers.CASES`."""

import copy
import io
import pickle
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import SGD, Optimizer, lr_scheduler

from koala_lib import Apollo, KoalaM, KoalaV
from tests.support.cases import (
    FILTERS,
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

STEPS = 9


def through_a_file(saved: Any) -> Any:
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def two_groups(net: Net) -> list[dict[str, Any]]:
    return [
        {"params": [net.weight, net.bias], "lr": 0.7},
        {"params": [net.out, net.scale, net.empty], "lr": 0.4, "weight_decay": 0.03},
    ]


# --- resuming ---------------------------------------------------------------------------------------------


def restart(case: Case, net: Net, optimizer: Any, way: str) -> tuple[Net, Any]:
    if way == "pickle":
        return pickle.loads(pickle.dumps((net, optimizer)))
    if way == "deepcopy":
        return copy.deepcopy((net, optimizer))
    saved = through_a_file({"net": net.state_dict(), "optimizer": optimizer.state_dict()})
    net = Net(seed=1)
    optimizer = case(net.parameters())
    if way == "into a used one":
        advance(net, optimizer, range(20, 23))
    net.load_state_dict(saved["net"])
    optimizer.load_state_dict(saved["optimizer"])
    return net, optimizer


@pytest.mark.parametrize("pending", [False, True], ids=["", "predicted"])
@pytest.mark.parametrize("way", ["into a fresh one", "into a used one", "pickle", "deepcopy"])
@each_case
def test_resume_is_bitwise(case: Case, way: str, pending: bool) -> None:
    if pending and not case.filters:
        pytest.skip("has no predict()")
    stop = random.Random(f"{case}{way}").randrange(2, STEPS - 1)
    net, optimizer = trained(case, 1)
    optimizer.step(lambda: evaluate(net, optimizer, 1) * torch.nan)
    advance(net, optimizer, range(2, stop))
    if pending:
        optimizer.predict()
    again, resumed = restart(case, net, optimizer, way)
    assert_same(snapshot(again, resumed), snapshot(net, optimizer))
    assert again.weight is not net.weight

    advance(net, optimizer, range(stop, STEPS))
    advance(again, resumed, range(stop, STEPS))
    assert_same(snapshot(again, resumed), snapshot(net, optimizer))
    if case.filters:
        assert resumed.skipped_steps == 1


@each_case
def test_loading_into_another_dtype(case: Case) -> None:
    net, optimizer = trained(case, 4)
    small = Net(torch.float32)
    loaded = case(small.parameters())
    loaded.load_state_dict(through_a_file(optimizer.state_dict()))
    small.load_state_dict(net.state_dict())
    for p in small.parameters():
        assert {name: value.dtype for name, value in kept(loaded, p).items()} == dict.fromkeys(case.state, p.dtype)
    if case.filters:  # the filter keeps its 64 bits
        torch.testing.assert_close(
            loaded.param_groups[0]["filter"], optimizer.param_groups[0]["filter"], rtol=0, atol=0
        )
    advance(small, loaded, range(4, STEPS))
    advance(net, optimizer, range(4, STEPS))
    torch.testing.assert_close(weights(small), weights(net), rtol=0, atol=1e-6)


def double(*values: Any) -> list[Tensor]:
    return [torch.tensor(value, dtype=torch.float64) for value in values]


OLD_FILTER = {
    "blocks": "tensor", "foreach": None, "formulas": "paper", "fused": None, "initial_measurement_noise": 1.0,
    "initial_variance": 0.1, "lr": 1.0, "measurement_noise": None, "min_grad_norm": 1e-9, "noise_decay": 0.9,
    "params": [0, 1], "predicted": True, "target_risk": "relative",
}  # fmt: skip
OLD_APOLLO = {
    "base_lr": 0.1, "beta": 0.9, "decoupled_weight_decay": False, "eps": 1e-4, "eps_scaling": "released",
    "foreach": None, "fused": None, "lr": 0.1, "maximize": False, "params": [0, 1], "sigma": 0.2,
    "warmup_init_lr": None, "warmup_steps": 2, "weight_decay": 0.0,
}  # fmt: skip
# What version 0.1.0 saved after three steps (and a prediction): optimizer, its options, the group, filter, the state
# of both tensors, the weights, and those to which it then came.
OLD_STATES: list[tuple[Any, ...]] = [
    (KoalaV, {"weight_decay": 0.02}, OLD_FILTER | {"process_noise": 1.0, "weight_decay": 0.02},
     [1.50466678960033895, 1.0, 1.61725206699378643, 0.0], {},
     ([0.6625084405711049, -0.151483849394572], 0.1655949955175549),
     ([0.18515512473783352, 0.15135320043513786], 0.164477198331613)),
    (KoalaM, {}, OLD_FILTER | {"initial_covariance": 0.0, "initial_velocity_variance": 0.1, "momentum": 0.9,
                               "process_noise": None, "velocity_noise": 0.01, "weight_decay": 0.0},
     [1.0480806456930698, 0.09329158414670242, 0.04711608228182659, 0.52298861275029618, 1.6336701262985418, 0.0],
     {"average": ([1.76365935152567799, -0.84960140551634056], 0.4280833013663814),
      "velocity": ([-0.22454638413181077, 0.14289315353842505], -0.06183278211138685)},
     ([0.482523387900492, -0.03433306502758582], 0.08791208998776054),
     ([0.09247625414799901, 0.21387874736036427], 0.16683151514369018)),
    (Apollo, {"lr": 0.1, "sigma": 0.2, "warmup_steps": 2}, OLD_APOLLO, [],
     {"curvature": ([0.03346494439508181, 0.01355191963106619], 0.02770706315817462),
      "mean": ([2.36778873780102916, -1.50677465132792765], 0.43050704323655076)},
     ([0.12681478406001181, 0.19202695559817434], 0.15942086982909304),
     ([-1.1726848747181957, 1.018981283911579], -0.07685179540330832)),
]  # fmt: skip


@pytest.mark.parametrize(("cls", "options", "group", "values", "state", "start", "end"), OLD_STATES)
def test_a_state_of_version_0_1_goes_on(
    cls: Any, options: Any, group: Any, values: Any, state: Any, start: Any, end: Any
) -> None:
    params = [nn.Parameter(t) for t in double(*start)]
    optimizer = cls(params, **options)
    kept: dict[int, Any] = {i: {} for i in range(2)} if state else {}
    for name, tensors in state.items():
        for i, t in enumerate(double(*tensors)):
            kept[i][name] = t
            if cls is Apollo:
                kept[i]["step"] = torch.tensor(3.0)
    if values:
        group = group | {"filter": double(values)[0]}
    optimizer.load_state_dict(copy.deepcopy({"param_groups": [group], "state": kept}))
    for k in range(3 if values else 2):
        if values:
            optimizer.predict()
        for p in params:
            p.grad = p.detach() * 1.5 - 0.25
        if values and k == 0:
            optimizer.step(loss=torch.tensor([0.5, 0.7], dtype=torch.float64))
        elif values:
            loss = sum((p.detach() ** 2).sum() for p in params) / 2
            optimizer.step(loss=loss + torch.tensor([0.1, 0.2, 0.4], dtype=torch.float64))
        else:
            optimizer.step()
    for p, expected in zip(params, double(*end), strict=True):
        torch.testing.assert_close(p.detach(), expected, rtol=1e-13, atol=1e-13)


@each_filter
def test_a_state_of_another_optimizer_is_refused(case: Case) -> None:
    net, optimizer = trained(case, 3)
    before = snapshot(net, optimizer)
    others = {c.factory: c for c in FILTERS if c.factory is not case.factory}.values()
    for stranger in (SGD(net.parameters(), lr=0.1), *(other(net.parameters()) for other in others)):
        name = case.factory.__name__  # two filters can have equally many scalars, but not the same options
        with pytest.raises(ValueError, match=rf"no filter of {name}.*another optimizer|it was not saved by {name}"):
            optimizer.load_state_dict(stranger.state_dict())
    assert_same(snapshot(net, optimizer), before)


@each_filter
def test_a_filter_that_comes_in_float32_copies_is_one_in_float64_again(case: Case) -> None:
    """As from a device without float64, through something that copied the groups one by one."""
    net = Net()
    optimizer = case(two_groups(net))
    advance(net, optimizer, range(2))
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        group["filter"] = group["filter"].float()
    optimizer.load_state_dict(saved)
    first, second = (group["filter"] for group in optimizer.param_groups)
    assert first is second
    assert first.dtype == torch.float64


@each_case
def test_a_state_can_be_loaded_again_and_again(case: Case) -> None:
    net, optimizer = trained(case, 2)
    before = snapshot(net, optimizer)
    for _ in range(3):
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert_same(snapshot(net, optimizer), before)


@each_filter
def test_loading_drops_a_pending_observation(case: Case) -> None:
    net, optimizer = trained(case, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.predict()
    optimizer.observe(evaluate(net, optimizer, 2))
    optimizer.load_state_dict(saved)
    with pytest.raises(RuntimeError, match="needs the losses"):
        optimizer.step()


@pytest.mark.parametrize("flatten", [False, True], ids=["nested", "flat"])
@each_case
def test_distributed_checkpoint(case: Case, flatten: bool) -> None:
    """Keys by parameter name; the groups may be built in another order."""
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    net = Net()
    optimizer = case(two_groups(net))
    start = weights(net)
    get_optimizer_state_dict(net, optimizer, options=options)  # makes a bare step() at lr = 0
    assert torch.equal(weights(net), start)
    assert [group["lr"] for group in optimizer.param_groups] == [0.7, 0.4]
    assert all(kept(optimizer, p).keys() == case.state for p in net.parameters())

    advance(net, optimizer, range(4))
    saved = through_a_file(get_optimizer_state_dict(net, optimizer, options=options))
    again = Net(seed=1)
    # The nested form has no parameter names where there is no state, so it keeps the order of the groups.
    resumed = case(two_groups(again)[:: -1 if flatten or case.state else 1])
    set_optimizer_state_dict(again, resumed, saved, options=options)
    again.load_state_dict(net.state_dict())
    advance(net, optimizer, range(4, STEPS))
    advance(again, resumed, range(4, STEPS))
    for group in resumed.param_groups:
        assert group["lr"] == (0.7 if any(p is again.weight for p in group["params"]) else 0.4)
    # Norms are added up in another order.
    torch.testing.assert_close(weights(again), weights(net), rtol=0, atol=1e-13)


@each_filter
def test_a_bare_step_at_lr_0_creates_the_state_and_moves_nothing(case: Case) -> None:
    net = Net()
    optimizer = case(net.parameters(), lr=0.0)
    before, noise = weights(net), optimizer.filter_state()
    evaluate(net, optimizer, 0)
    assert optimizer.step() is None
    assert torch.equal(weights(net), before)
    assert optimizer.filter_state() == noise
    assert all(kept(optimizer, p).keys() == case.state for p in net.parameters())


# --- param groups -----------------------------------------------------------------------------------------


@each_case
def test_two_groups_are_one_group(case: Case) -> None:
    net, optimizer = trained(case, STEPS)
    split = Net()
    groups = [{"params": group["params"]} for group in two_groups(split)]
    optimizer_of_two = case(groups)
    advance(split, optimizer_of_two, range(STEPS))
    torch.testing.assert_close(weights(split), weights(net), rtol=0, atol=1e-13)
    if case.filters:
        assert optimizer_of_two.filter_state() == pytest.approx(optimizer.filter_state(), rel=1e-12)


@pytest.mark.parametrize("pending", [False, True], ids=["", "predicted"])
@each_case
def test_a_group_added_later(case: Case, pending: bool) -> None:
    """It is as if its parameters had always been there without a gradient (n of the process noise aside)."""
    if pending and not case.filters:
        pytest.skip("has no predict()")

    def run(late: bool) -> tuple[Tensor, Any]:
        net = Net()
        first, second = two_groups(net)
        optimizer = case([first] if late else [first, second])

        def without_the_second() -> Tensor:
            losses = evaluate(net, optimizer, 0)
            for p in second["params"]:
                p.grad = None
            return losses

        for _ in range(3):
            optimizer.step(without_the_second)
        if pending:
            optimizer.predict()
        if late:
            optimizer.add_param_group(second)
        advance(net, optimizer, range(3, STEPS))
        return weights(net), optimizer

    late, optimizer = run(late=True)
    assert [group["lr"] for group in optimizer.param_groups] == [0.7, 0.4]
    assert not torch.equal(late, weights(Net()))
    if case.filters:
        first, second = optimizer.param_groups
        assert first["filter"] is second["filter"]
    if "average" not in case.state:
        assert torch.equal(late, run(late=False)[0])


@each_case
def test_lr_and_weight_decay_belong_to_the_group(case: Case) -> None:
    def run(**second: float) -> Net:
        net = Net()
        optimizer = case([{"params": [net.weight]}, {"params": [net.bias, net.out, net.scale, net.empty], **second}])
        advance(net, optimizer, range(2))
        return net

    assert torch.equal(run(lr=0.0).bias, Net().bias)
    assert not torch.equal(run(lr=0.0).weight, Net().weight)
    assert not torch.equal(run(weight_decay=0.3).bias, run().bias)
    with pytest.raises(ValueError, match="lr must be"):
        run(lr=-1.0)
    with pytest.raises(ValueError, match="weight_decay must be"):
        run(weight_decay=-1.0)


@each_filter
def test_another_option_in_a_group_is_refused(case: Case) -> None:
    net = Net()
    optimizer = case([net.weight])
    with pytest.raises(ValueError, match=r"noise_decay=0\.5 in a param group.*lr, weight_decay"):
        optimizer.add_param_group({"params": [net.bias], "noise_decay": 0.5})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [net.bias], "noise_decay": 0.9})
    assert len(optimizer.param_groups) == 2


@each_case
def test_named_parameters(case: Case) -> None:
    net = Net()
    optimizer = case(net.named_parameters())
    advance(net, optimizer, range(3))
    assert torch.equal(weights(net), weights(trained(case, 3)[0]))
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == [name for name, _ in net.named_parameters()]


@each_case
def test_numbers_of_numpy_are_saved_as_numbers(case: Case) -> None:
    numpy = pytest.importorskip("numpy")
    net = Net()
    optimizer = case(net.parameters(), lr=numpy.float64(0.25), weight_decay=numpy.float32(0.5))
    (group,) = through_a_file(optimizer.state_dict())["param_groups"]
    assert (group["lr"], group["weight_decay"]) == (0.25, 0.5)


# --- learning rates ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (1,)])
@each_case
def test_lr_as_a_tensor(case: Case, shape: tuple[int, ...]) -> None:
    lr = torch.full(shape, 0.3, dtype=torch.float64)
    net, optimizer = trained(case, STEPS, lr=lr)
    assert optimizer.param_groups[0]["lr"] is lr
    assert float(lr) == 0.3
    assert torch.equal(weights(net), weights(trained(case, STEPS, lr=0.3)[0]))


SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3, gamma=0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5], gamma=0.1),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.5, total_steps=STEPS + 1, cycle_momentum=False),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=4), lr_scheduler.ExponentialLR(o, 0.7)], milestones=[4]
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@each_case
def test_schedulers_act_through_lr(case: Case, name: str) -> None:
    def rates(optimizer: Optimizer, step: Callable[[int], Any]) -> list[float]:
        scheduler = SCHEDULERS[name](optimizer)
        seen = []
        for k in range(STEPS):
            seen.append(float(optimizer.param_groups[0]["lr"]))
            step(k)
            scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
        return seen

    net, by_hand = Net(), Net()
    optimizer = case(net.parameters())
    seen = rates(optimizer, lambda k: advance(net, optimizer, [k]))
    expected_of = SGD([torch.nn.Parameter(torch.ones(()))], lr=case(by_hand.parameters()).defaults["lr"])
    assert seen == rates(expected_of, lambda k: expected_of.step())
    assert len(set(seen)) > 1

    optimizer = case(by_hand.parameters())
    for k, lr in enumerate(seen):
        optimizer.param_groups[0]["lr"] = lr
        advance(by_hand, optimizer, [k])
    assert torch.equal(weights(net), weights(by_hand))


# --- gradients: scaled, clipped, missing, frozen, cleared ---------------------------------------------------


@each_filter
def test_gradient_scaler_with_a_skipped_step(case: Case) -> None:
    net = Net()
    optimizer = case(net.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)

    def step(k: int, overflow: bool = False) -> None:
        optimizer.predict()
        optimizer.zero_grad()
        losses = losses_of(net, k)
        scaler.scale(losses.mean()).backward()
        if overflow:
            net.out.grad[0] = torch.inf
        scaler.step(optimizer, loss=losses)
        scaler.update()

    for k in range(STEPS):
        if k == 3:
            optimizer.predict()
            before = snapshot(net, optimizer)
            step(k, overflow=True)
            assert_same(snapshot(net, optimizer), before)
            assert scaler.get_scale() == 2.0**11
        step(k)
    assert torch.equal(weights(net), weights(trained(case, STEPS)[0]))  # scales are powers of two
    assert optimizer.skipped_steps == 0


@each_case
def test_clipped_gradients_are_the_ones_used(case: Case) -> None:
    def run(clip: Callable[[Net], Any]) -> Tensor:
        net = Net()
        optimizer = case(net.parameters())

        def closure() -> Tensor:
            losses = evaluate(net, optimizer, 0)
            clip(net)
            return losses

        for _ in range(3):
            optimizer.step(closure)
        return weights(net)

    def by_hand(net: Net) -> None:
        for p in net.parameters():
            p.grad = p.grad * 0.25

    def with_torch(net: Net) -> None:
        norm = torch.cat([p.grad.reshape(-1) for p in net.parameters()]).norm()
        assert float(nn.utils.clip_grad_norm_(net.parameters(), float(norm) / 4)) == pytest.approx(float(norm))

    torch.testing.assert_close(run(with_torch), run(by_hand), rtol=1e-4, atol=0)
    assert (run(by_hand) - run(lambda net: None)).abs().max() > 1e-3


@each_case
def test_hooks(case: Case) -> None:
    net, calls = Net(), []
    optimizer = case(net.parameters())
    optimizer.register_step_pre_hook(lambda o, args, kwargs: calls.append("before"))
    optimizer.register_step_post_hook(lambda o, args, kwargs: calls.append("after"))
    optimizer.register_state_dict_pre_hook(lambda o: calls.append("save"))
    optimizer.register_state_dict_post_hook(lambda o, saved: {**saved, "extra": 1})
    optimizer.register_load_state_dict_pre_hook(lambda o, saved: saved.pop("extra") and None)
    optimizer.register_load_state_dict_post_hook(lambda o: calls.append("loaded"))
    advance(net, optimizer, [0])
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["before", "after", "save", "loaded"]


@each_case
def test_zero_grad(case: Case) -> None:
    for to_none in (True, False):
        net, optimizer = trained(case, 2)
        optimizer.zero_grad(set_to_none=to_none)
        assert [p.grad is None for p in net.parameters()] == [to_none] * 5
        assert to_none or not any(p.grad.any() for p in net.parameters())
        advance(net, optimizer, range(2, 5))
        assert torch.equal(weights(net), weights(trained(case, 5)[0]))


@each_case
def test_a_frozen_parameter_stays(case: Case) -> None:
    net = Net()
    net.bias.requires_grad_(False)
    optimizer = case(net.parameters())
    advance(net, optimizer, range(4))
    assert torch.equal(net.bias, Net().bias)
    assert not torch.equal(net.weight, Net().weight)


@each_case
def test_no_gradient_no_correction(case: Case) -> None:
    """A parameter without gradient keeps its place, or coasts on; with none at all, nothing was observed."""
    net, optimizer = trained(case, 3)
    velocity = optimizer.state[net.out].get("velocity", torch.zeros(4)).clone()
    before = net.out.detach().clone()

    def closure(names: list[str]) -> Tensor:
        losses = evaluate(net, optimizer, 3)
        for name in names:
            net.get_parameter(name).grad = None
        return losses

    optimizer.step(lambda: closure(["out"]))
    assert torch.equal(net.out, before + velocity)
    everything = [name for name, _ in net.named_parameters()]
    before = {name: p.detach() + optimizer.state[p].get("velocity", 0) for name, p in net.named_parameters()}
    optimizer.step(lambda: closure(everything))
    assert_same(dict(net.state_dict()), before)
    if case.filters:
        assert optimizer.skipped_steps == 1
    advance(net, optimizer, [5])
    assert not torch.equal(net.out, before["out"])


@pytest.mark.parametrize("factor", [1.0, 1e-12, torch.inf], ids=["", "tiny", "infinite"])
@each_case
def test_gradients_are_left_alone(case: Case, factor: float) -> None:
    net, optimizer = trained(case, 2, weight_decay=0.1)
    kept: list[tuple[Tensor, Tensor]] = []

    def closure() -> Tensor:
        losses = evaluate(net, optimizer, 2)
        for p in net.parameters():
            p.grad.mul_(factor)
            kept.append((p.grad, p.grad.clone()))
        return losses

    optimizer.step(closure)
    for p, (gradient, copied) in zip(net.parameters(), kept, strict=True):
        assert p.grad is gradient
        torch.testing.assert_close(gradient, copied, rtol=0, atol=0, equal_nan=True)


def test_sparse_gradients_are_refused_and_nothing_is_lost() -> None:
    table = nn.Embedding(5, 3, sparse=True, dtype=torch.float64)
    dense = nn.Embedding(5, 3, dtype=torch.float64)
    for case in FILTERS:
        torch.manual_seed(0)
        nn.init.normal_(table.weight)
        dense.load_state_dict(table.state_dict())
        bias, same_bias = (nn.Parameter(torch.zeros(3, dtype=torch.float64)) for _ in range(2))
        optimizer, expected = case([bias, *table.parameters()]), case([same_bias, *dense.parameters()])
        for net, b, o in ((table, bias, optimizer), (dense, same_bias, expected)):
            o.zero_grad()
            o.predict()
            losses = (net(torch.tensor([0, 3])) - b - 1).square().sum(1)
            losses.mean().backward()
            if net is table:
                with pytest.raises(RuntimeError, match=r"sparse gradients \(parameter of shape \(5, 3\)\)"):
                    o.step(loss=losses)
                table.weight.grad = table.weight.grad.to_dense()
            o.step(loss=losses)
        assert torch.equal(table.weight, dense.weight)
        assert torch.equal(bias, same_bias)
        assert optimizer.filter_state() == expected.filter_state()


@each_case
def test_parameters_that_are_not_real_are_refused(case: Case) -> None:
    for bad in (torch.ones(2, dtype=torch.complex64), torch.ones(2, dtype=torch.int64)):
        with pytest.raises(TypeError, match=f"needs real floating-point parameters, got {bad.dtype}"):
            case([bad])


STRIDES: dict[str, Callable[[Tensor], Tensor]] = {
    "channels_last": lambda t: t.to(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(0, 3).contiguous().transpose(0, 3),
    "every other": lambda t: torch.stack([t, t], -1).reshape(*t.shape[:3], -1)[..., ::2],
}


@pytest.mark.parametrize("layout", STRIDES)
@each_case
def test_strides_do_not_matter(case: Case, layout: str) -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64)
    plain, strided = nn.Parameter(start.clone()), nn.Parameter(STRIDES[layout](start))
    assert not strided.is_contiguous()
    optimizers = case([plain]), case([strided])
    for k in range(4):
        gradient = torch.randn(start.shape, generator=generator, dtype=torch.float64)
        plain.grad, strided.grad = gradient, STRIDES[layout](gradient)
        if k == 3:  # memory that overlaps itself
            plain.grad, strided.grad = torch.ones_like(plain), torch.ones((), dtype=torch.float64).expand_as(strided)
        for optimizer in optimizers:
            optimizer.step(lambda k=k: torch.tensor(k + 1.0, dtype=torch.float64))
    torch.testing.assert_close(strided.detach(), plain.detach(), rtol=1e-12, atol=1e-12)
    stride = {name: value.stride() for name, value in kept(optimizers[1], strided).items()}
    dense = layout != "every other"  # preserve_format keeps the strides of dense tensors
    assert stride == dict.fromkeys(case.state, strided.stride()) or not dense
