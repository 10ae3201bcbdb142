"""What a training step costs: time and memory of the optimizers, side by side.

Whatever is compared is measured in turn, round by round, so that a machine whose speed drifts slows all of it alike;
quote the ratios. With one thread the clock is the processor time of that thread, which goes on only while it runs. The
optimizers share weights and gradients and step with a learning rate of 1e-9, which moves next to nothing.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from koala_lab import paths
from koala_lab.bench import compiled as bench_fused
from koala_lab.bench import meka as bench_meka
from koala_lab.bench import small
from koala_lab.bench.timing import Row, interleave, now, spread
from koala_lab.bench.traffic import Factory, image_network, memory, peak, step, synthetic, with_gradients
from koala_lab.config import RunConfig
from koala_lab.files import read_json, write_json
from koala_lab.runs.provenance import device_name, versions
from koala_lab.runs.store import locked
from koala_lab.runs.training import TrainingRun
from koala_lib.optim import Apollo, KoalaM, KoalaV

CONTENDERS: dict[str, Factory] = {
    "SGD momentum, foreach": lambda p: torch.optim.SGD(p, 1e-9, momentum=0.9, foreach=True),
    "SGD momentum, fused": lambda p: torch.optim.SGD(p, 1e-9, momentum=0.9, fused=True),
    "AdamW, foreach": lambda p: torch.optim.AdamW(p, 1e-9, foreach=True),
    bench_fused.BASE: bench_fused.adamw,
    "KOALA-V": lambda p: KoalaV(p, 1e-9),
    "KOALA-V, weight decay": lambda p: KoalaV(p, 1e-9, weight_decay=5e-4),
    "KOALA-M, fixed Q": lambda p: KoalaM(p, 1e-9, process_noise=0.01),
    "KOALA-M": lambda p: KoalaM(p, 1e-9),
    "KOALA-M, weight decay": lambda p: KoalaM(p, 1e-9, weight_decay=5e-4),
    "KOALA-M, released": lambda p: KoalaM(p, 1e-9, weight_decay=5e-4, formulas="released"),
    "APOLLO": lambda p: Apollo(p, 1e-9),
    "APOLLO, decoupled decay": lambda p: Apollo(p, 1e-9, weight_decay=5e-4, decoupled_weight_decay=True),
}
SWEPT = ("SGD momentum, fused", "AdamW, fused", "KOALA-V", "KOALA-M")
SIZES = (125_000, 500_000, 2_000_000, 4_000_000, 8_000_000, 16_000_000, 32_000_000, 64_000_000)
LARGE = 4_000_000  # four tensors of 16 MB: a step of fewer parameters may find part of them in a cache

# The optimizers as the classification runs train with them; SGD and Adam in torch's fused form.
TRAINED: dict[str, Factory] = {
    "SGD": lambda p: torch.optim.SGD(p, 1e-9, momentum=0.9, weight_decay=5e-4, fused=True),
    "Adam": lambda p: torch.optim.Adam(p, 1e-9, weight_decay=5e-4, fused=True),
    "KOALA-V": lambda p: KoalaV(p, 1e-9, weight_decay=5e-4, formulas="released"),
    "KOALA-M": lambda p: KoalaM(p, 1e-9, weight_decay=5e-4, formulas="released"),
    "KOALA-M, compiled": bench_fused.FUSED["KOALA-M, released, compiled"],
}


# ---------------------------------------------------------------- time


def measure(
    params: list[Tensor],
    contenders: Mapping[str, Factory] = CONTENDERS,
    *,
    base: str = "AdamW, fused",
    device: str = "cpu",
    seconds: float = 1.0,
) -> list[Row]:
    """Time the step of every optimizer on the same parameters.

    Args:
        params: Parameters with gradients.
        contenders: Optimizers by name.
        base: The one that the others are compared with.
        device: torch device.
        seconds: Spent on each optimizer, at least three steps.

    Returns:
        One row per optimizer: ``ms`` per step and ``ratio`` to the base in the same round, each with quartiles.
    """
    jobs = {name: partial(step, create(params)) for name, create in contenders.items()}
    times = interleave(jobs, 3, device=device, seconds=seconds * len(jobs))
    return [
        {"optimizer": name}
        | spread("ms", (1e3 * s for s in t))
        | spread("ratio", (a / b for a, b in zip(t, times[base], strict=True)))
        for name, t in times.items()
    ]


def sweep(
    contenders: Mapping[str, Factory],
    sizes: Sequence[int] = SIZES,
    *,
    tensors: int = 16,
    repetitions: int = 5,
    rounds: int = 3,
    device: str = "cpu",
) -> list[Row]:
    """Time steps over the number of parameters, every repetition with new parameters and optimizers.

    A first size is added: 2048 elements a tensor, where a step costs its fixed part. At least ``rounds`` are timed.

    Returns:
        One row by repetition, size and optimizer: ``repetition``, ``parameters``, ``optimizer``, ``ms`` (median).
    """
    rows = []
    for repetition in range(repetitions):
        for size in (2048 * tensors, *sizes):
            params = synthetic(size, tensors=tensors, device=device)
            jobs = {name: partial(step, create(params)) for name, create in contenders.items()}
            for name, t in interleave(jobs, rounds, device=device, seconds=0.05).items():
                ms = 1e3 * statistics.median(t)
                rows.append({"repetition": repetition, "parameters": size, "optimizer": name, "ms": ms})
    return rows


def exponents(rows: Iterable[Row], optimizer: str, *, smallest: int = LARGE) -> dict[int, float]:
    """Fit the c of ms - overhead ~ parameters^c, by repetition, to the sizes from ``smallest`` on.

    Raises:
        ValueError: with fewer than two such sizes.
    """
    times: dict[int, dict[int, float]] = {}
    for row in rows:
        if row["optimizer"] == optimizer:
            times.setdefault(row["repetition"], {})[row["parameters"]] = row["ms"]
    large = sorted({n for ms in times.values() for n in ms if n >= smallest})
    if len(large) < 2:
        raise ValueError(f"an exponent needs two sizes from {smallest} on, got {large} for {optimizer!r}")
    above = {repetition: [ms[n] - ms[min(ms)] for n in large] for repetition, ms in times.items()}
    return {repetition: float(np.polyfit(np.log(large), np.log(t), 1)[0]) for repetition, t in above.items()}


def training_step(
    model: str = "resnet18",
    *,
    batch_size: int = 128,
    rounds: int = 5,
    contenders: Mapping[str, Factory] = TRAINED,
    second_order: Collection[str] = (),
    device: str = "cpu",
) -> list[Row]:
    """Time whole training steps (forward, backward, optimizer) on random images of CIFAR's shape.

    All optimizers step one network, so that forward and backward are the same work; the first one is the base.

    Args:
        model: A network of :func:`koala_lab.models.build`.
        batch_size: Images.
        rounds: How many.
        contenders: Optimizers by name.
        second_order: Those that differentiate the gradients, for which backward keeps the graph.
        device: torch device.

    Returns:
        One row per optimizer, all with quartiles: ``seconds`` of the whole step; ``optimizer_ms``, its part outside of
        forward and backward; ``whole_percent``, the whole step over the base's in the same round; ``overhead_percent``,
        the optimizer's part less the base's, over the base's whole step, which leaves out the noise of the rest.
    """
    gradients: list[float] = []  # seconds of forward and backward, in the order of the steps
    jobs = training_jobs(model, batch_size, contenders, second_order, gradients, device=device)
    whole = {name: np.array(t) for name, t in interleave(jobs, rounds, device=device).items()}
    own = {name: t - gradients[i :: len(jobs)][1:] for i, (name, t) in enumerate(whole.items())}
    base = next(iter(jobs))
    return [
        {"optimizer": name}
        | spread("seconds", whole[name])
        | spread("optimizer_ms", 1e3 * own[name])
        | spread("whole_percent", 100 * (whole[name] / whole[base] - 1))
        | spread("overhead_percent", 100 * (own[name] - own[base]) / whole[base])
        for name in whole
    ]


def training_memory(
    model: str = "resnet18",
    *,
    batch_size: int = 128,
    contenders: Mapping[str, Factory] = TRAINED,
    second_order: Collection[str] = (),
) -> list[Row]:
    """Count the memory of the second of two whole training steps; arguments as in :func:`training_step`.

    Returns:
        One row per optimizer: ``peak``, bytes of new tensors alive at once (activations, gradients, temporary ones; not
        what is kept from step to step, nor kernels' own buffers), and ``weights``, bytes of those.
    """
    rows = []
    for name, create in contenders.items():
        params: list[Tensor] = []

        def kept(listed: list[Tensor], create: Factory = create, params: list[Tensor] = params) -> Optimizer:
            params.extend(listed)
            return create(listed)

        [job] = training_jobs(model, batch_size, {name: kept}, second_order, []).values()
        job()
        for p in params:
            p.grad = None  # made anew in the step that counts
        row = {"optimizer": name, "peak": peak(job)}
        rows.append(row | {"weights": sum(p.numel() * p.element_size() for p in params)})
    return rows


def training_jobs(
    model: str,
    batch_size: int,
    contenders: Mapping[str, Factory],
    second_order: Collection[str],
    gradients: list[float],
    *,
    device: str = "cpu",
) -> dict[str, Callable[[], object]]:
    """Return jobs that train one network by a step of each optimizer.

    ``gradients`` takes in the seconds of forward and backward.
    """
    torch.manual_seed(0)
    network = image_network(model, device=device)
    images = torch.randn(batch_size, 3, 32, 32, device=device).to(memory_format=torch.channels_last)
    labels = torch.randint(100, (batch_size,), device=device)

    def closure(create_graph: bool) -> Tensor:
        start = now(device)
        network.zero_grad()
        losses = nn.functional.cross_entropy(network(images), labels, reduction="none")
        losses.mean().backward(create_graph=create_graph)  # type: ignore[no-untyped-call]
        gradients.append(now(device) - start)
        return losses

    params: list[Tensor] = list(network.parameters())
    return {
        name: partial(create(params).step, partial(closure, name in second_order))
        for name, create in contenders.items()
    }


def epoch(config: RunConfig, *, device: str = "cpu") -> Callable[[], None]:
    """Return a function that trains one further epoch per call, without evaluating; a job of :func:`interleave`."""
    run = TrainingRun(config, torch.device(device))

    def job() -> None:
        run.begin_epoch()
        for batch in run.task.batches(run.epoch):
            run.train_step(batch)
        run.epoch, run.step = run.epoch + 1, 0

    return job


# ---------------------------------------------------------------- the command


def file() -> Path:
    """Return the committed results: by kind of device and section, provenance and rows."""
    return paths.results_dir() / "bench.json"


def stored(device: str = "cpu") -> dict[str, Any]:
    """Return the committed results of a kind of device by section, empty where there are none."""
    return dict(_content().get(device.partition(":")[0], {}))


def _content() -> dict[str, Any]:
    return read_json(file()) if file().exists() else {}


def provenance(device: str) -> Row:
    """Return where and under which load (processes that wanted to run, mean over a minute) one measures."""
    return {
        "device": device_name(device),
        "kernels": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "versions": versions(),
    }


def main(device: str = "cpu", *, whole: bool = False, meka: bool = False) -> None:
    """Print the tables and keep them in ``data/results/bench.json``; sections that are not measured stay as they are.

    Args:
        device: torch device.
        whole: Also time whole training steps of ResNet-18, some minutes on a CPU.
        meka: Measure MEKA's moments and whole steps instead, a quarter of an hour on a CPU.
    """
    sections = _meka_sections(device) if meka else _sections(device, whole)
    for section, measured in sections.items():
        keep(section, measured, device)
    print(f"\nwritten to {file()}")


def keep(section: str, measured: Callable[[], list[Row]], device: str) -> None:
    """Measure one section, put it into the committed results and print it."""
    origin, _ = provenance(device), _content()  # a damaged file is told before the measurement
    rows = measured()
    with locked("bench"):
        content = _content()  # somebody else may have measured another section meanwhile
        content.setdefault(device.partition(":")[0], {})[section] = {"provenance": origin, "rows": rows}
        write_json(file(), content)
    print(f"\n{section}: {origin['device']}, {origin['threads']} thread(s), load {origin['load']}")
    _show(section, rows)


def _sections(device: str, whole: bool) -> dict[str, Callable[[], list[Row]]]:
    networks = [(m, with_gradients(image_network(m, device=device).parameters())) for m in ("resnet18", "resnet50")]
    threads = [1] if device != "cpu" else sorted({1, os.cpu_count() or 1})
    sections: dict[str, Callable[[], list[Row]]] = {
        "step": lambda: [
            {"model": m, "threads": n} | r
            for n in threads
            for m, p in networks
            for r in _with_threads(n, partial(measure, p, CONTENDERS | bench_fused.FUSED, device=device))
        ],
        **({"small": lambda: _with_threads(1, small.measure)} if device == "cpu" else {}),
        "bandwidth": lambda: [{"model": m} | bench_fused.bandwidth(p, device=device) for m, p in networks],
        "flatness": lambda: bench_fused.flatness(device=device),
        "compile": lambda: bench_fused.compile_time(device=device),
        "memory": lambda: [{"model": m} | r for m, p in networks for r in memory(p, CONTENDERS)],
        "sweep": lambda: sweep({name: CONTENDERS[name] for name in SWEPT}, device=device),
    }
    if whole:
        sections["training_step"] = lambda: training_step(device=device)
    return sections


def _with_threads(threads: int, measured: Callable[[], list[Row]]) -> list[Row]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return measured()
    finally:
        torch.set_num_threads(before)


def _meka_sections(device: str) -> dict[str, Callable[[], list[Row]]]:
    sizes = [(n, b) for n in bench_meka.NETWORKS for b in bench_meka.BATCH_SIZES]
    return {
        "moments": lambda: [r for n, b in sizes for r in bench_meka.moments(n, b, device=device)],
        "meka_step": lambda: [r for n in bench_meka.NETWORKS for r in bench_meka.steps(n, device=device)],
    }


def _show(section: str, rows: list[Row]) -> None:
    import pandas as pd

    frame = pd.DataFrame(rows)
    if section == "meka_step":
        print("medians of the repetitions")
        frame = (
            frame.groupby(["network", "batch_size", "optimizer"], sort=False)[["ms", "ratio"]].median().reset_index()
        )
    if section == "sweep":
        print("ms per step, median of the repetitions")
        print(frame.pivot_table("ms", "parameters", "optimizer", aggfunc="median", sort=False).round(3).to_string())
        for name in frame["optimizer"].unique():
            print(f"exponents of {name}: " + " ".join(f"{e:.3f}" for e in exponents(rows, name).values()))
        return
    print(frame.round(3).to_string(index=False))
    if section == "small":
        print("\ngoals\n" + pd.DataFrame(small.goals(rows)).round(2).to_string(index=False))
    if section == "step":
        from koala_lab import plots

        print("\ngoals\n" + pd.DataFrame(bench_fused.goals(rows)).round(2).to_string(index=False))
        if apart := bench_fused.unshared(rows):
            print("\nms that threads do not share\n" + pd.DataFrame(apart).round(1).to_string(index=False))
        origin = {"notebook": "koala/27_cost", "preset": "desktop", "runs": []}  # which shows the same figure
        print(plots.save(bench_fused.draw(rows), paths.figures_dir() / "koala" / "cost_compiled", origin))
    for row in rows if section == "training_step" else ():
        if row["optimizer"] in bench_fused.FUSED:
            over, limit = row["overhead_percent"], bench_fused.OVERHEAD
            print(f"{row['optimizer']}: goal {limit:g} % over SGD, measured {over:.1f} %, met: {over <= limit}")
