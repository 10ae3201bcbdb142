"""The papers' numbers as data, and what measurements say about them.

``data/claims/<paper>.yaml`` holds one claim per printed number and per checkable statement; its header explains the
tests. :func:`judge` compares a claim with measurements and returns a :class:`Verdict`, whose status is computed, never
typed: "reproduced", "inconclusive" (the measurements cannot tell, and why), "contradicted", or "not run at this scale"
(the claim lists no test for the preset). :func:`scoreboard` turns verdicts into the table of the README and the report.

Statistics. Intervals are Student t. Methods are compared by their *paired* differences over shared seeds. "Better"
and values use 95 % intervals; equivalence ("on par", "insensitive") uses two one-sided tests at 5 %, that is a 90 %
interval inside the margin (Schuirmann 1987), and so does non-inferiority. A claim about several comparisons is
reproduced if each of them is, which needs no correction (intersection-union test), and contradicted if one of them is
at a level divided by their number (Bonferroni).
"""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
from scipy import stats  # type: ignore[import-untyped]

from koala_lab import paths
from koala_lab.claims.schema import PRESETS, TESTS, Claim, Criterion, read

__all__ = [
    "PRESETS", "STATUSES", "Claim", "Criterion", "Verdict", "available", "combine", "interval",
    "judge", "load", "read", "replace_block",
    "save", "saved", "scoreboard", "table",
]  # fmt: skip

NOT_RUN, NOT_YET = "not run at this scale", "not run yet"
STATUSES = ("reproduced", "inconclusive", "contradicted", NOT_RUN)
BEGIN, END = "<!-- scoreboard:begin -->", "<!-- scoreboard:end -->"

Seeds = Mapping[int, float | None] | pd.Series  # seed -> final metric; None and NaN are failed runs
_Outcome = tuple[str, str, int, str]  # status, measured, n, detail


@dataclass(frozen=True)
class Verdict:
    """The outcome for one claim at one preset; every field is JSON."""

    claim_id: str
    preset: str
    paper: str
    measured: str
    n: int
    status: str
    detail: str


def available() -> list[str]:
    """The papers whose claims are here."""
    return sorted(path.stem for path in paths.claims_dir().glob("*.yaml"))


@cache
def load(paper: str = "koala") -> Mapping[str, Claim]:
    """The claims of one paper by id, in the order of its file."""
    return read(paths.claims_dir() / f"{paper}.yaml")


def interval(sample: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """Mean and Student t interval ``(mean, low, high)`` of n >= 2 independent values.

    >>> tuple(round(v, 3) for v in interval([1.0, 2.0, 3.0]))
    (2.0, -0.484, 4.484)
    """
    if len(sample) < 2:
        raise ValueError(f"an interval needs at least 2 values, got {len(sample)}")
    x = np.asarray(sample, dtype=float)
    half = float(stats.t.ppf(0.5 + confidence / 2, len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x)))
    return float(x.mean()), float(x.mean()) - half, float(x.mean()) + half


def judge(
    claim: str | Claim,
    *,
    preset: str,
    values: Seeds | None = None,
    arms: Mapping[str, Seeds] | pd.DataFrame | None = None,
    measured: float | Mapping[str, float] | None = None,
    bound: float | None = None,
    holds: bool | Mapping[str, bool] | None = None,
) -> Verdict:
    """Compare a claim with what was measured at one preset.

    Each test takes one kind of evidence; anything else is a ``ValueError``. With failed, missing or too few runs the
    verdict is inconclusive and says so: no run is dropped.

    Args:
        claim: Id, or the claim itself.
        preset: "quick", "desktop" or "paper". If the claim lists no test for it: "not run at this scale".
        values: Value and rate claims: ``{seed: number}``.
        arms: Orderings: ``{arm: {seed: number}}``, or a frame with seeds as index and arms as columns. The claim says
            which arms it compares, so that a whole table may be passed.
        measured: Bounds and properties: a number, or ``{case: number}`` of which all must pass.
        bound: The bound, where it is computed and the claim has no ``expected``.
        holds: Properties: a condition, or ``{case: condition}`` of which all must hold.
    """
    claim = _claim(claim) if isinstance(claim, str) else claim
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; known are {', '.join(PRESETS)}")
    criterion = claim.judge.get(preset)
    if criterion is None:
        return Verdict(claim.id, preset, claim.paper, "–", 0, NOT_RUN, "the claim lists no test for this preset")
    wanted = [TESTS[criterion.test].evidence]
    wanted += ["bound"] if wanted == ["measured"] and claim.expected is None else []
    evidence = {"values": values, "arms": arms, "measured": measured, "holds": holds, "bound": bound}
    given = [name for name, value in evidence.items() if value is not None]
    if given != wanted:
        got = " and ".join(given) or "nothing"
        raise ValueError(f"{claim.id}: the test {criterion.test!r} takes {' and '.join(wanted)}; got {got}")
    if holds is not None:
        outcome = _judge_holds(holds)
    elif measured is not None:
        outcome = _judge_measured(claim, criterion, measured, cast(float, claim.expected if bound is None else bound))
    else:
        source = arms if arms is not None else {"values": values}
        names = claim.arms if arms is not None else ("values",)
        outcome = _judge_seeds(claim, preset, {arm: _seeds(claim, arm, source) for arm in names})
    status, text, n, detail = outcome
    return Verdict(claim.id, preset, claim.paper, text, n, status, detail)


