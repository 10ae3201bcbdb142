"""One training run: :class:`RunConfig` -> :func:`train` -> :class:`RunResult`.

The same few lines train every optimizer of a table, so that rows differ in nothing else. The data set lies on the
device, a step reads nothing back, and what a run needs to go on after ``kill -9`` is written to a checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from koala_lib import data, models, paths
from koala_lib.optim import KoalaM, KoalaV

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "koala_v": KoalaV,
    "koala_m": KoalaM,
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
}

# Part of every run's key. Raise a number by hand when a change alters what such a run computes.
VERSION = {"train": 1, "koala_v": 1, "koala_m": 1}

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides the outcome of a run, in canonical form.

    Args:
        dataset: a name of :data:`koala_lib.data.DATASETS`.
        model: a name of :data:`koala_lib.models.MODELS`.
        optimizer: a name of :data:`OPTIMIZERS`.
        optimizer_args: keyword arguments of the optimizer; kept as sorted pairs.
        epochs: passes over the training data.
        batch_size: samples per step; the last incomplete batch of an epoch is dropped.
        milestones: epochs, counted from 0, at whose start the learning rate is multiplied by ``gamma``.
        gamma: that factor.
        augment: random crop after padding by 4, and flips for natural images.
        train_size: size of a fixed class-balanced subset; ``None`` for all.
        seed: of weights, order and augmentation.
        precision: ``"float32"``, or ``"bfloat16"`` for autocast (a deviation from the papers, and recorded).

    Raises:
        ValueError: for an unknown name or an impossible number, which the message names.
    """

    dataset: str
    model: str
    optimizer: str
    optimizer_args: Any = ()
    epochs: int
    batch_size: int = 128
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1
    augment: bool = False
    train_size: int | None = None
    seed: int = 0
    precision: str = "float32"

    def __post_init__(self) -> None:
        pairs = self.optimizer_args.items() if isinstance(self.optimizer_args, Mapping) else self.optimizer_args
        object.__setattr__(self, "optimizer_args", tuple(sorted((str(k), _hashable(v)) for k, v in pairs)))
        object.__setattr__(self, "milestones", tuple(self.milestones))
        for name, value, known in (
            ("dataset", self.dataset, data.DATASETS),
            ("model", self.model, models.MODELS),
            ("optimizer", self.optimizer, OPTIMIZERS),
            ("precision", self.precision, PRECISIONS),
        ):
            if value not in known:
                raise ValueError(f"{name}={value!r} is unknown; known are {', '.join(known)}")
        for name in ("epochs", "batch_size", "train_size"):
            value = getattr(self, name)
            if not (name == "train_size" and value is None) and (type(value) is not int or value < 1):
                raise ValueError(f"{name} must be a whole number >= 1, got {value!r}")
        if not all(type(m) is int and m >= 0 for m in self.milestones) or list(self.milestones) != sorted(
            self.milestones
        ):
            raise ValueError(f"milestones must be increasing epochs, got {self.milestones!r}")
        if not (isinstance(self.gamma, (int, float)) and 0 < self.gamma <= 1):
            raise ValueError(f"gamma must be in (0, 1], got {self.gamma!r}")

    def but(self, **changes: Any) -> RunConfig:
        """A copy with other values."""
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        fields = asdict(self)
        return fields | {"optimizer_args": dict(self.optimizer_args), "milestones": list(self.milestones)}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> RunConfig:
        return cls(**fields)

    @property
    def key(self) -> str:
        """16 hex digits that name the run: the same everywhere for the same configuration, data and algorithm."""
        what = self.to_dict() | {
            "data": data.identity(self.dataset),
            "version": [VERSION["train"], VERSION.get(self.optimizer, 1)],
        }
        canonical = json.dumps(what, sort_keys=True, separators=(",", ":"), default=list)
        # 1 and 1.0 are one learning rate: numbers of the optimizer enter as floats.
        canonical = json.dumps(_canonical(json.loads(canonical)), sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]

    @property
    def label(self) -> str:
        """One line for people."""
        args = ", ".join(f"{k}={v}" for k, v in self.optimizer_args)
        return f"{self.dataset} {self.model} {self.optimizer}({args}) {self.epochs} epochs, seed {self.seed}"


def _hashable(value: Any) -> Any:
    return tuple(map(_hashable, value)) if isinstance(value, (list, tuple)) else value


