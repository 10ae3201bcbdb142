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
import os
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import yaml
from scipy import stats  # type: ignore[import-untyped]

from koala_lib import paths

PRESETS = ("quick", "desktop", "paper")
NOT_RUN = "not run at this scale"
STATUSES = ("reproduced", "inconclusive", "contradicted", NOT_RUN)
BEGIN, END = "<!-- scoreboard:begin -->", "<!-- scoreboard:end -->"

Seeds = Mapping[int, float | None] | pd.Series  # seed -> final metric; None or NaN is a failed run
# test -> its number in the YAML, the argument of `judge` that carries the evidence, the confidence of its interval
_TESTS = {
    "value": ("tolerance", "values", 0.95),
    "better": ("margin", "arms", 0.95),
    "no_worse": ("margin", "arms", 0.90),
    "on_par": ("margin", "arms", 0.90),
    "insensitive": ("margin", "arms", 0.90),
    "at_most": ("tolerance", "measured", 0.0),
    "at_least": ("tolerance", "measured", 0.0),
    "near": ("tolerance", "measured", 0.0),
    "holds": (None, "holds", 0.0),
}
_KINDS = {
    "value": ("value",),
    "ordering": ("better", "no_worse", "on_par", "insensitive"),
    "bound": ("at_most", "at_least"),
    "rate": ("value", "near", "at_most", "at_least"),
    "property": ("holds", "near", "at_most", "at_least"),
}


@dataclass(frozen=True)
class Criterion:
    """How one preset judges a claim: a test and its margin or tolerance, in the claim's unit."""

    test: str
    margin: float = 0.0
    beyond: float | None = None  # measured numbers: contradicted only past this, inconclusive up to it
    n: int | None = None  # least number of seeds; by default 5, and at the paper's scale the paper's own


@dataclass(frozen=True)
class Claim:
    """One number or statement of a paper. Fields as in the YAML; ``expected`` of a comparison is the paper's own."""

    id: str
    where: str
    kind: str
    metric: str
    unit: str
    direction: str
    expected: float | None
    spread: float | None
    n: int | None
    text: str
    notebook: str
    note: str = ""
    subject: str = ""
    against: tuple[str, ...] = ()
    among: tuple[str, ...] = ()
    judge: Mapping[str, Criterion] = field(default_factory=dict)

    @property
    def paper(self) -> str:
        """What the paper says, as a short text."""
        if self.expected is None:
            return "no number"
        number = f"{self.expected:.2f}" if self.unit == "%" else f"{self.expected:g}"
        if self.kind == "ordering":
            number = f"range {number}" if self.among else f"{self.expected:+.2f}"
        test = next((c.test for c in self.judge.values()), "")
        return " ".join(f"{ {'at_most': '≤', 'at_least': '≥'}.get(test, '')} {number} {self.unit}".split())


@dataclass(frozen=True)
class Verdict:
    """The outcome for one claim at one preset; every field is JSON."""

    claim_id: str
    preset: str
    status: str
    paper: str
    measured: str
    n: int
    detail: str


# ---- reading the YAML ---------------------------------------------------------------------------------------------