def combine(cases: Mapping[str, Verdict]) -> Verdict:
    """One verdict from several data sets: theirs where all agree, else inconclusive.

    Data sets are not a sample of anything, so their pairs are not pooled; ``n`` is that of each.

    Args:
        cases: Verdicts of one claim at one preset, by data set.
    """
    first = next(iter(cases.values()))
    statuses = {v.status for v in cases.values()}
    status = first.status if len(statuses) == 1 else "inconclusive"
    measured = "; ".join(f"{name} {v.measured}" for name, v in cases.items()) if first.status != NOT_RUN else "–"
    return replace(first, status=status, measured=measured, n=min(v.n for v in cases.values()))


def _claim(claim_id: str) -> Claim:
    paper = claim_id.split(".")[0]
    if not (paths.claims_dir() / f"{paper}.yaml").is_file() or claim_id not in load(paper):
        raise ValueError(f"there is no claim {claim_id!r} in data/claims/{paper}.yaml")
    return load(paper)[claim_id]


def _seeds(claim: Claim, arm: str, source: Any) -> dict[int, float]:
    if arm not in source:
        raise ValueError(f"{claim.id}: arm {arm!r} is missing; got {', '.join(map(str, source)) or 'none'}")
    series = source[arm]
    pairs: list[tuple[Any, Any]] = list(series.items()) if isinstance(series, Mapping | pd.Series) else []
    if not pairs or not all(isinstance(seed, int | np.integer) for seed, _ in pairs):
        raise ValueError(f"{claim.id}: expected {{seed: number}} for {arm!r}, got {series!r}")
    if len({seed for seed, _ in pairs}) < len(pairs):
        raise ValueError(f"{claim.id}: a seed appears twice in {arm!r}")
    return {int(seed): math.nan if value is None else float(value) for seed, value in pairs}


def _judge_seeds(claim: Claim, preset: str, arms: dict[str, dict[int, float]]) -> _Outcome:
    """Values and orderings: t intervals over seeds, paired between arms."""
    criterion = claim.judge[preset]
    test, margin, confidence = criterion.test, criterion.margin, TESTS[criterion.test].confidence
    least = max(2, criterion.n or (claim.n or 3 if preset == "paper" else 5))
    seeds = sorted(set().union(*arms.values()))
    gaps = {arm: [seed for seed in seeds if not math.isfinite(x.get(seed, math.nan))] for arm, x in arms.items()}
    n = len(set(seeds).difference(*gaps.values()))
    if n < len(seeds):
        lost = "; ".join(f"{arm} seed {', '.join(map(str, missing))}" for arm, missing in gaps.items() if missing)
        return "inconclusive", "–", n, f"failed or missing: {lost}"
    if n < least:
        return "inconclusive", "–", n, f"{n} of at least {least} seeds"
    if all(len(set(arm.values())) == 1 for arm in arms.values()):  # a saturated metric, or a seed that has no effect
        return "inconclusive", "–", n, "every seed gives the same number: no spread to judge by"

    target = claim.expected or 0.0 if test == "value" else 0.0
    pairs = _pairs(claim, {arm: np.array([x[seed] for seed in seeds]) for arm, x in arms.items()})
    ranked = []
    for label, difference in pairs.items():
        mean, low, high = interval(difference.tolist(), confidence)
        _, *sure = interval(difference.tolist(), 1 - (1 - confidence) / len(pairs))
        narrow, wide = (low - target, high - target), (sure[0] - target, sure[1] - target)
        status = _place(test, margin, narrow, wide)
        held = f"; of {len(pairs)} comparisons, contradicted only if [{sure[0]:+.4g}, {sure[1]:+.4g}] is outside too"
        why = held if status != _place(test, margin, narrow, narrow) else ""
        slack = low if test in ("better", "no_worse") else -max(abs(low - target), abs(high - target))
        ranked.append((-STATUSES.index(status), _rounded(slack), status, label, (mean, low, high), why))
    *_, status, label, numbers, why = min(ranked)  # the comparison that decides
    mean_text, low_text, high_text = (_number(v, claim, "" if test == "value" else "+") for v in numbers)
    rule = {
        "value": f"within {margin:g} of {target:g}",
        "better": f"gain above {margin:g}",
        "no_worse": f"gain above {-margin:g}",
        "on_par": f"gain within ±{margin:g}",
        "insensitive": f"all differences within ±{margin:g}",
    }[test]
    return status, f"{mean_text} [{low_text}, {high_text}]{label}", n, f"{rule} ({confidence:.0%} interval){why}"


