"""The bookkeeping of the compiled steps' benchmark. No test depends on how fast anything is."""

from __future__ import annotations

import subprocess
from typing import Any

import pytest
import torch

from koala_lab.bench import compiled as bench_fused
from koala_lab.bench import steps as bench
from koala_lab.bench.timing import Row
from koala_lab.bench.traffic import step, traffic
from koala_lib.optim import apollo
from koala_lib.optim._engine.compiled import CompiledPass


def measured(**ms: float) -> list[Row]:
    names = {"fused": "AdamW, fused", "foreach": "AdamW, foreach", "v": "KOALA-V, compiled", "m": "KOALA-M, compiled"}
    names["a"] = "APOLLO, compiled"
    row = {"model": "net", "threads": 2, "ratio": 1.0, "ratio_q1": 1.0, "ratio_q3": 1.0}
    return [row | {"optimizer": names[k], "ms": t} for k, t in ms.items()]


def test_a_goal_is_met_up_to_its_limit() -> None:
    rows = bench_fused.goals(measured(fused=10.0, foreach=20.0, v=10.0, m=22.1, a=12.0))
    assert [(r["optimizer"], r["base"], r["measured"], r["met"]) for r in rows] == [
        ("KOALA-V, compiled", "AdamW, fused", 1.0, True),
        ("KOALA-M, compiled", "AdamW, fused", pytest.approx(2.21), False),
        ("APOLLO, compiled", "AdamW, fused", 1.2, True),
        ("KOALA-V, compiled", "AdamW, foreach", 0.5, True),
        ("KOALA-M, compiled", "AdamW, foreach", pytest.approx(1.105), False),
        ("APOLLO, compiled", "AdamW, foreach", 0.6, True),
    ]
    assert [round(r["memory"], 2) for r in rows] == [0.71, 1.86, 1.43, 0.36, 0.93, 0.71]  # foreach takes twice as long
    assert {(r["model"], r["threads"]) for r in rows} == {("net", 2)}


def test_what_threads_do_not_share_is_what_stays() -> None:
    one = [row | {"threads": 1} for row in measured(fused=12.0, m=30.0)]
    two = measured(fused=8.0, m=22.0)  # 6 of Python, and 24 that two threads do in 16
    [row] = bench_fused.unshared([*one, *two])
    assert row["unshared"] == pytest.approx(6.0)
    assert (row["optimizer"], row["one_thread"], row["all_threads"]) == ("KOALA-M, compiled", 30.0, 22.0)
    assert bench_fused.unshared(one) == []
    assert bench_fused.unshared([*one, *(row | {"threads": 2} for row in one)]) == []


@pytest.mark.usefixtures("traced_passes")
@pytest.mark.parametrize("name", bench_fused.FUSED)
def test_the_least_traffic_is_that_of_the_tensors_that_a_step_needs(name: str) -> None:
    """Each pass reads and writes a tensor once: counted from the arguments of the compiled functions."""
    params, moved = bench.synthetic(64, tensors=1), 0
    optimizer = bench_fused.FUSED[name](params)
    for group in optimizer.param_groups:  # so that everything moves
        group |= {"lr": 0.1} | ({"warmup_steps": 0} if "warmup_steps" in group else {})
    step(optimizer)
    params[0].grad = torch.randn_like(params[0])
    call = CompiledPass._call_compiled

    def counted(self: Any, converted: dict[str, Any], *rest: Any) -> Any:
        nonlocal moved
        tensors = [ts[0] for ts in converted.values() if isinstance(ts, list) and ts]  # the others fill the lists
        before = [t.clone() for t in tensors]
        result = call(self, converted, *rest)
        unread = self is apollo._secant_sums  # the weights, without a decay in the gradient
        written = sum(not torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
        moved += len(tensors) - unread + written
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CompiledPass, "_call_compiled", counted)
        step(optimizer)
    assert moved == bench_fused.MOVED[name]


def test_torchs_traffic_is_what_it_is_compared_with() -> None:
    for name in ("SGD momentum, fused", "AdamW, fused"):
        operations = traffic(bench.CONTENDERS[name], bench.synthetic(40_000)).operations
        moved = sum(r["reads"] + r["writes"] for r in operations) / 40_000
        assert moved == pytest.approx(bench_fused.MOVED[name], rel=0.01)


def test_shapes_that_do_not_fit_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_fused, "_memory", lambda device: 7 * 4 * 1000)
    monkeypatch.setattr(bench_fused, "interleave", lambda jobs, *_, **__: {n: [2e-6, 4e-6, 2e-6] for n in jobs})
    rows = bench_fused.flatness(shapes=[(1000, 2), (1001, 2)])
    assert [(r["parameters"], r["tensors"], r["ns"], r["ratio"]) for r in rows] == [(1000, 2, 2.0, 1.0)] * 3


def test_the_second_process_finds_what_the_first_has_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    caches, steps = [], []

    def check_output(command: list[str], env: dict[str, str], text: bool) -> str:
        caches.append(env["TORCHINDUCTOR_CACHE_DIR"])
        exec(command[-1])
        return f"{10.0 / len(caches)}\n"

    monkeypatch.setattr(subprocess, "check_output", check_output)
    monkeypatch.setattr(bench_fused, "first_step", lambda *given: steps.append(given))
    rows = bench_fused.compile_time("resnet8")
    assert (rows[0]["cold_seconds"], rows[0]["warm_seconds"]) == (10.0, 5.0)
    assert caches[0::2] == caches[1::2]
    assert len(set(caches)) == len(rows)
    assert steps[0::2] == steps[1::2] == [("resnet8", row["optimizer"], "cpu") for row in rows]


@pytest.mark.usefixtures("no_compiler")
def test_the_first_step_of_a_compiled_optimizer_is_timed() -> None:
    with pytest.warns(UserWarning, match="fused=True needs a working compiler"):
        assert 0 < bench_fused.first_step("resnet8", "KOALA-V, compiled", "cpu") < 60


def test_copying_is_reading_and_writing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_fused, "interleave", lambda jobs, *_, **__: {n: [1e-6] * 3 for n in jobs})
    assert bench_fused.bandwidth(bench.synthetic(1000, tensors=2))["gigabytes_a_second"] == pytest.approx(8.0)


def test_every_optimizer_has_its_bar_and_its_limit() -> None:
    fig = bench_fused.draw(measured(fused=10.0, foreach=20.0, v=10.0, m=22.0, a=12.0))
    assert [t.get_text() for t in fig.axes[0].get_yticklabels()] == [
        "AdamW, foreach", "KOALA-V, compiled", "KOALA-M, compiled", "APOLLO, compiled"
    ]  # fmt: skip
