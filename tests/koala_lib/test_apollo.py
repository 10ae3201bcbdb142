"""APOLLO against its slow twin, against the problem that its update solves, and in the limits that have a formula."""

import copy
import inspect
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from koala_lib import Apollo, KoalaV
from koala_lib.optim.apollo import weak_secant_update
from koala_lib.reference.apollo import ReferenceApollo

STEPS = 25
SHAPES = [(3, 4), (4,), (), (0, 3), (2,)]


def start(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES]


def gradient(i: int, x: Tensor, k: int) -> Tensor:
    """A noisy gradient at x, of a function with curvatures of both signs, up to 4."""
    generator = torch.Generator().manual_seed(100 * k + i)
    noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    curvatures = torch.linspace(-0.5, 3.0, max(x.numel(), 1), dtype=torch.float64)[: x.numel()].view(x.shape)
    return (curvatures * x.double() + torch.sin(x.double()) + 0.1 * noise).to(x.dtype)


def observed(k: int) -> list[bool]:
    """Which tensors have a gradient in step k: the second and the last do without for a while, later all do."""
    return [k != 15 and not (i in (1, 4) and 6 <= k < 9) for i in range(len(SHAPES))]


def lr_factor(k: int) -> float:
    return 1.0 if k < 12 else 0.5


def run(
    options: dict[str, Any], *, steps: int = STEPS, dtype: torch.dtype = torch.float64, sign: float = 1.0
) -> tuple[list[Tensor], Apollo]:
    params = [nn.Parameter(x) for x in start(dtype)]
    optimizer = Apollo(params, **options)
    for k in range(steps):
        optimizer.param_groups[0]["lr"] = options["lr"] * lr_factor(k)
        for i, (p, seen) in enumerate(zip(params, observed(k), strict=True)):
            p.grad = sign * gradient(i, p.detach(), k) if seen else None
        optimizer.step()
    return [p.detach() for p in params], optimizer


def run_reference(options: dict[str, Any], sign: float) -> tuple[list[Tensor], ReferenceApollo]:
    tensors = start()
    reference = ReferenceApollo(tensors, **options)
    for k in range(STEPS):
        reference.lr = options["lr"] * lr_factor(k)
        gradients = enumerate(zip(tensors, observed(k), strict=True))
        reference.step([sign * gradient(i, x, k) if seen else None for i, (x, seen) in gradients])
    return tensors, reference


# ---------------------------------------------------------------- the slow twin

EPS: list[dict[str, Any]] = [{"eps": 1e-2}, {"eps": 1e-2, "eps_scaling": "literal"}, {"eps": 0.0}]
WARM_UPS = [{"warmup_steps": 0}, {"warmup_steps": 8}, {"warmup_steps": 8, "warmup_init_lr": 0.3}]
DECAYS = [{}, {"weight_decay": 0.05}, {"weight_decay": 0.05, "decoupled_weight_decay": True}]
MAXIMIZE = [{}, {"maximize": True}]


@pytest.mark.parametrize("beta", [0.9, 0.0])
@pytest.mark.parametrize("lr_and_sigma", [(0.1, 0.2), (0.005, 0.01)], ids=["", "the paper's sigma"])
def test_equals_the_reference(lr_and_sigma: tuple[float, float], beta: float) -> None:
    assert_equals_the_reference(*lr_and_sigma, beta)


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.usefixtures("kept_on_device")
def test_equals_the_reference_with_scalars_kept_on_the_device(foreach: bool) -> None:
    assert_equals_the_reference(0.1, 0.2, 0.9, foreach=foreach)


def test_fused_equals_the_reference(traced_passes: None) -> None:
    assert_equals_the_reference(0.1, 0.2, 0.9, fused=True)
    # L2 decay, decoupled decay or none, ascent or descent; two passes, each for short and long tensors.
    assert 2 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 24


