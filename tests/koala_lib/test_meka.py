"""MEKA: the optimizer against its slow twin with full matrices, its state, and what it makes of bad input."""

from __future__ import annotations

import copy
import inspect
import io
import itertools
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from koala_lab.baselines.meka_variants import MekaPreviousHessian, MekaWithoutModelError
from koala_lab.theory import problems
from koala_lib.moments import sample_moments
from koala_lib.optim import meka
from koala_lib.optim._engine.lists import dot
from koala_lib.optim.meka import Meka
from koala_lib.reference.meka import ReferenceMeka

F64 = torch.float64
RULES = ["constant", "quadratic", "pi", "ei"]
EVERY = {"variance", "process_noise", "measurement_noise", "gain", "value", "value_variance", "value_noise"}
EVERY |= {"model_error", "step_size"}
OF_RULES = {"slope", "curvature", "step_size_optimum"}


class Net(nn.Module):
    """3 -> 3 -> 1 without symmetric units; small enough for a twin that takes one sample after the other."""

    def __init__(self, dtype: torch.dtype = F64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in {"weight": (3, 3), "bias": (3,), "out": (3,), "scale": ()}.items():
            value = torch.randn(shape, generator=generator, dtype=F64) / 2
            self.register_parameter(name, nn.Parameter(value.to(dtype)))

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.tanh(inputs @ self.weight + self.bias) @ self.out + self.scale


def squared(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets) ** 2 / 2


def batch(k: int, size: int = 5, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 + k)
    inputs = torch.randn(size, 3, generator=generator, dtype=F64)
    noise = torch.randn(size, generator=generator, dtype=F64)
    return inputs.to(dtype), (torch.sin(inputs.sum(1)) + 0.3 * noise).to(dtype)


def weights(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().double().reshape(-1) for p in net.parameters()])


def advance(net: nn.Module, optimizer: Meka, steps: range, dtype: torch.dtype = F64) -> Tensor:
    for k in steps:
        optimizer.step(*batch(k, dtype=dtype))
    return weights(net)


def slow_loss(theta: Tensor, sample: tuple[Tensor, Tensor]) -> Tensor:
    """The loss of Net on one sample as a function of all weights."""
    (x, y), (W, b, out, scale) = sample, torch.split(theta, [9, 3, 3, 1])
    return (torch.tanh(x @ W.view(3, 3) + b) @ out + scale[0] - y) ** 2 / 2


def symbols(twin: ReferenceMeka) -> dict[str, float]:
    """`filter_state()` of a twin whose matrices are multiples of the identity."""
    state = {
        "variance": float(twin.P[0, 0]),
        "process_noise": float(twin.Q[0, 0]),
        "measurement_noise": float(twin.Sigma[0, 0]),
        "gain": float(twin.K[0, 0]),
        "value": twin.u,
        "value_variance": twin.s,
        "value_noise": twin.r,
        "model_error": twin.lam,
        "step_size": twin.lr * twin.alpha,
    }
    if twin.rule != "constant":
        state |= {"slope": twin.a, "curvature": twin.b_delta, "step_size_optimum": twin.alpha_star}
    return state


# ---- the twin --------------------------------------------------------------------------------------------------------

RUNS: list[dict[str, Any]] = [
    {"step_size": rule, "direction": direction, "smoothing": smoothing}
    for (rule, direction), smoothing in zip(
        itertools.product(RULES, ["gradient", "adam"]), itertools.cycle([0.999, 0.0, 0.5]), strict=False
    )
]
RUNS.append({"step_size": "pi", "prior_variance": 0.02, "max_step_size": 0.3})
RUNS.append({"step_size": "pi", "prior_variance": 0.02, "third_order": True})  # a model error before the first step
RUNS.append({"step_size": "pi", "curvature_smoothing": 0.7})
RUNS.append({"step_size": "quadratic", "direction": "adam", "curvature_smoothing": 0.999, "smoothing": 0.0})
RUNS.append({"step_size": "quadratic", "max_step_size": 0.07, "smoothing": 0.0, "lr": 0.4})


def name(options: dict[str, Any]) -> str:
    return "-".join(f"{k}={v}" for k, v in options.items())


