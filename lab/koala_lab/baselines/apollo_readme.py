"""The settings of APOLLO's image experiments, from the README of the released code (XuezheMax/apollo), by row."""

from __future__ import annotations

from typing import Any

_ADAM = {"lr": 1e-3, "weight_decay": 0.25}  # 0.25 in its table, 0.025 in the commands beside it
_SGD = {"lr": 0.1, "momentum": 0.9}
_APOLLO = {"lr": 0.01, "weight_decay": 2.5e-4, "warmup_init_lr": 1e-5}

_ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd": ("sgd", _SGD | {"nesterov": True, "weight_decay": 5e-4}),
    "adam": ("adam", _ADAM | {"decoupled_weight_decay": True}),
    "radam": ("radam", _ADAM | {"decoupled_weight_decay": True}),
    "adabelief": ("adabelief", _ADAM | {"eps": 1e-8}),
    "adahessian": ("adahessian", {"lr": 0.15, "weight_decay": 1e-3, "eps": 1e-2}),
    "apollo": ("apollo", _APOLLO),
    "apollow": ("apollo", _APOLLO | {"weight_decay": 2.5e-2, "decoupled_weight_decay": True}),
    # Not in the README: footnote 2 of the paper, with SGD's decay; the curvature switched off; the floor's SGD.
    "adabelief_l2": ("adabelief", _ADAM | {"eps": 1e-8, "weight_decay": 5e-4, "weight_decouple": False}),
    "apollo_b0": ("apollo", _APOLLO | {"eps": 1e6}),
    "sgd_equivalent": ("sgd", _SGD | {"weight_decay": 2.5e-4}),
}
_STARTS = {"adahessian": 1e-3, "sgd_equivalent": 1e-4}  # rates at which a run's own warm-up starts
_IMAGENET = {"adam": 0.1, "radam": 0.1, "adabelief": 0.1, "adahessian": 1e-3, "apollow": 1e-2}  # decays, else 1e-4


def image_rows(warmup_steps: int, dataset: str = "cifar10") -> dict[str, dict[str, Any]]:
    """Return optimizer, options and warm-up of each row, as fields of a `RunConfig`.

    Args:
        warmup_steps: of APOLLO, AdaHessian and SGD at APOLLO's equivalent rate; 500 in the README.
        dataset: ``"imagenet"`` has weight decays of its own.
    """
    found = {}
    for row, (optimizer, options) in _ROWS.items():
        args = options | ({"weight_decay": _IMAGENET.get(row, 1e-4)} if dataset == "imagenet" else {})
        args |= {"warmup_steps": warmup_steps} if optimizer == "apollo" else {}
        ramp = {"warmup_steps": warmup_steps, "warmup_init_lr": _STARTS[row]} if row in _STARTS and warmup_steps else {}
        found[row] = {"optimizer": optimizer, "optimizer_args": args, **ramp}
    return found
