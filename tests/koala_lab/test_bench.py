"""The benchmark's bookkeeping, on a clock that is ours, and its counts. No test depends on how fast anything is."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from koala_lab import runs
from koala_lab.baselines.registry import OPTIMIZERS
from koala_lab.bench import compiled as bench_fused
from koala_lab.bench import meka as bench_meka
from koala_lab.bench import small, timing
from koala_lab.bench import steps as bench
from koala_lab.bench.timing import interleave, now
from koala_lab.bench.traffic import Factory, Traffic, memory, peak, step, traffic
from koala_lab.config import RunConfig
from koala_lab.runs.training import TrainingRun, train
from koala_lib.optim import KoalaM, KoalaPlusPlus

# ---------------------------------------------------------------- time


class Clock:
    """Goes on only when somebody takes time."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def take(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    ours = Clock()
    for module in (bench, timing):
        monkeypatch.setattr(module, "now", lambda device: ours.now)
    monkeypatch.setattr(timing, "time", ours)  # of which only the monotonic clock is used
    return ours


class Slow(torch.optim.SGD):
    """Takes some seconds a step, and others in its first one."""

    def __init__(self, params: list[Tensor], clock: Clock, seconds: Callable[[list[Tensor]], float]) -> None:
        super().__init__(params, lr=0.0)
        self.clock, self.seconds, self.params = clock, seconds, params
        self.first = True

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        self.clock.take(1000.0 if self.first else self.seconds(self.params))
        self.first = False
        return loss

    def train(self, images: Tensor, labels: Tensor) -> Any:
        return self.step()


