"""What the compiled steps cost beside torch's fused AdamW: goals, limits of memory, sizes, time of compiling.

A step computes next to nothing with what it reads, so that its time is at least that of moving its numbers through
memory once: ``MOVED`` of them per parameter, against AdamW's seven. As in :mod:`koala_lab.bench.steps`, whatever is
compared takes turns: quote the ratios.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple

import torch
from torch import Tensor, nn

from koala_lab.bench.timing import Row, interleave, spread
from koala_lab.bench.traffic import Factory, image_network, step, synthetic, with_gradients
from koala_lib.optim import Apollo, KoalaM, KoalaV

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BASE: Final = "AdamW, fused"
FUSED: Final[dict[str, Factory]] = {
    "KOALA-V, compiled": lambda p: KoalaV(p, 1e-9, weight_decay=5e-4, fused=True),
    "KOALA-M, compiled": lambda p: KoalaM(p, 1e-9, weight_decay=5e-4, fused=True),
    "KOALA-M, released, compiled": lambda p: KoalaM(p, 1e-9, weight_decay=5e-4, formulas="released", fused=True),
    "APOLLO, compiled": lambda p: Apollo(p, 1e-9, fused=True),
    "APOLLO, decoupled decay, compiled": lambda p: Apollo(
        p, 1e-9, weight_decay=5e-4, decoupled_weight_decay=True, fused=True
    ),
}

# Numbers read and written per parameter, each tensor once in a pass. KOALA-V: |g|^2, |h|^2 and |x|^2 read g and x, the
# update reads both and writes x. KOALA-M: the prediction reads and writes x, p and x_avg first, and its update moves p
# as well; the released formulas average in the update. APOLLO: the sums read g, m and B; the update reads these and
# theta, and writes all but g; decoupled decay reads d in both and writes it.
MOVED: Final[dict[str, int]] = {
    "SGD momentum, fused": 5,
    BASE: 7,
    "KOALA-V, compiled": 5,
    "KOALA-M, compiled": 13,
    "KOALA-M, released, compiled": 14,
    "APOLLO, compiled": 10,
    "APOLLO, decoupled decay, compiled": 13,
}


class Goal(NamedTuple):
    """A step's time is to be at most ``limit`` times that of ``base``."""

    optimizer: str
    base: str
    limit: float


GOALS: Final = (
    *(Goal(f"{name}, compiled", BASE, at) for name, at in {"KOALA-V": 1.0, "KOALA-M": 2.2, "APOLLO": 1.8}.items()),
    *(Goal(f"{name}, compiled", "AdamW, foreach", 0.6) for name in ("KOALA-V", "KOALA-M", "APOLLO")),
)

OVERHEAD: Final = 3.0  # per cent that a KOALA-M step may add to a whole training step with SGD


def goals(rows: Iterable[Row]) -> list[Row]:
    """Judge the goals by rows of :func:`koala_lab.bench.steps.measure`, with a model and a number of threads.

    Returns:
        One row per goal and measurement: ``model``, ``threads``, ``optimizer``, ``base``, ``limit``, ``memory`` (what
        the ratio would be if the numbers moved at the speed at which fused AdamW moves its own), ``measured`` (a ratio
        of medians) and ``met``.
    """
    times: dict[tuple[str, int], dict[str, float]] = {}
    for row in rows:
        times.setdefault((row["model"], row["threads"]), {})[row["optimizer"]] = row["ms"]
    result = []
    for (model, threads), ms in times.items():
        for goal in GOALS:
            ratio = ms[goal.optimizer] / ms[goal.base]
            memory = MOVED[goal.optimizer] / MOVED[BASE] * ms[BASE] / ms[goal.base]
            row = {"model": model, "threads": threads} | goal._asdict() | {"memory": memory}
            result.append(row | {"measured": ratio, "met": ratio <= goal.limit})
    return result


def unshared(rows: Iterable[Row]) -> list[Row]:
    """Return the part of a step that other threads do not take over: Python between the passes, mostly.

    If all threads together do the rest as much faster as they do AdamW's step, then t_1 = a + b and t_n = a + b / s.

    Returns:
        One row per model and compiled optimizer, none where more threads make AdamW no faster: ``model``,
        ``optimizer``, and in milliseconds ``one_thread`` (t_1), ``all_threads`` (t_n) and ``unshared`` (a).
    """
    times = {(r["model"], r["optimizer"], r["threads"]): r["ms"] for r in rows}
    most = max(threads for _, _, threads in times)
    result = []
    for model, name, threads in times:
        faster = times[model, BASE, 1] / times[model, BASE, most]
        if name in FUSED and threads == 1 and faster > 1:
            one, many = (times[model, name, n] for n in (1, most))
            row = {"model": model, "optimizer": name, "one_thread": one, "all_threads": many}
            result.append(row | {"unshared": one - (one - many) / (1 - 1 / faster)})
    return result


SIZES: Final = (100_000, 1_000_000, 10_000_000, 100_000_000, 500_000_000)
TENSORS: Final = (10, 50, 200, 1000, 2000)
AT: Final = 20_000_000  # parameters, where the number of tensors changes
USUAL: Final = 16  # tensors, where the number of parameters changes
SHAPES: Final = (*((n, USUAL) for n in SIZES), *((AT, n) for n in TENSORS))


