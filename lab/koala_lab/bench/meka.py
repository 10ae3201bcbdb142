"""What MEKA costs beside a plain gradient: the moments over the samples of a minibatch, and whole steps.

As in :mod:`koala_lab.bench.steps`, whatever is compared takes turns: quote the ratios. Images and labels are random,
since the time does not depend on their values.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, baddbmm_flop

from koala_lab import models
from koala_lab.bench.timing import Row, interleave, spread
from koala_lab.bench.traffic import peak
from koala_lib.moments import sample_moments
from koala_lib.optim import Meka

NETWORKS: Final[dict[str, tuple[int, int]]] = {"mlp_100": (1, 28), "cnn_3c3d": (3, 32), "resnet32_gn": (3, 32)}
BATCH_SIZES: Final = (32, 64, 128)
GRADIENT: Final = "plain gradient"
TURN: Final = 0.02  # seconds; a gradient of the MLP takes less than one millisecond
METHODS: Final = (GRADIENT, "batch HVP", "structured", "vmap")

# Arms of appendix G. The learning rate moves the weights a little: with next to none, products with the displacement
# would be so small that a processor treats them in its slow way.
STEPPERS: Final[dict[str, Callable[[nn.Module], torch.optim.Optimizer]]] = {
    "sgd": lambda network: torch.optim.SGD(network.parameters(), 1e-3, fused=True),
    "fixed": lambda network: Meka(network, cross_entropy, 1e-3, step_size="constant"),
    "pi": lambda network: Meka(network, cross_entropy, 1e-3, step_size="pi"),
}


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Losses of the samples, (B,)."""
    return nn.functional.cross_entropy(outputs, targets, reduction="none")


def problem(name: str, batch_size: int, *, device: str = "cpu") -> tuple[nn.Module, Tensor, Tensor]:
    """A network of the MEKA paper for images of its data set's size, a batch of images, and labels from ten classes.

    Raises:
        ValueError: for a network that is none of the paper's.
    """
    if name not in NETWORKS:
        raise ValueError(f"network must be one of {', '.join(NETWORKS)}, got {name!r}")
    channels, size = NETWORKS[name]
    network = models.build(name, num_classes=10, in_channels=channels, image_size=size).to(device)
    images = torch.randn(batch_size, channels, size, size, device=device)
    return network, images, torch.randint(10, (batch_size,), device=device)


def moment_jobs(network: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Callable[[], Any]]:
    """What :func:`moments` compares, by the names of ``METHODS``, on one direction."""
    direction = {name: 1e-3 * torch.randn_like(p) for name, p in network.named_parameters()}
    params = list(network.parameters())

    def gradient(create_graph: bool = False) -> Sequence[Tensor]:
        loss = cross_entropy(network(images), labels).mean()
        return torch.autograd.grad(loss, params, create_graph=create_graph)

    def product() -> object:
        return torch.autograd.grad(gradient(create_graph=True), params, list(direction.values()))

    def moments(method: str) -> Callable[[], object]:
        return lambda: sample_moments(network, cross_entropy, images, labels, direction, method=method)

    return dict(zip(METHODS, (gradient, product, moments("structured"), moments("vmap")), strict=True))


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
        bytes of new tensors alive at once, of which kernels' own buffers are not seen; ``weights``, bytes of those.
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
        for name, t in times.items()
    ]


def flops(job: Callable[[], object]) -> int:
    """Floating-point operations of a job's matrix products and convolutions."""
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
        jobs = {}
        for name, create in STEPPERS.items():
            model = problem(network, 1, device=device)[0]
            jobs[name] = step(model, create(model), images, labels)
        times = interleave(jobs, rounds, device=device, seconds=seconds, least=TURN)
        shared = {"network": network, "batch_size": batch_size, "repetition": repetition}
        rows += [
            {**shared, "optimizer": name, "ms": 1e3 * statistics.median(t)}
            | {"ratio": statistics.median(a / b for a, b in zip(t, times["sgd"], strict=True))}
            for name, t in times.items()
        ]
    return rows


def step(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> Callable[[], object]:
    """A job that trains a network by one step."""
    if isinstance(optimizer, Meka):
        return lambda: optimizer.step(images, labels)

    def update() -> None:
        optimizer.zero_grad()
        cross_entropy(model(images), labels).mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return update


def arms(rows: Iterable[Row], network: str) -> dict[str, dict[int, float]]:
    """``ratio`` of :func:`steps` for one network, by optimizer and repetition: the arms of a claim."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        if row["network"] == network:
            found.setdefault(row["optimizer"], {})[row["repetition"]] = row["ratio"]
    return found