@pytest.mark.parametrize("options", RUNS, ids=name)
def test_meka_follows_its_twin(options: dict[str, Any]) -> None:
    options = {"lr": 0.2 if options["step_size"] == "constant" else 0.5, **options}
    net = Net()
    fast, slow = Meka(net, squared, **options), ReferenceMeka(weights(net), slow_loss, **options)
    for k in range(12):
        inputs, targets = batch(k, size=3 + k % 3)
        if k in (2, 6):  # a missing observation
            targets[1] = [torch.nan, torch.inf][k == 6]
        if k == 8:
            fast.param_groups[0]["lr"] *= 0.5
            slow.lr *= 0.5
        loss = fast.step(inputs, targets)
        expected = slow.step(list(zip(inputs, targets, strict=True)))
        torch.testing.assert_close(loss, torch.tensor(expected, dtype=F64), rtol=1e-9, atol=0, equal_nan=True)
        torch.testing.assert_close(weights(net), slow.theta, rtol=1e-9, atol=1e-11, msg=lambda m, k=k: f"step {k}: {m}")
        if slow.Sigmas:
            state = fast.filter_state()
            assert all(type(value) is float for value in state.values())
            assert state == pytest.approx(symbols(slow), rel=1e-8, abs=1e-20), f"step {k}"
        means = torch.cat([fast.state[p]["mean"].reshape(-1) for p in net.parameters()])
        torch.testing.assert_close(means, slow.m, rtol=1e-9, atol=1e-11)
        assert fast.skipped_steps == slow.skipped_steps
    assert slow.skipped_steps == 2
    assert bool(slow.theta.isfinite().all())


VARIANTS: dict[str, tuple[Callable[..., Meka], dict[str, Any]]] = {
    "previous": (MekaPreviousHessian, {"hessian": "previous"}),
    "previous_current_samples": (
        lambda *args, **options: MekaPreviousHessian(*args, minibatch="current", **options),
        {"hessian": "previous_current_samples"},
    ),
    "without_model_error": (MekaWithoutModelError, {"model_error": False}),
}