def assert_equals_the_reference(lr: float, sigma: float, beta: float, **path: Any) -> None:
    left_the_floor = 0
    for eps, warm_up, decay, maximize in itertools.product(EPS, WARM_UPS, DECAYS, MAXIMIZE):
        options = {"lr": lr, "sigma": sigma, "beta": beta} | eps | warm_up | decay | maximize
        sign = -1.0 if maximize else 1.0
        weights, optimizer = run(options | path, sign=sign)
        wanted, reference = run_reference(options, sign)
        for p, x, parameter in zip(optimizer.param_groups[0]["params"], wanted, reference.parameters, strict=True):
            state = optimizer.state[p]
            kept = {"mean": parameter.m, "curvature": parameter.B}
            if "decoupled_weight_decay" in options:
                kept["direction"] = parameter.d
            torch.testing.assert_close(p.detach(), x, rtol=1e-10, atol=1e-10, msg=f"{options}")
            for name, value in kept.items():
                torch.testing.assert_close(state[name].flatten(), torch.tensor(value, dtype=x.dtype).flatten(),
                                           rtol=1e-9, atol=1e-10, msg=f"{name} of {options}")  # fmt: skip
            assert int(state["step"]) == parameter.t
            left_the_floor += int((state["curvature"].abs() > sigma).sum())
        assert all(float((x - y).abs().max()) > 0.01 for x, y in zip(weights, start(), strict=True) if x.numel())
    assert left_the_floor > 100  # the comparison is not about plain descent


def test_the_reference_has_the_same_arguments() -> None:
    ours, theirs = (inspect.signature(cls).parameters for cls in (Apollo, ReferenceApollo))
    shared = set(ours) - {"params", "foreach", "fused"}
    assert shared == set(theirs) - {"tensors"}
    assert all(ours[name].default == theirs[name].default for name in shared)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_foreach_equals_the_loop_bit_for_bit(dtype: torch.dtype, decay: dict[str, Any]) -> None:
    options = {"lr": 0.1, "sigma": 0.2, "warmup_steps": 4} | decay
    runs = [run(options | {"foreach": foreach}, dtype=dtype) for foreach in (False, True, None)]
    for weights, optimizer in runs[1:]:
        for p, q in zip(weights, runs[0][0], strict=True):
            assert torch.equal(p, q)
        for p, q in zip(*(o.param_groups[0]["params"] for o in (optimizer, runs[0][1])), strict=True):
            assert all(torch.equal(optimizer.state[p][name], value) for name, value in runs[0][1].state[q].items())


# ---------------------------------------------------------------- the problem that the update solves


def least_change(B: Tensor, s: Tensor, y: Tensor) -> Tensor:
    """argmin |B' - B|_F over diagonal B' with s^T B' s = s^T y (6), from the conditions of Karush, Kuhn and Tucker."""
    n = len(B)
    system = torch.zeros(n + 1, n + 1, dtype=torch.float64)
    system[:n, :n] = torch.eye(n)
    system[:n, n] = system[n, :n] = s**2
    return torch.linalg.solve(system, torch.cat([B, (s @ y)[None]]))[:n]


def by_definition(options: dict[str, Any]) -> list[Tensor]:
    """Trajectories of the first tensor for eps = 0: averages over the whole history, (6) with y' = eta y and s."""
    x, lr, sigma, beta = start()[0].flatten(), options["lr"], options["sigma"], options["beta"]
    B, d, history, points = torch.zeros_like(x), torch.zeros_like(x), [], [x]
    means = [torch.zeros_like(x)]
    for k in range(STEPS):
        history.append(gradient(0, x.view(3, 4), k).flatten())
        factors = [beta ** (k - i) for i in range(k + 1)]
        means.append(sum(f * g for f, g in zip(factors, history, strict=True)) / sum(factors))
        if k > 0:
            B = least_change(B, -lr * d, lr * (means[-1] - means[-2]))
        d = means[-1] / B.abs().clamp(min=sigma)
        x = x - lr * d
        points.append(x)
    return points


