"""Reads ``data/claims/<paper>.yaml`` into checked :class:`Claim` objects; use it through :mod:`koala_lab.claims`.

The header of ``koala.yaml`` explains the format. Every mistake is a ``ValueError`` naming file, claim and field.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

from koala_lab.files import read_yaml
from koala_lab.parameters import PRESETS

ANY = "any"  # in the place of presets: what has no scale and is settled once
SOURCES = ("paper", "released code", "ours")
RATES = ("printed", "own")  # or the name of the row whose rate is taken
_EXACT = ("holds", "near", "at_most", "at_least")
KINDS = {
    "value": ("value",),
    "ordering": ("better", "no_worse", "on_par", "insensitive"),
    "range": ("better", "no_worse", "on_par"),  # an ordering of ranges that are read from a grid
    "bound": ("at_most", "at_least"),
    "rate": ("value", "near", "at_most", "at_least"),
    "limit": ("vanishes",),
    "property": ("holds", "near", "at_most", "at_least", "never"),
    "exact": _EXACT,  # algebra, proofs, counter-examples
    "identity": _EXACT,  # true by construction: our code against our formula
}
RANKED = ("ordering", "range")


class Rule(NamedTuple):
    """What a test needs: its number in the YAML, its argument of ``judge``, the confidence of its interval."""

    number: str
    evidence: str
    confidence: float = 0.0


TESTS = {
    "value": Rule("tolerance", "values", 0.95),
    "better": Rule("margin", "arms", 0.95),
    "no_worse": Rule("margin", "arms", 0.90),
    "on_par": Rule("margin", "arms", 0.90),
    "insensitive": Rule("margin", "arms", 0.90),
    "at_most": Rule("tolerance", "measured"),
    "at_least": Rule("tolerance", "measured"),
    "near": Rule("tolerance", "measured"),
    "never": Rule("", "measured"),
    "vanishes": Rule("rate", "measured"),
    "holds": Rule("", "holds"),
}
NUMBERS = ("margin", "tolerance", "rate")


@dataclass(frozen=True)
class Criterion:
    """How one preset judges a claim: a test and its margin or tolerance, in the claim's unit (or its rate)."""

    test: str
    margin: float = 0.0
    beyond: float | None = None  # measured numbers: contradicted only past this, inconclusive up to it
    n: int | None = None  # least number of seeds; by default 5, and at the paper's scale the paper's own


@dataclass(frozen=True)
class Claim:
    """One number or statement of a paper. Fields as in the YAML; an ordering's ``expected`` is the paper's own gain.

    Attributes:
        source: Who says so: ``paper``, ``released code`` or ``ours`` (what a claim rests on, or repairs it).
        row: Of a printed number, the row of its notebook's table; an ordering names rows in ``subject``, ``against``,
            ``among``.
        dataset: The data set of the printed number; at the paper's scale the claim is judged on that one alone.
        rates: How the learning rate of a row is chosen among its candidates: ``printed`` (the first), ``own`` (by
            validation), or as another row, which is named. Rows that are not listed: ``printed``.
        fragile: Where the verdict at quick is another one on another processor: what was seen.
    """

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
    source: str = "paper"
    row: str = ""
    dataset: str = ""
    rates: Mapping[str, str] = field(default_factory=dict)
    fragile: str = ""

    @property
    def arms(self) -> tuple[str, ...]:
        """Return the rows that the claim compares."""
        return self.among or (self.subject, *self.against)

    @property
    def scale_free(self) -> bool:
        """Say whether it is settled once, whatever the preset."""
        return ANY in self.judge

    def criterion(self, preset: str) -> Criterion | None:
        """Return how the claim is judged at a preset; ``None`` for not at all."""
        return self.judge.get(ANY) or self.judge.get(preset)

    @property
    def paper(self) -> str:
        """Return what the paper says, as a short text."""
        if self.expected is None or self.kind not in ("value", "rate", "bound", *RANKED):
            return "statement"
        number = f"{self.expected:.2f}" if self.unit == "%" else f"{self.expected:g}"
        if self.kind in RANKED:
            number = f"range {number}" if self.among else f"{self.expected:+.2f}"
        unit = "points" if self.kind in RANKED and self.unit == "%" else self.unit
        test = next((c.test for c in self.judge.values()), "")
        return " ".join([*{"at_most": "≤", "at_least": "≥"}.get(test, ""), number, *unit.split()])


