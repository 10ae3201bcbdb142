"""What a training run is: :class:`RunConfig`, everything that decides its outcome, and the key made of it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from typing import Any

from koala_lab import data
from koala_lab.baselines.registry import OPTIMIZERS
from koala_lab.checks import check_known, check_number, check_whole
from koala_lab.tasks import PRECISIONS, TASKS

# Part of every run's key. Raise a number by hand when a change alters what such a run computes.
VERSION = {"train": 2, "koala_v": 2, "koala_m": 2, "meka": 2, "adameka": 2, "apollo": 2}

WRAPPERS = ("", "lookahead", "swa", "switch")

Arguments = Mapping[str, Any] | tuple[tuple[str, Any], ...]  # keywords as given, and as kept


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides the outcome of a run, in canonical form.

    Arguments that end in ``_args`` are mappings of keywords, kept as sorted pairs.

    Args:
        task: what is trained and measured, a name of :data:`koala_lab.tasks.TASKS`.
        task_args: options of the task.
        dataset: a data set of the task.
        train_size: size of a fixed class-balanced subset; ``None`` for all.
        augment: random crop after padding by 4, and flips for natural images; of photographs a random area.
        model: a network of the task.
        model_args: its options, such as ``init``.
        optimizer: a name of ``OPTIMIZERS`` in ``baselines.registry``.
        optimizer_args: its arguments.
        wrapper: ``"lookahead"`` (see ``baselines.registry``), or ``"swa"``: the metrics are those of
            the mean of the weights at the end of epochs ``start``, ``start + every``, …, once there is one (Izmailov et
            al., UAI 2018), with BatchNorm statistics taken anew on the training data. Or ``"switch"``: from the start
            of epoch ``epoch`` (counted from 0) on, the optimizer has the other options given, and keeps its state.
        wrapper_args: its options.
        epochs: passes over the training data.
        batch_size: samples per step; the last incomplete batch of an epoch is dropped, but not of translations.
        milestones: epochs, counted from 0, at whose start the learning rate is multiplied by ``gamma``.
        gamma: that factor.
        final_lr: instead of milestones, a cosine schedule (Loshchilov & Hutter, ICLR 2017, without restarts): in epoch
            e = 0, 1, ... of E the learning rate is final_lr + (lr - final_lr) (1 + cos(pi e / E)) / 2.
        warmup_steps: for so many steps the learning rate rises linearly from ``warmup_init_lr`` at the first step to
            the optimizer's ``lr``, whatever the schedule says meanwhile.
        warmup_init_lr: where it starts.
        inverse_sqrt: instead of milestones, after the warm-up: the learning rate of step t is lr sqrt(warmup_steps / t)
            (Vaswani et al., NeurIPS 2017, section 5.3). The ``lr`` of an epoch's metrics is the one before this factor.
        seed: seed of the initial weights, the order of the samples and the augmentation.
        precision: ``"float32"``, or ``"bfloat16"`` for autocast in forward and backward; an LSTM stays in float32 on a
            processor that cannot compute it in bfloat16.

    Raises:
        ValueError: for an unknown name or a number out of range.
    """

    task: str = "classification"
    task_args: Arguments = ()
    dataset: str
    train_size: int | None = None
    augment: bool = False
    model: str
    model_args: Arguments = ()
    optimizer: str
    optimizer_args: Arguments = ()
    wrapper: str = ""
    wrapper_args: Arguments = ()
    epochs: int
    batch_size: int = 128
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1
    final_lr: float | None = None
    warmup_steps: int = 0
    warmup_init_lr: float = 0.0
    inverse_sqrt: bool = False
    seed: int = 0
    precision: str = "float32"

    def __post_init__(self) -> None:
        for name in _MAPPINGS:
            given = getattr(self, name)
            pairs = given.items() if isinstance(given, Mapping) else given
            object.__setattr__(self, name, tuple(sorted((str(k), _hashable(v)) for k, v in pairs)))
        object.__setattr__(self, "milestones", tuple(self.milestones))
        check_known("task", self.task, TASKS)
        check_known("dataset", self.dataset, TASKS[self.task].datasets, of=f"task {self.task!r}")
        check_known("model", self.model, TASKS[self.task].networks, of=f"task {self.task!r}")
        check_known("optimizer", self.optimizer, OPTIMIZERS)
        check_known("wrapper", self.wrapper, WRAPPERS)
        check_known("precision", self.precision, PRECISIONS)
        check_whole("epochs", self.epochs, 1)
        check_whole("batch_size", self.batch_size, 1)
        check_whole("train_size", self.train_size, 1, also=(None,))
        check_whole("warmup_steps", self.warmup_steps)
        check_whole("seed", self.seed)
        if not isinstance(self.augment, bool):
            raise ValueError(f"augment must be True or False, got {self.augment!r}")
        check_number("gamma", self.gamma, "in (0, 1]")
        check_number("warmup_init_lr", self.warmup_init_lr)
        if not all(type(m) is int and m >= 0 for m in self.milestones) or list(self.milestones) != sorted(
            self.milestones
        ):
            raise ValueError(f"milestones must be increasing epochs, got {self.milestones!r}")
        if self.final_lr is not None:
            check_number("final_lr", self.final_lr)
            if self.milestones:
                raise ValueError("final_lr asks for a cosine schedule and milestones for steps: give one of them")
        if self.inverse_sqrt and (not self.warmup_steps or self.milestones or self.final_lr is not None):
            raise ValueError("inverse_sqrt=True needs warmup_steps of 1 or more, and neither milestones nor final_lr")
        if self.warmup_steps and OPTIMIZERS[self.optimizer].own_warm_up:
            raise ValueError(f"optimizer={self.optimizer!r} warms up by itself: put warmup_steps into optimizer_args")

    def but(self, **changes: Any) -> RunConfig:
        """Return a copy with other values."""
        return replace(self, **changes)

    def scaled(self, factor: float) -> RunConfig:
        """Return the run at a multiple of its learning rate, with weight decay divided by it: their product stays.

        The rates at which a warm-up starts and a cosine schedule ends go with it. Six digits are kept.

        >>> run = RunConfig(dataset="digits", model="resnet8", optimizer="sgd", optimizer_args={"lr": 0.1}, epochs=1)
        >>> dict(run.scaled(3).optimizer_args)
        {'lr': 0.3}
        """

        def times(value: float | None, by: float) -> float | None:
            return None if value is None else float(f"{value * by:.6g}")

        given = dict(self.optimizer_args)
        if "lr" not in given:
            raise ValueError(f"{self.label}: no lr is given, so there is none to scale; put it into optimizer_args")
        powers = {"lr": factor, "warmup_init_lr": factor, "weight_decay": 1 / factor}
        args = {name: times(v, powers[name]) if name in powers else v for name, v in given.items()}
        start, end = times(self.warmup_init_lr, factor), times(self.final_lr, factor)
        return self.but(optimizer_args=args, warmup_init_lr=start, final_lr=end)

    def shortened(self, epochs: int) -> RunConfig:
        """Return the run with so many epochs, its milestones and warm-up at the same shares of it."""

        def share(steps: int) -> int:
            return math.ceil(steps * epochs / self.epochs)

        args = {name: share(v) if name == "warmup_steps" else v for name, v in dict(self.optimizer_args).items()}
        drops = [round(m * epochs / self.epochs) for m in self.milestones]
        return self.but(epochs=epochs, optimizer_args=args, warmup_steps=share(self.warmup_steps), milestones=drops)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields, as JSON has them."""
        return (
            asdict(self) | {name: dict(getattr(self, name)) for name in _MAPPINGS} | {"milestones": [*self.milestones]}
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunConfig:
        """Return the configuration that :meth:`to_dict` wrote."""
        return cls(**values)

    @property
    def key(self) -> str:
        """16 hex digits that name the run: the same everywhere for the same configuration, data and algorithm.

        Fields at their default do not enter, so that a new field leaves the keys of old runs alone.
        """
        default = {f.name: f.default for f in fields(self)}
        what = {k: v for k, v in self.to_dict().items() if default[k] is MISSING or getattr(self, k) != default[k]}
        what["data"] = data.identity(self.dataset)
        what["version"] = [VERSION["train"], VERSION.get(self.optimizer, 1), VERSION.get(self.task, 1)]
        canonical = json.dumps(what, sort_keys=True, separators=(",", ":"), default=list)
        # 1 and 1.0 are one learning rate: numbers of the optimizer enter as floats.
        canonical = json.dumps(_canonical(json.loads(canonical)), sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]

    @property
    def label(self) -> str:
        """One line for people."""
        args = ", ".join(f"{k}={v}" for k, v in dict(self.optimizer_args).items())
        method = f"{self.wrapper} {self.optimizer}".strip()
        return f"{self.dataset} {self.model} {method}({args}) {self.epochs} epochs, seed {self.seed}"


_MAPPINGS = tuple(f.name for f in fields(RunConfig) if f.name.endswith("_args"))


def _hashable(value: Any) -> Any:
    if isinstance(value, Mapping):
        raise ValueError(f"an argument must be a number, a text or a list of them, got {value!r}")
    return tuple(map(_hashable, value)) if isinstance(value, (list, tuple)) else value


def _canonical(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _canonical(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_canonical(v) for v in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value
