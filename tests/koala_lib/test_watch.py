"""A watch sees what a slow loop sees, changes nothing, and its verdict is right where the best gain is known."""

from __future__ import annotations

import copy
import csv
import io
import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from scipy import stats  # type: ignore[import-untyped]
from torch import Tensor, nn

from koala_lab import models
from koala_lab.bench.traffic import Traffic
from koala_lib import Apollo, KoalaM, KoalaPlusPlus, KoalaV, Meka
from koala_lib.reference import reference_watch
from koala_lib.watch import Watch, best_gain, promised_variance, reliability, verdict_of, watch

MOMENTA: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.8),
    "nesterov": lambda p: torch.optim.SGD(p, 0.05, momentum=0.8, nesterov=True),
    "without": lambda p: torch.optim.SGD(p, 0.05),
    "adam": lambda p: torch.optim.Adam(p, 0.01, betas=(0.8, 0.99)),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.8),
    "apollo": lambda p: Apollo(p, 0.01, beta=0.8),
}
LOSSES: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "koala_v": KoalaV, "koala_m": KoalaM, "koala_plus_plus": KoalaPlusPlus,
}  # fmt: skip


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def minibatches(steps: int, size: int = 8) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        yield (
            torch.randn(size, 6, generator=generator, dtype=torch.float64),
            torch.randint(3, (size,), generator=generator),
        )


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def weights_of(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def train(
    model: nn.Module,
    optimizer: Any,
    steps: int = 12,
    watched: Watch | None = None,
    each: Callable[[int], None] = lambda k: None,
) -> tuple[list[list[float]], list[list[float]]]:
    """Train; return the gradients, and the moves from where they were taken."""
    gradients, moves = [], []
    for k, batch in enumerate(minibatches(steps)):
        each(k)
        start, seen = weights_of(model), torch.zeros(0)

        def closure(batch: Any = batch) -> Tensor:
            nonlocal start, seen
            optimizer.zero_grad()
            losses = loss_of(model, batch)
            losses.mean().backward()  # type: ignore[no-untyped-call]
            start = weights_of(model)
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
            seen = torch.cat([g.flatten() for g in grads])
            return losses if isinstance(optimizer, KoalaV | KoalaM | KoalaPlusPlus) else losses.mean()

        if isinstance(optimizer, KoalaV | KoalaM | KoalaPlusPlus):
            optimizer.step(closure)
        else:
            loss = closure()
            if watched is not None:
                watched.observe(loss)
            optimizer.step()
        gradients.append(seen.tolist())
        moves.append((weights_of(model) - start).tolist())
    return gradients, moves


def same(rows: list[dict[str, float]], slow: list[dict[str, float]]) -> None:
    assert len(rows) == len(slow)
    for row, expected in zip(rows, slow, strict=True):
        for name in ("innovation", "whiteness", "nis", "promised"):
            assert row[name] == pytest.approx(expected[name], rel=1e-12, abs=1e-14, nan_ok=True), name


# ---- the same as the slow loop


@pytest.mark.parametrize("name", MOMENTA)
def test_it_sees_what_the_slow_loop_sees(name: str) -> None:
    model = network()
    optimizer = MOMENTA[name](model.parameters())
    watched = watch(model, optimizer, rest=0)
    gradients, moves = train(model, optimizer, watched=watched)
    slow = reference_watch(gradients, moves, [1.0 if name == "without" else 0.2] * 12)
    same(watched.table(), slow)
    products = [row["product"] for row in slow if math.isfinite(row["product"])]
    assert len(products) == 10
    assert watched.verdict().z == pytest.approx(verdict_of(products).z, rel=1e-12)
    assert [row["step"] for row in watched.table()] == list(range(1, 13))


@pytest.mark.parametrize("name", LOSSES)
def test_filters_of_the_loss_are_seen_at_the_prediction(name: str) -> None:
    model = network()
    optimizer = LOSSES[name](model.parameters())
    watched = watch(model, optimizer, rest=0)
    gradients, moves = train(model, optimizer)
    same(watched.table(), reference_watch(gradients, moves, [1.0 - 0.9 * (name == "koala_m")] * 12))


def test_koalas_promise_is_its_gain_times_the_loss_and_its_nis_is_that_of_the_loss() -> None:
    model = network()
    optimizer = KoalaV(model.parameters(), blocks="global", process_noise=0.2, measurement_noise=0.5)
    watched = watch(model, optimizer, rest=0)
    gradients, _ = train(model, optimizer)
    P = 0.1
    for row, g in zip(watched.table(), gradients, strict=True):
        P, squared = P + 0.2, sum(v * v for v in g)
        S = P * squared + 0.5
        assert row["promised"] == pytest.approx(P * squared / S * row["loss"], rel=1e-12)
        assert row["loss_nis"] == pytest.approx(row["loss"] ** 2 / S, rel=1e-12)
        P *= 0.5 / S


def test_meka_is_seen_by_its_own_filter() -> None:
    model = network()
    optimizer = Meka(model, lambda out, y: nn.functional.cross_entropy(out, y, reduction="none"), smoothing=0.0)
    watched = watch(model, optimizer, rest=0)
    mean = torch.zeros_like(weights_of(model))
    states = []
    for batch in minibatches(8):
        start = weights_of(model)
        g = torch.autograd.functional.jacobian(partial(loss_at, model, batch), start)  # type: ignore[no-untyped-call]
        states_of = [optimizer.state[p].get("displacement", torch.zeros_like(p)) for p in model.parameters()]
        moved = torch.cat([d.flatten() for d in states_of])
        b = torch.autograd.functional.hvp(partial(loss_at, model, batch), start, moved)[1]  # type: ignore[no-untyped-call]
        optimizer.step(*batch)
        states.append(optimizer.filter_state())
        innovation = g - mean - b
        mean = mean + b + states[-1]["gain"] * innovation
        row = watched.table()[-1]
        assert row["gain"] == pytest.approx(states[-1]["gain"], rel=1e-12)
        if len(states) > 1:
            assert row["innovation"] == pytest.approx(float(innovation.square().mean().sqrt()), rel=1e-9)
            S = states[-2]["variance"] + states[-1]["process_noise"] + states[-1]["measurement_noise"]
            assert row["nis"] == pytest.approx(float(innovation.square().mean()) / S, rel=1e-9)
        assert 0 < row["probability"] <= 1
        assert row["promised"] == pytest.approx(-float(g @ (weights_of(model) - start)), rel=1e-9)
        assert row["loss"] == pytest.approx(float(loss_at(model, batch, start)), rel=1e-9)


def loss_at(model: nn.Module, batch: tuple[Tensor, Tensor], v: Tensor) -> Tensor:
    sizes = [p.numel() for p in model.parameters()]
    pieces = zip(model.named_parameters(), torch.split(v, sizes), strict=True)
    values = {name: part.view_as(p) for (name, p), part in pieces}
    return nn.functional.cross_entropy(torch.func.functional_call(model, values, (batch[0],)), batch[1])


def test_muon_is_watched() -> None:
    model = nn.Linear(6, 3, bias=False).double()
    optimizer = torch.optim.Muon(model.parameters(), momentum=0.8)
    watched = watch(model, optimizer, rest=0)
    gradients, moves = train(model, optimizer)
    same(watched.table(), reference_watch(gradients, moves, [0.2] * 12))


def test_a_given_gain_and_a_scheduled_one() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.8)
    watched, told = watch(model, optimizer, rest=0), watch(model, optimizer, rest=0, gain=0.5)
    momenta = [0.5 + 0.03 * k for k in range(12)]

    def schedule(k: int) -> None:
        optimizer.param_groups[0]["momentum"] = momenta[k]

    gradients, moves = train(model, optimizer, each=schedule)
    same(watched.table(), reference_watch(gradients, moves, [1 - mu for mu in momenta]))
    same(told.table(), reference_watch(gradients, moves, [0.5] * 12))


