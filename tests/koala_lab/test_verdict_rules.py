"""What decides nothing, by rule; and how claims are judged from a table of runs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from koala_lab import claims
from koala_lab.claims import Claim, Criterion, evidence, judge, references


def claim(test: str, number: float = 0.0, *, at: str = "quick", **changes: Any) -> Claim:
    fields: dict[str, Any] = {
        "id": "koala.test.claim", "where": "Table 0", "kind": "property", "metric": "test_error", "unit": "",
        "direction": "lower", "expected": None, "spread": None, "n": None, "text": "t", "notebook": "koala/20_x",
        "judge": {at: Criterion(test, number)},
    }  # fmt: skip
    return Claim(**fields | changes)


def ordering(test: str = "better", margin: float = 0.0, **changes: Any) -> Claim:
    return claim(test, margin, **{"kind": "ordering", "subject": "a", "against": ("b",), "unit": "%"} | changes)


# ---- rules on evidence


def test_better_with_a_margin_is_contradicted_by_an_interval_below_it() -> None:
    gains = {s: 0.3 + 0.01 * s for s in range(5)}  # better, and surely by less than 1
    arms = {"a": {s: 10.0 - g for s, g in gains.items()}, "b": dict.fromkeys(range(5), 10.0)}
    assert judge(ordering(margin=0.1), preset="quick", arms=arms).status == "reproduced"
    assert judge(ordering(margin=1.0), preset="quick", arms=arms).status == "contradicted"


@pytest.mark.parametrize(("measured", "status"), [(0.0006, "inconclusive"), (0.5, "reproduced"), (1.2, "contradicted")])
def test_a_bound_that_nothing_comes_near_decides_nothing(measured: float, status: str) -> None:
    verdict = judge(claim("at_most", kind="bound", expected=1.0), preset="quick", measured={"x": measured})
    assert verdict.status == status
    if status == "inconclusive":
        assert verdict.detail == "nothing comes near the bound 1"


@pytest.mark.parametrize(
    ("count", "contrast", "status"),
    [(0, 3, "reproduced"), (0, 0, "inconclusive"), (0, None, "inconclusive"), (1, 3, "contradicted")],
)
def test_never_needs_a_contrast_in_which_it_happens(count: int, contrast: int | None, status: str) -> None:
    assert judge(claim("never"), preset="quick", measured=count, contrast=contrast).status == status


@pytest.mark.parametrize(
    ("horizons", "status"),
    [
        ({100: 1.0, 1000: 0.1, 10000: 0.01}, "reproduced"),
        ({100: 1.0, 1000: 0.2, 10000: 0.2}, "contradicted"),  # it stalls
        ({100: 1.0, 1000: 0.1, 10000: 0.05}, "inconclusive"),  # it falls, but too slowly in the end
        ({100: 1.0, 1000: 0.0, 10000: 0.0}, "reproduced"),
        ({100: 1.0, 10000: 0.01}, "inconclusive"),
        ({100: 1.0, 200: 0.4, 400: 0.1}, "inconclusive"),  # less than a factor of ten
        (1e-9, "inconclusive"),  # one finite run, however small
        ({"x": 1e-9, "y": 1e-12}, "inconclusive"),
    ],
)
def test_a_limit_is_read_from_growing_horizons(horizons: Any, status: str) -> None:
    limit = claim("vanishes", 0.5, at="any", kind="limit")
    assert judge(limit, preset="quick", measured=horizons).status == status


def test_cases_of_a_limit_are_combined() -> None:
    limit = claim("vanishes", 0.5, at="any", kind="limit")
    falls, stalls = {1: 1.0, 10: 0.1, 100: 0.01}, {1: 1.0, 10: 1.0, 100: 1.0}
    assert judge(limit, preset="quick", measured={"x": falls, "y": stalls}).outcome == "mixed (1 of 2 reproduced)"


@pytest.mark.parametrize(
    ("step", "cut", "reason"),
    [
        (0.1, (), ""),
        (0.5, (), "the range of b is less than two steps of the grid (0.5)"),
        (0.1, ("b",), "the range of b goes on beyond the window"),
        (0.1, ("another",), ""),
        (None, (), "the step of the grid that the ranges are read from is not given"),
    ],
)
def test_a_range_needs_two_steps_of_its_grid_inside_the_window(step: Any, cut: Any, reason: str) -> None:
    ranges = ordering(kind="range", direction="higher", unit="decades")
    arms = {"a": {s: 1.2 + 0.01 * s for s in range(5)}, "b": {s: 0.7 - 0.01 * s for s in range(5)}}
    verdict = judge(ranges, preset="quick", arms=arms, step=step, cut=cut)
    assert verdict.status == ("inconclusive" if reason else "reproduced")
    assert not reason or verdict.detail == reason


def test_an_exact_statement_has_one_test_and_no_scale() -> None:
    exact = claim("at_most", 1e-9, at="any", kind="exact", expected=0.0)
    assert [judge(exact, preset=p, measured=0.0).preset for p in claims.PRESETS] == ["any"] * 3
    assert judge(exact, preset="quick", measured={"x": 0.0, "y": 1.0}).status == "contradicted"


# ---- tables of runs


def runs(errors: dict[str, Any], *, dataset: str = "digits") -> pd.DataFrame:
    """Lines of a table: per row the numbers of its seeds, or per rate these."""
    about = {"dataset": dataset, "model": "resnet8", "epochs": 5, "train_size": None, "reference": dataset}
    lines = []
    for row, given in errors.items():
        for candidate, (lr, values) in enumerate(given.items() if isinstance(given, dict) else [(0.1, given)]):
            for seed, value in enumerate(values):
                numbers = {"candidate": candidate, "lr": lr, "test_error": value, "validation_error": value}
                status = {"status": "failed" if math.isnan(value) else "done"}
                lines.append({"row": row, "seed": seed, "key": f"{row}{lr}{seed}"} | about | numbers | status)
    return pd.DataFrame(lines)


def around(mean: float, n: int = 5, spread: float = 0.1) -> list[float]:
    return [mean + spread * math.sin(7 * i + 13 * mean) for i in range(n)]


@pytest.fixture
def bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Reference models: 5 % on digits, 18 % on fashion."""
    monkeypatch.setenv("KOALA_RESULTS", str(tmp_path))
    entry = {"metric": "test_error", "model": "a linear model", "higher": False}
    content = {"digits": entry | {"value": 5.0}, "fashion": entry | {"value": 18.0}}
    references.file().write_text(json.dumps({"references": content}))
    return tmp_path


