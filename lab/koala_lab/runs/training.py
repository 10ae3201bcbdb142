"""One training run: :class:`RunConfig` -> :func:`train` -> :class:`RunResult`.

The same few lines train every optimizer of a table, so that rows differ in nothing else. A step reads nothing back, and
what a run needs to go on after ``kill -9`` is written to a checkpoint.
"""

from __future__ import annotations

import hashlib
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import swa_utils

from koala_lab import tasks
from koala_lab.baselines.registry import OPTIMIZERS, create, lookahead
from koala_lab.checks import check_fields, check_known
from koala_lab.config import RunConfig
from koala_lab.files import read_torch, set_aside, write_torch
from koala_lab.runs.provenance import provenance

__all__ = ["RunConfig", "RunResult", "Stopped", "train"]


@dataclass(frozen=True)
class RunResult:
    """What a run measured.

    ``epochs`` holds one dict per epoch: the task's training losses and the entries that an optimizer names as
    ``traced`` (means over the epoch's batches, each at its own step; APOLLO's is ``above_floor``, the share of the
    weights with |B| > sigma), the task's test metrics (of the posterior weights) and ``lr``. ``status`` is ``"done"``,
    or ``"failed"`` with the step whose loss was not finite. ``provenance`` says where and with what, ``pictures`` holds
    PNG files in base64.
    """

    key: str  # of the configuration with the data and algorithm that the run really had
    config: RunConfig
    status: str
    epochs: tuple[dict[str, float], ...]
    failed_step: int | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    pictures: dict[str, str] = field(default_factory=dict)

    @property
    def final(self) -> dict[str, float]:
        """Return the last epoch's metrics, the paper's choice; empty for a failed run, which has no result."""
        return dict(self.epochs[-1]) if self.status == "done" else {}

    def to_json(self) -> dict[str, Any]:
        """Return what is stored of the run."""
        record = {
            "key": self.key,
            "config": self.config.to_dict(),
            "status": self.status,
            "failed_step": self.failed_step,
            "epochs": list(self.epochs),
            "provenance": self.provenance,
        }
        return record | ({"pictures": self.pictures} if self.pictures else {})

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> RunResult:
        """Return the result that :meth:`to_json` wrote.

        Raises:
            ValueError, KeyError, TypeError: If a field is missing or of another type.
        """
        kinds = {"key": str, "config": dict, "epochs": list, "provenance": dict, "failed_step": int | None}
        check_fields(record, kinds)
        known = {"data": dict, "device": str, "seconds": float | int}
        check_fields(record["provenance"], {name: known[name] for name in known if name in record["provenance"]})
        check_known("status", record["status"], ("done", "failed"))
        for metrics in record["epochs"]:
            check_fields({"epochs": metrics}, {"epochs": dict})
            check_fields(metrics, dict.fromkeys(metrics, float | int))
        return cls(
            key=record["key"],
            config=RunConfig.from_dict(record["config"]),
            status=record["status"],
            epochs=tuple(record["epochs"]),
            failed_step=record["failed_step"],
            provenance=record["provenance"],
            pictures=record.get("pictures", {}),
        )


class Stopped(Exception):
    """The time for a run was over; its checkpoint goes on."""


def train(
    config: RunConfig,
    *,
    device: str | torch.device = "cpu",
    checkpoint: Path | None = None,
    checkpoint_seconds: float = 60.0,
    on_step: Callable[[int, int], None] | None = None,
    until: float = math.inf,
) -> RunResult:
    """Train what a configuration says.

    Args:
        config: what to train.
        device: where data, weights and filter live. On CUDA the training step is compiled.
        checkpoint: a file; written every ``checkpoint_seconds``, and continued from where it exists. One that cannot be
            read, or belongs to another run, is set aside with a warning; one that cannot be written is told and missed.
        checkpoint_seconds: 0 writes after every step.
        on_step: called with (steps done, steps in all).
        until: a time of ``time.monotonic()``; the first step that ends after it is the last.

    Returns:
        The result. On the CPU a run has one thread, because sums depend on the number of threads; so on one kind of CPU
        it has the same bits everywhere, and whether it was interrupted or not.

    Raises:
        Stopped: at ``until``, behind a checkpoint.
        ValueError: if a batch is larger than the data set.
        TypeError: for an argument that the optimizer, network or task does not have.
    """
    if torch.device(device).type == "cpu":
        torch.set_num_threads(1)
    run = TrainingRun(config, torch.device(device))
    if checkpoint is not None and checkpoint.exists():
        try:
            run.load(checkpoint)
        except Exception as error:  # empty, cut off, of another run or version: of no use, whatever it is
            set_aside(checkpoint, error, "the run begins anew")
            run = TrainingRun(config, torch.device(device))
    started, saved = time.monotonic() - run.seconds, time.monotonic()
    while run.epoch < config.epochs and run.failed_step is None:
        run.begin_epoch()
        for batch in run.task.batches(run.epoch, run.step):
            run.train_step(batch)
            if on_step is not None:
                on_step(run.steps_done, run.task.steps_per_epoch * config.epochs)
            stopping = time.monotonic() >= until
            if checkpoint is not None and (stopping or time.monotonic() - saved >= checkpoint_seconds):
                run.seconds = time.monotonic() - started
                try:
                    run.save(checkpoint)
                except OSError as error:  # the run itself needs none
                    warnings.warn(f"{error}; the run goes on without a new checkpoint", stacklevel=2)
                saved = time.monotonic()
            if stopping:
                raise Stopped(f"{config.label}: stopped after step {run.steps_done}")
        run.end_epoch()
    run.seconds = time.monotonic() - started
    return run.result()