def _canonical(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _canonical(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_canonical(v) for v in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


@dataclass(frozen=True)
class RunResult:
    """What a run measured.

    ``epochs`` holds one dict per epoch: ``train_loss`` (mean over the epoch's batches, each at its own step),
    ``test_loss``, ``test_error`` and ``test_error_top5`` (in %, of the posterior weights), ``lr``. ``status`` is
    ``"done"``, or ``"failed"`` with the step whose loss was not finite. ``provenance`` says where and with what.
    """

    key: str  # of the configuration with the data and algorithm that the run really had
    config: RunConfig
    status: str
    epochs: tuple[dict[str, float], ...]
    failed_step: int | None = None
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def final(self) -> dict[str, float]:
        """The last epoch's metrics, the paper's choice; empty for a failed run, which has no result."""
        return dict(self.epochs[-1]) if self.status == "done" else {}

    def to_json(self) -> dict[str, Any]:
        return {
            "key": self.key,
            "config": self.config.to_dict(),
            "status": self.status,
            "failed_step": self.failed_step,
            "epochs": list(self.epochs),
            "provenance": self.provenance,
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> RunResult:
        return cls(
            key=record["key"],
            config=RunConfig.from_dict(record["config"]),
            status=record["status"],
            epochs=tuple(record["epochs"]),
            failed_step=record["failed_step"],
            provenance=record["provenance"],
        )


def train(
    config: RunConfig,
    *,
    device: str | torch.device = "cpu",
    checkpoint: Path | None = None,
    checkpoint_seconds: float = 60.0,
    on_step: Callable[[int, int], None] | None = None,
) -> RunResult:
    """Train one network.

    Args:
        config: what to train.
        device: where data, weights and filter live. On CUDA the step is compiled and runs in channels-last layout.
        checkpoint: a file; written every ``checkpoint_seconds``, and continued from where it exists.
        checkpoint_seconds: 0 writes after every step.
        on_step: called with (steps done, steps in all).

    Returns:
        The result. On the CPU a run has one thread, because sums depend on the number of threads; so on one kind of CPU
        it has the same bits everywhere, and whether it was interrupted or not.

    Raises:
        ValueError: if a batch is larger than the data set, or the checkpoint belongs to another run.
    """
    if torch.device(device).type == "cpu":
        torch.set_num_threads(1)
    run = _Run(config, torch.device(device))
    if checkpoint is not None and checkpoint.exists():
        run.load(checkpoint)
    started, saved = time.monotonic() - run.seconds, time.monotonic()
    while run.epoch < config.epochs and run.failed_step is None:
        for x, y in run.batches():
            run.train_step(x, y)
            if on_step is not None:
                on_step(run.steps_done, run.steps_per_epoch * config.epochs)
            if checkpoint is not None and time.monotonic() - saved >= checkpoint_seconds:
                run.seconds = time.monotonic() - started
                run.save(checkpoint)
                saved = time.monotonic()
        run.end_epoch()
    run.seconds = time.monotonic() - started
    return run.result()


class _Run:
    """The state of a run between two steps, and nothing that could be recomputed."""

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self.data = data.load(config.dataset, device=device, train_size=config.train_size)
        self.steps_per_epoch = len(self.data.train_labels) // config.batch_size
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"batch_size={config.batch_size} exceeds the {len(self.data.train_labels)} training samples"
            )
        torch.manual_seed(config.seed)
        channels, size = self.data.train_images.shape[1], self.data.train_images.shape[-1]
        self.model = models.build(
            config.model, num_classes=self.data.num_classes, in_channels=channels, image_size=size
        ).to(device)
        self.forward: Callable[[Tensor, Tensor], Tensor] = self._losses
        if device.type == "cuda":
            self.model = self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            self.forward = torch.compile(self._losses)
        self.optimizer = OPTIMIZERS[config.optimizer](self.model.parameters(), **dict(config.optimizer_args))
        self.scheduler = torch.optim.lr_scheduler.MultiStepLR(
            self.optimizer, list(config.milestones), gamma=config.gamma
        )
        self.epoch = self.step = 0  # finished epochs; finished steps of the current one
        self.loss_sum = torch.zeros((), device=device)
        self.bad_step = torch.full((), -1, device=device)
        self.failed_step: int | None = None
        self.epochs: list[dict[str, float]] = []
        self.seconds = 0.0

    @property
    def steps_done(self) -> int:
        return self.epoch * self.steps_per_epoch + self.step

    def batches(self) -> Any:
        """The rest of this epoch's batches, the same ones however often the run was interrupted."""
        self.model.train()
        return data.batches(
            self.data.train_images,
            self.data.train_labels,
            self.config.batch_size,
            mean=self.data.mean,
            std=self.data.std,
            generator=data.epoch_generator(self.config.seed, self.epoch),
            augment=self.data.augmentation if self.config.augment else None,
            drop_last=True,
            start=self.step,
        )

    def _losses(self, x: Tensor, y: Tensor) -> Tensor:
        precision = PRECISIONS[self.config.precision]
        with torch.autocast(self.device.type, dtype=precision, enabled=precision != torch.float32):
            return nn.functional.cross_entropy(self.model(x).float(), y, reduction="none")

    def train_step(self, x: Tensor, y: Tensor) -> None:
        def closure() -> Tensor:
            self.optimizer.zero_grad()
            losses = self.forward(x, y)
            losses.mean().backward()  # type: ignore[no-untyped-call]
            return losses

        # KOALA returns the mean loss, torch's optimizers what the closure returned.
        losses: Any = self.optimizer.step(closure)  # type: ignore[arg-type]
        loss = losses.detach().mean()
        first_bad = (self.bad_step < 0) & ~torch.isfinite(loss)
        self.bad_step = torch.where(first_bad, self.steps_done, self.bad_step)
        self.loss_sum += loss
        self.step += 1

    def end_epoch(self) -> None:
        lr = float(self.optimizer.param_groups[0]["lr"])
        self.scheduler.step()
        loss, bad = self.loss_sum.item() / self.steps_per_epoch, int(self.bad_step.item())
        metrics = {"train_loss": loss, **self.evaluate(), "lr": lr}
        if bad < 0 and not all(math.isfinite(v) for v in metrics.values()):
            bad = self.steps_done - 1  # finite training losses, yet the weights overflowed by the last step
        if bad >= 0:
            self.failed_step = bad
        else:
            self.epochs.append({k: float(f"{v:.6g}") for k, v in metrics.items()})
        self.epoch, self.step = self.epoch + 1, 0
        self.loss_sum = torch.zeros_like(self.loss_sum)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Loss and top-1 and top-5 error (%) on the test set."""
        self.model.eval()
        images, labels, top = self.data.test_images, self.data.test_labels, min(5, self.data.num_classes)
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        for x, y in data.batches(images, labels, 1000, mean=self.data.mean, std=self.data.std):
            logits = self.model(x).float()
            hits = logits.topk(top, dim=1).indices == y[:, None]
            loss = nn.functional.cross_entropy(logits, y, reduction="sum")
            sums += torch.stack([loss.double(), hits[:, 0].sum().double(), hits.sum().double()])
        loss_sum, first, five = (sums / len(labels)).tolist()
        return {"test_loss": loss_sum, "test_error": 100 * (1 - first), "test_error_top5": 100 * (1 - five)}

    def save(self, path: Path) -> None:
        """Write a checkpoint and only then let it take the place of the last one."""
        state = {
            "key": self.config.key,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "counters": [self.epoch, self.step],
            "sums": [self.loss_sum, self.bad_step],
            "epochs": self.epochs,
            "seconds": self.seconds,
            "rng": torch.get_rng_state(),
            "rng_cuda": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }
        temporary = path.with_suffix(".part")
        torch.save(state, temporary)
        os.replace(temporary, path)

    def load(self, path: Path) -> None:
        state = torch.load(path, map_location=self.device, weights_only=True)
        if state["key"] != self.config.key:
            raise ValueError(f"{path} is a checkpoint of run {state['key']}, not of {self.config.key}: remove it")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.epoch, self.step = state["counters"]
        self.loss_sum, self.bad_step = state["sums"]
        self.epochs, self.seconds = state["epochs"], state["seconds"]
        torch.set_rng_state(state["rng"].cpu())
        if state["rng_cuda"] is not None:
            torch.cuda.set_rng_state(state["rng_cuda"].cpu(), self.device)

    def result(self) -> RunResult:
        digest = hashlib.sha256()
        for tensor in self.model.state_dict().values():
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        provenance = _provenance(self.device) | {
            "data": {"title": self.data.title, "tag": self.data.tag, "identity": self.data.identity[:16]},
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "weights_sha256": digest.hexdigest()[:16],
            "seconds": float(f"{self.seconds:.4g}"),
        }
        status = "done" if self.failed_step is None else "failed"
        return RunResult(self.config.key, self.config, status, tuple(self.epochs), self.failed_step, provenance)


def _provenance(device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "device": f"{device.type} ({name})",
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "numpy": np.__version__, "python": platform.python_version()},
        "commit": _commit(),
    }


@cache
def _commit() -> str:
    """The commit of the working tree, with ``+`` if it was changed; empty outside a checkout."""
    try:
        git = ["git", "-C", str(paths.ROOT)]
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        dirty = subprocess.run([*git, "status", "--porcelain", "koala_lib"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")
