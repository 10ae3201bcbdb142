"""KOALA's tables train their common runs once, and the paper preset of each is the printed protocol."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from koala_lab import notebook as nb
from koala_lab.config import RunConfig

TABLES = {name: path for name, path in nb.all_notebooks().items() if name.startswith("koala/2")}
NUMBERS = {name.split("/")[1][:2]: name for name in TABLES}
SHARING = [NUMBERS[n] for n in ("20", "21", "22", "23", "24", "25", "26")]

KOALA_M = {"weight_decay": 5e-4, "formulas": "released", "momentum": 0.9}
SMALL: dict[str, dict[str, Any]] = {
    "quick": {"dataset": "digits", "model": "resnet8", "batch_size": 64, "epochs": 5, "milestones": (2, 3, 4)},
    "desktop": {
        "dataset": "fashion-mnist",
        "model": "resnet8_w16",
        "batch_size": 128,
        "augment": True,
        "epochs": 40,
        "milestones": (12, 24, 36),
    },
}
SEEDS = {"quick": 5, "desktop": 3}  # that all tables have; Tables 2 and 6 have two more at desktop


def grid(name: str, preset: str) -> list[RunConfig]:
    return nb.grid_of(TABLES[name], preset)


@pytest.mark.parametrize("preset", SMALL)
def test_every_table_has_the_default_koala_m_run_and_it_is_the_same_run(preset: str) -> None:
    default = RunConfig(gamma=0.2, optimizer="koala_m", optimizer_args=KOALA_M, **SMALL[preset])
    wanted = {default.but(seed=seed).key for seed in range(SEEDS[preset])}
    lacking = [name for name in SHARING if not wanted <= {c.key for c in grid(name, preset)}]
    assert not lacking
    grids = [{c.key for c in grid(name, preset)} for name in SHARING]
    assert len(set().union(*grids)) <= sum(map(len, grids)) - len(wanted) * (len(SHARING) - 1)


def schedules(name: str) -> Counter[tuple[Any, ...]]:
    """How many runs of the paper preset have each data set, length, decay epochs and factor."""
    return Counter((c.dataset, c.epochs, c.milestones, c.gamma) for c in grid(name, "paper"))


@pytest.mark.parametrize("name", [n for n in SHARING if n != NUMBERS["24"]])
def test_ablations_decay_by_a_fifth_every_thirty_epochs_on_cifar100(name: str) -> None:
    assert set(schedules(name)) == {("cifar100", 100, (30, 60, 90), 0.2)}
    networks = {"25": "resnet50", "26": "resnet50"}
    assert {c.model for c in grid(name, "paper")} == {networks.get(name.split("/")[1][:2], "resnet18")}
    assert {c.seed for c in grid(name, "paper")} == {0, 1, 2}
    assert all(c.augment and c.train_size is None for c in grid(name, "paper"))
    sizes = {32, 64, 128, 256} if name == NUMBERS["22"] else {128}
    assert {c.batch_size for c in grid(name, "paper")} == sizes


def test_table6_decays_as_printed() -> None:
    """100 epochs: every 30 by 0.1 (CIFAR-10, ImageNet-32) or 0.2 (CIFAR-100); 200: once at 150, or at 60, 120, 160."""
    assert schedules(NUMBERS["24"]) == {
        ("cifar10", 100, (30, 60, 90), 0.1): 27,
        ("cifar10", 200, (150,), 0.1): 27,
        ("cifar100", 100, (30, 60, 90), 0.2): 27,
        ("cifar100", 200, (60, 120, 160), 0.2): 27,
        ("imagenet32", 100, (30, 60, 90), 0.1): 6,
    }


def test_table6_trains_every_printed_cell_three_times() -> None:
    networks = ("resnet18", "resnet50", "wide_resnet50_2")
    cells = {(d, m, o): 6 for d in ("cifar10", "cifar100") for m in networks for o in ("sgd", "adam", "koala_m")}
    cells |= {("imagenet32", "resnet50", o): 3 for o in ("sgd", "koala_m")}
    runs = grid(NUMBERS["24"], "paper")
    assert Counter((c.dataset, c.model, c.optimizer) for c in runs) == cells
    assert {(c.batch_size, c.augment, c.train_size, c.precision) for c in runs} == {(128, True, None, "float32")}


def test_table6_has_the_printed_rates_and_weight_decays() -> None:
    printed = {"sgd": {"lr": 0.1, "momentum": 0.9}, "adam": {"lr": 3e-4}, "koala_m": {**KOALA_M}}
    for c in grid(NUMBERS["24"], "paper"):
        decay = 1e-4 if c.dataset == "imagenet32" else 5e-4
        assert dict(c.optimizer_args) == printed[c.optimizer] | {"weight_decay": decay}


def test_table3_changes_one_initial_variance_at_a_time() -> None:
    changes = Counter(
        (c.optimizer, k, v)
        for c in grid(NUMBERS["21"], "paper")
        for k, v in c.optimizer_args
        if k.startswith("initial_")
    )
    names = [("koala_v", "initial_variance"), ("koala_m", "initial_variance"), ("koala_m", "initial_velocity_variance")]
    assert changes == {(*name, value): 3 for name in names for value in (0.01, 1.0)}  # 0.1 is the default


def test_table5_has_four_initialisations_for_sgd_and_koala_m() -> None:
    sgd = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
    runs = [c for c in grid(NUMBERS["23"], "paper") if dict(c.optimizer_args) in (sgd, KOALA_M)]
    inits = ("xavier_normal", "xavier_uniform", "kaiming_uniform", "orthogonal")
    assert Counter((dict(c.model_args)["init"], c.optimizer) for c in runs if c.model_args) == {
        (init, o): 3 for init in inits for o in ("sgd", "koala_m")
    }