def test_jobs_take_turns_and_the_first_round_does_not_count(clock: Clock) -> None:
    calls = []

    def job(name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            calls.append(name)
            clock.take(seconds if len(calls) > 2 else 100.0)

        return run

    times = interleave({"a": job("a", 1.0), "b": job("b", 2.0)}, 3)
    assert calls == ["a", "b"] * 4
    assert times == {"a": [1.0] * 3, "b": [2.0] * 3}
    calls.clear()
    assert len(interleave({"a": job("a", 1.0)}, 1, seconds=202.5)["a"]) == 4  # 200 for the first two calls


def test_a_quick_job_is_called_more_often_in_its_turn(clock: Clock) -> None:
    calls: list[str] = []

    def job(name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            calls.append(name)
            clock.take(100.0 if calls.count(name) == 1 else seconds)

        return run

    times = interleave({"a": job("a", 1.0), "b": job("b", 7.0)}, 2, least=2.5)
    assert "".join(calls) == "aabb" + "aaab" * 3
    assert times == {"a": [1.0] * 2, "b": [7.0] * 2}


@pytest.mark.parametrize(("threads", "counts"), [(1, False), (2, True)])
def test_waiting_takes_no_time_of_a_single_thread(threads: int, counts: bool) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        start = now()
        time.sleep(0.05)
        assert (now() - start >= 0.05) is counts
    finally:
        torch.set_num_threads(before)


def test_a_ratio_is_that_of_the_same_round(clock: Clock) -> None:
    rounds = {"base": iter([2.0, 20.0, 4.0]), "other": iter([6.0, 60.0, 12.0])}  # a machine that changes its speed
    slow = {n: lambda p, times=times: Slow(p, clock, lambda _: next(times)) for n, times in rounds.items()}
    base, other = bench.measure(bench.synthetic(32), slow, base="base", seconds=0.0)
    assert (base["ratio"], base["ms"]) == (1.0, 4000.0)
    assert (other["ratio_q1"], other["ratio"], other["ratio_q3"]) == (3.0, 3.0, 3.0)
    assert (other["ms_q1"], other["ms"], other["ms_q3"]) == (9000.0, 12000.0, 36000.0)


@pytest.mark.parametrize("power", [1.0, 1.3])
def test_the_exponent_is_that_above_the_fixed_overhead(clock: Clock, power: float) -> None:
    def seconds(params: list[Tensor]) -> float:
        n = sum(p.numel() for p in params)
        return 5.0 + (0.0 if n == 4096 else 1e-3 * n**power)

    sizes = (10_000, 50_000, 100_000, 200_000)
    slow = {"ours": lambda p: Slow(p, clock, seconds), "constant": lambda p: Slow(p, clock, lambda _: 1.0)}
    rows = bench.sweep(slow, sizes, tensors=2, repetitions=3, rounds=2)
    assert [r["parameters"] for r in rows if r["repetition"] == 1 and r["optimizer"] == "ours"] == [4096, *sizes]
    assert bench.exponents(rows, "ours", smallest=50_000) == pytest.approx(dict.fromkeys(range(3), power))
    with pytest.raises(ValueError, match=r"two sizes from 150000 on, got \[200000\]"):
        bench.exponents(rows, "ours", smallest=150_000)


def test_the_overhead_of_a_training_step_leaves_forward_and_backward_out(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    gradients = iter([50.0] * 2 + [10.0, 14.0] * 3)  # the noise of forward and backward must not reach the overhead

    def cross_entropy(logits: Tensor, labels: Tensor, reduction: str) -> Tensor:
        assert (logits.shape, labels.shape, reduction) == ((2, 100), (2,), "none")
        clock.take(next(gradients))
        return logits.sum(1)

    monkeypatch.setattr(nn.functional, "cross_entropy", cross_entropy)
    slow = {n: lambda p, s=s: Slow(p, clock, lambda _: s) for n, s in {"base": 1.0, "other": 3.0}.items()}
    base, other = bench.training_step("resnet8", batch_size=2, rounds=3, contenders=slow)
    assert (base["seconds"], base["optimizer_ms"], base["overhead_percent"]) == (11.0, 1000.0, 0.0)
    assert (other["seconds"], other["optimizer_ms"]) == (17.0, 3000.0)
    assert other["overhead_percent"] == pytest.approx(100 * 2 / 11)
    assert other["whole_percent"] == pytest.approx(100 * 6 / 11)


def test_a_training_step_runs_with_the_real_optimizers() -> None:
    rows = bench.training_step("resnet8", batch_size=2, rounds=2)
    assert [r["optimizer"] for r in rows] == ["SGD", "Adam", "KOALA-V", "KOALA-M", "KOALA-M, compiled"]
    assert all(0 < r["optimizer_ms"] < 1e3 * r["seconds"] for r in rows)


def test_an_optimizer_that_differentiates_the_gradients_gets_their_graph() -> None:
    seen: dict[str, list[bool]] = {"plain": [], "second": []}

    class Watching(torch.optim.SGD):
        name = ""

        def step(self, closure: Any = None) -> Any:
            loss = super().step(closure)
            seen[self.name].append(self.param_groups[0]["params"][0].grad.requires_grad)
            return loss

    def create(params: list[Tensor], name: str) -> Watching:
        optimizer = Watching(params, lr=0.0)
        optimizer.name = name
        return optimizer

    contenders = {name: lambda p, name=name: create(p, name) for name in seen}
    bench.training_step("resnet8", batch_size=2, rounds=2, contenders=contenders, second_order=["second"])
    assert seen == {"plain": [False] * 3, "second": [True] * 3}


# ---------------------------------------------------------------- memory


def test_memory_of_a_training_step_is_counted_in_its_second_step() -> None:
    contenders = {
        "sgd": lambda p: torch.optim.SGD(p, 0.0, momentum=0.9),
        "adam": lambda p: torch.optim.Adam(p, 0.0, foreach=True),
        "adahessian": lambda p: OPTIMIZERS["adahessian"](p, lr=1e-9),
    }
    rows = bench.training_memory("resnet8", batch_size=2, contenders=contenders, second_order=["adahessian"])
    peak = {r["optimizer"]: r["peak"] / r["weights"] for r in rows}
    assert rows[0]["weights"] == 4 * sum(p.numel() for p in bench.image_network("resnet8").parameters())
    assert 1 < peak["sgd"] <= peak["adam"] < peak["adahessian"], "gradients alone are as large as the weights"


def test_traffic_counts_what_operations_read_write_and_keep() -> None:
    a, b = torch.ones(1000), torch.ones(1000)
    with Traffic() as seen:
        a.add_(b)  # reads 2, writes 1
        half = a[:500].view(50, 10)  # free
        c = torch.where(torch.tensor(True), half, 0.0)  # reads 1/2, writes 1/2
        d = a - c.view(-1)[0]  # reads 1, writes 1
        del c, d
        torch._foreach_mul_([a, b], 2.0)  # reads 2, writes 2
    big = [(r["operation"], r["reads"], r["writes"]) for r in seen.operations if r["reads"] > 100]
    assert big == [("add_", 2000, 1000), ("where", 502, 500), ("sub", 1001, 1000), ("_foreach_mul_", 2000, 2000)]
    assert 6000 <= seen.peak < 6100  # c and d, and a few scalars


def test_traffic_counts_memory_once() -> None:
    x, w = torch.ones(10, 20, 30), torch.ones(30, 40)
    with Traffic() as seen:
        y = x @ w  # a matrix product and a view of it whose signature does not say so
        del y
    assert seen.peak == 4 * 10 * 20 * 40
    with Traffic() as seen:
        zero = torch._efficientzerotensor((1000,))
    assert (len(zero), seen.peak) == (1000, 0)


def allocated(job: Callable[[], object]) -> tuple[int, int]:
    """Bytes that torch's allocator gave out at most at once, and in the end."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        job()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak, alive


FOREACH = {
    "KOALA-M, foreach": lambda p: KoalaM(p, 1e-9, foreach=True),
    "KOALA++, foreach": lambda p: KoalaPlusPlus(p, 1e-9, foreach=True),
}


@pytest.mark.parametrize("create", [*bench.CONTENDERS.values(), *FOREACH.values()], ids=[*bench.CONTENDERS, *FOREACH])
def test_the_peak_is_that_of_the_allocator(create: Factory) -> None:
    params = bench.synthetic(400_000, tensors=4)
    optimizer = create(params)
    step(optimizer)
    peak, alive = allocated(lambda: step(optimizer))
    assert alive == 0, "a second step leaves nothing behind"
    assert traffic(create, params).peak == pytest.approx(peak, rel=0.01, abs=5000)


@pytest.mark.parametrize(("name", "reads", "writes"), [("SGD momentum, fused", 3, 2), ("AdamW, fused", 4, 3)])
def test_traffic_of_the_fused_optimizers_is_that_of_their_formulas(name: str, reads: int, writes: int) -> None:
    params = bench.synthetic(40_000)
    operations = traffic(bench.CONTENDERS[name], params).operations
    assert sum(r["reads"] for r in operations) == pytest.approx(reads * 40_000, rel=0.01)
    assert sum(r["writes"] for r in operations) == pytest.approx(writes * 40_000, rel=0.01)


@pytest.mark.parametrize("foreach", [None, True])
def test_the_traffic_of_koala_plus_plus(foreach: bool | None) -> None:
    """A step reads and writes every weight, gradient and vector a fixed number of times, in few operations per list."""

    def create(params: list[nn.Parameter]) -> KoalaPlusPlus:
        return KoalaPlusPlus(params, 1e-9, foreach=foreach)

    operations = traffic(create, bench.synthetic(4_000_000, tensors=4)).operations
    assert {r["phase"] for r in operations if max(r["reads"], r["writes"]) > 1000} == {"update"}
    assert sum(r["writes"] for r in operations) == pytest.approx(10 * 4_000_000, rel=0.01)
    assert sum(r["reads"] for r in operations) == pytest.approx(23 * 4_000_000, rel=0.01)
    few, many = (len(traffic(create, bench.synthetic(1000 * n, tensors=n)).operations) for n in (10, 20))
    assert many - few == 3 * 10, "sums of three products are all that a tensor of a list asks for by itself"


def test_the_phases_of_koala_are_all_of_its_step() -> None:
    params = bench.synthetic(2_000_000)
    operations = traffic(bench.CONTENDERS["KOALA-M"], params).operations
    assert {r["phase"] for r in operations} == {"predict", "update"}
    written = {
        (name, phase): sum(r["writes"] for r in operations if (r["operation"], r["phase"]) == (name, phase))
        for name in ("_foreach_mul_", "_foreach_addcmul_")
        for phase in ("predict", "update")
    }
    # p times kappa before the gradient is taken; x and p along the gradient afterwards
    assert written["_foreach_mul_", "predict"] == 2_000_000
    assert written["_foreach_addcmul_", "update"] == 2 * 2_000_000
    assert written["_foreach_mul_", "update"] == written["_foreach_addcmul_", "predict"] == 0


def test_state_is_counted_to_the_byte() -> None:
    params = bench.with_gradients([nn.Parameter(torch.ones(10, 7)), nn.Parameter(torch.ones(30))])
    rows = {r["optimizer"]: r for r in memory(params, bench.CONTENDERS)}
    assert {name: r["tensors"] for name, r in rows.items()} == {
        "SGD momentum, foreach": 1,
        "SGD momentum, fused": 1,
        "AdamW, foreach": 2,
        "AdamW, fused": 2,
        "KOALA-V": 0,
        "KOALA-V, weight decay": 0,
        "KOALA-M, fixed Q": 1,
        "KOALA-M": 2,
        "KOALA-M, weight decay": 2,
        "KOALA-M, released": 2,
        "APOLLO": 2,
        "APOLLO, decoupled decay": 3,
    }
    assert rows["SGD momentum, fused"]["state_bytes"] == 400
    assert rows["AdamW, fused"]["state_bytes"] == 2 * 400 + 2 * 4  # a step counter for each tensor
    assert rows["APOLLO"]["state_bytes"] == rows["AdamW, fused"]["state_bytes"]
    assert rows["KOALA-V"]["state_bytes"] == 5 * 8  # the filter, in float64
    assert rows["KOALA-M"]["state_bytes"] == 2 * 400 + 7 * 8
    assert rows["KOALA-M"]["state"] == pytest.approx(2 + 56 / 400)


def test_one_filter_in_two_groups_counts_once() -> None:
    def create(params: list[Tensor]) -> KoalaM:
        return KoalaM([{"params": params[:1]}, {"params": params[1:], "weight_decay": 0.1}], 1e-9)

    [row] = memory(bench.synthetic(100, tensors=2), {"two groups": create})
    assert row["state_bytes"] == 2 * 400 + 56


# ---------------------------------------------------------------- MEKA


@pytest.mark.parametrize("network", bench_meka.NETWORKS)
def test_what_is_compared_with_the_moments_is_the_same_quantity(network: str) -> None:
    torch.manual_seed(0)
    jobs = bench_meka.moment_jobs(*bench_meka.problem(network, 3))
    gradient, product, structured, along, vmap = (jobs[method]() for method in bench_meka.METHODS)
    for field in ("slope_variance", "curvature", "curvature_variance"):
        torch.testing.assert_close(getattr(along, field), getattr(vmap, field), rtol=1e-3, atol=0)
    for moments in (structured, vmap):
        for mean, expected in ((moments.gradient, gradient), (moments.hvp, product)):
            largest = max(float(t.abs().max()) for t in expected)
            for ours, t in zip(mean.values(), expected, strict=True):
                torch.testing.assert_close(ours, t, rtol=0, atol=1e-4 * largest)
    torch.testing.assert_close(structured.gradient_variance, vmap.gradient_variance, rtol=1e-3, atol=0)
    torch.testing.assert_close(structured.hvp_variance, vmap.hvp_variance, rtol=1e-3, atol=0)


def test_moments_are_compared_in_the_same_round(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    # A machine that changes its speed: counting memory, a first and a second call, a first round, and three that count.
    speeds = iter([9.0, 9.0, 9.0, 9.0, 1.0, 10.0, 2.0])
    now = [0.0]

    def jobs(*_: object) -> dict[str, Callable[[], object]]:
        def job(factor: float) -> Callable[[], None]:
            def run() -> None:
                now[0] = next(speeds) if factor == 1.0 else now[0]
                clock.take(factor * now[0])

            return run

        return {name: job(factor) for name, factor in zip(bench_meka.METHODS, (1.0, 2.0, 3.0, 4.0, 5.0), strict=True)}

    monkeypatch.setattr(bench_meka, "moment_jobs", jobs)
    rows = bench_meka.moments("mlp_100", 2, rounds=3, seconds=0.0)
    assert [r["method"] for r in rows] == list(bench_meka.METHODS)
    assert [r["ratio_q1"] for r in rows] == [r["ratio_q3"] for r in rows] == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert [r["ms"] for r in rows] == [2000.0, 4000.0, 6000.0, 8000.0, 10000.0]


def test_memory_of_structured_moments_grows_with_the_activations_alone() -> None:
    small, large = ({r["method"]: r for r in bench_meka.moments("mlp_100", b, rounds=2, seconds=0)} for b in (8, 32))
    of_one = {name: (large[name]["peak"] - small[name]["peak"]) / 24 for name in bench_meka.METHODS}
    weights = small["vmap"]["weights"]
    assert weights == 4 * 79_510
    assert of_one["structured"] < 0.02 * weights
    assert of_one["vmap"] > 2 * weights, "a gradient and a product of each sample"


# Not of "along": what torch keeps of a forward-mode pass is freed where the count does not see it.
@pytest.mark.parametrize("method", [m for m in bench_meka.METHODS if m != "along"])
def test_the_peak_of_the_moments_is_that_of_the_allocator(method: str) -> None:
    torch.manual_seed(0)
    job = bench_meka.moment_jobs(*bench_meka.problem("cnn_3c3d", 3))[method]
    job()
    assert peak(job) == pytest.approx(allocated(job)[0], rel=0.05)


def test_flops_are_those_of_the_products() -> None:
    a, b, c = torch.ones(2, 3, 4), torch.ones(2, 4, 5), torch.ones(2, 3, 5)
    assert bench_meka.flops(lambda: (a @ b, c.baddbmm_(a, b), a + 1)) == 2 * 2 * 2 * 3 * 4 * 5


@pytest.mark.parametrize(("network", "ratio"), [("mlp_100", 2.5), ("cnn_3c3d", 3.2), ("resnet32_gn", 3.0)])
def test_structured_moments_need_about_three_times_the_arithmetic_of_a_gradient(network: str, ratio: float) -> None:
    jobs = bench_meka.moment_jobs(*bench_meka.problem(network, 2))
    work = {method: bench_meka.flops(jobs[method]) for method in ("plain gradient", "structured")}
    assert work["structured"] / work["plain gradient"] == pytest.approx(ratio, abs=0.1)


def test_whole_steps_by_repetition(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"sgd": 2.0, "fixed": 3.0, "pi": 8.0}
    arms = {n: lambda m, s=s: Slow(list(m.parameters()), clock, lambda _: s).train for n, s in seconds.items()}
    monkeypatch.setattr(bench_meka, "STEPPERS", arms)
    rows = bench_meka.steps("mlp_100", 4, repetitions=2, seconds=0.0)
    assert [(r["repetition"], r["optimizer"]) for r in rows] == [(i, n) for i in (0, 1) for n in seconds]
    assert rows[2] == {
        "network": "mlp_100", "batch_size": 4, "repetition": 0, "optimizer": "pi", "ms": 8000.0, "ratio": 4.0
    }  # fmt: skip
    assert bench_meka.arms(rows, "mlp_100")["fixed"] == {0: 1.5, 1: 1.5}
    assert bench_meka.arms(rows, "cnn_3c3d") == {}


def test_whole_steps_are_steps() -> None:
    torch.manual_seed(0)
    for create in bench_meka.STEPPERS.values():
        model, images, labels = bench_meka.problem("mlp_100", 4)
        before = [p.clone() for p in model.parameters()]
        create(model)(images, labels)
        assert all(not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_a_network_that_the_paper_does_not_have_is_refused() -> None:
    with pytest.raises(ValueError, match="network 'resnet18' is unknown; known are mlp_100, cnn_3c3d, resnet32_gn"):
        bench_meka.moments("resnet18")


# ---------------------------------------------------------------- the command


def test_meka_is_measured_on_request_and_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KOALA_RESULTS", str(tmp_path))

    def moments(network: str, batch_size: int, device: str) -> list[dict[str, Any]]:
        return [{"network": network, "batch_size": batch_size, "method": "structured", "ratio": 3.0}]

    def steps(network: str, device: str) -> list[dict[str, Any]]:
        shared = {"network": network, "batch_size": 128, "optimizer": "pi", "ms": 1.0}
        return [{**shared, "repetition": i, "ratio": ratio} for i, ratio in enumerate((1.0, 5.0, 7.0))]

    monkeypatch.setattr(bench_meka, "moments", moments)
    monkeypatch.setattr(bench_meka, "steps", steps)
    bench.main(meka=True)
    kept = bench.stored()
    assert {name: len(section["rows"]) for name, section in kept.items()} == {"moments": 9, "meka_step": 9}
    assert set(kept["moments"]["provenance"]) == {"device", "kernels", "cores", "threads", "load", "versions"}
    assert "resnet32_gn         128        pi 1.0    5.0" in capsys.readouterr().out


def test_sections_are_kept_with_their_provenance(
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("KOALA_RESULTS", str(tmp_path))
    assert bench.stored() == {}
    names = {goal.optimizer for goal in bench_fused.GOALS} | {goal.base for goal in bench_fused.GOALS}
    one = {"ms": 1.0, "ratio": 1.0, "ratio_q1": 0.9, "ratio_q3": 1.2}
    monkeypatch.setenv("KOALA_FIGURES", str(figures := tmp_path_factory.mktemp("figures")))
    monkeypatch.setattr(bench, "measure", lambda *_, **__: [{"optimizer": name} | one for name in sorted(names)])
    tiny = [{"network": "MLP", "optimizer": name, "us": 1.0} for name in small.CONTENDERS]
    monkeypatch.setattr(small, "measure", lambda: tiny)
    monkeypatch.setattr(bench_fused, "bandwidth", lambda *_, **__: {"gigabytes_a_second": 9.0})
    for section in ("flatness", "compile_time"):
        monkeypatch.setattr(bench_fused, section, lambda *_, **__: [{"optimizer": "one"}])
    monkeypatch.setattr(bench, "memory", lambda *_, **__: [{"optimizer": "one", "state": 2.0}])
    trained = {"optimizer": "KOALA-M, compiled", "seconds": 3.0, "overhead_percent": 2.5}
    sweep = [{"repetition": 0, "parameters": n, "optimizer": "one", "ms": n / 1e6} for n in (1, *bench.SIZES)]
    monkeypatch.setattr(bench, "sweep", lambda *_, **__: sweep)
    monkeypatch.setattr(bench, "training_step", lambda *_, **__: [trained])
    bench.main(whole=True)
    assert bench.stored()["training_step"]["rows"] == [trained]
    monkeypatch.setattr(bench, "training_step", None)  # not called
    monkeypatch.setattr(bench, "memory", lambda *_, **__: [{"optimizer": "two", "state": 5.0}])
    bench.main()
    kept = bench.stored("cpu")
    assert set(kept) == {"step", "small", "bandwidth", "flatness", "compile", "memory", "sweep", "training_step"}
    assert {r["threads"] for r in kept["step"]["rows"]} == {1, os.cpu_count()}
    assert {p.name for p in (figures / "koala").iterdir()} == {
        f"cost_compiled.{e}" for e in ("png", "pdf", "json", "csv")
    }
    assert kept["memory"]["rows"][0] == {"model": "resnet18", "optimizer": "two", "state": 5.0}
    assert set(kept["sweep"]["provenance"]) == {"device", "kernels", "cores", "threads", "load", "versions"}
    assert bench.stored("cuda:0") == {}
    printed = capsys.readouterr().out
    assert "exponents of one: 1.000" in printed
    assert "KOALA-M, compiled: goal 3 % over SGD" in printed
    assert list(json.loads((tmp_path / "bench.json").read_text())) == ["cpu"]
    assert runs.Store(tmp_path / "runs").get("no such key") is None  # which looks through the committed results


def test_a_timed_epoch_is_an_epoch_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"optimizer_args": {"lr": 0.1}, "epochs": 2, "batch_size": 64, "train_size": 320}
    config = RunConfig(dataset="digits", model="mlp_100", optimizer="svrg", **options)
    run = TrainingRun(config, torch.device("cpu"))
    monkeypatch.setattr(bench, "TrainingRun", lambda *given: run)
    job = bench.epoch(config)
    job(), job()
    assert run.result().provenance["weights_sha256"] == train(config).provenance["weights_sha256"]


# ---------------------------------------------------------------- small networks


def test_small_networks_have_the_published_numbers_of_weights() -> None:
    counted = {n: (sum(p.numel() for p in small.parameters(n)), len(small.NETWORKS[n])) for n in small.NETWORKS}
    assert counted == {
        "MLP": (79_510, 4),
        "LeNet": (61_706, 10),
        "ResNet-20": (269_722, 59),
        "GPT": (937_472, 50),
    }


def test_goals_of_small_networks_are_ratios_of_medians() -> None:
    us = dict.fromkeys(small.CONTENDERS, 10.0) | {"KOALA-M": 15.5, "APOLLO, compiled": 9.0}
    rows = [{"network": "MLP", "optimizer": name, "us": value} for name, value in us.items()]
    judged = {(g["optimizer"], g["base"]): (g["measured"], g["met"]) for g in small.goals(rows)}
    assert judged["KOALA-M", small.BASE] == (1.55, False)
    assert judged["KOALA-V", small.BASE] == (1.0, True)
    assert judged["APOLLO, compiled", "APOLLO"] == (0.9, True)
    assert len(judged) == len(small.GOALS)