def _pairs(claim: Claim, arms: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The samples to judge: the values themselves, or differences per seed, positive where the subject is better."""
    if "values" in arms:
        return {"": arms["values"]}
    if claim.among:
        return {f" ({a} - {b})": arms[a] - arms[b] for a, b in itertools.combinations(arms, 2)}
    sign = 1.0 if claim.direction == "lower" else -1.0
    return {f" over {arm}": sign * (arms[arm] - arms[claim.subject]) for arm in claim.against}


def _place(test: str, margin: float, ci: tuple[float, float], sure: tuple[float, float]) -> str:
    """Where an interval lies; ``sure`` is the wider one that a contradiction needs among several comparisons."""
    two_sided = test not in ("better", "no_worse")
    if sure[1] < -margin or (two_sided and sure[0] > margin):
        return "contradicted"
    inside = ci[0] > margin if test == "better" else ci[0] >= -margin and (not two_sided or ci[1] <= margin)
    return "reproduced" if inside else "inconclusive"


def _judge_measured(
    claim: Claim, criterion: Criterion, measured: float | Mapping[str, float], target: float
) -> _Outcome:
    """Numbers without a sampling error; of several cases the worst decides."""
    cases = {k: float(v) for k, v in (measured.items() if isinstance(measured, Mapping) else [("", measured)])}
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
        return "inconclusive", "–", len(cases), reason
    status = "contradicted" if highest > beyond else "inconclusive" if highest > tolerance else "reproduced"
    rule = f"{criterion.test.replace('_', ' ')} {target:g}" + (f", tolerance {tolerance:g}" if tolerance else "")
    text = _number(cases[worst], claim) + (f" ({worst})" if worst else "")
    return status, text, len(cases), rule + (f", contradicted past {beyond:g}" if beyond > tolerance else "")


def _judge_holds(holds: bool | Mapping[str, bool]) -> _Outcome:
    cases = holds if isinstance(holds, Mapping) else {"the condition": holds}
    for name, value in cases.items():
        if not isinstance(value, bool | np.bool_):
            raise ValueError(f"holds: expected True or False for {name}, got {value!r}")
    failed = [str(name) for name, value in cases.items() if not value]
    status = "contradicted" if failed else "reproduced" if cases else "inconclusive"
    detail = "fails: " + ", ".join(failed) if failed else "every case holds" if cases else "nothing checked"
    return status, f"{len(cases) - len(failed)} of {len(cases)} hold", len(cases), detail


def _rounded(value: float) -> float:
    """Six digits: cases that are equal but for rounding errors, which each processor has its own, are a tie."""
    return float(f"{value:.6g}")


def _number(value: float, claim: Claim, plus: str = "") -> str:
    text = f"{value:{plus}.3f}" if claim.unit == "%" else f"{value:{plus}.4g}"
    return text if float(text) else text.replace("-", plus)  # no minus zero


# ---- verdicts: table, files, scoreboard


def table(verdicts: Iterable[Verdict]) -> pd.DataFrame:
    """One row per verdict, for ``print(table(verdicts).to_string())``."""
    frame = pd.DataFrame([asdict(v) for v in verdicts], columns=[field.name for field in fields(Verdict)])
    return frame.rename(columns={"claim_id": "claim", "status": "verdict"}).set_index("claim")


def save(verdicts: Iterable[Verdict], notebook: str) -> Path:
    """Write one notebook's verdicts to ``report/verdicts/<notebook>.json``."""
    path = paths.report_dir() / "verdicts" / f"{notebook}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"verdicts": [asdict(v) for v in verdicts]}, indent=1, ensure_ascii=False)
    temporary = path.with_suffix(".tmp")  # renamed: a reader never sees half a file
    temporary.write_text(text + "\n", encoding="utf-8")
    return temporary.replace(path)


def saved(folder: Path | None = None) -> list[Verdict]:
    """All verdicts below a folder, by default ``report/verdicts``, in the order of the file names."""
    verdicts = []
    for path in sorted((folder or paths.report_dir() / "verdicts").rglob("*.json")):
        try:
            verdicts += [Verdict(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))["verdicts"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: not a file of verdicts ({error}); run its notebook again") from error
    return verdicts


_Judged = Mapping[tuple[str, str], Verdict]  # by claim id and preset


def scoreboard(verdicts: Iterable[Verdict], papers: Sequence[str] | None = None, *, full: bool = False) -> str:
    """Verdicts of all presets as Markdown: counts, then the claims of each paper by table, folded.

    The short form (README) gives the numbers of a table one row, and a table that nobody has run one row in all. The
    full form (report) gives every claim a row with its id and the rule, and the notes. "Not run yet" marks a claim
    that lists a test for the preset and has no verdict. ``ValueError`` for a verdict that does not fit its claim any
    more, and for two different verdicts on one claim and preset.
    """
    judged = _by_claim(verdicts)
    shown = ("reproduced", "inconclusive", "contradicted", NOT_YET, NOT_RUN)
    lines = [_row("claims", "preset", *shown), _row("---", "---", *["---:"] * len(shown))]
    papers = papers or available()
    for paper in papers:
        for preset in PRESETS:
            counts = Counter(_status(claim, preset, judged) for claim in load(paper).values())
            name = f"{paper.upper()}, {len(load(paper))}" if preset == PRESETS[0] else ""
            lines.append(_row(name, preset, *(str(counts[status]) for status in shown)))
    for paper in papers:
        lines += ["", "<details>", f"<summary>{paper.upper()}, claim by claim</summary>", ""]
        lines += [_row("claim", "the paper says", *PRESETS), _row(*["---"] * (2 + len(PRESETS)))]
        groups: dict[str, list[Claim]] = {}
        for claim in load(paper).values():
            groups.setdefault(claim.id.split(".")[1], []).append(claim)
        for group in groups.values():
            lines += _group(group[0].where.split(",")[0], group, judged, full)
        notes = dict.fromkeys(f"- {c.where.split(',')[0]}: {c.note}" for c in load(paper).values() if c.note)
        if full and notes:
            lines += ["", "Notes on the paper's own statements:", "", *notes]
        lines += ["", "</details>"]
    return "\n".join(lines) + "\n"


def _by_claim(verdicts: Iterable[Verdict]) -> _Judged:
    judged: dict[tuple[str, str], Verdict] = {}
    for verdict in verdicts:
        claim = _claim(verdict.claim_id)
        fits = verdict.status in STATUSES and (verdict.status == NOT_RUN) == (verdict.preset not in claim.judge)
        if not fits or verdict.preset not in PRESETS or verdict.paper != claim.paper:
            raise ValueError(
                f"{claim.id}: the verdict at {verdict.preset!r} is out of date; run {claim.notebook} again"
            )
        if judged.setdefault((claim.id, verdict.preset), verdict) != verdict:
            raise ValueError(f"{claim.id}: two different verdicts at {verdict.preset!r}")
    return judged


def _group(title: str, group: list[Claim], judged: _Judged, full: bool) -> list[str]:
    """The rows of one table or section."""
    numbers = [claim for claim in group if claim.kind == "value"]
    statements = [claim for claim in group if claim.kind != "value"]
    seen = any((claim.id, preset) in judged for claim in group for preset in PRESETS)
    head = numbers if seen and not full else group  # what the first row sums up
    parts = ((numbers, "number"), ([claim for claim in head if claim.kind != "value"], "statement"))
    shape = ", ".join(f"{len(part)} {word}{'s' * (len(part) > 1)}" for part, word in parts if part)
    lines = [_row(f"**{title}**", shape, *(_counts(head, preset, judged) for preset in PRESETS))]
    for claim in group if full else statements if seen else []:
        label = f"{claim.text} (`{claim.id}`)" if full else claim.text
        if full and claim.kind == "value":
            label = f"`{claim.id}`"
        lines.append(_row(label, claim.paper, *(_cell(claim, preset, judged, full) for preset in PRESETS)))
    return lines


def _status(claim: Claim, preset: str, judged: _Judged) -> str:
    verdict = judged.get((claim.id, preset))
    return verdict.status if verdict else NOT_YET if preset in claim.judge else NOT_RUN


def _counts(claims: list[Claim], preset: str, judged: _Judged) -> str:
    found = Counter(_status(claim, preset, judged) for claim in claims)
    words = [f"{n} {status}" if len(found) > 1 else status for status, n in sorted(found.items())]
    return ", ".join(words)


def _cell(claim: Claim, preset: str, judged: _Judged, full: bool) -> str:
    verdict = judged.get((claim.id, preset))
    if verdict is None or verdict.status == NOT_RUN:
        return _status(claim, preset, judged)
    words = [verdict.measured] if verdict.measured != "–" else []
    words += [verdict.detail] if full or not words else []
    counted = "seeds" if claim.kind in ("value", "ordering", "rate") else "cases"
    return f"{verdict.status}: {'; '.join(words)}; n = {verdict.n} {counted}"


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def replace_block(readme: str, block: str) -> str:
    """The text with what stands between the two scoreboard markers replaced; doing it twice changes nothing."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        raise ValueError(f"expected the markers {BEGIN} and {END} once each, in this order")
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n{block.strip()}\n{END}{rest.split(END)[1]}"