def verdict_of(frame: pd.DataFrame, c: Claim, preset: str = "quick") -> claims.Verdict:
    [found] = claims.judge_table(frame, [c], preset)
    return found


def test_figures_show_the_interval_that_decides(bar: Path) -> None:
    """The mean and interval of what `compared` returns are those that the verdict states, at the chosen rates."""
    frame = runs(
        {"a": {0.1: around(3), 0.2: around(2), 0.4: around(4)}, "b": {0.1: around(5), 0.2: around(3), 0.4: around(6)}}
    )
    c = ordering(rates={"a": "own", "b": "own"})
    told = claims.compared(frame, [c], "test_error", "quick")
    mean, low, high = claims.interval(told["gain"].to_numpy(), told["confidence"].iloc[0])
    assert verdict_of(frame, c).measured.startswith(f"{mean:+.3f} [{low:+.3f}, {high:+.3f}] over b")
    assert (told["subject"].iloc[0], told["other"].iloc[0], told["test"].iloc[0]) == ("a", "b", "better")
    assert told["seed"].tolist() == list(range(5))
    assert told["paper"].isna().all()
    numbers = [claim("value", 1.0, row=row, expected=x, metric="test_error") for row, x in (("a", 7.0), ("b", 7.5))]
    assert claims.compared(frame, [c, *numbers], "test_error", "quick")["paper"].unique().tolist() == [0.5]
    assert claims.compared(frame, [c], "train_loss", "quick").empty
    assert claims.compared(frame, [c], "test_error", "desktop").empty


def test_a_claim_finds_its_rows_and_its_metric(bar: Path) -> None:
    frame = runs({"a": around(2), "b": around(3), "other": around(50)})
    verdict = verdict_of(frame, ordering())
    assert (verdict.status, verdict.n) == ("reproduced", 5)
    assert (verdict.setting, verdict.rates) == ("digits, resnet8, 5 epochs", "as printed")
    low = ordering(subject="b", against=("a", "other"))
    assert verdict_of(frame, low).status == "contradicted"
    for other in (ordering(against=("c",)), ordering(metric="train_loss"), claim("holds")):
        assert claims.judge_table(frame, [other], "quick") == []
    assert claims.judge_table(frame, [ordering()], "desktop") == []


def test_data_sets_are_judged_apart_and_combined(bar: Path) -> None:
    frame = pd.concat(
        [runs({"a": around(2), "b": around(3)}), runs({"a": around(9), "b": around(8)}, dataset="fashion")]
    )
    verdict = verdict_of(frame, ordering())
    assert verdict.outcome == "mixed (1 of 2 reproduced)"
    assert verdict.setting == "digits, resnet8, 5 epochs; fashion, resnet8, 5 epochs"
    only = runs({"a": around(2)}, dataset="another")  # no case: row b is missing
    assert verdict_of(pd.concat([frame, only]), ordering()) == verdict


