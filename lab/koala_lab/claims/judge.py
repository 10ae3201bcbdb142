"""Compare a claim with measurements: :func:`judge` returns a :class:`Verdict`, whose status is computed, never typed.

* ``reproduced``: the interval lies inside what the claim says;
* ``contradicted``: it lies outside altogether;
* ``mixed``: several cases (data sets, conditions) come out differently, and at least one is decided;
* ``inconclusive``: the measurements cannot tell, or a rule says that nothing could have failed; ``detail`` says why;
* ``not run at this scale``: the claim lists no test for the preset.

Statistics. Intervals are Student t. Methods are compared by their *paired* differences over shared seeds. "Better"
and values use 95 % intervals; equivalence ("on par", "insensitive") uses two one-sided tests at 5 %, that is a 90 %
interval inside the margin (Schuirmann 1987), and so does non-inferiority. A claim about several comparisons is
reproduced if each of them is, which needs no correction (intersection-union test), and contradicted if one of them is
at a level divided by their number (Bonferroni).

What decides nothing, by rule: an interval of width 0; a bound that no case comes within a tenth of; "never" without
a contrast in which it happens; a limit read from fewer than three horizons that span a factor of ten; a range of less
than two steps of its grid, or one that the window cuts; and what :mod:`koala_lab.claims.evidence` finds of the runs: a
task that nothing has learned, a rate at the edge of its grid.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from koala_lab import paths
from koala_lab.checks import check_fields, check_known
from koala_lab.claims.schema import ANY, TESTS, Claim, Criterion, read
from koala_lab.claims.statistics import interval, spreads
from koala_lab.parameters import PRESETS

REPRODUCED, MIXED, INCONCLUSIVE, CONTRADICTED = "reproduced", "mixed", "inconclusive", "contradicted"
NOT_RUN = "not run at this scale"
STATUSES = (REPRODUCED, MIXED, INCONCLUSIVE, CONTRADICTED, NOT_RUN)
NO_SPREAD = "every seed gives the same number: no spread to judge by"
NEAR_THE_BOUND = 0.1  # of a bound: what stays below this share of it does not test it

Seeds = Mapping[int, float | None] | pd.Series  # seed -> final metric; None and NaN are failed runs


@dataclass(frozen=True)
class Verdict:
    """The outcome for one claim at one preset; every field is JSON.

    Attributes:
        claim_id: The claim.
        preset: ``quick``, ``desktop``, ``paper``; ``any`` for what has no scale; ``custom`` for other parameters.
        paper: What the paper says.
        measured: What was measured, as text.
        n: How many seeds or cases, as ``counted`` says.
        status: One of ``STATUSES``.
        detail: The rule, or the reason why nothing is decided.
        counted: What ``n`` counts: ``seeds``, ``cases``, ``rounds``.
        share: Of a mixed verdict, how many of how many cases, such as ``1 of 3 reproduced``.
        setting: Data set, network and length.
        rates: How the learning rates were chosen.
    """

    claim_id: str
    preset: str
    paper: str
    measured: str
    n: int
    status: str
    detail: str
    counted: str = "seeds"
    share: str = ""
    setting: str = ""
    rates: str = ""

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Verdict:
        """Return the verdict with the fields of a mapping.

        Raises:
            ValueError, TypeError: If a field is missing, unknown or of another type.
        """
        verdict = cls(**entry)
        check_fields(vars(verdict), {f.name: int if f.name == "n" else str for f in fields(cls)})
        check_known("status", verdict.status, STATUSES)
        return verdict

    @property
    def decided(self) -> bool:
        """Say whether the measurements say anything."""
        return self.status in (REPRODUCED, MIXED, CONTRADICTED)

    @property
    def outcome(self) -> str:
        """Return the status, of a mixed verdict with its share."""
        return f"{self.status} ({self.share})" if self.share else self.status


class _Outcome(NamedTuple):
    status: str
    measured: str
    n: int
    detail: str
    counted: str
    share: str = ""


def available() -> list[str]:
    """Return the papers whose claims are here."""
    return sorted(path.stem for path in paths.claims_dir().glob("*.yaml"))


@cache
def load(paper: str = "koala") -> Mapping[str, Claim]:
    """Return the claims of one paper by id, in the order of its file."""
    return read(paths.claims_dir() / f"{paper}.yaml")


def of(notebook: str) -> list[Claim]:
    """Return the claims that a notebook judges."""
    return [claim for paper in available() for claim in load(paper).values() if claim.notebook == notebook]


def find(claim_id: str) -> Claim:
    """Return the claim with an id."""
    paper = claim_id.split(".")[0]
    if not (paths.claims_dir() / f"{paper}.yaml").is_file() or claim_id not in load(paper):
        raise ValueError(f"there is no claim {claim_id!r} in data/claims/{paper}.yaml")
    return load(paper)[claim_id]


def judge(
    claim: str | Claim,
    *,
    preset: str,
    values: Seeds | None = None,
    arms: Mapping[str, Seeds] | pd.DataFrame | None = None,
    measured: float | Mapping[str, Any] | None = None,
    bound: float | None = None,
    holds: bool | Mapping[str, bool] | None = None,
    contrast: float | Mapping[str, float] | None = None,
    step: float | None = None,
    cut: Collection[str] = (),
    doubt: str = "",
    setting: str = "",
    rates: str = "",
    counted: str = "",
) -> Verdict:
    """Compare a claim with what was measured at one preset.

    Each test takes one kind of evidence; anything else is a ``ValueError``. With failed, missing or too few runs the
    verdict is inconclusive and says so: no run is dropped.

    Args:
        claim: Id, or the claim itself.
        preset: "quick", "desktop" or "paper". If the claim lists no test for it: "not run at this scale".
        values: Value and rate claims: ``{seed: number}``.
        arms: Orderings: ``{row: {seed: number}}``, or a frame with seeds as index and rows as columns. The claim says
            which rows it compares, so that a whole table may be passed.
        measured: Bounds, rates, properties: a number, or ``{case: number}``. Of an exact statement the worst case
            decides; else each case does, and they are combined. ``vanishes`` takes ``{horizon: number}`` or
            ``{case: {horizon: number}}``: the same quantity at growing numbers of steps.
        bound: The bound, where it is computed and the claim has no ``expected``.
        holds: Properties: a condition, or ``{case: condition}``.
        contrast: ``never``: how often it happens where the claim does not forbid it, such as without a warm-up.
        step: Ranges: distance of two values of the grid that they are read from, in the claim's unit.
        cut: Ranges: the rows whose range goes on beyond the window.
        doubt: Why the evidence decides nothing, whatever it says; see `evidence.circumstances`.
        setting: Data, network and length, for the scoreboard.
        rates: How the learning rates were chosen, for the scoreboard.
        counted: What the seeds of ``values`` or ``arms`` really are, such as ``rounds`` of a measurement.
    """
    claim = find(claim) if isinstance(claim, str) else claim
    check_known("preset", preset, PRESETS)
    criterion = claim.criterion(preset)
    if criterion is None:
        return Verdict(claim.id, preset, claim.paper, "–", 0, NOT_RUN, "the claim lists no test for this preset")
    evidence = {"values": values, "arms": arms, "measured": measured, "holds": holds, "bound": bound}
    _check_evidence(claim, criterion, evidence)
    if holds is not None:
        outcome = _judge_holds(claim, holds)
    elif criterion.test == "never":
        outcome = _judge_never(_cases(measured), None if contrast is None else _cases(contrast))
    elif criterion.test == "vanishes":
        outcome = _judge_vanishes(criterion, measured)
    elif measured is not None:
        outcome = _judge_measured(claim, criterion, _cases(measured), claim.expected if bound is None else bound)
    else:
        source = arms if arms is not None else {"values": values}
        names = claim.arms if arms is not None else ("values",)
        samples = {row: _seeds(claim, row, source) for row in names}
        outcome = _judge_seeds(claim, criterion, preset, samples)
        doubt = doubt or (_unresolved(samples, step, cut) if claim.kind == "range" else "")
    if doubt and outcome.measured != "–":
        outcome = outcome._replace(status=INCONCLUSIVE, detail=doubt, share="")
    at = ANY if claim.scale_free else preset
    status, text, n, detail, units, share = outcome
    return Verdict(claim.id, at, claim.paper, text, n, status, detail, counted or units, share, setting, rates)


def _check_evidence(claim: Claim, criterion: Criterion, evidence: Mapping[str, Any]) -> None:
    wanted = [TESTS[criterion.test].evidence]
    computed = criterion.test in ("at_most", "at_least", "near") and claim.expected is None
    wanted += ["bound"] if computed else []
    given = [name for name, value in evidence.items() if value is not None]
    if given != wanted:
        got = " and ".join(given) or "nothing"
        raise ValueError(f"{claim.id}: the test {criterion.test!r} takes {' and '.join(wanted)}; got {got}")


def _cases(given: Any) -> dict[str, float]:
    return {str(k): float(v) for k, v in (given.items() if isinstance(given, Mapping) else [("", given)])}


def combine(cases: Mapping[str, Verdict]) -> Verdict:
    """Join the verdicts of several data sets: theirs where all agree, ``mixed`` where they differ and any is decided.

    Data sets are not a sample of anything, so their pairs are not pooled; ``n`` is that of each that is decided.

    Args:
        cases: Verdicts of one claim at one preset, by data set.
    """
    first = next(iter(cases.values()))
    if first.status == NOT_RUN or (len(cases) == 1 and first.setting):
        return first
    status, share = _agreed([v.status for v in cases.values()])
    one = len({v.status for v in cases.values()}) == 1
    texts = [f"{name} {v.measured}" if one else f"{name} {v.status} {v.measured}" for name, v in cases.items()]
    decided = [v for v in cases.values() if v.status != INCONCLUSIVE] or list(cases.values())
    details = dict.fromkeys(v.detail for v in cases.values() if share == "" or v.status == INCONCLUSIVE)
    return replace(
        first,
        status=status,
        share=share,
        measured="; ".join(texts),
        n=min(v.n for v in decided),
        detail="; ".join(details) or first.detail,
        setting="; ".join(dict.fromkeys(v.setting for v in cases.values() if v.setting)),
        rates="; ".join(dict.fromkeys(v.rates for v in cases.values() if v.rates)),
    )


def _agreed(statuses: list[str]) -> tuple[str, str]:
    """Return the status and share of several cases."""
    if len(set(statuses)) == 1:
        return statuses[0], ""
    shown = REPRODUCED if REPRODUCED in statuses else CONTRADICTED
    return MIXED, f"{statuses.count(shown)} of {len(statuses)} {shown}"


# ---- samples over seeds


def _seeds(claim: Claim, row: str, source: Any) -> dict[int, float]:
    if row not in source:
        raise ValueError(f"{claim.id}: arm {row!r} is missing; got {', '.join(map(str, source)) or 'none'}")
    series = source[row]
    pairs: list[tuple[Any, Any]] = list(series.items()) if isinstance(series, Mapping | pd.Series) else []
    if not pairs or not all(isinstance(seed, int | np.integer) for seed, _ in pairs):
        raise ValueError(f"{claim.id}: expected {{seed: number}} for {row!r}, got {series!r}")
    if len({seed for seed, _ in pairs}) < len(pairs):
        raise ValueError(f"{claim.id}: a seed appears twice in {row!r}")
    return {int(seed): math.nan if value is None else float(value) for seed, value in pairs}


def _judge_seeds(claim: Claim, criterion: Criterion, preset: str, arms: dict[str, dict[int, float]]) -> _Outcome:
    """Judge values and orderings by t intervals over seeds, paired between rows; the worst comparison decides."""
    test, margin = criterion.test, criterion.margin
    seeds = sorted(set().union(*arms.values()))
    n, reason = _incomplete(claim, criterion, preset, arms, seeds)
    if reason:
        return _Outcome(INCONCLUSIVE, "–", n, reason, "seeds")
    target = claim.expected or 0.0 if test == "value" else 0.0
    samples = _pairs(claim, {row: np.array([x[seed] for seed in seeds]) for row, x in arms.items()})
    ranked = []
    for label, sample in samples.items():
        mean, low, high = interval(sample, TESTS[test].confidence)
        status, why = _compare(test, margin, sample - target, len(samples))
        slack = low if test in ("better", "no_worse") else -max(abs(low - target), abs(high - target))
        ranked.append((-STATUSES.index(status), _rounded(slack), status, label, (mean, low, high), why))
    *_, status, label, numbers, why = min(ranked)
    mean_text, low_text, high_text = (_number(v, claim, "" if test == "value" else "+") for v in numbers)
    text = f"{mean_text} [{low_text}, {high_text}]{label}"
    rule = {
        "value": f"within {margin:g} of {target:g}",
        "better": f"gain above {margin:g}",
        "no_worse": f"gain above {-margin:g}",
        "on_par": f"gain within ±{margin:g}",
        "insensitive": f"all differences within ±{margin:g}",
    }[test]
    detail = why if why == NO_SPREAD else f"{rule} ({TESTS[test].confidence:.0%} interval){why}"
    return _Outcome(status, text, n, detail, "seeds")


def _incomplete(
    claim: Claim, criterion: Criterion, preset: str, arms: dict[str, dict[int, float]], seeds: list[int]
) -> tuple[int, str]:
    """Return how many seeds every row has, and what is missing for a verdict."""
    least = max(2, criterion.n or (claim.n or 3 if preset == "paper" else 5))
    gaps = {row: [seed for seed in seeds if not math.isfinite(x.get(seed, math.nan))] for row, x in arms.items()}
    n = len(set(seeds).difference(*gaps.values()))
    if n < len(seeds):
        lost = "; ".join(f"{row} seed {', '.join(map(str, missing))}" for row, missing in gaps.items() if missing)
        return n, f"failed or missing: {lost}"
    return n, f"{n} of at least {least} seeds" if n < least else ""


def gains(claim: Claim, arms: Mapping[str, np.ndarray[Any, Any]]) -> dict[tuple[str, str], np.ndarray[Any, Any]]:
    """Return the paired differences that an ordering is judged by, per (row, other row), over seeds in one order.

    They are positive where the subject is better; where a claim ranks nobody (``among``), the first less the second.
    """
    if claim.among:
        return {(a, b): arms[a] - arms[b] for a, b in itertools.combinations(arms, 2)}
    sign = 1.0 if claim.direction == "lower" else -1.0
    return {(claim.subject, row): sign * (arms[row] - arms[claim.subject]) for row in claim.against}


def _pairs(claim: Claim, arms: dict[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
    """Return the samples to judge by what a verdict calls them: the values, or the differences."""
    if "values" in arms:
        return {"": arms["values"]}
    name = " ({} - {})" if claim.among else " over {1}"
    return {name.format(*rows): sample for rows, sample in gains(claim, arms).items()}


def _compare(test: str, margin: float, sample: np.ndarray[Any, Any], comparisons: int) -> tuple[str, str]:
    """Return the status of one comparison, and what its detail must add."""
    if not spreads(sample):
        return INCONCLUSIVE, NO_SPREAD
    confidence = TESTS[test].confidence
    _, *narrow = interval(sample, confidence)
    _, *sure = interval(sample, 1 - (1 - confidence) / comparisons)
    status = _place(test, margin, (narrow[0], narrow[1]), (sure[0], sure[1]))
    if status == _place(test, margin, (narrow[0], narrow[1]), (narrow[0], narrow[1])):
        return status, ""
    held = f"[{sure[0]:+.4g}, {sure[1]:+.4g}]"
    return status, f"; of {comparisons} comparisons, contradicted only if {held} is outside too"


def _place(test: str, margin: float, ci: tuple[float, float], sure: tuple[float, float]) -> str:
    """Place an interval beside what the test asks for; ``sure`` is the wider one that a contradiction needs."""
    low = margin if test == "better" else -margin
    high = math.inf if test in ("better", "no_worse") else margin
    if sure[1] < low or sure[0] > high:
        return CONTRADICTED
    above = ci[0] > low if test == "better" else ci[0] >= low
    return REPRODUCED if above and ci[1] <= high else INCONCLUSIVE


def _unresolved(arms: Mapping[str, Mapping[int, float]], step: float | None, cut: Collection[str]) -> str:
    """Say why ranges cannot be compared; empty if they can."""
    if step is None:
        return "the step of the grid that the ranges are read from is not given"
    if beyond := [row for row in arms if row in cut]:
        return f"the range of {', '.join(beyond)} goes on beyond the window"
    narrow = [row for row, x in arms.items() if np.mean(list(x.values())) < 2 * step]
    return f"the range of {', '.join(narrow)} is less than two steps of the grid ({step:.2g})" if narrow else ""


# ---- numbers and conditions without a sampling error


def _judge_measured(claim: Claim, criterion: Criterion, cases: dict[str, float], target: float | None) -> _Outcome:
    assert target is not None
    over = {name: v - target for name, v in cases.items() if not math.isnan(v)}
    if criterion.test != "at_most":
        over = {name: abs(v) if criterion.test == "near" else -v for name, v in over.items()}
    undefined = [name or "the value" for name in cases if name not in over]
    worst = max(over, key=lambda name: _rounded(over[name]), default="")  # the first of several
    highest = max(over.values(), default=-math.inf)
    tolerance = criterion.margin
    beyond = tolerance if criterion.beyond is None else criterion.beyond
    if not math.isfinite(target) or not over or (undefined and highest <= beyond):
        undefined += ["the bound"] * (not math.isfinite(target))
        reason = f"not a number: {', '.join(undefined)}" if undefined else "nothing measured"
        return _Outcome(INCONCLUSIVE, "–", len(cases), reason, "cases")
    each = [CONTRADICTED if v > beyond else INCONCLUSIVE if v > tolerance else REPRODUCED for v in over.values()]
    status, share = _agreed(each)
    if claim.kind in ("exact", "identity"):  # one counter-example is enough
        status, share = each[list(over.values()).index(highest)], ""
    text = _number(cases[worst], claim) + (f" ({worst})" if worst else "")
    rule = f"{criterion.test.replace('_', ' ')} {target:g}" + (f", tolerance {tolerance:g}" if tolerance else "")
    rule += f", contradicted past {beyond:g}" if beyond > tolerance else ""
    loose = claim.kind == "bound" and criterion.test == "at_most" and target > 0
    if loose and status == REPRODUCED and max(cases.values()) < NEAR_THE_BOUND * target:
        status, rule = INCONCLUSIVE, f"nothing comes near the bound {target:g}"
    return _Outcome(status, text, len(cases), rule, "cases", share)


def _judge_never(cases: dict[str, float], contrast: dict[str, float] | None) -> _Outcome:
    """Return how often something happened that never should; only a contrast in which it does shows that it could."""
    count, beside = sum(cases.values()), sum((contrast or {}).values())
    text = f"{count:g}, {beside:g} in the contrast" if contrast is not None else f"{count:g}"
    if count > 0:
        return _Outcome(CONTRADICTED, text, len(cases), "never", "cases")
    if not beside > 0:
        why = "it does not happen in the contrast either" if contrast is not None else "there is no contrast"
        return _Outcome(INCONCLUSIVE, text, len(cases), f"nothing could be seen to fail: {why}", "cases")
    return _Outcome(REPRODUCED, text, len(cases), "never, and the contrast shows that it can", "cases")


def _judge_vanishes(criterion: Criterion, measured: Any) -> _Outcome:
    """Say whether a quantity falls like a power of the horizon, or faster, between any two horizons."""
    by_horizon = isinstance(measured, Mapping) and all(isinstance(k, int | float | np.number) for k in measured)
    cases = measured if isinstance(measured, Mapping) and not by_horizon else {"": measured}
    statuses, texts = [], []
    for name, horizons in cases.items():
        status, text = _falls(horizons, criterion.margin)
        statuses.append(status)
        texts.append(f"{name} {text}".strip())
    status, share = _agreed(statuses)
    rule = f"falls at least like the horizon to the power {-criterion.margin:g}"
    if status == INCONCLUSIVE and all("one finite run" in text for text in texts):
        rule = "a limit is not read from one finite run: give three horizons that span a factor of ten"
    return _Outcome(status, "; ".join(texts), len(cases), rule, "cases", share)


def _falls(horizons: Any, rate: float) -> tuple[str, str]:
    pairs = sorted((float(k), float(v)) for k, v in horizons.items()) if isinstance(horizons, Mapping) else []
    if len(pairs) < 3 or pairs[-1][0] < 10 * pairs[0][0]:
        return INCONCLUSIVE, "one finite run"
    powers = []
    for (a, x), (b, y) in itertools.pairwise(pairs):
        powers.append(math.inf if y == 0 else -math.log(y / x) / math.log(b / a) if x > 0 else -math.inf)
    text = f"{pairs[-1][1]:.3g} after {pairs[-1][0]:g}, powers " + ", ".join(f"{-p:.2f}" for p in powers)
    if min(powers) >= rate:
        return REPRODUCED, text
    return CONTRADICTED if powers[-1] < rate / 10 else INCONCLUSIVE, text


def _judge_holds(claim: Claim, holds: bool | Mapping[str, bool]) -> _Outcome:
    cases = holds if isinstance(holds, Mapping) else {"the condition": holds}
    for name, value in cases.items():
        if not isinstance(value, bool | np.bool_):
            raise ValueError(f"holds: expected True or False for {name}, got {value!r}")
    failed = [str(name) for name, value in cases.items() if not value]
    status, share = _agreed([REPRODUCED if value else CONTRADICTED for value in cases.values()] or [INCONCLUSIVE])
    if status == MIXED and claim.kind in ("exact", "identity"):  # one counter-example is enough
        status, share = CONTRADICTED, ""
    detail = "fails: " + ", ".join(failed) if failed else "every case holds" if cases else "nothing checked"
    return _Outcome(status, f"{len(cases) - len(failed)} of {len(cases)} hold", len(cases), detail, "cases", share)


def _rounded(value: float) -> float:
    """Round to six digits: cases that differ by rounding errors, of which each processor has its own, are a tie."""
    return float(f"{value:.6g}")


def _number(value: float, claim: Claim, plus: str = "") -> str:
    text = f"{value:{plus}.3f}" if claim.unit == "%" else f"{value:{plus}.4g}"
    return text if float(text) else text.replace("-", plus)  # no minus zero
