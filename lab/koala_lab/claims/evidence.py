"""From a table of runs to the evidence of claims: rows, data sets, chosen rates, and whether anything was learned.

The table is that of `koala_lab.runs.frame`: one line per row and run, with ``row``, ``dataset``, ``model``, ``seed``,
``candidate``, ``lr``, the metrics, and ``reference``, the key of the model that the best row must beat.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from koala_lab.claims import references
from koala_lab.claims.judge import Verdict, combine, gains, judge
from koala_lab.claims.schema import TESTS, Claim

# What candidates are chosen by, the first that a table has; smaller is better in all of them.
VALIDATION = ("validation_error", "validation_loss", "frechet_distance_train")
LEARNED_AT = ("quick", "desktop")  # at the paper's scale its own protocol is the yardstick


class Choice(NamedTuple):
    """The candidate that a row is judged at.

    Attributes:
        candidate: Its number in the table.
        lr: Its rate; NaN where a row gives none.
        doubt: Why it decides nothing, or empty.
    """

    candidate: int
    lr: float
    doubt: str = ""


def judge_table(frame: pd.DataFrame, claims: Iterable[Claim], preset: str) -> list[Verdict]:
    """Judge the values and orderings whose rows and metric are in a table.

    Args:
        frame: Of `koala_lab.runs.frame`.
        claims: Of its notebook; those of another kind, without a test at the preset, or on other rows are passed over.
        preset: Of the measurements.
    """
    here = set(frame["row"])
    fitting = [c for c in claims if c.kind in ("value", "ordering") and c.criterion(preset) and c.metric in frame]
    found = []
    for claim in fitting:
        rows = claim.arms if claim.kind == "ordering" else (claim.row,)
        if not set(rows) <= here:
            continue
        wanted = frame[frame["dataset"] == claim.dataset] if claim.dataset and preset == "paper" else frame
        cases = {name: _judge_case(case, claim, rows, preset) for name, case in _split(wanted, rows, claim.metric)}
        if cases:
            found.append(combine(cases))
    return found


def _split(frame: pd.DataFrame, rows: tuple[str, ...], metric: str) -> list[tuple[str, pd.DataFrame]]:
    """Return the cases of a claim, by name: data sets and networks on which its rows were run and have the metric."""
    found = []
    for key, case in _by_case(frame):
        values = case.loc[case["row"].isin(rows) & (case["status"] == "done"), metric]
        if set(rows) <= set(case["row"]) and (values.empty or values.notna().any()):
            found.append((key, case))
    datasets = [dataset for (dataset, _), _ in found]
    return [(f"{d} {model}" if datasets.count(d) > 1 else d, case) for (d, model), case in found]


def _by_case(frame: pd.DataFrame) -> list[tuple[tuple[str, str], pd.DataFrame]]:
    groups = frame.groupby(["dataset", "model"], sort=False)
    return [((str(key[0]), str(key[1])), case) for key, case in groups]


def _judge_case(case: pd.DataFrame, claim: Claim, rows: tuple[str, ...], preset: str) -> Verdict:
    rates, choices = _choices(case, claim, rows, preset)
    doubt = next(filter(None, (choices[row].doubt for row in rows)), "") or unlearned(case, preset)
    shown = case[case["row"].isin(rows)]
    told: dict[str, Any] = {"doubt": doubt, "setting": describe(shown), "rates": _rates(choices, rates, claim.kind)}
    samples = _samples(case, claim, choices)
    if claim.kind == "value":
        return judge(claim, preset=preset, values=samples[claim.row], **told)
    return judge(claim, preset=preset, arms=samples, **told)


def _choices(
    case: pd.DataFrame, claim: Claim, rows: tuple[str, ...], preset: str
) -> tuple[Mapping[str, str], dict[str, Choice]]:
    # At the paper's scale a table without other candidates has the rates that its authors tuned.
    as_printed = preset not in LEARNED_AT and not (case["candidate"] > 0).any()
    rates = {} if as_printed else claim.rates
    return rates, choose(case, rates, rows)


def _samples(case: pd.DataFrame, claim: Claim, choices: Mapping[str, Choice]) -> dict[str, dict[int, float]]:
    """Return the metric by seed of each row, at its chosen candidate."""
    used = {row: case[(case["row"] == row) & (case["candidate"] == c.candidate)] for row, c in choices.items()}
    return {row: dict(zip(part["seed"].astype(int), part[claim.metric], strict=True)) for row, part in used.items()}


def compared(frame: pd.DataFrame, claims: Iterable[Claim], metric: str, preset: str) -> pd.DataFrame:
    """Return the paired differences that orderings are judged by at a preset, for figures.

    Args:
        frame: As for :func:`judge_table`.
        claims: Of its notebook; those that it would pass over, or that have another metric, are passed over.
        metric: The column that is compared.
        preset: Of the measurements.

    Returns:
        One line per data set, network, claim, comparison and seed that both rows have: ``subject`` and ``other``
        (rows), ``gain`` (positive where the subject is better), ``test``, ``margin`` and ``confidence`` of the interval
        that decides, and ``paper``, the same difference of the printed numbers, where both rows have one.
    """
    claims = list(claims)
    numbers = {(c.row, c.expected) for c in claims if c.row and c.metric == metric and c.expected is not None}
    rows = [row for row, _ in numbers]
    printed = {row: number for row, number in numbers if rows.count(row) == 1}  # not those of several data sets
    here, lines = set(frame["row"]), []
    for claim in claims:
        criterion = claim.criterion(preset)
        if claim.kind != "ordering" or claim.metric != metric or criterion is None or not set(claim.arms) <= here:
            continue
        for _, case in _split(frame, claim.arms, metric):
            samples = _samples(case, claim, _choices(case, claim, claim.arms, preset)[1])
            seeds = sorted(set.union(*map(set, samples.values())))
            arms = {row: np.array([x.get(seed, math.nan) for seed in seeds]) for row, x in samples.items()}
            differences = gains(claim, arms)
            named = {row: np.array(printed.get(row.removesuffix("_own"), math.nan)) for row in claim.arms}
            own = gains(claim, named)
            told = {
                "dataset": case["dataset"].iloc[0],
                "model": case["model"].iloc[0],
                "claim": claim.id,
                "test": criterion.test,
                "margin": criterion.margin,
                "confidence": TESTS[criterion.test].confidence,
            }
            for (subject, other), gain in differences.items():
                pair = {**told, "subject": subject, "other": other, "paper": float(own[subject, other])}
                both = [(seed, value) for seed, value in zip(seeds, gain, strict=True) if math.isfinite(value)]
                lines += [{**pair, "seed": seed, "gain": value} for seed, value in both]
    return pd.DataFrame(lines)


# ---- rates


def choose(case: pd.DataFrame, rates: Mapping[str, str], rows: Iterable[str]) -> dict[str, Choice]:
    """Choose the candidate of each row, on one data set and network.

    ``printed`` is the first candidate. ``own`` is that with the smallest mean of the validation metric over the seeds
    that all candidates of the row have, a failed run counting as infinitely bad; it must lie inside its grid, and all
    rows that choose must have equally many candidates. Where candidates differ in length, the shorter runs are the
    pilot: they choose, and the rate is judged by its long run. The name of another row means that row's rate.

    Args:
        case: Part of a table.
        rates: How, by row; ``printed`` where nothing is said.
        rows: The rows that are asked for.
    """
    how = {row: rates.get(row, "printed") for row in rows}
    found = {row: _own(case, row) for row in case["row"].unique() if row in {*how.values()} or how.get(row) == "own"}
    budgets = {row: int(_tried(case[case["row"] == row])["candidate"].nunique()) for row in found}
    unequal = len(set(budgets.values())) > 1
    text = ", ".join(f"{row} {n}" for row, n in budgets.items())
    doubt = f"unequal numbers of candidate rates: {text}" if unequal else ""
    chosen: dict[str, Choice] = {}
    for row, rule in how.items():
        if rule not in ("printed", "own") and rule not in found:
            raise ValueError(f"{row} takes the rate of {rule}, which is no row of this table")
        if rule == "printed":
            chosen[row] = Choice(0, _candidates(case[case["row"] == row]).get(0, math.nan))
        elif rule == "own":
            chosen[row] = found[row]._replace(doubt=found[row].doubt or doubt)
        else:
            chosen[row] = _same(case, row, rule, found[rule])
    return chosen


def _own(case: pd.DataFrame, row: str) -> Choice:
    mine = case[case["row"] == row]
    metric = next((m for m in VALIDATION if m in mine and mine[m].notna().any()), "")
    tried = _tried(mine)
    rates = _candidates(tried)
    if not metric or len(rates) < 3:
        why = "no validation metric" if not metric else f"{max(len(rates), 1)} of at least 3 candidate rates"
        return Choice(0, rates.get(0, math.nan), f"the rate of {row} cannot be chosen: {why}")
    wide = tried.pivot(index="seed", columns="candidate", values="status").dropna()
    shared = tried[tried["seed"].isin(wide.index)]
    scores = shared[metric].fillna(math.inf).groupby(shared["candidate"]).mean()
    best = min(rates, key=lambda k: float(scores[k]))
    edge = rates[best] in (min(rates.values()), max(rates.values()))
    doubt = f"the best rate of {row}, {rates[best]:g}, lies at the edge of its grid" if edge else ""
    full = _candidates(mine[mine["epochs"] == mine["epochs"].max()])
    if rates[best] not in full.values():
        return Choice(0, rates[best], f"{row} was not trained at the rate that its pilot chose, {rates[best]:g}")
    return Choice(best if best in full else next(k for k in full if full[k] == rates[best]), rates[best], doubt)


def _tried(mine: pd.DataFrame) -> pd.DataFrame:
    """Return the runs of one row that its rate is chosen by: the pilot, where that is shorter than the rest."""
    shorter = mine[mine["epochs"] < mine["epochs"].max()]
    return mine if shorter.empty else shorter


def _candidates(mine: pd.DataFrame) -> dict[int, float]:
    """Return the rates of one row by candidate; none where it gives no rate."""
    if "lr" not in mine:
        return {}
    known = mine.dropna(subset="lr").drop_duplicates("candidate")
    return {int(k): float(lr) for k, lr in zip(known["candidate"], known["lr"], strict=True)}


def _same(case: pd.DataFrame, row: str, other: str, choice: Choice) -> Choice:
    mine = case[(case["row"] == row) & (case["lr"] == choice.lr)]
    if mine.empty:
        return Choice(0, choice.lr, f"{row} was not trained at the rate of {other}, {choice.lr:g}")
    return choice._replace(candidate=int(mine["candidate"].iloc[0]))


def _rates(choices: Mapping[str, Choice], how: Mapping[str, str], kind: str) -> str:
    taken = {row: c.lr for row, c in choices.items() if how.get(row, "printed") != "printed"}
    if taken:
        return "by validation: " + ", ".join(f"{row} {lr:g}" for row, lr in taken.items())
    return "as printed" if kind == "ordering" and any(c.lr == c.lr for c in choices.values()) else ""


def chosen(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the part of a table at each row's own best candidate, per data set and network; rows with one keep it.

    A row that was not trained at the rate that its pilot chose is there with the pilot's run at it.
    """
    kept = []
    for _, case in _by_case(frame):
        for row in case["row"].unique():
            mine, choice = case[case["row"] == row], _own(case, row)
            best = mine[mine["candidate"] == choice.candidate]
            untrained = "lr" in mine and choice.lr == choice.lr and choice.lr not in set(best["lr"])
            kept.append(mine[mine["lr"] == choice.lr] if untrained else best)
    return pd.concat(kept) if kept else frame