_TYPES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "text": ("a text", lambda v: isinstance(v, str)),
    "number": ("a finite number", lambda v: type(v) in (int, float) and math.isfinite(v)),
    "count": ("a whole number above 0", lambda v: type(v) is int and v > 0),
    "texts": ("a list of texts", lambda v: isinstance(v, list) and all(isinstance(x, str) for x in v)),
    "mapping": ("a mapping", lambda v: isinstance(v, dict)),
    "list": ("a list", lambda v: isinstance(v, list)),
    "judge": ("a mapping or the name of one of the criteria", lambda v: isinstance(v, str | dict)),
    "rates": ("printed, own, or a mapping of rows to these or to rows", lambda v: isinstance(v, str | dict)),
}


def _fields(entry: Any, at: str, **schema: str) -> dict[str, Any]:
    """Check a mapping against ``type="required! optional ..."``; an absent optional field becomes None."""
    if not isinstance(entry, dict):
        raise ValueError(f"{at}: expected a mapping, got {entry!r}")
    known = {name.rstrip("!"): (kind, name) for kind, names in schema.items() for name in names.split()}
    if unknown := [key for key in entry if key not in known]:
        raise ValueError(f"{at}: unknown field {unknown[0]!r}; known are {', '.join(known)}")
    for name, (kind, written) in known.items():
        value = entry.get(name)
        if value is None and written.endswith("!"):
            raise ValueError(f"{at}: field {name!r} is missing")
        wanted, fits = _TYPES[kind]
        if value is not None and not fits(value):
            hint = " (YAML wants a dot and a sign: 1.0e-3)" if kind == "number" and isinstance(value, str) else ""
            raise ValueError(f"{at}: field {name!r}: expected {wanted}, got {value!r}{hint}")
    return {name: entry.get(name) for name in known}


def _criteria(judge: str | dict[str, Any], named: dict[str, Any], at: str) -> dict[str, Criterion]:
    """Return the criterion of each listed preset, written out or by name."""
    if isinstance(judge, str) and judge not in named:
        raise ValueError(f"{at}: field 'judge': no criteria named {judge!r}; known are {', '.join(named)}")
    written = named[judge] if isinstance(judge, str) else judge
    listed = _fields(written, f"{at}: judge", mapping=" ".join((ANY, *PRESETS)))
    found = {}
    for preset, entry in listed.items():
        if entry is None:
            continue
        here = f"{at}: judge.{preset}"
        given = _fields(entry, here, text="test!", number=f"{' '.join(NUMBERS)} beyond", count="n")
        if given["test"] not in TESTS:
            raise ValueError(f"{here}: field 'test': unknown test {given['test']!r}; known are {', '.join(TESTS)}")
        number, evidence, _ = TESTS[given["test"]]
        for name in NUMBERS:
            if (given[name] is None) == (name == number) or (given[name] or 0.0) < 0:
                wanted = f"needs {number!r}, a number of 0 or more" if number else "takes no number"
                raise ValueError(f"{here}: field {name!r}: the test {given['test']!r} {wanted}; got {given[name]!r}")
        size = float(given[number]) if number else 0.0
        if given["beyond"] is not None and (evidence != "measured" or number != "tolerance" or given["beyond"] < size):
            raise ValueError(f"{here}: field 'beyond': only for measured numbers, and not below the tolerance")
        found[preset] = Criterion(given["test"], size, given["beyond"], given["n"])
    return found