def test_groups_with_momenta_of_their_own() -> None:
    model = network()
    groups: list[Any] = [{"params": model[0].parameters(), "momentum": 0.6}, {"params": model[2].parameters()}]
    optimizer = torch.optim.SGD(groups, 0.05, momentum=0.9)
    watched = watch(model, optimizer, rest=0)
    gradients, moves = train(model, optimizer)
    cut = sum(p.numel() for p in model[0].parameters())
    parts = [
        reference_watch([g[s] for g in gradients], [d[s] for d in moves], [k] * 12)
        for s, k in ((slice(cut), 0.4), (slice(cut, None), 0.1))
    ]
    sizes = cut, len(gradients[0]) - cut
    for row, *both in zip(watched.table(), *parts, strict=True):
        squared = sum(n * part["innovation"] ** 2 for n, part in zip(sizes, both, strict=True))
        assert row["innovation"] == pytest.approx(math.sqrt(squared / sum(sizes)), rel=1e-12, nan_ok=True)
        assert math.isnan(row["gain"])
    assert math.isnan(watched.verdict().best_momentum)


def test_a_part_of_the_model_frozen_weights_and_weights_that_join() -> None:
    model = network()
    model[0].bias.requires_grad_(False)
    optimizer = torch.optim.SGD(model[0].parameters(), 0.05, momentum=0.8)
    watched, part = watch(model, optimizer, rest=0), watch(model[0], optimizer, rest=0)
    n = 6 * 5
    gradients, moves = train(model, optimizer, steps=6)
    same(watched.table(), reference_watch([g[:n] for g in gradients], [d[:n] for d in moves], [0.2] * 6))
    assert str(part.table()) == str(watched.table())
    optimizer.add_param_group({"params": model[2].parameters(), "momentum": 0.8})
    for p in model.parameters():
        p.grad = None
    gradients, moves = train(model, optimizer, steps=6)
    keep = [i for i in range(len(gradients[0])) if not n <= i < n + 5]
    slow = reference_watch([[g[i] for i in keep] for g in gradients], [[d[i] for i in keep] for d in moves], [0.2] * 6)
    same(watched.table()[6:], slow)