@pytest.mark.parametrize("rule", ["constant", "pi"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_variants_follow_their_twins(variant: str, rule: str) -> None:
    create, changes = VARIANTS[variant]
    options: dict[str, Any] = {"lr": 0.3, "step_size": rule, "smoothing": 0.5, "prior_variance": 0.02}
    net, plain = Net(), Net()
    fast, slow = create(net, squared, **options), ReferenceMeka(weights(net), slow_loss, **options, **changes)
    for k in range(8):
        if k == 5:  # a checkpoint between two steps
            saved = io.BytesIO()
            torch.save(fast.state_dict(), saved)
            saved.seek(0)
            fast = create(net, squared, **options)
            fast.load_state_dict(torch.load(saved, weights_only=True))
        fast.step(*batch(k))
        slow.step(list(zip(*batch(k), strict=True)))
        torch.testing.assert_close(weights(net), slow.theta, rtol=1e-9, atol=1e-11)
        assert fast.filter_state() == pytest.approx(symbols(slow), rel=1e-8, abs=1e-20), f"step {k}"
    advance(plain, Meka(plain, squared, **options), range(8))
    same = torch.allclose(weights(plain), slow.theta, rtol=1e-6)
    assert same == (variant == "without_model_error" and rule == "constant")  # there the filter of the loss is idle


def test_the_hessian_of_a_quadratic_is_the_same_before_and_after_the_step() -> None:
    nets, loss_fn = [line(), line()], lambda outputs, targets: (outputs - targets).square().sum(1) / 2
    fast = [Meka(nets[0], loss_fn, 0.3), MekaPreviousHessian(nets[1], loss_fn, 0.3, minibatch="current")]
    for k in range(5):
        first, second = (optimizer.step(*targets_of(k, 1.0, 2.0)) for optimizer in fast)
        torch.testing.assert_close(first, second, rtol=1e-12, atol=0)


def test_an_unknown_minibatch_is_refused() -> None:
    with pytest.raises(ValueError, match="minibatch"):
        MekaPreviousHessian(Net(), squared, minibatch="next")


READINGS = list(
    itertools.product(RULES, ["gradient", "adam"], ["mean", "directional", "sum"], [False, True], [0.0, 0.999])
)


@pytest.mark.parametrize(("step_size", "direction", "variances", "third_order", "smoothing"), READINGS)
def test_every_reading_follows_its_twin(
    step_size: str, direction: str, variances: str, third_order: bool, smoothing: float
) -> None:
    options: dict[str, Any] = {"step_size": step_size, "direction": direction, "smoothing": smoothing}
    options |= {"variances": variances, "third_order": third_order, "prior_variance": 0.02, "max_step_size": 0.1}
    options["lr"] = 0.1
    net = Net()
    fast, slow = Meka(net, squared, **options), ReferenceMeka(weights(net), slow_loss, **options)
    cubic = 0
    for k in range(20):
        fast.step(*batch(k))
        slow.step(list(zip(*batch(k), strict=True)))
        torch.testing.assert_close(weights(net), slow.theta, rtol=1e-9, atol=1e-11, msg=lambda m, k=k: f"step {k}: {m}")
        assert fast.filter_state() == pytest.approx(symbols(slow), rel=1e-9, abs=1e-20), f"step {k}"
        cubic += slow.lam3 > 0
    assert fast.skipped_steps == 0
    assert (cubic > 0) == third_order  # the term was there


def test_negative_curvature_and_the_cap_happened() -> None:
    # what the runs above rest on: the quadratic rule met b <= 0, and its step was the cap
    net = Net()
    optimizer = Meka(net, squared, 0.4, step_size="quadratic", smoothing=0.0, max_step_size=0.07)
    curvatures, steps = [], []
    for k in range(12):
        optimizer.step(*batch(k, size=3 + k % 3))
        state = optimizer.filter_state()
        curvatures.append(state["curvature"])
        steps.append(state["step_size_optimum"])
    assert [step == 0.07 for step in steps] == [b <= 0 for b in curvatures]
    assert 0 < steps.count(0.07) < 12


def test_full_covariances_are_another_filter() -> None:
    theta, runs = weights(Net()), []
    for covariance in ("scalar", "full"):
        slow = ReferenceMeka(theta.clone(), slow_loss, 0.2, step_size="pi", covariance=covariance)  # type: ignore[arg-type]
        for k in range(4):
            slow.step(list(zip(*batch(k), strict=True)))
        runs.append(slow)
    assert float((runs[0].theta - runs[1].theta).norm()) > 1e-3
    assert float((runs[1].P - runs[1].P.diag().diag()).norm()) > 1e-3


# ---- by hand ---------------------------------------------------------------------------------------------------------


def line(x: float = 5.0) -> nn.Module:
    model = nn.Linear(1, 1, bias=False, dtype=F64)
    nn.init.constant_(model.weight, x)
    return model


def targets_of(*values: float) -> tuple[Tensor, Tensor]:
    return torch.ones(len(values), 1, dtype=F64), torch.tensor(values, dtype=F64)[:, None]


def test_two_steps_by_hand() -> None:
    """Losses (x - t)^2 / 2: gradients x - t, curvature 1 without noise."""
    model = line()
    loss_fn = lambda outputs, targets: (outputs - targets).square().sum(1) / 2  # noqa: E731
    optimizer = Meka(model, loss_fn, 0.5, step_size="constant", smoothing=0.0, prior_variance=3.0)
    # gradients 5 and 3: g = 4, sigma = 2 / 2; p = 3, k = 3/4: m = 3, p = 3/4. y = 8.5, losses 12.5 and 4.5: r = 32 / 2;
    # c = 3 + 16, lambda = 8.5^2 - 19 = 53.25, s^ = 56.25, gamma = 56.25 / 72.25
    assert float(optimizer.step(*targets_of(0.0, 2.0))) == 8.5
    state = optimizer.filter_state()
    u, s = 8.5 * 56.25 / 72.25, 56.25 * 16 / 72.25
    expected = {"variance": 0.75, "process_noise": 0.0, "measurement_noise": 1.0, "gain": 0.75, "value": u}
    expected |= {"value_variance": s, "value_noise": 16.0, "model_error": 53.25, "step_size": 0.5}
    assert state == pytest.approx(expected, rel=1e-12)
    assert model.weight.item() == 3.5
    # d = -1.5, b = -1.5: m^ = 1.5; gradients 3.5 + 0.5 and 3.5 - 2.5: g = 2.5, sigma = 4.5 / 2; k = 0.75 / 3 = 1/4:
    # m = 1.75. u^ = u + 3 (-1.5) + 1.5^2 / 2; y = 17 / 4, losses 8 and 1/2: r = 7.5^2 / 4
    optimizer.step(*targets_of(-0.5, 2.5))
    state = optimizer.filter_state()
    r, predicted = 7.5**2 / 4, u - 4.5 + 1.125
    s = s + 0.75 * 1.5**2
    error = max((4.25 - predicted) ** 2 - s - r, 0.0)
    assert state["model_error"] == error == 0.0
    assert state["gain"] == pytest.approx(0.25, rel=1e-12)
    assert state["value"] == pytest.approx((r * predicted + s * 4.25) / (s + r), rel=1e-12)
    assert state["value_variance"] == pytest.approx(s * r / (s + r), rel=1e-12)
    assert model.weight.item() == pytest.approx(3.5 - 0.5 * 1.75, rel=1e-12)


def test_the_adam_direction_is_shorter_than_one_everywhere() -> None:
    net = Net()
    before = weights(net)
    optimizer = Meka(net, squared, 0.25, step_size="constant", direction="adam")
    moved = advance(net, optimizer, range(1)) - before
    p, mean = (
        optimizer.filter_state()["variance"],
        torch.cat([optimizer.state[q]["mean"].reshape(-1) for q in net.parameters()]),
    )
    torch.testing.assert_close(moved, -0.25 * mean / ((mean**2 + p).sqrt() + 1e-8), rtol=1e-12, atol=0)
    assert float(moved.abs().max()) < 0.25


def test_the_filtered_gradient_comes_closer_than_the_minibatch() -> None:
    problem = problems.noisy_quadratic(10, condition=10.0)
    model = problem.model()
    optimizer = Meka(model, problem.loss_fn, 0.3, step_size="constant")
    generator = torch.Generator().manual_seed(0)
    errors = []
    for _ in range(60):
        xi = problem.draw(8, generator=generator)
        full = problem.gradient(model.theta.detach())
        noisy = ((model.theta - xi) @ problem.hessian).mean(0).detach()
        optimizer.step(xi, xi)
        errors.append([(optimizer.state[model.theta]["mean"] - full).norm(), (noisy - full).norm()])
    filtered, sampled = torch.tensor(errors)[30:].mean(0)
    assert float(filtered) < float(sampled) / 4
    # the model's variance is that of the errors: sigma / (t + 1), Sigma's mean diagonal for sigma
    assert optimizer.filter_state()["variance"] == pytest.approx(float(filtered) ** 2 / 10, rel=0.5)
    sigma = float(problem.gradient_noise(8).trace()) / 10
    assert optimizer.filter_state()["variance"] == pytest.approx(sigma / 60, rel=0.2)


# ---- missing observations --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["constant", "pi"])
@pytest.mark.parametrize("first", [0, 3])
def test_a_missing_observation_changes_nothing_but_the_count(rule: str, first: int) -> None:
    nets = [Net(), Net()]
    whole, broken = (Meka(net, squared, 0.3, step_size=rule) for net in nets)
    for k in range(6):
        if k == first:
            inputs, targets = batch(99)
            broken.step(inputs * torch.inf, targets)
            inputs[0, 0] = torch.nan
            loss = broken.step(inputs, targets)
            assert bool(loss.isnan())
        for optimizer in (whole, broken):
            optimizer.step(*batch(k))
        assert torch.equal(weights(nets[0]), weights(nets[1]))
    assert (whole.skipped_steps, broken.skipped_steps) == (0, 2)
    assert whole.filter_state() == broken.filter_state()


def test_a_gradient_that_overflows_is_a_missing_observation() -> None:
    # sqrt at 0: the loss is finite, its gradient is not
    model = line(0.0)
    optimizer = Meka(model, lambda outputs, targets: outputs.square().sum(1).sqrt() + targets.sum(1), 0.1)
    loss = optimizer.step(*targets_of(1.0, 2.0))
    assert loss.item() == 1.5
    assert model.weight.item() == 0.0
    assert optimizer.skipped_steps == 1


@pytest.mark.parametrize("variances", meka.VARIANCES)
def test_a_variance_that_overflows_along_the_direction_is_a_missing_observation(variances: str) -> None:
    # c x^2 / 2 for c = 1, 2 times 1e100 at x = 1e-40: the direction is -c x = 1e60, its products c^2 x = 1e160
    model = line(1e-40)
    options: dict[str, Any] = {"prior_variance": 1e200, "variances": variances}  # a wide prior, so that m = g
    optimizer = Meka(model, lambda outputs, c: c[:, 0] * outputs[:, 0] ** 2 / 2, **options)
    optimizer.step(torch.ones(2, 1, dtype=F64), torch.tensor([[1e100], [2e100]], dtype=F64))
    assert model.weight.item() == 1e-40
    assert optimizer.skipped_steps == 1
    assert optimizer.filter_state()["value"] == 0.0


# ---- what it returns and keeps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_filter_state_has_the_agreed_names(rule: str) -> None:
    net = Net()
    optimizer = Meka(net, squared, 0.1, step_size=rule)
    expected = EVERY if rule == "constant" else EVERY | OF_RULES
    assert optimizer.filter_state().keys() == expected
    assert optimizer.filter_state()["variance"] == optimizer.filter_state()["value_variance"] == 1e4
    advance(net, optimizer, range(2))
    assert optimizer.filter_state().keys() == expected


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("rule", ["constant", "pi"])
def test_state_dict_resumes_bit_for_bit(rule: str, dtype: torch.dtype) -> None:
    net = Net(dtype)
    optimizer = Meka(net, squared, 0.3, step_size=rule, direction="adam", smoothing=0.9)
    advance(net, optimizer, range(4), dtype)
    file = io.BytesIO()
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, file)
    expected = advance(net, optimizer, range(4, 9), dtype)

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = Net(dtype)
    again.load_state_dict(saved["net"])
    resumed = Meka(again, squared)
    resumed.load_state_dict(saved["optimizer"])
    assert resumed.param_groups[0]["filter"].dtype == F64
    assert torch.equal(advance(again, resumed, range(4, 9), dtype), expected)
    assert resumed.filter_state() == optimizer.filter_state()
    assert resumed.skipped_steps == 0


def test_a_copy_goes_its_own_way() -> None:
    net = Net()
    optimizer = Meka(net, squared, 0.3)
    advance(net, optimizer, range(3))
    twin_net, twin = copy.deepcopy((net, optimizer))
    assert twin.model is twin_net
    before = weights(twin_net)
    expected = advance(net, optimizer, range(3, 6))
    assert torch.equal(weights(twin_net), before)
    assert torch.equal(advance(twin_net, twin, range(3, 6)), expected)


def test_another_optimizers_state_is_refused() -> None:
    net = Net()
    with pytest.raises(ValueError, match=r"holds no filter of Meka.*: it was saved by another optimizer"):
        Meka(net, squared).load_state_dict(torch.optim.SGD(net.parameters(), 0.1).state_dict())


def test_schedulers_act_through_lr() -> None:
    nets = [Net(), Net()]
    scheduled, manual = (Meka(net, squared, 0.4) for net in nets)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(scheduled, milestones=[2], gamma=0.25)
    for k in range(4):
        scheduled.step(*batch(k))
        manual.step(*batch(k))
        scheduler.step()
        if k == 1:
            manual.param_groups[0]["lr"] *= 0.25
        assert torch.equal(weights(nets[0]), weights(nets[1]))
    assert scheduled.filter_state()["step_size"] < 0.1


def test_the_scale_of_the_step_is_exact_in_the_first_step() -> None:
    # Figure 6: c alpha delta
    moves = []
    for lr in (1.0, 0.25, torch.tensor(0.25)):
        net = Net()
        before = weights(net)
        optimizer = Meka(net, squared, lr)
        moves.append(advance(net, optimizer, range(1)) - before)
        state = optimizer.filter_state()
        assert state["step_size"] == pytest.approx(float(lr) * state["step_size_optimum"], rel=1e-15)
    torch.testing.assert_close(moves[1], moves[0] / 4, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(moves[2], moves[1], rtol=1e-12, atol=1e-15)


def test_the_rule_may_change_on_the_way() -> None:
    # Figure 7: constant steps first; the filter goes on, the average of the steps begins at the switch
    net = Net()
    optimizer = Meka(net, squared, 0.05, step_size="constant")
    advance(net, optimizer, range(3))
    variance = optimizer.filter_state()["variance"]
    optimizer.param_groups[0].update(step_size="pi", lr=1.0)
    advance(net, optimizer, range(3, 4))
    state = optimizer.filter_state()
    assert state["step_size"] == state["step_size_optimum"] > 0
    assert state["variance"] < variance + state["process_noise"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_inner_products_are_added_up_in_float32_at_least(dtype: torch.dtype) -> None:
    ones = [torch.ones(1001, dtype=dtype), torch.ones(2, 3, dtype=dtype)]  # bfloat16 has no 1001
    assert dot(ones, ones) == 1007
    assert dot(ones, ones).dtype == torch.float64


def test_gradients_of_the_caller_are_left_alone() -> None:
    net = Net()
    optimizer = Meka(net, squared)
    net.bias.grad = torch.full_like(net.bias, 7.0)
    loss = optimizer.step(*batch(0))
    assert net.weight.grad is None
    assert net.bias.grad.eq(7).all()
    assert loss.shape == ()
    assert not loss.requires_grad
    assert all(p.requires_grad and p.is_leaf for p in net.parameters())


@contextmanager
def no_host_read() -> Iterator[None]:
    """Fails where a tensor is read back to the host, which on a GPU would wait for it."""

    class Refuse(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            assert func is not torch.ops.aten._local_scalar_dense.default, "a tensor was read back to the host"
            return func(*args, **(kwargs or {}))

    with Refuse():
        yield


@pytest.mark.parametrize("direction", ["gradient", "adam"])
@pytest.mark.parametrize("rule", RULES)
def test_no_step_reads_a_tensor_back(rule: str, direction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"step_size": rule, "direction": direction, "variances": "directional"}
    nets = [Net(), Net()]
    here, elsewhere = (Meka(net, squared, third_order=True, **options) for net in nets)
    bad = batch(2)[0] * torch.nan, batch(2)[1]
    for minibatch in (batch(0), bad, batch(1)):
        here.step(*minibatch)
    monkeypatch.setattr(meka, "reading_is_free", lambda device: False)  # as on an accelerator
    for minibatch in (batch(0), bad, batch(1)):
        with no_host_read():
            elsewhere.step(*minibatch)
    assert torch.equal(weights(nets[0]), weights(nets[1]))
    assert here.filter_state() == elsewhere.filter_state()
    optimizer = here
    with pytest.raises(AssertionError, match="read back"), no_host_read():  # the check itself
        float(optimizer.param_groups[0]["filter"][0])


# ---- groups ----------------------------------------------------------------------------------------------------------


def test_frozen_parameters_stay_and_join_later() -> None:
    net = Net()
    net.weight.requires_grad_(False)
    optimizer = Meka(net, squared, 0.3, step_size="constant")
    before = net.weight.clone()
    advance(net, optimizer, range(2))
    assert torch.equal(net.weight, before)
    net.weight.requires_grad_(True)
    optimizer.param_groups[0]["smoothing"] = 0.9  # the new group takes over what was changed
    optimizer.add_param_group({"params": [net.weight], "lr": 0.03})
    moved = net.weight.detach().clone()
    advance(net, optimizer, range(2, 3))
    step = net.weight.detach() - moved
    torch.testing.assert_close(step, -0.03 * optimizer.state[net.weight]["mean"], rtol=1e-9, atol=1e-12)
    assert optimizer.param_groups[1]["filter"] is optimizer.param_groups[0]["filter"]
    assert optimizer.param_groups[1]["smoothing"] == 0.9
    advance(net, optimizer, range(3, 5))
    assert optimizer.skipped_steps == 0


def test_groups_with_rates_of_their_own_have_the_variance_of_their_displacement() -> None:
    """d^T P d is k times the variance of d^T g, also where the displacement d is no multiple of the direction."""
    net = Net()
    net.weight.requires_grad_(False)
    optimizer = Meka(net, squared, 0.3, variances="directional")
    net.weight.requires_grad_(True)
    optimizer.add_param_group({"params": [net.weight], "lr": 0.03})
    for k in range(3):
        before = copy.deepcopy(net)
        advance(net, optimizer, range(k, k + 1))
    displacement = {name: optimizer.state[p]["displacement"] for name, p in net.named_parameters()}
    seen = sample_moments(before, squared, *batch(k), displacement)
    assert seen.slope_variance is not None
    entries = dict(zip(Meka.filter_entries, optimizer.param_groups[0]["filter"].unbind(), strict=True))
    of_mean = seen.slope_variance / len(batch(k)[0])
    torch.testing.assert_close(entries["displacement_variance"], entries["gain"] * of_mean, rtol=1e-9, atol=0.0)


# ---- arguments -------------------------------------------------------------------------------------------------------

CHANGES: dict[str, Any] = {
    "lr": 0.5,
    "step_size": "quadratic",
    "direction": "adam",
    "smoothing": 0.5,
    "max_step_size": 0.5,
    "prior_variance": 1e-2,
    "variances": "sum",
    "third_order": True,
    "curvature_smoothing": 0.9,
}


def test_the_list_of_arguments_is_complete() -> None:
    assert set(inspect.signature(Meka).parameters) == {"model", "loss_fn", "moments", *CHANGES}


@pytest.mark.parametrize("key", CHANGES)
def test_every_argument_changes_the_weights(key: str) -> None:
    def run(**options: Any) -> Tensor:
        net = Net()
        return advance(net, Meka(net, squared, **{"max_step_size": 0.1, **base, **options}), range(steps))

    # the cap needs a rule and a stretch with negative curvature
    base, steps = ({"step_size": "ei"}, 12) if key == "max_step_size" else ({}, 5)
    assert float((run(**{key: CHANGES[key]}) - run()).abs().max()) > 1e-6
    assert torch.equal(run(), run())


@pytest.mark.parametrize("again", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["copy", "pickle"])
def test_parameters_are_added_after_a_copy_as_before_it(again: Callable[[Any], Any]) -> None:
    ends = []
    for way in (lambda o: o, again):
        net = Net()
        net.weight.requires_grad_(False)
        optimizer = way(Meka(net, squared, 0.3))
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        optimizer.model.weight.requires_grad_(True)
        optimizer.add_param_group({"params": [optimizer.model.weight], "lr": 0.1})
        ends.append(advance(optimizer.model, optimizer, range(3)))
    assert torch.equal(*ends)


def test_a_network_that_is_converted_takes_the_state_along() -> None:
    net, other = Net(), Net(torch.float32)
    optimizer, expected = Meka(net, squared, 0.3), Meka(other, squared, 0.3)
    advance(net, optimizer, range(2))
    expected.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    other.load_state_dict(net.state_dict())
    net.to(torch.float32)
    ends = [advance(n, o, range(2, 4), torch.float32) for n, o in ((net, optimizer), (other, expected))]
    assert torch.equal(*ends)
    assert {t.dtype for t in optimizer.state[net.weight].values()} == {torch.float32}


@pytest.mark.parametrize("key", CHANGES)
def test_an_option_changed_in_the_groups_acts_or_is_refused(key: str) -> None:
    def run(*, change: bool) -> Tensor:
        net = Net()
        optimizer = Meka(net, squared, **{"max_step_size": 0.1, **base})
        advance(net, optimizer, range(2))
        if change:
            optimizer.param_groups[0][key] = CHANGES[key]
        if change and key == "prior_variance":
            message = "prior_variance was changed from 10000.0 to 0.01 in a param group, but Meka reads it in the cons"
            with pytest.raises(ValueError, match=message):
                advance(net, optimizer, [2])
            optimizer.param_groups[0][key] = 1e4
        return advance(net, optimizer, range(2, steps))

    base, steps = ({"step_size": "ei"}, 12) if key == "max_step_size" else ({}, 5)
    assert torch.equal(run(change=True), run(change=False)) == (key == "prior_variance")


def test_an_option_changed_to_nonsense_is_refused() -> None:
    net = Net()
    optimizer = Meka(net, squared)
    optimizer.param_groups[0]["smoothing"] = 1.0
    with pytest.raises(ValueError, match="smoothing must be a finite number >= 0 and < 1, got 1"):
        advance(net, optimizer, [0])


@pytest.mark.parametrize("moments", ["vmap", "structured"])
def test_ways_to_compute_moments_agree(moments: str) -> None:
    runs = []
    for method in ("auto", moments):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1), nn.Flatten(0)).double()
        runs.append(advance(net, Meka(net, squared, 0.5, moments=method), range(4)))
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-9, atol=1e-11)


Bad = tuple[Callable[[], Any], type[Exception], str]
NET = Net()
BAD: dict[str, Bad] = {
    "model": (lambda: Meka(NET.parameters(), squared), TypeError, "model must be a torch.nn.Module, got a generator"),  # type: ignore[arg-type]
    "loss_fn": (lambda: Meka(NET, 0.1), TypeError, "loss_fn must be callable as loss_fn.*, got a float"),  # type: ignore[arg-type]
    "lr": (lambda: Meka(NET, squared, -1.0), ValueError, "lr must be a finite number >= 0, got -1.0"),
    "step_size": (
        lambda: Meka(NET, squared, step_size="best"),
        ValueError,
        "step_size must be one of 'constant', 'quadratic', 'pi', 'ei', got 'best'",
    ),
    "direction": (
        lambda: Meka(NET, squared, direction="sgd"),
        ValueError,
        "direction must be one of 'gradient', 'adam'",
    ),
    "smoothing": (lambda: Meka(NET, squared, smoothing=1.0), ValueError, "smoothing must be .* < 1, got 1.0"),
    "max_step_size": (lambda: Meka(NET, squared, max_step_size=0), ValueError, "max_step_size must be .* > 0, got 0"),
    "moments": (lambda: Meka(NET, squared, moments="fast"), ValueError, "moments must be one of 'auto', 'vmap'"),
    "prior_variance": (lambda: Meka(NET, squared, prior_variance="1"), TypeError, "prior_variance must be a number"),  # type: ignore[arg-type]
    "curvature_smoothing": (
        lambda: Meka(NET, squared, curvature_smoothing=-0.1),
        ValueError,
        "curvature_smoothing must",
    ),
    "unknown": (lambda: Meka(NET, squared, momentum=0.9), TypeError, "momentum"),  # type: ignore[call-arg]
    "one sample": (
        lambda: Meka(NET, squared).step(*batch(0, size=1)),
        ValueError,
        "at least 2 of them, got a batch of 1",
    ),
    "closure": (
        lambda: Meka(NET, squared).step(lambda: torch.zeros(())),  # type: ignore[arg-type]
        TypeError,
        r"Meka runs forward and backward itself: call step\(inputs, targets\)",
    ),
    "dictionary": (
        lambda: Meka(NET, squared).step({"x": batch(0)[0]}, batch(0)[1]),  # type: ignore[arg-type]
        TypeError,
        "inputs must be one tensor with a leading dimension of samples, got dict",
    ),
    "scalar loss": (
        lambda: Meka(NET, lambda o, t: squared(o, t).mean()).step(*batch(0)),
        ValueError,
        r"one loss per sample, shape \(5,\), got \(\)",
    ),
    "foreign": (
        lambda: Meka(NET, squared).add_param_group({"params": [nn.Parameter(torch.zeros(2))]}),
        ValueError,
        r"the model has no such parameter \(shape \(2,\)\)",
    ),
    "group option": (
        lambda: Meka(one_frozen(), squared).add_param_group({"params": [FROZEN.weight], "smoothing": 0.5}),
        ValueError,
        r"smoothing=0.5 in a param group: .* \(here 0.999\)",
    ),
}
FROZEN = Net()


def one_frozen() -> nn.Module:
    FROZEN.weight.requires_grad_(False)
    return FROZEN


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case: str) -> None:
    call, error, message = BAD[case]
    with pytest.raises(error, match=message) as raised:
        call()
    assert "\n" not in str(raised.value)