def _checked(claim: Claim, at: str) -> Claim:
    """Check the rules that tie fields together."""
    ordering, tests = claim.kind in RANKED, {c.test for c in claim.judge.values()}
    exact = claim.kind in ("exact", "identity", "limit")
    named = len(claim.among) > 1 if claim.among else bool(claim.subject and claim.against)
    misfits = sorted(tests - set(KINDS.get(claim.kind, ())))
    for broken, name, problem in (
        (
            not re.fullmatch(r"[a-z0-9_]+(\.[a-z0-9_]+){2,}", claim.id),
            "id",
            "expected paper.section.name in lower case",
        ),
        (claim.kind not in KINDS, "kind", f"unknown kind {claim.kind!r}; known are {', '.join(KINDS)}"),
        (bool(misfits), "test", f"{', '.join(misfits)} cannot judge a {claim.kind}"),
        (claim.expected is None and tests & {"value", "near"}, "expected", "is missing, and the test needs it"),
        (claim.direction not in ("lower", "higher", ""), "direction", f"lower or higher, not {claim.direction!r}"),
        (claim.source not in SOURCES, "source", f"unknown source {claim.source!r}; known are {', '.join(SOURCES)}"),
        (claim.scale_free and len(claim.judge) > 1, "judge", f"{ANY!r} excludes the presets"),
        (exact and not claim.scale_free, "judge", f"what is {claim.kind} has no scale: give one test under {ANY!r}"),
        (bool(claim.rates) and not ordering, "rates", "only for an ordering"),
        (
            not {*claim.rates} <= {*claim.arms} or not all(isinstance(how, str) for how in claim.rates.values()),
            "rates",
            f"expected {', '.join(RATES)} or a row, for rows of the claim; got {dict(claim.rates)!r}",
        ),
        (claim.kind in ("value", *RANKED) and not claim.direction, "direction", "is missing: lower or higher?"),
        (ordering and not named, "subject", "an ordering needs subject and against, or two or more in among"),
        (not ordering and claim.arms != ("",), "subject", f"arms are for an ordering, not for a {claim.kind}"),
        (claim.among and (claim.subject or claim.against), "among", "excludes subject and against"),
        (len(set(claim.arms)) < len(claim.arms), "against", "an arm is named twice"),
        (any((t == "insensitive") != bool(claim.among) for t in tests), "test", "insensitive and among go together"),
        (not re.fullmatch(r"[a-z_]+/\d\d_[a-z0-9_]+", claim.notebook), "notebook", f"not a name: {claim.notebook!r}"),
    ):
        if broken:
            raise ValueError(f"{at}: field {name!r}: {problem}")
    return claim


def _numbers(entry: Any, file: str, named: dict[str, Any]) -> list[Claim]:
    """Return the claims of a table: one per number."""
    at = f"{file}: {entry.get('id', 'table') if isinstance(entry, dict) else 'tables'}"
    text = "id! where! text! unit! direction! notebook! note dataset source"
    table = _fields(entry, at, text=text, count="n", mapping="columns! rows!")
    shared = {key: table[key] for key in ("unit", "direction", "n", "text", "notebook")}
    columns = {}
    for name, column in table["columns"].items():
        columns[name] = _fields(column, f"{at}: column {name}", text="title! metric! suffix", judge="judge!")
        columns[name]["judge"] = _criteria(columns[name]["judge"], named, f"{at}: column {name}")
    claims = []
    for row, cells in table["rows"].items():
        here = f"{at}: row {row}"
        if not isinstance(cells, list) or len(cells) != 1 + len(columns) or not isinstance(cells[0], str):
            raise ValueError(f"{here}: expected a label and {len(columns)} numbers, got {cells!r}")
        for (name, column), cell in zip(columns.items(), cells[1:], strict=True):
            number, spread = cell if isinstance(cell, list) and len(cell) == 2 else (cell, None)
            printed = _fields({name: number, "spread": spread}, here, number=f"{name}! spread")
            claim = Claim(
                id=f"{table['id']}.{row}.{name}",
                where=f"{table['where']}, {cells[0]}, {column['title']}",
                kind="value",
                metric=column["metric"],
                expected=printed[name],
                spread=printed["spread"],
                note=table["note"] or "",
                row=_named(row, column),
                dataset=table["dataset"] or "",
                source=table["source"] or "paper",
                judge=column["judge"],
                **shared,
            )
            claims.append(_checked(claim, here))
    return claims


