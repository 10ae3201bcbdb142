"""What MEKA costs beside a plain gradient: the moments over the samples of a minibatch, and whole steps.

As in :mod:`koala_lab.bench.steps`, whatever is compared takes turns: quote the ratios. Images and labels are random,
since the time does not depend on their values.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, baddbmm_flop

from koala_lab import models
from koala_lab.bench.timing import Row, interleave, spread
from koala_lab.bench.traffic import peak
from koala_lab.checks import check_known
from koala_lib.moments import observe, sample_moments
from koala_lib.optim import Meka

NETWORKS: Final[dict[str, tuple[int, int]]] = {"mlp_100": (1, 28), "cnn_3c3d": (3, 32), "resnet32_gn": (3, 32)}
BATCH_SIZES: Final = (32, 64, 128)
GRADIENT: Final = "plain gradient"
TURN: Final = 0.02  # seconds; a gradient of the MLP takes less than one millisecond
METHODS: Final = (GRADIENT, "batch HVP", "structured", "along", "vmap")

# What 128 samples on one thread are to cost at most: all moments and a pass along a direction beside a plain gradient,
# a step with a self-chosen step size beside one of SGD.
GOALS: Final[dict[tuple[str, str], float]] = {
    ("cnn_3c3d", "structured"): 2.9,
    ("cnn_3c3d", "along"): 1.4,
    ("cnn_3c3d", "pi"): 4.2,
    ("mlp_100", "structured"): 4.0,
    ("mlp_100", "along"): 1.8,
    ("mlp_100", "pi"): 6.5,
    ("resnet32_gn", "structured"): 4.0,
    ("resnet32_gn", "along"): 1.6,
    ("resnet32_gn", "pi"): 6.5,
}
# Moves the weights a little: with next to none, products with the displacement would be so small that a processor
# treats them in its slow way.
LR: Final = 1e-3

Step = Callable[[Tensor, Tensor], object]  # one training step on images and labels


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the losses of the samples, (B,)."""
    return nn.functional.cross_entropy(outputs, targets, reduction="none")


def _sgd(network: nn.Module) -> Step:
    optimizer = torch.optim.SGD(network.parameters(), LR, fused=True)

    def step(images: Tensor, labels: Tensor) -> None:
        optimizer.zero_grad()
        cross_entropy(network(images), labels).mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


# Arms of appendix G.
STEPPERS: Final[dict[str, Callable[[nn.Module], Step]]] = {
    "sgd": _sgd,
    "fixed": lambda network: Meka(network, cross_entropy, LR, step_size="constant").step,
    "pi": lambda network: Meka(network, cross_entropy, LR, step_size="pi", variances="directional").step,
    "pi, means": lambda network: Meka(network, cross_entropy, LR, step_size="pi").step,
}


def problem(name: str, batch_size: int, *, device: str = "cpu") -> tuple[nn.Module, Tensor, Tensor]:
    """Make a network of the MEKA paper, a batch of images of its data set's size, and labels from ten classes.

    Raises:
        ValueError: for a network that is none of the paper's.
    """
    check_known("network", name, NETWORKS)
    channels, size = NETWORKS[name]
    network = models.build(name, num_classes=10, in_channels=channels, image_size=size).to(device)
    images = torch.randn(batch_size, channels, size, size, device=device)
    return network, images, torch.randint(10, (batch_size,), device=device)


def moment_jobs(network: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Callable[[], Any]]:
    """Return what :func:`moments` compares, by the names of ``METHODS``, on one direction.

    "along" is one pass of tangents after the moments were taken: slope and curvature with their variances.
    """
    direction = {name: 1e-3 * torch.randn_like(p) for name, p in network.named_parameters()}
    params = list(network.parameters())

    def gradient(create_graph: bool = False) -> Sequence[Tensor]:
        loss = cross_entropy(network(images), labels).mean()
        return torch.autograd.grad(loss, params, create_graph=create_graph)

    def product() -> object:
        return torch.autograd.grad(gradient(create_graph=True), params, list(direction.values()))

    def moments(method: str) -> Callable[[], object]:
        return lambda: sample_moments(network, cross_entropy, images, labels, direction, method=method)

    along = observe(network, cross_entropy, images, labels, direction).along
    jobs = gradient, product, moments("structured"), lambda: along(direction), moments("vmap")
    return dict(zip(METHODS, jobs, strict=True))


