"""What a step costs on small networks, where the time goes into calls and not into moving memory.

Beside torch's AdamW over lists, the same kind of implementation. As in :mod:`koala_lab.bench.steps`, whatever is
compared takes turns: quote the ratios.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from itertools import chain
from typing import Final

import torch
from torch import Tensor, nn

from koala_lab.bench.compiled import Goal
from koala_lab.bench.timing import Row, interleave, spread
from koala_lab.bench.traffic import Factory, step, with_gradients
from koala_lib.optim import Apollo, KoalaM, KoalaV

Shapes = tuple[tuple[int, ...], ...]


def _layers(*weights: tuple[int, ...]) -> Shapes:
    """Return the shapes of layers with biases."""
    return tuple(chain.from_iterable((w, w[:1]) for w in weights))


def _resnet20() -> Iterator[tuple[int, ...]]:
    """Yield the shapes of a ResNet-20 whose shortcuts have no weights (He et al., CVPR 2016, section 4.2)."""
    inputs = 3
    for width in (16, *[16] * 6, *[32] * 6, *[64] * 6):
        yield from ((width, inputs, 3, 3), (width,), (width,))  # convolution, BatchNorm
        inputs = width
    yield from _layers((10, 64))


def _gpt(layers: int = 4, width: int = 128, vocabulary: int = 1000, context: int = 128) -> Iterator[tuple[int, ...]]:
    """Yield the shapes of a small GPT-2 with tied embeddings and no last normalisation."""
    yield from ((vocabulary, width), (context, width))
    for _ in range(layers):
        yield from ((width,), (width,), *_layers((3 * width, width), (width, width)))
        yield from ((width,), (width,), *_layers((4 * width, width), (width, 4 * width)))


NETWORKS: Final[dict[str, Shapes]] = {
    "MLP": _layers((100, 784), (10, 100)),
    "LeNet": _layers((6, 1, 5, 5), (16, 6, 5, 5), (120, 400), (84, 120), (10, 84)),
    "ResNet-20": tuple(_resnet20()),
    "GPT": tuple(_gpt()),
}

BASE: Final = "AdamW, foreach"
CONTENDERS: Final[dict[str, Factory]] = {
    BASE: lambda p: torch.optim.AdamW(p, 1e-9, foreach=True),
    "KOALA-V": lambda p: KoalaV(p, 1e-9),
    "KOALA-M": lambda p: KoalaM(p, 1e-9),
    "APOLLO": lambda p: Apollo(p, 1e-9),
    "KOALA-V, compiled": lambda p: KoalaV(p, 1e-9, fused=True),
    "KOALA-M, compiled": lambda p: KoalaM(p, 1e-9, fused=True),
    "APOLLO, compiled": lambda p: Apollo(p, 1e-9, fused=True),
}


GOALS: Final = (
    Goal("KOALA-V", BASE, 1.0),
    Goal("KOALA-M", BASE, 1.5),
    Goal("APOLLO", BASE, 1.5),
    *(Goal(f"{name}, compiled", name, 1.0) for name in ("KOALA-V", "KOALA-M", "APOLLO")),
)


def parameters(network: str) -> list[Tensor]:
    """Return the parameters of a network of :data:`NETWORKS`, with gradients."""
    return with_gradients(nn.Parameter(torch.full(shape, 0.01)) for shape in NETWORKS[network])


def measure(*, seconds: float = 10.0) -> list[Row]:
    """Time the steps of all contenders on all small networks, on the CPU with the threads that are set.

    Args:
        seconds: Spent on each network, at least three rounds.

    Returns:
        One row per network and optimizer: ``network``, ``optimizer``, ``us`` (microseconds per step) and ``ratio`` to
        AdamW in the same round, each with quartiles.
    """
    rows = []
    for network in NETWORKS:
        params = parameters(network)
        jobs = {name: partial(step, create(params)) for name, create in CONTENDERS.items()}
        times = interleave(jobs, 3, device="cpu", seconds=seconds, least=2e-3)
        for name, t in times.items():
            ratios = (a / b for a, b in zip(t, times[BASE], strict=True))
            about = {"network": network, "optimizer": name}
            rows.append(about | spread("us", (1e6 * s for s in t)) | spread("ratio", ratios))
    return rows


def goals(rows: Iterable[Row]) -> list[Row]:
    """Judge the goals by rows of :func:`measure`.

    Returns:
        One row per goal and network: ``network``, ``optimizer``, ``base``, ``limit``, ``measured`` (a ratio of medians)
        and ``met``.
    """
    times = {(row["network"], row["optimizer"]): row["us"] for row in rows}
    found = []
    for network in dict.fromkeys(name for name, _ in times):
        for goal in GOALS:
            ratio = times[network, goal.optimizer] / times[network, goal.base]
            found.append({"network": network} | goal._asdict() | {"measured": ratio, "met": ratio <= goal.limit})
    return found