def _named(row: str, column: Mapping[str, Any]) -> str:
    """Name a row of the notebook's table: where a printed table has several runs in a row, the column is a suffix."""
    return f"{row}.{column['suffix']}" if column["suffix"] else row


def _rates(rates: str | dict[str, str] | None, arms: tuple[str, ...]) -> dict[str, str]:
    return dict(rates) if isinstance(rates, dict) else dict.fromkeys(arms, rates) if rates else {}


def _statement(entry: Any, file: str, named: dict[str, Any], numbers: Mapping[str, Claim]) -> Claim:
    """Read a claim written out; where it compares rows of a table, the rest comes from there."""
    at = f"{file}: {entry.get('id', 'statement') if isinstance(entry, dict) else 'statements'}"
    text = "id! where! kind! text! metric unit direction notebook note table column subject source dataset fragile"
    number, texts = "expected spread", "against among"
    given = _fields(entry, at, text=text, number=number, count="n", texts=texts, judge="judge!", rates="rates")
    table, column = given.pop("table"), given.pop("column")
    given |= {"against": tuple(given["against"] or ()), "among": tuple(given["among"] or ())}
    given |= {"judge": _criteria(given["judge"], named, at), "subject": given["subject"] or ""}
    given |= {"note": given["note"] or "", "source": given["source"] or "paper", "dataset": given["dataset"] or ""}
    given["fragile"] = given["fragile"] or ""
    if table:
        ids = [f"{table}.{arm}.{column}" for arm in given["among"] or (given["subject"], *given["against"])]
        if missing := [name for name in ids if name not in numbers]:
            raise ValueError(f"{at}: field 'table', 'column' or an arm: there is no number {missing[0]!r}")
        for name in ("metric", "unit", "direction", "notebook", "n", "expected"):
            if given[name] is not None:
                raise ValueError(f"{at}: field {name!r} comes from {table} and is not written again")
            given[name] = getattr(numbers[ids[0]], name)
        first, *others = [cast(float, numbers[name].expected) for name in ids]
        gain = min((o - first) * (1 if given["direction"] == "lower" else -1) for o in others)
        spread = max(first, *others) - min(first, *others)
        given["expected"] = round(spread if given["among"] else gain, 10)
        rows = iter([numbers[name].row for name in ids])
        given |= {"subject": given["subject"] if given["among"] else next(rows), "dataset": numbers[ids[0]].dataset}
        given["among" if given["among"] else "against"] = tuple(rows)
    given["rates"] = _rates(given["rates"], given["among"] or (given["subject"], *given["against"]))
    if missing := [name for name in ("metric", "unit", "notebook") if given[name] is None]:
        raise ValueError(f"{at}: field {missing[0]!r} is missing")
    return _checked(Claim(**given | {"direction": given["direction"] or ""}), at)


def read(path: Path) -> dict[str, Claim]:
    """Read and check one file of claims."""
    top = _fields(
        read_yaml(path), path.name, text="paper! title! source!", mapping="criteria", list="tables statements"
    )
    named = top["criteria"] or {}
    numbers = [claim for entry in top["tables"] or [] for claim in _numbers(entry, path.name, named)]
    by_id = {claim.id: claim for claim in numbers}
    statements = [_statement(entry, path.name, named, by_id) for entry in top["statements"] or []]
    claims: dict[str, Claim] = {}
    for claim in numbers + statements:
        if claim.id in claims or not claim.id.startswith(f"{top['paper']}."):
            problem = "appears twice" if claim.id in claims else f"does not start with {top['paper']!r}"
            raise ValueError(f"{path.name}: {claim.id}: field 'id': {problem}")
        claims[claim.id] = claim
    return claims