def test_gradients_that_add_up_are_seen_once_per_step() -> None:
    model, whole = network(), network()
    optimizers = [torch.optim.SGD(m.parameters(), 0.05, momentum=0.8) for m in (model, whole)]
    watches = [watch(m, o, rest=0) for m, o in zip((model, whole), optimizers, strict=True)]
    for x, y in minibatches(6):
        for m, o, parts in zip((model, whole), optimizers, (2, 1), strict=True):
            o.zero_grad()
            for i in range(parts):
                (loss_of(m, (x[i::parts], y[i::parts])).mean() / parts).backward()  # type: ignore[no-untyped-call]
            o.step()
    for few, one in zip(*(w.table() for w in watches), strict=True):
        assert few == pytest.approx(one, rel=1e-9, nan_ok=True)


# ---- it changes nothing


def fingerprint(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    state = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
    held = [v for g in optimizer.param_groups for v in g.values() if isinstance(v, Tensor)]
    return [*model.parameters(), *state, *held, torch.get_rng_state()]


@pytest.mark.parametrize("name", [*MOMENTA, *LOSSES])
def test_training_is_the_same_to_the_bit(name: str) -> None:
    make, ends = (MOMENTA | LOSSES)[name], []
    for how in ("without", "watched", "closed in between"):
        model = network()
        optimizer = make(model.parameters())
        torch.manual_seed(3)
        watched = None if how == "without" else watch(model, optimizer, rest=0)

        def end(k: int, how: str = how, watched: Watch | None = watched) -> None:
            if how == "closed in between" and k == 6 and watched is not None:
                watched.close()

        train(model, optimizer, each=end)
        ends.append(fingerprint(model, optimizer))
        if watched is not None:
            assert len(watched.table()) == (12 if how == "watched" else 6)
            assert "watch" not in str(optimizer.state_dict())
    for other in ends[1:]:
        assert len(other) == len(ends[0])
        assert all(torch.equal(a, b) for a, b in zip(ends[0], other, strict=True))


def test_meka_is_the_same_to_the_bit() -> None:
    ends = []
    for watching in (False, True):
        model = network()
        optimizer = Meka(model, lambda out, y: nn.functional.cross_entropy(out, y, reduction="none"))
        with watch(model, optimizer) if watching else io.StringIO():
            for batch in minibatches(8):
                optimizer.step(*batch)
        assert optimizer._seen is None
        ends.append(fingerprint(model, optimizer))
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_a_copy_and_a_loaded_state_are_not_watched_and_go_on() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.8)
    watched = watch(model, optimizer, rest=0)
    train(model, optimizer, steps=5)
    other, twin = copy.deepcopy((model, optimizer))
    train(other, twin, steps=5)
    assert len(watched.table()) == 5
    optimizer.load_state_dict(optimizer.state_dict())
    train(model, optimizer, steps=5)
    assert len(watched.table()) == 10