def moments(
    network: str, batch_size: int = 128, *, rounds: int = 5, seconds: float = 2.0, device: str = "cpu"
) -> list[Row]:
    """Time and count the memory of all moments, beside one plain gradient (forward and backward) of the same batch.

    The batch's Hessian-vector product, by differentiating the gradient in reverse once more, is what somebody without
    variances would pay.

    Args:
        network: One of ``NETWORKS``.
        batch_size: Samples.
        rounds: How many at least.
        seconds: Go on until this time is over.
        device: torch device.

    Returns:
        One row by ``METHODS``: ``ms`` and ``ratio`` to the plain gradient in the same round, with quartiles; ``peak``,
        bytes of new tensors alive at once, of which kernels' own buffers are not seen; ``weights``, bytes of those;
        ``goal`` for the ratio, where there is one.
    """
    torch.manual_seed(0)
    model, images, labels = problem(network, batch_size, device=device)
    jobs = moment_jobs(model, images, labels)
    peaks = {name: peak(job) for name, job in jobs.items()}
    times = interleave(jobs, rounds, device=device, seconds=seconds, least=TURN)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    shared = {"network": network, "batch_size": batch_size, "weights": size}
    return [
        {**shared, "method": name}
        | spread("ms", (1e3 * s for s in t))
        | spread("ratio", (a / b for a, b in zip(t, times[GRADIENT], strict=True)))
        | {"peak": peaks[name]}
        | goal(network, name, batch_size)
        for name, t in times.items()
    ]


def goal(network: str, name: str, batch_size: int) -> Row:
    """Return the column ``goal`` of a row that has one."""
    return {"goal": GOALS[network, name]} if batch_size == 128 and (network, name) in GOALS else {}


def flops(job: Callable[[], object]) -> int:
    """Return the floating-point operations of a job's matrix products and convolutions."""
    in_place = {torch.ops.aten.baddbmm_: lambda *shapes, **_: baddbmm_flop(*shapes)}  # which torch leaves out
    counter = FlopCounterMode(display=False, custom_mapping=in_place)
    with counter:
        job()
    return int(counter.get_total_flops())


def steps(
    network: str,
    batch_size: int = 128,
    *,
    repetitions: int = 5,
    rounds: int = 2,
    seconds: float = 0.2,
    device: str = "cpu",
) -> list[Row]:
    """Time whole training steps (appendix G): SGD, MEKA with a fixed step size, MEKA with probability of improvement.

    Every repetition has new networks, data and optimizers.

    Returns:
        One row by repetition and ``optimizer`` (``STEPPERS``): medians over the rounds of ``ms``, and of ``ratio`` to
        SGD in the same round.
    """
    rows = []
    for repetition in range(repetitions):
        torch.manual_seed(repetition)
        _, images, labels = problem(network, batch_size, device=device)
        steppers = {name: create(problem(network, 1, device=device)[0]) for name, create in STEPPERS.items()}
        jobs = {name: partial(step, images, labels) for name, step in steppers.items()}
        times = interleave(jobs, rounds, device=device, seconds=seconds, least=TURN)
        shared = {"network": network, "batch_size": batch_size, "repetition": repetition}
        rows += [
            {**shared, "optimizer": name, "ms": 1e3 * statistics.median(t)}
            | {"ratio": statistics.median(a / b for a, b in zip(t, times["sgd"], strict=True))}
            | goal(network, name, batch_size)
            for name, t in times.items()
        ]
    return rows


def arms(rows: Iterable[Row], network: str) -> dict[str, dict[int, float]]:
    """Return ``ratio`` of :func:`steps` for one network, by optimizer and repetition: the arms of a claim."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        if row["network"] == network:
            found.setdefault(row["optimizer"], {})[row["repetition"]] = row["ratio"]
    return found