def test_a_printed_number_is_judged_on_its_own_data_set(bar: Path) -> None:
    number = ordering(
        "value", 0.5, at="paper", kind="value", subject="", against=(), row="a", expected=2.0, dataset="x"
    )
    frame = pd.concat([runs({"a": around(2)}, dataset="x"), runs({"a": around(9)}, dataset="y")])
    assert verdict_of(frame, number, "paper").status == "reproduced"


def test_a_failed_run_is_never_dropped(bar: Path) -> None:
    frame = runs({"a": around(2), "b": [*around(3, 4), math.nan]})
    verdict = verdict_of(frame, ordering())
    assert (verdict.status, verdict.detail) == ("inconclusive", "failed or missing: b seed 4")


@pytest.mark.parametrize(
    ("best", "dataset", "reason"),
    [
        (4.0, "digits", ""),
        (6.0, "digits", "not learned: test_error 6 at best, a linear model 5"),
        (6.0, "fashion", ""),
        (4.0, "unknown", "no reference model for unknown: run 'koala references'"),
    ],
)
def test_only_a_task_that_was_learned_counts(bar: Path, best: float, dataset: str, reason: str) -> None:
    frame = runs({"a": around(best, spread=0.001), "b": around(best + 9)}, dataset=dataset)
    verdict = verdict_of(frame, ordering())
    assert verdict.status == ("inconclusive" if reason else "reproduced")
    assert verdict.detail == reason or not reason
    assert evidence.circumstances(frame, "quick")["doubt"] == reason
    assert evidence.circumstances(frame, "paper")["doubt"] == ""


RATES = {0.01: 4.0, 0.1: 2.0, 1.0: 3.0}


def tuned(best_of_b: dict[float, float], **rows: Any) -> pd.DataFrame:
    grids = {"a": RATES, "b": best_of_b} | rows
    return runs({row: {lr: around(v) for lr, v in grid.items()} for row, grid in grids.items()})


def test_own_rates_are_chosen_by_validation(bar: Path) -> None:
    frame = tuned({0.01: 5.0, 0.1: 2.5, 1.0: 9.0})
    verdict = verdict_of(frame, ordering(rates={"a": "own", "b": "own"}))
    assert verdict.status == "reproduced"
    assert verdict.rates == "by validation: a 0.1, b 0.1"
    assert float(verdict.measured.split()[0]) == pytest.approx(np.mean(around(2.5)) - np.mean(around(2.0)), abs=1e-3)
    printed = verdict_of(frame, ordering())  # the first candidates
    assert float(printed.measured.split()[0]) == pytest.approx(np.mean(around(5.0)) - np.mean(around(4.0)), abs=1e-3)
    assert claims.chosen(frame)["lr"].unique().tolist() == [0.1]


@pytest.mark.parametrize(
    ("grid", "reason"),
    [
        ({0.01: 5.0, 0.1: 3.5, 1.0: 3.0}, "the best rate of b, 1, lies at the edge of its grid"),
        ({0.01: 5.0, 0.1: 2.5}, "unequal numbers of candidate rates: a 3, b 2"),
        ({0.01: 5.0, 0.1: 2.5, 1.0: 9.0, 10.0: 9.5}, "unequal numbers of candidate rates: a 3, b 4"),
        ({0.01: 5.0, 0.1: math.nan, 1.0: 9.0}, "the best rate of b, 0.01, lies at the edge of its grid"),
    ],
)
def test_a_rate_that_is_not_chosen_fairly_decides_nothing(bar: Path, grid: dict[float, float], reason: str) -> None:
    verdict = verdict_of(tuned(grid), ordering(rates={"a": "own", "b": "own"}))
    assert (verdict.status, verdict.detail) == ("inconclusive", reason)


def test_at_the_papers_scale_one_rate_is_the_one_that_its_authors_chose(bar: Path) -> None:
    frame, own = tuned({0.01: 5.0, 0.1: 2.5, 1.0: 9.0}), {"a": "own", "b": "own"}
    single = frame[frame["candidate"] == 0]
    at_scale = claim("better", at="paper", kind="ordering", subject="a", against=("b",), unit="%", rates=own)
    assert verdict_of(single, at_scale, "paper").rates == "as printed"
    assert verdict_of(single, at_scale, "paper").status == "reproduced"
    assert verdict_of(frame, at_scale, "paper").rates == "by validation: a 0.1, b 0.1"
    assert "of at least 3 candidate rates" in verdict_of(single, ordering(rates=own)).detail