def test_what_is_not_finite_is_left_out() -> None:
    model = network()
    optimizer = KoalaM(model.parameters())  # leaves such a step out, too
    watched = watch(model, optimizer, rest=0)
    handles: list[Any] = []

    def each(k: int) -> None:
        if k == 5:
            handles.append(next(model.parameters()).register_hook(lambda g: g * math.inf))  # type: ignore[no-untyped-call]
        if k == 6:
            handles[0].remove()

    train(model, optimizer, steps=12, each=each)
    rows = watched.table()
    assert [k for k, row in enumerate(rows) if math.isnan(row["innovation"])] == [0, 5]
    assert [k for k, row in enumerate(rows) if math.isnan(row["whiteness"])] == [0, 1, 5, 6]
    assert math.isfinite(watched.verdict().z)
    assert watched.verdict().pairs == 8


# ---- what it says


BEST = 0.2
R = BEST**2 / (1 - BEST)  # k^2 / (1 - k) = q / sigma


def draws(steps: int, seeds: int, n: int) -> tuple[Tensor, Tensor]:
    """Minima that move by N(0, R), and noises N(0, 1) of gradients, (steps, seeds, n)."""
    generator = torch.Generator().manual_seed(0)
    moves, noises = torch.randn(2, steps, seeds, n, generator=generator, dtype=torch.float64)
    return torch.cumsum(math.sqrt(R) * moves, 0), noises


def drifting(gain: float, rate: float, minima: Tensor, noises: Tensor) -> Watch:
    """Train on the noisy quadratic 1/2 |x - c_t|^2 whose minimum moves: the gradient is a random walk if x rests."""
    x = nn.ParameterList([torch.zeros(minima.shape[-1], dtype=torch.float64)])
    optimizer = torch.optim.SGD(x.parameters(), rate, momentum=1 - gain)
    watched = watch(x, optimizer, rest=0, window=len(minima))
    for c, noise in zip(minima, noises, strict=True):
        x[0].grad = x[0].detach() - c + noise
        optimizer.step()
    return watched


def many(gain: float, rate: float, minima: Tensor, noises: Tensor) -> list[list[float]]:
    """The products of consecutive innovations in the same trainings, all seeds side by side."""
    x, m, buffer, weight, last = (torch.zeros_like(minima[0]) for _ in range(5))
    products = []
    for t, (c, noise) in enumerate(zip(minima, noises, strict=True)):
        g = x - c + noise
        innovation, weight = g - m, (1 - gain) * weight + gain
        products += [(innovation * last).sum(1)] if t > 1 else []
        last, m, buffer = innovation, m + gain / weight * innovation, (1 - gain) * buffer + g
        x = x - rate * buffer
    return torch.stack(products, 1).tolist()