# ---- what the runs were, and whether they learned


def describe(frame: pd.DataFrame) -> str:
    """Name data set, network and length of some runs in a few words.

    >>> line = {"dataset": "digits", "train_size": None, "model": "resnet8", "epochs": 5}
    >>> describe(pd.DataFrame([line]))
    'digits, resnet8, 5 epochs'
    """
    columns = ["dataset", "train_size", "model", "epochs"]
    texts = []
    for line in frame[columns].drop_duplicates().to_dict("records"):
        size = f" ({line['train_size']:g} samples)" if pd.notna(line["train_size"]) else ""
        texts.append(f"{line['dataset']}{size}, {line['model']}, {line['epochs']} epochs")
    return "; ".join(texts)


def unlearned(frame: pd.DataFrame, preset: str) -> str:
    """Say why runs on one data set do not count: nothing beats its reference; empty if something does.

    Args:
        frame: All rows on that data set.
        preset: At the paper's scale nothing is asked.
    """
    if preset not in LEARNED_AT:
        return ""
    known = references.load()
    for key, part in frame.groupby("reference", sort=False):
        reference = known.get(str(key))
        if reference is None:
            return f"no reference model for {key}: run 'koala references'"
        if reference.metric not in part:
            return f"not learned: no run finished on {key}"
        means = part.groupby(["row", "candidate"])[reference.metric].mean()
        best = means.max() if reference.higher else means.min()
        if not (best > reference.value if reference.higher else best < reference.value):
            return f"not learned: {reference.metric} {best:.3g} at best, {reference.model} {reference.value:.3g}"
    return ""


def circumstances(frame: pd.DataFrame, preset: str) -> dict[str, str]:
    """Return ``doubt`` and ``setting`` for `judge`, of evidence that was made by hand from a table of runs."""
    doubts = [doubt for _, case in _by_case(frame) if (doubt := unlearned(case, preset))]
    return {"doubt": doubts[0] if doubts else "", "setting": describe(frame)}