def test_a_row_may_take_the_rate_of_another(bar: Path) -> None:
    frame = tuned({0.01: 5.0, 0.1: 3.5, 1.0: 2.2})
    verdict = verdict_of(frame, ordering(rates={"a": "own", "b": "a"}))
    assert verdict.rates == "by validation: a 0.1, b 0.1"
    missing = verdict_of(tuned({0.2: 5.0}), ordering(rates={"a": "own", "b": "a"}))
    assert missing.detail == "b was not trained at the rate of a, 0.1"


def test_candidates_of_a_pilot_are_compared_on_the_seeds_that_all_have(bar: Path) -> None:
    frame = tuned({0.01: 5.0, 0.1: 2.5, 1.0: 9.0})
    pilot = frame[(frame["seed"] == 0) | (frame["lr"] == 0.1)]
    assert verdict_of(pilot, ordering(rates={"a": "own", "b": "own"})).status == "reproduced"
    wrong = frame[(frame["seed"] == 0) | (frame["lr"] == 1.0)]  # the seeds were spent on another rate
    assert "of at least 5 seeds" in verdict_of(wrong, ordering(rates={"a": "own", "b": "own"})).detail


def test_candidates_of_one_rate_that_differ_otherwise_are_told_apart(bar: Path) -> None:
    frame = tuned({0.01: 5.0, 0.1: 2.5, 1.0: 9.0})
    twin = frame[(frame["row"] == "a") & (frame["lr"] == 0.1)].assign(candidate=3)  # the same rate, other options
    better = twin.assign(test_error=twin["test_error"] - 1, validation_error=twin["validation_error"] - 1)
    shown = claims.chosen(pd.concat([frame, better]))
    assert shown.loc[shown["row"] == "a", "candidate"].unique().tolist() == [3]


def test_a_shorter_pilot_chooses_and_the_long_run_is_judged(bar: Path) -> None:
    rates = {"a": "own", "b": "own"}
    tried = tuned({0.01: 5.0, 0.1: 2.5, 1.0: 9.0}).assign(epochs=1)
    pilot = tried[tried["seed"] == 0].assign(candidate=lambda f: f["candidate"] + 1)
    long = runs({"a": {0.1: around(1.0)}, "b": {0.1: around(3.0)}})
    verdict = verdict_of(pd.concat([long, pilot]), ordering(rates=rates))
    assert (verdict.status, verdict.rates) == ("reproduced", "by validation: a 0.1, b 0.1")
    assert float(verdict.measured.split()[0]) == pytest.approx(np.mean(around(3.0)) - np.mean(around(1.0)), abs=1e-3)
    other = runs({"a": {0.1: around(1.0)}, "b": {0.01: around(0.5)}})  # long, so better than all of the pilot
    verdict = verdict_of(pd.concat([other, pilot]), ordering(rates=rates))
    assert verdict.detail == "b was not trained at the rate that its pilot chose, 0.1"
    shown = claims.chosen(pd.concat([other, pilot]))
    assert shown[["row", "lr", "epochs"]].drop_duplicates().values.tolist() == [["a", 0.1, 5], ["b", 0.1, 1]]


# ---- the simple models


def test_reference_models_on_data_whose_answer_is_known() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.random((200, 1, 4, 4)), rng.integers(0, 2, 200)
    x[:, 0, 0, 0] = y  # one pixel tells the class
    assert references.linear_error(x[:100], y[:100], x[100:], y[100:]) == 0.0
    assert references.linear_error(x[:100], y[:100], x[100:], 1 - y[100:]) == 100.0
    text = np.array([0, 0, 0, 1])
    expected = -(2 * math.log(4 / 7) + math.log(2 / 7)) / 3  # of "0 0 1", after counts plus one over three words
    assert references.unigram_loss(text, np.array([2, 0, 0, 1]), 3) == pytest.approx(expected)
    pairs = [("a b c", "x y z w"), ("d e f", "u v w x")]
    assert references.neighbour_bleu(pairs, pairs) == pytest.approx(100.0)
    drawn = references.gaussian_images(x, 2000)
    assert drawn.shape == (2000, 1, 4, 4)
    assert abs(drawn[:, 0, 1].mean() - 0.5) < 0.02


def test_a_key_names_what_changes_the_data() -> None:
    key = references.key("language_model", "wikitext-2", None, {"clip_norm": 1.0, "evaluation_size": 30000})
    assert key == "language_model wikitext-2 all evaluation_size=30000"