@pytest.mark.parametrize(
    ("gain", "says"), [(BEST, "right"), (BEST / 3, "too large"), (3 * BEST, "too small"), (1.0, "too small")]
)
@pytest.mark.parametrize("rate", [0.0, 0.002])
def test_the_verdict_is_right_in_95_per_cent_of_the_seeds(gain: float, says: str, rate: float) -> None:
    """The best gain is that of the scalar Kalman filter with q = R, sigma = 1; 16 weights, 120 steps, level 1 %."""
    seeds = 1000
    minima, noises = draws(120, seeds, 16)
    products = many(gain, rate, minima, noises)
    right = [verdict_of(row).momentum == says for row in products]
    assert stats.binomtest(sum(right), seeds).proportion_ci(0.98, "exact").low > 0.95, sum(right)
    for seed in range(3):  # and these are the watch's
        verdict = drifting(gain, rate, minima[:, seed], noises[:, seed]).verdict()
        assert verdict.z == pytest.approx(verdict_of(products[seed]).z, rel=1e-9)
        assert (verdict.momentum == says) == right[seed]


def test_the_level_of_the_test_is_as_stated_and_its_power_grows() -> None:
    generator = torch.Generator().manual_seed(0)
    c = torch.randn(4000, 100, generator=generator, dtype=torch.float64)
    heavy = c * torch.rand(c.shape, generator=generator, dtype=c.dtype) ** -0.4
    for products in (c, heavy):
        wrong = sum(verdict_of(row).momentum != "right" for row in products.tolist())
        assert stats.binomtest(wrong, 4000, 0.01, "greater").pvalue > 0.001, wrong
        assert products is heavy or wrong > 15
    assert sum(verdict_of(row).momentum == "too large" for row in (c + 1).tolist()) > 3900


@pytest.mark.parametrize("gain", [0.05, 0.2, 0.6, 1.0])
@pytest.mark.parametrize("r", [0.001, 0.05, 2.0])
def test_the_best_gain_is_found_from_any_other(gain: float, r: float) -> None:
    """From the covariances of the steady state, by their recursion and not by the formula under test."""
    p = 1.0
    for _ in range(2000):
        p = (1 - gain) ** 2 * p + gain**2 + r
    rho = ((1 - gain) * p - gain) / (p + 1)
    kalman = 1.0
    for _ in range(2000):
        kalman = kalman / (kalman + 1) + r
    assert best_gain(gain, rho) == pytest.approx(kalman / (kalman + 1), rel=1e-9)
    assert promised_variance(kalman / (kalman + 1), 2 + r) == pytest.approx(kalman + 1, rel=1e-9)


def test_the_best_momentum_and_nis_on_the_drifting_minimum() -> None:
    minima, noises = (numbers[:, 0] for numbers in draws(400, 1, 400))
    from_small, right, from_large = (drifting(k, 0.0, minima, noises).scalars() for k in (BEST / 4, BEST, 4 * BEST))
    for seen in (from_small, right, from_large):
        assert abs(seen["best_momentum"] - (1 - BEST)) < 0.02
    assert abs(right["nis"] - 1) < 0.01
    assert from_small["nis"] > 1.1


def test_reliability_counts() -> None:
    rows = reliability([(1.0, True), (0.95, True), (0.5, False), (0.5, True)], bins=4)
    assert [row["n"] for row in rows] == [2, 2]
    assert [row["observed"] for row in rows] == [0.5, 1.0]


def test_promised_and_delivered_and_fresh() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 1e-4)
    watched = watch(model, optimizer, rest=0)
    losses, after = [], []
    for batch in minibatches(6):
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        watched.observe(loss)
        loss.mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        again = loss_of(model, batch)
        watched.after(again)
        losses.append(float(loss.detach().mean()))
        after.append(float(again.detach().mean()))
    rows = watched.table()
    assert [row["delivered"] for row in rows] == pytest.approx([a - b for a, b in zip(losses, after, strict=True)])
    assert [row["fresh"] for row in rows[:-1]] == pytest.approx([a - b for a, b in pairwise(losses)])
    assert watched.scalars()["delivered_share"] == pytest.approx(1, abs=1e-3)


