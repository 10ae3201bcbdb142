"""What a step costs: time and memory of the optimizers, side by side.

Every optimizer steps the same weights with the same gradients, in turn, so that a machine whose speed drifts slows all
of them alike; quote the ratios. Timings decide no test.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from koala_lib import models, paths
from koala_lib.optim import KoalaM, KoalaV
from koala_lib.runs import write_json

Factory = Callable[[list[Tensor]], torch.optim.Optimizer]

CONTENDERS: dict[str, Factory] = {
    "SGD momentum, foreach": lambda p: torch.optim.SGD(p, 1e-9, momentum=0.9, foreach=True),
    "SGD momentum, fused": lambda p: torch.optim.SGD(p, 1e-9, momentum=0.9, fused=True),
    "AdamW, foreach": lambda p: torch.optim.AdamW(p, 1e-9, foreach=True),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, 1e-9, fused=True),
    "KOALA-V": lambda p: KoalaV(p, 1e-9),
    "KOALA-V, weight decay": lambda p: KoalaV(p, 1e-9, weight_decay=5e-4),
    "KOALA-M, fixed Q": lambda p: KoalaM(p, 1e-9, process_noise=0.01),
    "KOALA-M": lambda p: KoalaM(p, 1e-9),
    "KOALA-M, weight decay": lambda p: KoalaM(p, 1e-9, weight_decay=5e-4),
    "KOALA-M, released": lambda p: KoalaM(p, 1e-9, weight_decay=5e-4, formulas="released"),
}
BASE = "AdamW, fused"


def _weights(shapes: Iterable[torch.Size | tuple[int, ...]], device: str) -> list[Tensor]:
    """Parameters of the given shapes with gradients, both ~ N(0, 0.01^2)."""
    params: list[Tensor] = []
    for shape in shapes:
        p = nn.Parameter(0.01 * torch.randn(shape, device=device))
        p.grad = 0.01 * torch.randn_like(p)
        params.append(p)
    return params


def _step(optimizer: torch.optim.Optimizer, losses: Tensor) -> None:
    if isinstance(optimizer, (KoalaV, KoalaM)):
        optimizer.predict()
        optimizer.step(loss=losses)
    else:
        optimizer.step()


def measure(
    shapes: Iterable[torch.Size | tuple[int, ...]],
    *,
    device: str = "cpu",
    contenders: Iterable[str] = CONTENDERS,
    seconds: float = 1.0,
) -> list[dict[str, Any]]:
    """Time steps of every contender in turn.

    Args:
        shapes: of the parameter tensors.
        device: torch device.
        contenders: names of :data:`CONTENDERS`.
        seconds: spent on each contender, at least three steps.

    Returns:
        One row per contender: ``ms`` (median of a step), ``ratio`` to fused AdamW, ``state`` (bytes of state per byte
        of weights).
    """
    params = _weights(shapes, device)
    losses = torch.ones(128, device=device)
    optimizers = {name: CONTENDERS[name](params) for name in contenders}
    times: dict[str, list[float]] = {name: [] for name in optimizers}
    deadline = time.monotonic() + seconds * len(optimizers)
    while len(times[BASE]) < 4 or time.monotonic() < deadline:
        for name, optimizer in optimizers.items():
            _synchronise(device)
            start = time.perf_counter()
            _step(optimizer, losses)
            _synchronise(device)
            times[name].append(time.perf_counter() - start)
    median = {name: 1e3 * statistics.median(t[1:]) for name, t in times.items()}  # the first step makes the state
    weight = sum(p.numel() * p.element_size() for p in params)
    return [
        {"optimizer": name, "ms": median[name], "ratio": median[name] / median[BASE], "state": _state(o) / weight}
        for name, o in optimizers.items()
    ]


def _synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def _state(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the per-parameter state."""
    tensors = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor) and v.dim()]
    return sum(t.numel() * t.element_size() for t in tensors)


def main(device: str = "cpu", largest: float = 1e8) -> None:
    """Print both tables and keep them in ``report/bench.json``.

    Args:
        device: torch device.
        largest: parameters of the largest synthetic model.
    """
    print(f"device {device}, {torch.get_num_threads()} thread(s), torch {torch.__version__}")
    tables: dict[str, list[dict[str, Any]]] = {}
    for name in ("resnet18", "resnet50"):
        network = models.build(name, num_classes=100)
        shapes = [p.shape for p in network.parameters()]
        rows = tables[name] = measure(shapes, device=device)
        print(f"\n{name}, {len(shapes)} tensors, {sum(s.numel() for s in shapes):,} parameters, float32")
        print(f"{'optimizer':<24}{'ms a step':>12}{'/ ' + BASE:>18}{'state / weights':>18}")
        for row in rows:
            print(f"{row['optimizer']:<24}{row['ms']:>12.2f}{row['ratio']:>18.2f}{row['state']:>18.2f}")
    some = [BASE, "SGD momentum, fused", "KOALA-V", "KOALA-M"]
    print(
        "\nnanoseconds per parameter and step, 64 tensors\n" + f"{'parameters':>12}" + "".join(f"{s:>22}" for s in some)
    )
    for n in (10**e for e in range(5, 9) if 10**e <= largest):
        rows = tables[f"{n:.0e}"] = measure([(n // 64,)] * 64, device=device, contenders=some)
        print(f"{n:>12.0e}" + "".join(f"{1e6 * row['ms'] / n:>22.3f}" for row in rows), flush=True)
    file = paths.report_dir() / "bench.json"
    write_json(
        file, {"device": device, "torch": torch.__version__, "threads": torch.get_num_threads(), "tables": tables}
    )
    print(f"\nwritten to {file}")


if __name__ == "__main__":
    main()