@pytest.mark.parametrize("beta", [0.9, 0.5, 0.0])
def test_equals_the_least_change_problem(beta: float) -> None:
    options = {"lr": 0.1, "sigma": 0.1, "beta": beta, "eps": 0.0, "warmup_steps": 0}
    p = nn.Parameter(start()[0])
    optimizer = Apollo([p], **options)
    left_the_floor = False
    for k, x in enumerate(by_definition(options)):
        torch.testing.assert_close(p.detach().flatten(), x, rtol=0, atol=1e-10)
        p.grad = gradient(0, p.detach(), k)
        optimizer.step()
        left_the_floor |= bool((optimizer.state[p]["curvature"].abs() > options["sigma"]).any())
    assert left_the_floor


def random_update(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    B, d, y = (10**e * torch.randn(7, generator=generator, dtype=torch.float64) for e in (0, seed % 5 - 2, 0))
    return B, d, y


@pytest.mark.parametrize("seed", range(10))
def test_the_weak_secant_equation_holds_afterwards(seed: int) -> None:
    B, d, y = random_update(seed)
    new = B.clone()
    weak_secant_update([new], [d], [y], 0.0)
    assert float(d @ (new * d)) == pytest.approx(-float(d @ y), rel=1e-12, abs=1e-12 * float(d @ d))
    torch.testing.assert_close(new, least_change(B, -0.3 * d, 0.3 * y), rtol=1e-9, atol=1e-12)
    # every other diagonal that fulfils it is farther away
    generator = torch.Generator().manual_seed(seed)
    for _ in range(20):
        other = torch.randn(7, generator=generator, dtype=torch.float64)
        other -= (other @ d**2) / (d**2 @ d**2) * d**2
        assert float((new + other - B).norm()) > float((new - B).norm())
    shrunk = B.clone()
    weak_secant_update([shrunk], [d], [y], 1e-2)
    factor = (float((d**4).sum()) ** 0.25 / (float((d**4).sum()) ** 0.25 + 1e-2)) ** 4
    torch.testing.assert_close(shrunk - B, factor * (new - B), rtol=1e-10, atol=0)


def test_without_a_direction_nothing_is_learned() -> None:
    B = torch.tensor([1.0, -2.0])
    weak_secant_update([B], [torch.zeros(2)], [torch.ones(2)], 0.0)
    assert B.tolist() == [1.0, -2.0]
    p = nn.Parameter(torch.ones(2))
    optimizer = Apollo([p], eps=0.0)
    for _ in range(3):
        p.grad = torch.zeros(2)
        optimizer.step()
    assert p.tolist() == [1.0, 1.0]
    assert optimizer.state[p]["curvature"].tolist() == [0.0, 0.0]


def test_one_tensor_is_one_parameter() -> None:
    """The weak secant equation is solved for every tensor by itself (reading A-2)."""

    def go(cut: bool) -> Tensor:
        x = start()[0].flatten()
        params = [nn.Parameter(t.clone()) for t in (x.split(6) if cut else [x])]
        optimizer = Apollo(params, lr=0.1, sigma=0.2, warmup_steps=0)
        for k in range(4):
            g = gradient(0, torch.cat([p.detach() for p in params]).view(3, 4), k).flatten()
            for p, part in zip(params, g.split([p.numel() for p in params]), strict=True):
                p.grad = part
            optimizer.step()
        return torch.cat([p.detach() for p in params])

    assert (go(True) - go(False)).abs().max() > 1e-3


@pytest.mark.parametrize("size", [3, 1000, 2_000_000])
def test_sums_are_accurate_in_float32(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    B, d, y = (torch.rand(size, generator=generator) + 0.5 for _ in range(3))
    exact = B.double()
    weak_secant_update([exact], [d.double()], [y.double()], 0.01)
    weak_secant_update([B], [d], [y], 0.01)
    torch.testing.assert_close(B.double(), exact, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- limits


def quadratic(curvature: float, x0: float, steps: int, **options: Any) -> tuple[list[float], list[float]]:
    """Points and B on curvature / 2 x^2."""
    p = nn.Parameter(torch.tensor([x0], dtype=torch.float64))
    optimizer = Apollo([p], warmup_steps=0, eps_scaling="literal", **options)
    points, Bs = [x0], [0.0]
    for _ in range(steps):
        p.grad = curvature * p.detach()
        optimizer.step()
        points.append(p.item())
        Bs.append(optimizer.state[p]["curvature"].item())
    return points, Bs


@pytest.mark.parametrize("sigma", [0.01, 0.05, 1.0])
def test_on_a_quadratic_without_average_it_is_newton_or_descent(sigma: float) -> None:
    """B = eta lambda; above the floor the second step is Newton's, below it is descent with the rate eta / sigma."""
    lr, curvature = 0.02, 3.0
    (x0, x1, x2), Bs = quadratic(curvature, 1.5, 2, lr=lr, sigma=sigma, beta=0.0, eps=0.0)
    assert x1 == pytest.approx(x0 * (1 - lr * curvature / sigma), rel=1e-12)  # d = g / sigma
    assert Bs == [0.0, 0.0, pytest.approx(lr * curvature, rel=1e-12)]
    wanted = 0.0 if Bs[2] > sigma else x1 * (1 - lr * curvature / sigma)
    assert x2 == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize(("lr", "on_the_floor"), [(0.02, True), (0.05, True), (0.2, False)])
def test_the_second_step(lr: float, on_the_floor: bool) -> None:
    """With q = eta lambda / sigma and u = lambda |x0| / sigma; B leaves the floor only if q > 1 + beta."""
    curvature, sigma, beta, eps = 3.0, 0.1, 0.9, 0.5
    q, u = lr * curvature / sigma, curvature * 1.5 / sigma
    points, Bs = quadratic(curvature, 1.5, 2, lr=lr, sigma=sigma, beta=beta, eps=eps)
    assert points[1] == pytest.approx((1 - q) * 1.5, rel=1e-12)
    assert Bs[2] == pytest.approx(lr * curvature / (1 + beta) * (u / (u + eps)) ** 4, rel=1e-12)
    assert (Bs[2] <= sigma) == on_the_floor
    if on_the_floor:
        assert points[2] == pytest.approx((1 - 2 * q + q**2 / (1 + beta)) * 1.5, rel=1e-12)
    assert not on_the_floor or q <= 1 + beta


@pytest.mark.parametrize("beta", [0.0, 0.9, 0.99])
def test_the_mean_is_the_normalised_average(beta: float) -> None:
    p = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = Apollo([p], beta=beta)
    generator = torch.Generator().manual_seed(0)
    history = []
    for t in range(50):
        p.grad = torch.randn(3, generator=generator, dtype=torch.float64)
        history.append(p.grad)
        optimizer.step()
        factors = [beta ** (t - i) for i in range(t + 1)]
        wanted = sum(f * g for f, g in zip(factors, history, strict=True)) / sum(factors)
        torch.testing.assert_close(optimizer.state[p]["mean"], wanted, rtol=0, atol=1e-12)


def test_negative_curvature_counts_by_its_size() -> None:
    """(10): on -x^2, B = -2 eta, and the step goes down, away from the maximum."""
    points, Bs = quadratic(-2.0, 1.0, 2, lr=0.5, sigma=0.2, beta=0.0, eps=0.0)
    assert Bs[2] == pytest.approx(-1.0, rel=1e-12)
    assert points[2] == pytest.approx(points[1] - 0.5 * (-2.0 * points[1]) / 1.0, rel=1e-12)


# ---------------------------------------------------------------- on the floor it is momentum SGD

ON_THE_FLOOR = {"sigma": 5.0, "lr": 0.5, "eps": 5.0, "warmup_steps": 0}  # with so large an epsilon |B| stays below


def beside_sgd(options: dict[str, Any]) -> tuple[float, float, float]:
    """Largest difference of a weight from heavy ball at the converted rate; largest |B|; largest share above the floor.

    The rate is eta / sigma (1 - beta) / (1 - beta^(t+1)): the bias correction is part of it.
    """
    beta, apart, above = options["beta"], 0.0, 0.0
    p, q = (nn.Parameter(start()[0]) for _ in range(2))
    apollo = Apollo([p], **options)
    sgd = torch.optim.SGD([q], lr=1.0, momentum=beta, weight_decay=options["weight_decay"])
    for t in range(STEPS):
        apollo.param_groups[0]["lr"] = lr = options["lr"] * lr_factor(t)
        sgd.param_groups[0]["lr"] = lr / options["sigma"] * (1 - beta) / (1 - beta ** (t + 1))
        for weights, optimizer in ((p, apollo), (q, sgd)):
            weights.grad = gradient(0, weights.detach(), t)
            optimizer.step()
        apart = max(apart, float((p - q).detach().abs().max()))
        above = max(above, float(apollo.above_floor()))
    assert float((p.detach() - start()[0]).abs().max()) > 0.1
    return apart, float(apollo.state[p]["curvature"].abs().max()), above


@pytest.mark.parametrize("decay", [0.0, 0.05])
@pytest.mark.parametrize("beta", [0.9, 0.5, 0.0])
def test_on_its_floor_it_is_heavy_ball_sgd(beta: float, decay: float) -> None:
    options = ON_THE_FLOOR | {"beta": beta, "weight_decay": decay}
    apart, largest, above = beside_sgd(options)
    assert apart <= 1e-12
    assert largest > 1e-3  # it is the floor that hides B
    assert above == 0
    apart, _, above = beside_sgd(options | {"eps": 1e-4, "sigma": 0.1, "lr": 0.1})  # ten times as fast: off the floor
    assert apart > 1e-3
    assert above > 0


def test_the_rate_of_sgd_goes_to_the_one_without_bias_correction() -> None:
    """Far from the beginning heavy ball at the constant rate eta / sigma (1 - beta) takes the same steps."""
    beta, steps = 0.5, 60
    p = nn.Parameter(start()[0])
    apollo, buffer = Apollo([p], beta=beta, **ON_THE_FLOOR), torch.zeros_like(p)
    for t in range(steps):
        before = p.detach().clone()
        p.grad = gradient(0, before, t)
        buffer = beta * buffer + p.grad
        apollo.step()
    rate = ON_THE_FLOOR["lr"] / ON_THE_FLOOR["sigma"] * (1 - beta)
    torch.testing.assert_close(before - p.detach(), rate * buffer, rtol=1e-12, atol=1e-14)


def test_the_share_above_the_floor_is_counted_over_all_weights() -> None:
    """By hand: two groups with floors of their own; a frozen weight has no state and does not count."""
    a, b, frozen = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(5))
    optimizer = Apollo([{"params": [a, frozen]}, {"params": [b], "sigma": 3.0}], sigma=1.0)
    a.grad, b.grad = torch.ones_like(a), torch.ones_like(b)
    optimizer.step()
    optimizer.state[a]["curvature"].copy_(torch.tensor([1.0, -1.5, 0.5]))  # on the floor is not above it
    optimizer.state[b]["curvature"].copy_(torch.tensor([[2.0, 4.0], [-5.0, 3.0]]))
    assert optimizer.above_floor().item() == pytest.approx(3 / 7)
    assert optimizer.entries(optimizer.traced).tolist() == [pytest.approx(3 / 7)]
    assert frozen not in optimizer.state


# ---------------------------------------------------------------- Theorem 1

FREE = {"sigma": 0.2, "lr": 0.1, "eps": 0.03, "warmup_steps": 6, "warmup_init_lr": 0.01}


def coupled(options: dict[str, Any], c: float) -> dict[str, Any]:
    scaled = {name: options[name] * c for name in ("sigma", "lr", "warmup_init_lr") if name in options}
    if options.get("eps_scaling") == "literal":
        scaled["eps"] = options["eps"] / c
    if options.get("decoupled_weight_decay"):
        scaled["weight_decay"] = options["weight_decay"] / c
    return options | scaled


@pytest.mark.parametrize("c", [0.25, 0.5, 16.0, 0.3, 7.0])
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("eps_scaling", ["literal", "released"])
def test_step_size_and_floor_are_coupled(eps_scaling: str, decay: dict[str, Any], c: float) -> None:
    """(c lr, c sigma, epsilon / c) goes the same way, to the bit if c is a power of two; eps "released" needs no
    change, decoupled decay becomes lambda / c."""
    options = FREE | decay | {"eps_scaling": eps_scaling}
    weights, first = run(options)
    again, second = run(coupled(options, c))
    exact = float(c).hex().startswith("0x1.0000000000000p")
    for x, y in zip(again, weights, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0 if exact else 1e-12)
    for p, q in zip(*(o.param_groups[0]["params"] for o in (second, first)), strict=True):
        tolerance = 0 if exact else 1e-10
        torch.testing.assert_close(
            second.state[p]["curvature"], c * first.state[q]["curvature"], rtol=tolerance, atol=tolerance
        )


@pytest.mark.parametrize("decay", DECAYS)
def test_the_coupling_needs_the_scaled_epsilon_and_decay(decay: dict[str, Any]) -> None:
    """Theorem 1 as printed, with epsilon and decay left alone, is off by more than rounding."""

    def apart(options: dict[str, Any], changes: dict[str, Any]) -> float:
        pairs = zip(run(options)[0], run(coupled(options, 0.25) | changes)[0], strict=True)
        return max(float((x - y).abs().max()) for x, y in pairs if x.numel())

    literal = FREE | decay | {"eps_scaling": "literal"}
    assert apart(literal, {}) == 0
    assert apart(literal, {"eps": literal["eps"]}) > 1e-4
    if decay.get("decoupled_weight_decay"):
        assert apart(literal, {"weight_decay": 0.05}) > 1e-3


def test_the_authors_setting_is_sigma_1_with_the_printed_epsilon() -> None:
    ours, _ = run({"lr": 0.005, "sigma": 0.01, "warmup_steps": 4})
    theirs, _ = run({"lr": 0.5, "sigma": 1.0, "eps": 1e-4, "eps_scaling": "literal", "warmup_steps": 4})
    printed, _ = run({"lr": 0.005, "sigma": 0.01, "eps_scaling": "literal", "warmup_steps": 4})
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    assert not all(torch.equal(x, y) for x, y in zip(ours, printed, strict=True))


# ---------------------------------------------------------------- decay


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_direction_computed_anew_is_the_one_that_would_be_stored(dtype: torch.dtype) -> None:
    """Decoupled decay of zero stores it, and changes no bit."""
    options = {"lr": 0.1, "sigma": 0.2, "warmup_steps": 4}
    weights, plain = run(options, dtype=dtype)
    again, stored = run(options | {"decoupled_weight_decay": True}, dtype=dtype)
    assert all(torch.equal(x, y) for x, y in zip(weights, again, strict=True))
    for p, q in zip(*(o.param_groups[0]["params"] for o in (plain, stored)), strict=True):
        assert "direction" not in plain.state[p]
        mean, B = plain.state[p]["mean"], plain.state[p]["curvature"]
        assert torch.equal(stored.state[q]["direction"], mean / B.abs().clamp(min=0.2))


def test_decoupled_decay_may_begin_later() -> None:
    """The direction of the last step is then computed from m and B."""

    def go(late: bool) -> Tensor:
        p = nn.Parameter(start()[0])
        optimizer = Apollo([p], lr=0.1, sigma=0.2, warmup_steps=0, decoupled_weight_decay=not late)
        for k in range(8):
            if k == 4:
                optimizer.param_groups[0] |= {"decoupled_weight_decay": True, "weight_decay": 0.05}
            p.grad = gradient(0, p.detach(), k)
            optimizer.step()
        return p.detach()

    assert torch.equal(go(True), go(False))


# ---------------------------------------------------------------- warm-up


def rates(optimizer: Apollo, steps: int, between: Callable[[int], None] = lambda k: None) -> list[list[float]]:
    """The learning rates that the steps had, one list a tensor, from a gradient with |B| on the floor."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    seen: list[list[float]] = [[] for _ in params]
    for k in range(steps):
        before = [p.item() for p in params]
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        for rate, p, x in zip(seen, params, before, strict=True):
            rate.append((x - p.item()) * 1.0)  # d = 1 / sigma = 1
        between(k)
    return seen


def line(first: float, last: float, steps: int) -> list[float]:
    return [first + (last - first) * j / steps for j in range(steps)]


def scalars(n: int) -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros((), dtype=torch.float64)) for _ in range(n)]


@pytest.mark.parametrize("tensor", [False, True])
def test_warm_up_counts_from_zero_and_overrides_schedulers(tensor: bool) -> None:
    lr: Any = torch.tensor(0.5, dtype=torch.float64) if tensor else 0.5
    optimizer = Apollo(scalars(1), lr, sigma=1.0, warmup_steps=4)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    (seen,) = rates(optimizer, 7, lambda k: scheduler.step())
    assert seen == pytest.approx(line(0.0005, 0.5, 4) + [0.5 / 2**k for k in (4, 5, 6)], rel=1e-12)


def test_warm_up_goes_to_the_lr_of_the_group_and_counts_for_every_tensor() -> None:
    a, b = scalars(2)
    optimizer = Apollo([{"params": [a]}, {"params": [b], "lr": 0.2, "warmup_steps": 3}], 0.4, sigma=1.0, warmup_steps=2)
    assert rates(optimizer, 4) == [
        pytest.approx([*line(0.0004, 0.4, 2), 0.4, 0.4], rel=1e-12),
        pytest.approx([*line(0.0002, 0.2, 3), 0.2], rel=1e-12),
    ]
    optimizer.add_param_group({"params": scalars(1), "warmup_init_lr": 0.1})
    optimizer.param_groups[2]["lr"] = 0.8  # too late for the warm-up
    assert rates(optimizer, 3)[2] == pytest.approx([*line(0.1, 0.4, 2), 0.8], rel=1e-12)


def test_no_warm_up() -> None:
    optimizer = Apollo(scalars(1), 0.3, sigma=1.0, warmup_steps=0, warmup_init_lr=0.1)
    assert rates(optimizer, 2) == [pytest.approx([0.3, 0.3], rel=1e-12)]


@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.0)], ids=["number", "tensor"])
def test_lr_zero_moves_nothing_even_in_the_warm_up(lr: Any) -> None:
    optimizer = Apollo(scalars(1), 0.3, sigma=1.0, weight_decay=0.1)
    optimizer.param_groups[0]["lr"] = lr
    assert rates(optimizer, 2) == [[0.0, 0.0]]


def test_resuming_within_the_warm_up_goes_to_the_first_lr() -> None:
    """A scheduler has changed lr meanwhile."""
    optimizer = Apollo(scalars(1), 0.5, sigma=1.0, warmup_steps=6)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    rates(optimizer, 3, lambda k: scheduler.step())
    resumed = Apollo(scalars(1), 0.7, sigma=1.0)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    expected = rates(optimizer, 5)
    assert rates(resumed, 5) == [pytest.approx(seen, rel=1e-12) for seen in expected]


# ---------------------------------------------------------------- gradients that are not as they should be


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_gradient_that_is_not_finite_spoils_its_own_tensor(bad: float) -> None:
    a, b = (nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = Apollo([a, b], foreach=True)
    for k in range(3):
        a.grad, b.grad = torch.ones(3), torch.ones(3)
        if k == 1:
            a.grad[0] = bad
        optimizer.step()
    assert not a[0].isfinite()
    assert b.isfinite().all()


def test_sparse_gradients_are_refused_before_anything_moves() -> None:
    dense, table = nn.Parameter(torch.ones(2)), nn.Embedding(5, 3, sparse=True)
    optimizer = Apollo([{"params": [dense]}, {"params": table.parameters()}])
    dense.grad = torch.ones(2)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match=r"Apollo does not support sparse gradients \(parameter of shape \(5, 3\)\)"):
        optimizer.step()
    assert dense.tolist() == [1.0, 1.0]


# ---------------------------------------------------------------- arguments

NAN, INF = float("nan"), float("inf")
NOT_NEGATIVE = [-0.1, NAN, INF]
BAD: list[tuple[str, type[Exception], list[Any]]] = [
    ("lr", ValueError, [*NOT_NEGATIVE, torch.ones(2), torch.tensor(1), torch.tensor(-1.0)]),
    ("lr", TypeError, ["0.1", None, True]),
    ("beta", ValueError, [-0.1, 1.0, NAN]),
    ("beta", TypeError, ["0.1", None, (0.9, 0.999)]),
    ("eps", ValueError, NOT_NEGATIVE),
    ("eps", TypeError, [None, torch.tensor(0.1)]),
    ("sigma", ValueError, [*NOT_NEGATIVE, 0.0]),
    ("sigma", TypeError, [None]),
    ("warmup_steps", ValueError, [-1]),
    ("warmup_steps", TypeError, [1.5, None, True, "500"]),
    ("warmup_init_lr", ValueError, NOT_NEGATIVE),
    ("warmup_init_lr", TypeError, ["0.1", True]),
    ("weight_decay", ValueError, NOT_NEGATIVE),
    ("weight_decay", TypeError, [None]),
    ("decoupled_weight_decay", TypeError, [None, 1, "yes"]),
    ("maximize", TypeError, [None, 0]),
    ("eps_scaling", ValueError, ["Released", None, 0.01]),
    ("foreach", TypeError, [1, "yes"]),
    ("fused", TypeError, [1, "yes"]),
]


@pytest.mark.parametrize(("name", "error", "value"), [(n, e, v) for n, e, values in BAD for v in values])
def test_bad_arguments_are_named(name: str, error: type[Exception], value: Any) -> None:
    first, second = (nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = Apollo([first])
    with pytest.raises(error, match=rf"^{name}\b.* must"):
        Apollo([second], **{name: value})
    with pytest.raises(error, match=rf"^{name}\b.* must"):
        optimizer.add_param_group({"params": [second], name: value})
    assert len(optimizer.param_groups) == 1


def test_every_argument_is_checked() -> None:
    assert {name for name, _, _ in BAD} == set(inspect.signature(Apollo).parameters) - {"params"}


def test_every_option_may_differ_between_groups() -> None:
    options = {
        "lr": 0.2, "beta": 0.5, "eps": 0.01, "sigma": 0.3, "warmup_steps": 2, "warmup_init_lr": 0.05,
        "weight_decay": 0.1, "decoupled_weight_decay": True, "eps_scaling": "literal", "maximize": True,
    }  # fmt: skip

    def steps(optimizer: Apollo, p: nn.Parameter) -> Tensor:
        for k in range(5):
            for q in optimizer.param_groups[0]["params"]:
                q.grad = torch.ones_like(q)
            p.grad = gradient(0, p.detach(), k)
            optimizer.step()
        return p.detach()

    alone, together = (nn.Parameter(start()[0]) for _ in range(2))
    wanted = steps(Apollo([alone], **options), alone)
    other = nn.Parameter(torch.ones(2))
    assert torch.equal(steps(Apollo([{"params": [other]}, {"params": [together]} | options]), together), wanted)


@pytest.mark.parametrize("stranger", [torch.optim.Adam, KoalaV])
def test_a_state_of_another_optimizer_is_refused(stranger: Callable[..., Any]) -> None:
    p = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=r"no state of Apollo.*another optimizer"):
        Apollo([p]).load_state_dict(stranger([p]).state_dict())


# ---------------------------------------------------------------- fused


FUSED = {"lr": 0.1, "sigma": 0.2, "warmup_steps": 4, "weight_decay": 0.05}


@pytest.mark.usefixtures("no_compiler")
def test_fused_without_a_compiler_warns_once(recwarn: pytest.WarningsRecorder) -> None:
    for _ in range(2):
        fused, foreach = (run(FUSED | path)[0] for path in ({"fused": True}, {"foreach": True}))
        assert all(torch.equal(x, y) for x, y in zip(fused, foreach, strict=True))
    assert [str(w.message) for w in recwarn if "fused" in str(w.message)] == [
        "fused=True needs a working compiler (RuntimeError: no compiler); using foreach"
    ]