_TYPES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "text": ("a text", lambda v: isinstance(v, str)),
    "number": ("a finite number", lambda v: type(v) in (int, float) and math.isfinite(v)),
    "count": ("a whole number above 0", lambda v: type(v) is int and v > 0),
    "texts": ("a list of texts", lambda v: isinstance(v, list) and all(isinstance(x, str) for x in v)),
    "mapping": ("a mapping", lambda v: isinstance(v, dict)),
    "list": ("a list", lambda v: isinstance(v, list)),
    "judge": ("a mapping or the name of one of the criteria", lambda v: isinstance(v, str | dict)),
}
_Schema = Mapping[str, tuple[str, Any]]  # field -> type, default; `...` means required
_FILE: _Schema = {
    **dict.fromkeys(("paper", "title", "source"), ("text", ...)),
    "criteria": ("mapping", {}), "tables": ("list", []), "statements": ("list", []),
}  # fmt: skip
_TABLE: _Schema = {
    **dict.fromkeys(("id", "where", "text", "unit", "direction", "notebook"), ("text", ...)),
    "n": ("count", None), "note": ("text", ""), "columns": ("mapping", ...), "rows": ("mapping", ...),
}  # fmt: skip
_COLUMN: _Schema = {"title": ("text", ...), "metric": ("text", ...), "judge": ("judge", ...)}
_STATEMENT: _Schema = {
    **dict.fromkeys(("id", "where", "kind", "text"), ("text", ...)),
    **dict.fromkeys(("metric", "unit", "notebook"), ("text", None)),
    **dict.fromkeys(("direction", "note", "table", "column", "subject"), ("text", "")),
    "expected": ("number", None), "spread": ("number", None), "n": ("count", None),
    "against": ("texts", []), "among": ("texts", []), "judge": ("judge", ...),
}  # fmt: skip
_CRITERION: _Schema = {
    "test": ("text", ...), "margin": ("number", None), "tolerance": ("number", None),
    "beyond": ("number", None), "n": ("count", None),
}  # fmt: skip