class TrainingRun:
    """The state of a run between two steps, and nothing that could be recomputed."""

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        torch.manual_seed(config.seed)
        self.task = tasks.create(config, device)
        wrapper, options = config.wrapper, dict(config.wrapper_args)
        self.optimizers = {
            name: create(config.optimizer, part, self.task.loss_fn, **dict(config.optimizer_args))
            for name, part in self.task.parts.items()
        }
        if wrapper == "lookahead":
            if OPTIMIZERS[config.optimizer].own_forward:
                raise ValueError(f"wrapper='lookahead' calls step(closure), which optimizer={config.optimizer!r} lacks")
            self.optimizers = {name: lookahead(inner, **options) for name, inner in self.optimizers.items()}
        self.average = _Average(self.task.network, config.epochs, **options) if wrapper == "swa" else None
        self.switch = self._switch(**options) if wrapper == "switch" else (-1, {})
        self.schedulers = {name: _scheduler(config, optimizer) for name, optimizer in self.optimizers.items()}
        self.epoch = self.step = 0  # finished epochs; finished steps of the current one
        traced: dict[str, Any] = {part: o for part, o in self.optimizers.items() if hasattr(o, "traced")}
        self.traced = list(traced.values())
        entries = [(f"{part}_" if len(traced) > 1 else "") + name for part, o in traced.items() for name in o.traced]
        self.names = [*self.task.losses, *entries]
        self.sums = torch.zeros(len(self.names), device=device)
        self.bad_step = torch.full((), -1, device=device)
        self.failed_step: int | None = None
        self.epochs: list[dict[str, float]] = []
        self.seconds = 0.0

    @property
    def steps_done(self) -> int:
        return self.epoch * self.task.steps_per_epoch + self.step

    def _switch(self, *, epoch: int, **changes: Any) -> tuple[int, dict[str, Any]]:
        if type(epoch) is not int or not 0 <= epoch < self.config.epochs:
            raise ValueError(f"switch needs an epoch from 0 to {self.config.epochs - 1}, got {epoch!r}")
        for part in self.task.parts.values():  # the optimizer itself says what is wrong with the new options
            create(self.config.optimizer, part, self.task.loss_fn, **(dict(self.config.optimizer_args) | changes))
        return epoch, changes

    def begin_epoch(self) -> None:
        """Begin an epoch, or go on with it: also called by a run that continues from a checkpoint."""
        self.task.network.train()
        if self.epoch == self.switch[0]:
            for optimizer in self.optimizers.values():
                for group in optimizer.param_groups:
                    group.update(self.switch[1])
        for optimizer in self.optimizers.values():
            if hasattr(optimizer, "start_epoch") and self.step == 0:
                optimizer.start_epoch(self.task.batches(self.epoch))

    def train_step(self, batch: Any) -> None:
        with self.warm_up():
            losses = self.task.step(batch, self.optimizers)
        first_bad = (self.bad_step < 0) & ~torch.isfinite(losses).all()
        self.bad_step = torch.where(first_bad, self.steps_done, self.bad_step)
        traced = [optimizer.entries(optimizer.traced).to(losses.dtype) for optimizer in self.traced]
        self.sums += torch.cat([losses, *traced])
        self.step += 1

    @contextmanager
    def warm_up(self) -> Iterator[None]:
        """Yield at the learning rate of a step, where it is not the epoch's; afterwards the epoch's is there again."""
        steps, start, done = self.config.warmup_steps, self.config.warmup_init_lr, self.steps_done
        if done >= steps and not self.config.inverse_sqrt:
            yield
            return
        groups = [group for optimizer in self.optimizers.values() for group in optimizer.param_groups]
        scheduled = [group["lr"] for group in groups]
        for group in groups:
            top = group["initial_lr"]
            group["lr"] = start + (top - start) * done / steps if done < steps else top * math.sqrt(steps / done)
        yield
        for group, lr in zip(groups, scheduled, strict=True):
            group["lr"] = lr

    def end_epoch(self) -> None:
        lr = float(next(iter(self.optimizers.values())).param_groups[0]["lr"])
        for scheduler in self.schedulers.values():
            scheduler.step()
        means, bad = (self.sums / self.task.steps_per_epoch).tolist(), int(self.bad_step.item())
        metrics = {**dict(zip(self.names, means, strict=True)), **self.evaluate(), "lr": lr}
        if bad < 0 and not all(math.isfinite(v) for v in metrics.values()):
            bad = self.steps_done - 1  # finite training losses, yet the weights overflowed by the last step
        if bad >= 0:
            self.failed_step = bad
        else:
            self.epochs.append({k: float(f"{v:.6g}") for k, v in metrics.items()})
        self.epoch, self.step = self.epoch + 1, 0
        self.sums = torch.zeros_like(self.sums)

    def evaluate(self) -> dict[str, float]:
        network = self.task.network
        if self.average is not None and self.average.update(network, self.epoch):
            network = self.average.network
            # With the statistics of a step's weights, the averaged weights would be evaluated in the wrong place.
            swa_utils.update_bn(self.task.batches(self.epoch), network)
        return self.task.evaluate(network.eval())

    def save(self, path: Path) -> None:
        """Write a checkpoint and only then let it take the place of the last one."""
        state = {
            "key": self.config.key,
            "network": self.task.network.state_dict(),
            "task": self.task.state_dict(),
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "schedulers": {name: scheduler.state_dict() for name, scheduler in self.schedulers.items()},
            "average": self.average.network.state_dict() if self.average else None,
            "counters": [self.epoch, self.step],
            "sums": [self.sums, self.bad_step],
            "epochs": self.epochs,
            "seconds": self.seconds,
            "rng": torch.get_rng_state(),
            "rng_cuda": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }
        write_torch(path, state)

    def load(self, path: Path) -> None:
        state = read_torch(path, self.device)
        if state["key"] != self.config.key:
            raise ValueError(f"a checkpoint of run {state['key']}, not of {self.config.key}")
        self.task.network.load_state_dict(state["network"])
        self.task.load_state_dict(state["task"])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
            self.schedulers[name].load_state_dict(state["schedulers"][name])
        if self.average:
            self.average.network.load_state_dict(state["average"])
        self.epoch, self.step = state["counters"]
        self.sums, self.bad_step = state["sums"]
        self.epochs, self.seconds = state["epochs"], state["seconds"]
        torch.set_rng_state(state["rng"].cpu())
        if state["rng_cuda"] is not None:
            torch.cuda.set_rng_state(state["rng_cuda"].cpu(), self.device)

    def result(self) -> RunResult:
        digest = hashlib.sha256()
        for tensor in self.task.network.state_dict().values():
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        data = self.task.data
        origin = provenance(self.device) | {
            "data": {"title": data.title, "tag": data.tag, "identity": data.identity[:16]},
            "parameters": sum(p.numel() for p in self.task.network.parameters()),
            "weights_sha256": digest.hexdigest()[:16],
            "seconds": float(f"{self.seconds:.4g}"),
            **self.task.provenance(),
        }
        status = "done" if self.failed_step is None else "failed"
        pictures = self.task.pictures() if status == "done" else {}
        return RunResult(self.config.key, self.config, status, tuple(self.epochs), self.failed_step, origin, pictures)


def _scheduler(config: RunConfig, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    if config.final_lr is None:
        return torch.optim.lr_scheduler.MultiStepLR(optimizer, [*config.milestones], gamma=config.gamma)
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.epochs, eta_min=config.final_lr)


class _Average:
    """Stochastic weight averaging: the mean of the weights at the end of every ``every``-th epoch from ``start`` on."""

    def __init__(self, network: nn.Module, epochs: int, *, start: int, every: int = 1) -> None:
        if not (1 <= start <= epochs and every >= 1):
            raise ValueError(
                f"swa needs 1 <= start <= {epochs} epochs and every >= 1, got start={start}, every={every}"
            )
        self.start, self.every = start, every
        self.network = swa_utils.AveragedModel(network)

    def update(self, network: nn.Module, epoch: int) -> bool:
        """Take in the weights if the turn is theirs, ``epoch`` counted from 0; says whether there is an average."""
        done = epoch + 1
        if done >= self.start and (done - self.start) % self.every == 0:
            self.network.update_parameters(network)
        return bool(self.network.n_averaged > 0)