def flatness(
    shapes: Sequence[tuple[int, int]] = SHAPES,
    *,
    rounds: int = 5,
    device: str = "cpu",
) -> list[Row]:
    """Time of a step per parameter, over the number of parameters and of tensors.

    Args:
        shapes: Numbers of parameters and of tensors of flat models. Those for which the memory at hand is too small
            are left out.
        rounds: Steps of each optimizer; each is timed beside AdamW by itself, which needs less memory.
        device: torch device.

    Returns:
        One row per shape and optimizer: ``parameters``, ``tensors``, ``optimizer``, ``ns`` per parameter and ``ratio``
        to torch's fused AdamW, with quartiles.
    """
    rows = []
    for parameters, tensors in shapes:
        if 7 * 4 * parameters > _memory(device):  # weights, gradients, AdamW's two, two of ours, and one more
            continue
        params = synthetic(parameters, tensors=tensors, device=device)
        for name in ("KOALA-V, compiled", "KOALA-M, compiled", "APOLLO, compiled"):
            jobs = {n: partial(step, create(params)) for n, create in ((BASE, adamw), (name, FUSED[name]))}
            times = interleave(jobs, rounds, device=device, seconds=0.3)
            ratios = (a / b for a, b in zip(times[name], times[BASE], strict=True))
            row = {"parameters": parameters, "tensors": tensors, "optimizer": name}
            rows.append(row | spread("ns", (1e9 * s / parameters for s in times[name])) | spread("ratio", ratios))
    return rows


def adamw(params: list[Tensor]) -> torch.optim.Optimizer:
    """Return what everything is compared with."""
    return torch.optim.AdamW(params, 1e-9, fused=True)


def _memory(device: str) -> int:
    """Return the bytes that are free."""
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(device)[0])
    free = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"  # macOS tells all of it only
    return os.sysconf(free) * os.sysconf("SC_PAGE_SIZE")


def first_step(model: str, optimizer: str, device: str) -> float:
    """Return the seconds of the first step of an optimizer of ``FUSED``, in which its passes are compiled."""
    job = partial(step, FUSED[optimizer](with_gradients(image_network(model, device=device).parameters())))
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


def compile_time(model: str = "resnet18", *, device: str = "cpu") -> list[Row]:
    """Time an optimizer's first step, in seconds, in two new processes.

    The first has no cache of compiled code, the second the one that the first left on the disk.
    """
    rows = []
    for name in ("KOALA-V, compiled", "KOALA-M, compiled", "APOLLO, compiled"):
        with tempfile.TemporaryDirectory() as cache:
            script = f"from koala_lab.bench import compiled; print(compiled.first_step{(model, name, device)!r})"
            command = [sys.executable, "-c", script]
            environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
            seconds = [float(subprocess.check_output(command, env=environment, text=True)) for _ in range(2)]
        rows.append({"model": model, "optimizer": name, "cold_seconds": seconds[0], "warm_seconds": seconds[1]})
    return rows


def bandwidth(params: list[Tensor], *, device: str = "cpu") -> Row:
    """Measure gigabytes per second of copying the weights, the simplest pass: a number read, a number written."""
    weights = [nn.Parameter(p.detach().clone()) for p in params]
    copies = [torch.empty_like(w) for w in weights]

    def copy() -> None:
        with torch.no_grad():
            for a, b in zip(copies, weights, strict=True):
                a.copy_(b)

    size = sum(2 * w.numel() * w.element_size() for w in weights)
    [times] = interleave({"copy": copy}, 5, device=device, seconds=0.3).values()
    return spread("gigabytes_a_second", (size / s / 1e9 for s in times))


def draw(rows: Iterable[Row]) -> Figure:
    """Draw the times of the steps over those of AdamW, one panel per network, and what memory allows."""
    import matplotlib.pyplot as plt
    import pandas as pd

    frame = pd.DataFrame(rows)
    models, threads = frame["model"].unique(), frame["threads"].unique()
    names = [n for n in frame["optimizer"].unique() if n != BASE]
    fig, axes = plt.subplots(1, len(models), figsize=(13, 0.34 * len(names) + 1.4), sharey=True, squeeze=False)
    for ax, model in zip(axes[0], models, strict=True):
        for i, count in enumerate(threads):
            here = frame[(frame["model"] == model) & (frame["threads"] == count)].set_index("optimizer").loc[names]
            y = [k + 0.36 * (i - (len(threads) - 1) / 2) for k in range(len(names))]
            away = [here["ratio"] - here["ratio_q1"], here["ratio_q3"] - here["ratio"]]
            shade = ["#4c72b0" if "compiled" in n else "0.65" for n in names]
            ax.barh(y, here["ratio"], height=0.34, xerr=away, color=shade, alpha=1 - 0.4 * i, ecolor="0.2")
        for k, name in enumerate(names):
            if name in MOVED:
                ax.plot([MOVED[name] / MOVED[BASE]] * 2, [k - 0.4, k + 0.4], color="#c44e52", lw=2)
        ax.axvline(1, color="0.2", lw=1, ls=":")
        ax.set(title=f"{model}, {' and '.join(map(str, threads))} threads", xlabel=f"time of a step / that of {BASE}")
        ax.set_yticks(range(len(names)), names)
    axes[0, 0].invert_yaxis()
    axes[0, -1].plot([], [], color="#c44e52", lw=2, label="least traffic through memory / AdamW's")
    axes[0, -1].legend(loc="lower right", fontsize="small")
    return fig