class _Loader(yaml.SafeLoader):
    """Refuses a key written twice, of which PyYAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.MarkedYAMLError(problem=f"key {key!r} appears twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


def _fields(entry: Any, at: str, schema: _Schema) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise ValueError(f"{at}: expected a mapping, got {entry!r}")
    if unknown := [key for key in entry if key not in schema]:
        raise ValueError(f"{at}: unknown field {unknown[0]!r}; known are {', '.join(schema)}")
    checked = {}
    for name, (kind, default) in schema.items():
        value = entry.get(name)
        if value is None and default is ...:
            raise ValueError(f"{at}: field {name!r} is missing")
        if value is not None and not _TYPES[kind][1](value):
            hint = " (YAML wants a dot and a sign: 1.0e-3)" if kind == "number" and isinstance(value, str) else ""
            raise ValueError(f"{at}: field {name!r}: expected {_TYPES[kind][0]}, got {value!r}{hint}")
        checked[name] = default if value is None else value
    return checked


def _criteria(judge: str | dict[str, Any], named: dict[str, Any], at: str) -> dict[str, Criterion]:
    if isinstance(judge, str):
        if judge not in named:
            raise ValueError(f"{at}: field 'judge': no criteria named {judge!r}; known are {', '.join(named)}")
        judge = named[judge]
    found = {}
    for preset, entry in _fields(judge, f"{at}: judge", dict.fromkeys(PRESETS, ("mapping", None))).items():
        if entry is None:
            continue
        here = f"{at}: judge.{preset}"
        given = _fields(entry, here, _CRITERION)
        if given["test"] not in _TESTS:
            raise ValueError(f"{here}: field 'test': unknown test {given['test']!r}; known are {', '.join(_TESTS)}")
        number, evidence, _ = _TESTS[given["test"]]
        for name in ("margin", "tolerance"):
            if (given[name] is None) == (name == number) or (given[name] or 0.0) < 0:
                wanted = f"needs a number {number!r} of 0 or more" if number else "takes no number"
                raise ValueError(f"{here}: field {name!r}: test {given['test']!r} {wanted}, got {given[name]!r}")
        size = float(given[number]) if number else 0.0
        if given["beyond"] is not None and (evidence != "measured" or given["beyond"] < size):
            raise ValueError(f"{here}: field 'beyond': only for measured numbers, and at least the tolerance {size:g}")
        found[preset] = Criterion(given["test"], size, given["beyond"], given["n"])
    return found


def _check(claim: Claim, at: str) -> Claim:
    """The rules that tie fields together."""
    if not re.fullmatch(r"[a-z0-9_]+(\.[a-z0-9_]+){2,}", claim.id):
        raise ValueError(f"{at}: field 'id': {claim.id!r} is not of the form paper.section.name, in lower case")
    if claim.kind not in _KINDS:
        raise ValueError(f"{at}: field 'kind': unknown kind {claim.kind!r}; known are {', '.join(_KINDS)}")
    for preset, criterion in claim.judge.items():
        if criterion.test not in _KINDS[claim.kind]:
            raise ValueError(f"{at}: judge.{preset}: field 'test': {criterion.test!r} does not judge a {claim.kind}")
        if criterion.test in ("value", "near") and claim.expected is None:
            raise ValueError(f"{at}: field 'expected' is missing; the test {criterion.test!r} needs it")
        if claim.kind == "ordering" and (criterion.test == "insensitive") != bool(claim.among):
            raise ValueError(f"{at}: judge.{preset}: 'insensitive' goes with 'among', other tests with 'subject'")
    if claim.direction not in ("lower", "higher", ""):
        raise ValueError(f"{at}: field 'direction': expected lower or higher, got {claim.direction!r}")
    if claim.kind in ("value", "ordering") and not claim.direction:
        raise ValueError(f"{at}: field 'direction' is missing; say whether lower or higher is better")
    if claim.kind == "ordering":
        if len(claim.among) < 2 if claim.among else not (claim.subject and claim.against):
            raise ValueError(f"{at}: an ordering needs 'subject' and 'against', or two or more in 'among'")
        if len(set(arms := _arms(claim))) < len(arms) or (claim.among and (claim.subject or claim.against)):
            raise ValueError(f"{at}: an ordering names an arm once, in 'among' or in 'subject' and 'against'")
    elif _arms(claim) != ("",):
        raise ValueError(f"{at}: fields 'subject', 'against', 'among': only for an ordering, not for a {claim.kind}")
    if not re.fullmatch(r"[a-z_]+/\d\d_[a-z0-9_]+", claim.notebook):
        raise ValueError(f"{at}: field 'notebook': expected e.g. koala/20_table2, got {claim.notebook!r}")
    return claim


def _arms(claim: Claim) -> tuple[str, ...]:
    return claim.among or (claim.subject, *claim.against)


def _table_claims(entry: Any, file: str, named: dict[str, Any]) -> list[Claim]:
    at = f"{file}: {entry.get('id', 'table') if isinstance(entry, dict) else 'tables'}"
    table = _fields(entry, at, _TABLE)
    columns = {name: _fields(c, f"{at}: column {name}", _COLUMN) for name, c in table["columns"].items()}
    claims = []
    for row, cells in table["rows"].items():
        here = f"{at}: row {row}"
        if not isinstance(cells, list) or len(cells) != 1 + len(columns) or not isinstance(cells[0], str):
            raise ValueError(f"{here}: expected a label and {len(columns)} numbers, got {cells!r}")
        for (name, column), number in zip(columns.items(), cells[1:], strict=True):
            cell = _fields({"expected": number}, f"{here}: column {name}", {"expected": ("number", ...)})
            claims.append(
                _check(
                    Claim(
                        id=f"{table['id']}.{row}.{name}", where=f"{table['where']}, {cells[0]}, {column['title']}",
                        kind="value", metric=column["metric"], expected=float(cell["expected"]), spread=None,
                        judge=_criteria(column["judge"], named, f"{at}: column {name}"),
                        **{key: table[key] for key in ("unit", "direction", "n", "text", "notebook", "note")},
                    ),
                    here,
                )
            )  # fmt: skip
    return claims


def _statement(entry: Any, file: str, named: dict[str, Any], numbers: Mapping[str, Claim]) -> Claim:
    at = f"{file}: {entry.get('id', 'statement') if isinstance(entry, dict) else 'statements'}"
    given = _fields(entry, at, _STATEMENT)
    table, column = given.pop("table"), given.pop("column")
    given |= {"against": tuple(given["against"]), "among": tuple(given["among"])}
    given["judge"] = _criteria(given["judge"], named, at)
    if table:
        ids = [f"{table}.{arm}.{column}" for arm in given["among"] or (given["subject"], *given["against"])]
        if missing := [name for name in ids if name not in numbers]:
            raise ValueError(f"{at}: fields 'table', 'column' and arms: there is no number {missing[0]!r}")
        for name in ("metric", "unit", "direction", "notebook", "n", "expected"):
            if given[name]:
                raise ValueError(f"{at}: field {name!r} comes from {table} and is not written again")
            given[name] = getattr(numbers[ids[0]], name)
        first, *others = [cast(float, numbers[name].expected) for name in ids]
        gain = min((o - first) * (1 if given["direction"] == "lower" else -1) for o in others)
        given["expected"] = round(max(first, *others) - min(first, *others) if given["among"] else gain, 10)
    if missing := [name for name in ("metric", "unit", "notebook") if given[name] is None]:
        raise ValueError(f"{at}: field {missing[0]!r} is missing")
    return _check(Claim(**given), at)


def read(path: Path) -> dict[str, Claim]:
    """Read and check one file of claims; a mistake raises ``ValueError`` naming file, claim and field."""
    try:
        with path.open(encoding="utf-8") as stream:
            document = yaml.load(stream, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path.name}: not readable as YAML: {error}") from error
    top = _fields(document, path.name, _FILE)
    named = top["criteria"]
    claims: dict[str, Claim] = {}
    for claim in itertools.chain(
        (claim for table in top["tables"] for claim in _table_claims(table, path.name, named)),
        (_statement(entry, path.name, named, claims) for entry in top["statements"]),
    ):
        if claim.id in claims or not claim.id.startswith(f"{top['paper']}."):
            problem = "appears twice" if claim.id in claims else f"does not start with {top['paper']!r}"
            raise ValueError(f"{path.name}: {claim.id}: field 'id' {problem}")
        claims[claim.id] = claim
    return claims


@cache
def load(paper: str = "koala") -> Mapping[str, Claim]:
    """The claims of one paper by id, in the order of its file."""
    return read(paths.claims_dir() / f"{paper}.yaml")


# ---- judging ------------------------------------------------------------------------------------------------------


def interval(sample: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """Mean and Student t interval ``(mean, low, high)`` of independent values; n >= 2, a zero spread gives no width.

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

    Each test takes one kind of evidence; anything else is a ``ValueError``. Failed, missing or too few runs are an
    inconclusive verdict that says so: no run is dropped.

    Args:
        claim: id, or the claim itself.
        preset: "quick", "desktop" or "paper". If the claim lists no test for it: "not run at this scale".
        values: value and rate claims: ``{seed: number}``.
        arms: orderings: ``{arm: {seed: number}}``, or a frame with seeds as index and arms as columns. The claim says
            which arms it compares, so a whole table may be passed. None and NaN are failed runs.
        measured: bounds and properties: a number, or ``{case: number}`` of which all must pass.
        bound: the bound, where it is computed and the claim has no ``expected``.
        holds: properties: a condition, or ``{case: condition}`` of which all must hold.
    """
    if isinstance(claim, str):
        known = load(claim.split(".")[0])
        if claim not in known:
            raise ValueError(f"there is no claim {claim!r} in {claim.split('.')[0]}.yaml")
        claim = known[claim]
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; known are {', '.join(PRESETS)}")
    criterion = claim.judge.get(preset)
    if criterion is None:
        return Verdict(claim.id, preset, NOT_RUN, claim.paper, "–", 0, "the claim lists no test for this preset")
    evidence = {"values": values, "arms": arms, "measured": measured, "holds": holds}
    wanted = _TESTS[criterion.test][1]
    given = [name for name, value in evidence.items() if value is not None]
    if given != [wanted] or (bound is None) == (wanted == "measured" and claim.expected is None):
        wanted += " and bound" if wanted == "measured" and claim.expected is None else ""
        given += ["bound"] if bound is not None else []
        raise ValueError(f"{claim.id}: the test {criterion.test!r} takes {wanted}, got {', '.join(given) or 'nothing'}")
    if wanted == "holds":
        outcome = _judge_holds(cast("bool | Mapping[str, bool]", holds))
    elif measured is not None:
        outcome = _judge_measured(claim, criterion, measured, cast(float, bound if bound is not None else claim.expected))
    else:
        names = ("",) if values is not None else _arms(claim)
        source = {"": values} if values is not None else arms
        outcome = _judge_seeds(claim, criterion, preset, {a: _seeds(claim, a, source) for a in names})
    status, text, n, detail = outcome
    return Verdict(claim.id, preset, status, claim.paper, text, n, detail)


_Outcome = tuple[str, str, int, str]  # status, measured, n, detail


def _seeds(claim: Claim, arm: str, source: Any) -> dict[int, float]:
    if arm not in source:
        raise ValueError(f"{claim.id}: arm {arm!r} is missing; got {', '.join(map(str, source)) or 'none'}")
    series = source[arm]
    if not isinstance(series, Mapping | pd.Series):
        raise ValueError(f"{claim.id}: expected {{seed: number}} for {arm or 'values'}, got {type(series).__name__}")
    pairs = list(series.items())
    if len({seed for seed, _ in pairs}) < len(pairs):
        raise ValueError(f"{claim.id}: a seed appears twice in {arm or 'values'}")
    return {int(seed): math.nan if value is None else float(value) for seed, value in pairs}


def _judge_seeds(claim: Claim, criterion: Criterion, preset: str, arms: dict[str, dict[int, float]]) -> _Outcome:
    """Values and orderings: t intervals over seeds, paired between arms."""
    test, margin, confidence = criterion.test, criterion.margin, _TESTS[criterion.test][2]
    seeds = sorted(set().union(*arms.values()))
    gaps = [(arm, s) for arm in arms for s in seeds if not math.isfinite(arms[arm].get(s, math.nan))]
    complete = [s for s in seeds if s not in {seed for _, seed in gaps}]
    least = criterion.n or (claim.n or 3 if preset == "paper" else 5)
    reason = ""
    if gaps:
        reason = "failed or missing: " + ", ".join(f"{arm} seed {s}".strip() for arm, s in gaps)
    elif len(complete) < max(least, 2):
        reason = f"{len(complete)} seeds, {max(least, 2)} needed"
    elif all(len(set(arm.values())) == 1 for arm in arms.values()):
        reason = "every seed gives the same number, so there is no spread to judge by"
    if reason:
        return "inconclusive", "–", len(complete), reason

    x = {arm: np.array([arms[arm][s] for s in complete]) for arm in arms}
    sign = 1.0 if claim.direction == "lower" else -1.0
    if test == "value":
        pairs = {"": x[""] - cast(float, claim.expected)}
    elif test == "insensitive":
        pairs = {f" ({a} - {b})": x[a] - x[b] for a, b in itertools.combinations(x, 2)}
    else:
        pairs = {f" over {a}": sign * (x[a] - x[claim.subject]) for a in claim.against}
    two_sided = test in ("value", "on_par", "insensitive")
    need = margin if test == "better" else -margin  # where the interval of the gain has to begin
    ranked = []
    for name, gain in pairs.items():
        mean, low, high = interval(gain.tolist(), confidence)
        _, sure_low, sure_high = interval(gain.tolist(), 1 - (1 - confidence) / len(pairs))
        if sure_high < -margin or (two_sided and sure_low > margin):
            status = 2
        else:
            passed = -margin <= low and high <= margin if two_sided else low > need or (low == need and need < 0)
            status = 0 if passed else 1
        slack = -max(abs(low), abs(high)) if two_sided else low
        ranked.append((-status, slack, mean, low, high, name))
    rank, _, mean, low, high, name = min(ranked)  # the comparison that decides
    if test == "value":
        mean, low, high = (v + cast(float, claim.expected) for v in (mean, low, high))
    plus = "" if test == "value" else "+"
    text = f"{_number(mean, claim, plus)} [{_number(low, claim, plus)}, {_number(high, claim, plus)}]{name}"
    rule = {
        "value": f"within {margin:g} of {claim.paper}", "better": f"gain above {margin:g}",
        "no_worse": f"gain above {-margin:g}", "on_par": f"gain within ±{margin:g}",
        "insensitive": f"all differences within ±{margin:g}",
    }[test]  # fmt: skip
    return STATUSES[-rank], text, len(complete), f"{rule} ({confidence:.0%} interval)"


def _judge_measured(
    claim: Claim, criterion: Criterion, measured: float | Mapping[str, float], target: float
) -> _Outcome:
    """Numbers without a sampling error; of several cases the worst decides."""
    cases = measured if isinstance(measured, Mapping) else {"": measured}
    numbers = {name: float(value) for name, value in cases.items()}
    if math.isnan(target) or any(math.isnan(v) for v in numbers.values()) or not numbers:
        bad = [f" in {name}" if name else "" for name, v in numbers.items() if math.isnan(v)]
        return "inconclusive", "–", len(numbers), "not a number" + (bad or [""])[0] if numbers else "nothing measured"
    tolerance = criterion.margin
    beyond = tolerance if criterion.beyond is None else criterion.beyond
    excess = {
        "at_most": lambda v: v - target, "at_least": lambda v: target - v, "near": lambda v: abs(v - target),
    }[criterion.test]  # fmt: skip
    worst = max(numbers, key=lambda name: excess(numbers[name]))
    over = excess(numbers[worst])
    status = "reproduced" if over <= tolerance else "contradicted" if over > beyond else "inconclusive"
    rule = f"{criterion.test.replace('_', ' ')} {target:g}" + (f", tolerance {tolerance:g}" if tolerance else "")
    text = _number(numbers[worst], claim) + (f" ({worst})" if worst else "")
    return status, text, len(numbers), rule + (f", contradicted past {beyond:g}" if beyond > tolerance else "")


def _judge_holds(holds: bool | Mapping[str, bool]) -> _Outcome:
    cases = holds if isinstance(holds, Mapping) else {"": holds}
    for name, value in cases.items():
        if not isinstance(value, bool | np.bool_):
            raise ValueError(f"holds: expected True or False for {name or 'the condition'}, got {value!r}")
    failed = [str(name) for name, value in cases.items() if not value]
    status = "contradicted" if failed else "reproduced" if cases else "inconclusive"
    detail = "fails: " + ", ".join(failed) if any(failed) else "every case holds" if cases else "nothing checked"
    return status, f"{len(cases) - len(failed)} of {len(cases)} hold", len(cases), detail


def _number(value: float, claim: Claim, plus: str = "") -> str:
    text = f"{value:{plus}.3f}" if claim.unit == "%" else f"{value:{plus}.4g}"
    return text if float(text) else text.replace("-", plus)  # no minus zero


# ---- verdicts: table, files, scoreboard ---------------------------------------------------------------------------


def table(verdicts: Iterable[Verdict]) -> pd.DataFrame:
    """One row per verdict, for ``print(table(verdicts).to_string())``."""
    columns = ("claim_id", "preset", "paper", "measured", "n", "status", "detail")
    frame = pd.DataFrame([asdict(v) for v in verdicts], columns=list(columns))
    return frame.rename(columns={"claim_id": "claim", "status": "verdict"}).set_index("claim")


def save(verdicts: Iterable[Verdict], notebook: str) -> Path:
    """Write ``report/verdicts/<notebook>.json`` in one piece and return its path."""
    path = paths.report_dir() / "verdicts" / f"{notebook}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"notebook": notebook, "verdicts": [asdict(v) for v in verdicts]}
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)
    return path


def saved(folder: Path | None = None) -> list[Verdict]:
    """All verdicts below a folder, by default ``report/verdicts``, in the order of the file names."""
    verdicts = []
    for path in sorted((folder or paths.report_dir() / "verdicts").rglob("*.json")):
        try:
            verdicts += [Verdict(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))["verdicts"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: not a file of verdicts ({error}); run its notebook again") from error
    return verdicts


def scoreboard(verdicts: Iterable[Verdict], papers: Sequence[str] | None = None, *, full: bool = False) -> str:
    """Verdicts of all presets as Markdown: counts, then the claims by table.

    The short form (README) gives the numbers of a table one row, and a table nobody has run yet one row in all. The
    full form (report) gives every claim a row with its id, and the notes. "Not run yet" marks claims that list a test
    for a preset but have no verdict. A verdict that no longer fits its claim raises ``ValueError``.
    """
    papers = papers or sorted(path.stem for path in paths.claims_dir().glob("*.yaml"))
    claims = {id_: claim for paper in papers for id_, claim in load(paper).items()}
    judged: dict[tuple[str, str], Verdict] = {}
    for v in verdicts:
        if v.claim_id not in claims:
            raise ValueError(f"verdict on {v.claim_id!r}: there is no such claim")
        claim = claims[v.claim_id]
        if v.status not in STATUSES or v.preset not in PRESETS or v.paper != claim.paper:
            raise ValueError(f"verdict on {v.claim_id!r} at {v.preset!r} is out of date; run {claim.notebook} again")
        if judged.setdefault((v.claim_id, v.preset), v) != v:
            raise ValueError(f"two different verdicts on {v.claim_id!r} at {v.preset!r}")

    def status(claim: Claim, preset: str) -> str:
        found = judged.get((claim.id, preset))
        return found.status if found else "not run yet" if preset in claim.judge else NOT_RUN

    def cell(claim: Claim, preset: str) -> str:
        found = judged.get((claim.id, preset))
        measured = f": {found.measured}, n = {found.n}" if found and found.status != NOT_RUN else ""
        measured += f" – {found.detail}" if found and (full or found.measured == "–") and measured else ""
        return status(claim, preset) + measured

    def summary(group: list[Claim], preset: str) -> str:
        counts = Counter(status(claim, preset) for claim in group)
        return next(iter(counts)) if len(counts) == 1 else ", ".join(f"{n} {s}" for s, n in counts.most_common())

    everything = list(claims.values())
    lines = [_row(f"{len(everything)} claims", *PRESETS), _row("---", *["---:"] * len(PRESETS))]
    for name in ("reproduced", "inconclusive", "contradicted", "not run yet", NOT_RUN):
        lines.append(_row(name, *(str(sum(status(c, p) == name for c in everything)) for p in PRESETS)))
    lines += ["", _row("claim", "paper", *PRESETS), _row(*["---"] * (2 + len(PRESETS)))]
    for _, members in itertools.groupby(sorted(everything, key=_section), key=_section):
        group = list(members)
        numbers = [c for c in group if c.kind == "value"]
        statements = [c for c in group if c.kind != "value"]
        title = f"**{group[0].where.split(',')[0]}**" if len(papers) == 1 else f"**{_section(group[0])[1]}**"
        shape = " and ".join(
            f"{len(part)} {word if len(part) > 1 else word[:-1]}"
            for part, word in ((numbers, "numbers"), (statements, "statements")) if part
        )  # fmt: skip
        if full:
            lines.append(_row(title, shape, *(summary(group, p) for p in PRESETS)))
            lines += [_row(f"`{c.id}` {c.text}", c.paper, *(cell(c, p) for p in PRESETS)) for c in group]
        elif not any((c.id, p) in judged for c in group for p in PRESETS):
            lines.append(_row(title, shape, *(summary(group, p) for p in PRESETS)))
        else:
            head = f"{len(numbers)} numbers" if numbers else ""
            lines.append(_row(title, head, *(summary(numbers, p) if numbers else "" for p in PRESETS)))
            lines += [_row(c.text, c.paper, *(cell(c, p) for p in PRESETS)) for c in statements]
    if full and (notes := dict.fromkeys(f"- {c.where.split(',')[0]}: {c.note}" for c in everything if c.note)):
        lines += ["", "Notes on the papers' own numbers:", "", *notes]
    return "\n".join(lines) + "\n"


def _section(claim: Claim) -> tuple[str, str]:
    paper, section = claim.id.split(".")[:2]
    return paper, section


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def replace_block(readme: str, block: str) -> str:
    """The text with whatever stands between the two scoreboard markers replaced; applying it twice changes nothing."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        raise ValueError(f"expected the markers {BEGIN} and {END} once each, in this order")
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n{block.strip()}\n{END}{rest.split(END)[1]}"