def test_the_table_is_a_csv_and_scalars_are_numbers() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.8)
    watched = watch(model, optimizer, rest=0, history=5, window=4)
    assert watched.table() == []
    assert watched.verdict().momentum == "undecided"
    assert math.isnan(watched.scalars()["z"])
    train(model, optimizer, watched=watched)
    rows = watched.table()
    assert [row["step"] for row in rows] == [8, 9, 10, 11, 12]
    file = io.StringIO()
    writer = csv.DictWriter(file, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    assert len(file.getvalue().splitlines()) == 6
    assert all(isinstance(value, float) for value in watched.scalars().values())


# ---- what it costs


def test_it_touches_and_does_less_than_a_tenth_of_a_training_step() -> None:
    model = models.build("resnet18", num_classes=10, in_channels=3, image_size=32)
    x, y = torch.randn(8, 3, 32, 32), torch.randint(10, (8,))
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    counts = []
    for watching in (False, True):
        watched = watch(model, optimizer) if watching else None
        for k in range(3):
            traffic = Traffic()
            with traffic if k == 2 else torch.enable_grad():
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        counts.append((sum(o["reads"] + o["writes"] for o in traffic.operations), len(traffic.operations)))
        assert watched is None or len(watched.table()) == 3
    (elements, operations), (more_elements, more_operations) = counts
    assert 0 < more_elements - elements < 0.1 * elements
    assert 0 < more_operations - operations < 0.1 * operations


def test_a_small_network_is_watched_in_windows_with_rests_between() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.8)
    watched = watch(model, optimizer, window=5)
    gradients, moves = train(model, optimizer, steps=60)
    steps = [int(row["step"]) for row in watched.table()]
    first = [k for k in steps if k - 1 not in steps]
    assert first == [1, 20, 39, 58]  # 15 operations of 4 tensors' 40: 5 steps, and 14 without
    second = reference_watch(gradients[19:24], moves[19:24], [0.2] * 5)
    same([row for row in watched.table() if 20 <= row["step"] < 25], second)


@pytest.mark.parametrize("coordinates", [200, 1000])
def test_a_sample_of_the_weights_speaks_for_all(coordinates: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 24, 3), nn.Flatten(), nn.Linear(384, 10))
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    part, whole = (watch(model, optimizer, rest=0, coordinates=c) for c in (coordinates, 10**6))
    for _ in range(30):
        x, y = torch.randn(16, 3, 8, 8).to(memory_format=torch.channels_last), torch.randint(10, (16,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    seen, true = part.scalars(), whole.scalars()
    assert part._sample is not None
    assert len(part._sample.scale) < 1.2 * coordinates
    assert seen["innovation"] == pytest.approx(true["innovation"], rel=0.2)
    assert seen["promised"] == pytest.approx(true["promised"], rel=0.35)
    assert seen["whiteness"] == pytest.approx(true["whiteness"], abs=0.05)


# ---- errors


def test_mistakes_are_named_in_a_sentence() -> None:
    model, other = network(), network()
    nothing: Any = None
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for make, message in (
        (lambda: watch(nothing, optimizer), "model must be a torch.nn.Module"),
        (lambda: watch(model, nothing), "optimizer must be a torch.optim.Optimizer, got a NoneType"),
        (lambda: watch(other, optimizer), "steps no parameter of this model"),
        (lambda: watch(model, optimizer, window=0), "window must be"),
        (lambda: watch(model, optimizer, level=0.0), "level must be"),
        (lambda: watch(model, optimizer, gain=1.5), "gain must be a number > 0 and <= 1, got 1.5"),
        (lambda: watch(model, optimizer, rest=-1), "rest must be"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            make()  # type: ignore[no-untyped-call]
    embedding = nn.Embedding(4, 2, sparse=True)
    sparse = torch.optim.SGD(embedding.parameters(), 0.1)
    watch(embedding, sparse)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse gradient"):
        sparse.step()
