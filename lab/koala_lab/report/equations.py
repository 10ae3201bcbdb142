"""Where the papers' equations are: read from the marks in docstrings, comments, notebooks and tests.

A mark is "eq. 12", "eqs. 7 and 8", "eqs. 16-21" or "(12)". Which paper it means is said by the docstring that it stands
in, if that names one paper, and otherwise by the file. ``data/equations.yaml`` has the formulas, and the reasons of
those that no code computes.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from koala_lab import paths
from koala_lab.files import read_yaml
from koala_lab.report.code import spans

PAPERS = {"koala": "KOALA", "meka": "MEKA", "apollo": "APOLLO"}
LAST = 32  # the largest number in any of the papers

# Files whose names do not say whose equations they count; None: another paper's.
OF_FILE: dict[str, str | None] = {
    "kalman": "koala", "passes": "koala", "filter": "koala", "ekf": "koala",
    "step_size": "meka", "gradient_estimates": "meka", "horizon": "meka", "noisy_quadratic": "meka", "moments": "meka",
    "curvature": "apollo", "koala_plus_plus": None, "surrogate": None,
}  # fmt: skip

_NUMBER = r"\(?\d{1,2}\)?"
_LIST = rf"{_NUMBER}(?:(?:, | and | or | to |-|–|,? and ){_NUMBER})*"
_MARK = re.compile(
    rf"(?:\b[Ee]qs?\.|\b[Ee]quations?) ({_LIST})"
    r"|(?<![\w{^\]])(\(\d{1,2}\)(?:(?: to |-|–)\(\d{1,2}\))?|\(\d{1,2}(?:, \d{1,2})+\))"
)


class Equation(NamedTuple):
    """An entry of ``data/equations.yaml``."""

    paper: str
    number: int
    section: str
    says: str
    tex: str
    no_code: str = ""


class Mark(NamedTuple):
    """A place that names an equation.

    Attributes:
        paper: ``koala``, ``meka`` or ``apollo``.
        number: Of the equation.
        file: The file.
        line: Its line there.
        owner: The function or class around it, such as ``KoalaV.step``; "" at the top of a module.
    """

    paper: str
    number: int
    file: Path
    line: int
    owner: str


def load() -> dict[str, list[Equation]]:
    """Return the equations by paper, in the papers' order."""
    content = read_yaml(paths.equations())
    return {
        paper: [Equation(paper, number, **fields) for number, fields in entries.items()]
        for paper, entries in content.items()
    }


def numbers(text: str) -> list[int]:
    """Return the equation numbers that a text marks, each once, in order.

    >>> numbers("P = R / S P^ (eq. 13), as eqs. 16-18 and (21); x(4) is none, nor is lambda^{(3)}")
    [13, 16, 17, 18, 21]
    """
    found: list[int] = []
    for match in _MARK.finditer(text):
        listed: list[int] = []
        for piece in re.split(r", and |, | and | or ", match[1] or match[2]):
            ends = [int(n) for n in re.findall(r"\d+", piece)]
            listed += range(ends[0], ends[-1] + 1)
        if match[1] or listed == sorted({*listed}):  # (1, 1) is a point
            found += listed
    return [n for n in dict.fromkeys(found) if 1 <= n <= LAST]


def in_code(file: Path) -> list[Mark]:
    """Return the marks in the docstrings and comments of a Python file."""
    source = file.read_text(encoding="utf-8")
    tree = ast.parse(source)
    marks = []
    for line, text in _texts(source, tree):
        around = [name for name, (start, end) in spans(file).items() if start <= line <= end]
        owner = around[-1] if around else ""  # the innermost
        for offset, part in enumerate(text.split("\n")):
            for number in [] if ">>> " in part else numbers(part):
                if paper := _paper_of(text, file):
                    marks.append(Mark(paper, number, file, line + offset, owner))
    return marks


def _texts(source: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield the comments and docstrings of a file with the line on which each begins."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node, clean=False):
            text = node.body[0].value  # type: ignore[attr-defined]
            yield text.lineno, text.value


def _paper_of(text: str, file: Path) -> str | None:
    if any(paper is None and key in file.stem for key, paper in OF_FILE.items()):
        return None
    named = [paper for paper, name in PAPERS.items() if re.search(rf"\b{name}\b", text)]
    if len(named) == 1:
        return named[0]
    for part in (file.stem, *(p.name for p in file.parents[:2])):
        for key, paper in OF_FILE.items():
            if key in part:
                return paper
        for paper in PAPERS:
            if paper in part:
                return paper
    return None


def code_marks(root: Path) -> list[Mark]:
    """Return the marks of the library and of the papers' theory; baselines count the equations of other papers."""
    variants = [root / "lab/koala_lab/baselines" / f"{paper}_variants.py" for paper in PAPERS]
    files = [*(root / "koala_lib").rglob("*.py"), *(root / "lab/koala_lab/theory").glob("*.py"), *variants]
    return [mark for file in sorted(files) if file.exists() for mark in in_code(file)]


# ---- tests


class Test(NamedTuple):
    """A test: its file, name and line, the names that it uses, and the equations that it marks."""

    file: Path
    name: str
    line: int
    uses: frozenset[str]
    marks: frozenset[tuple[str, int]]


@cache
def tests(root: Path) -> tuple[Test, ...]:
    """Return the tests of both packages."""
    found = []
    for file in sorted((root / "tests").rglob("test_*.py")):
        marks = in_code(file)
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                uses = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
                uses |= {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}
                own = frozenset((m.paper, m.number) for m in marks if m.owner.split(".")[-1] == node.name)
                found.append(Test(file, node.name, node.lineno, frozenset(uses), own))
    return tuple(found)


def tests_of(equation: Equation, marks: Iterable[Mark], root: Path) -> list[Test]:
    """Return the tests that mark an equation, then those that use a function or class that does.

    Args:
        equation: The equation.
        marks: Its marks in the code.
        root: Of the repository.
    """
    marking = [t for t in tests(root) if (equation.paper, equation.number) in t.marks]
    names = {name for mark in marks if (name := mark.owner.split(".")[0]) and not name.startswith("_")}
    users = {name: [t for t in tests(root) if name in t.uses] for name in names}
    told: Counter[Test] = Counter()
    for found in users.values():
        for test in found:
            told[test] += 1000 // len(found)  # the fewer tests use a name, the more it says
    return marking + [test for test, _ in told.most_common() if test not in marking]


# ---- what is missing


def problems(equations: Mapping[str, Sequence[Equation]], marks: Iterable[Mark]) -> list[str]:
    """Return a sentence per number that is left out, has no code and no reason, or has a reason in spite of code."""
    marked = {(mark.paper, mark.number) for mark in marks}
    found = []
    for paper, listed in equations.items():
        if [e.number for e in listed] != list(range(1, len(listed) + 1)):
            found.append(f"{paper}: the numbers in data/equations.yaml are not 1, 2, ... without a gap")
        for e in listed:
            code = (paper, e.number) in marked
            if not code and not e.no_code:
                found.append(f"{paper} eq. {e.number}: no docstring or comment marks it, and no_code gives no reason")
            if code and e.no_code:
                found.append(f"{paper} eq. {e.number}: it is marked in the code, so no_code is out of date")
        found += [
            f"{paper} eq. {number}: marked in the code, and not in data/equations.yaml"
            for of, number in sorted(marked)
            if of == paper and number > len(listed)
        ]
    return found
