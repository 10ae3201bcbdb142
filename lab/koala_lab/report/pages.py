"""The pages of the site that are no notebooks: landing page, parts, equations, figures, library."""

from __future__ import annotations

import ast
import html
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
from docutils.nodes import make_id  # type: ignore[import-untyped]

from koala_lab import claims, paths
from koala_lab.files import read_yaml
from koala_lab.notebook.files import cells_of
from koala_lab.report import claim_pages, code, equations, overview, staging
from koala_lab.report.claim_pages import Judged
from koala_lab.report.code import ROOT
from koala_lab.report.equations import PAPERS, Equation, Mark
from koala_lab.report.shown import COMMITTED, DAMAGED, EXECUTED, FAILED, Picture, Shown

TESTS_SHOWN = 5  # under each equation
THEORY = "11_"  # the notebook of each paper's theorems
BEYOND = ("beyond/", "koala/32_")  # questions that no paper asks

_TEXTS = Path(__file__).parent / "site" / "pages"
_OVERVIEW = "Bars of each paper's claims: how many are reproduced, mixed, inconclusive or contradicted in small runs"
_EVERYWHERE = ["be_the_filter", "claims/index", "figures"]  # in the first part


def write(
    folder: Path,
    extra: Path,
    notebooks: Sequence[Shown],
    pictures: Sequence[Picture],
    known: Judged,
    differences: Sequence[str],
    fresh: bool,
) -> None:
    """Write all of them into the folder of the site's sources, and pages of code into the ``extra`` one."""
    marks = equations.code_marks(ROOT)
    (folder / "equations").mkdir(exist_ok=True)
    for paper, listed in equations.load().items():
        (folder / "equations" / f"{paper}.md").write_text(_equations(paper, listed, marks, notebooks), encoding="utf-8")
    parts = _parts(notebooks)
    for name, (title, members) in parts.items():
        if name != "start":
            (folder / f"{name}.md").write_text(_part(name, title, members, known, fresh), encoding="utf-8")
    modules = _library(folder)
    (folder / "figures.md").write_text(_figures(folder, pictures), encoding="utf-8")
    shutil.copy(_TEXTS / "be_the_filter.md", folder)
    _code(folder, extra)
    (folder / "index.md").write_text(_landing(folder, parts, modules, known, differences, fresh), encoding="utf-8")


# ---- landing page and parts

Parts = dict[str, tuple[str, list[Shown]]]


def _parts(notebooks: Iterable[Shown]) -> Parts:
    """Return the parts of the site: the title and the notebooks of each, by the name of its page."""
    parts: Parts = {"start": ("Start", [])}
    parts |= {paper: (name, []) for paper, name in PAPERS.items()}
    parts |= {"theory": ("Theory", []), "beyond": ("Beyond the papers", []), "use": ("In your own code", [])}
    for shown in notebooks:
        where, _, stem = shown.name.rpartition("/")
        if not where:
            part = "start" if stem < "02" else "use"
        elif shown.name.startswith(BEYOND) or where not in PAPERS:
            part = "beyond"
        else:
            part = "theory" if stem.startswith(THEORY) else where
        parts[part][1].append(shown)
    return {name: part for name, part in parts.items() if part[1]}


def _state(shown: Shown, fresh: bool) -> str:
    if shown.state in (FAILED, DAMAGED):
        return f' <span class="contradicted">{shown.state}</span>'
    return f" <span>{COMMITTED}</span>" if fresh and shown.state != EXECUTED else ""


def _part(name: str, title: str, members: Sequence[Shown], known: Judged, fresh: bool) -> str:
    text = [f"# {title}\n"]
    if name in PAPERS:
        about = read_yaml(paths.claims_dir() / f"{name}.yaml")
        text.append(f"*{about['title']}*\\\n{about['source']}\n")
        text.append(f"[Its equations](equations/{name}.md) · [its claims](claims/{name}.md)\n")
    text += ["| notebook | item of the paper | verdicts |", "|---|---|---|"]
    for shown in members:
        item = "" if shown.state == DAMAGED else _item(shown)
        words = claim_pages.verdict_words(claim_pages.tally(known, [shown.name]))
        label = shown.name if shown.state == DAMAGED else shown.title
        text.append(
            f"| [{_cell(label)}](notebooks/{shown.name}.ipynb){_state(shown, fresh)} | {_cell(item)} | {words} |"
        )
    return "\n".join(text) + "\n"


def _item(shown: Shown) -> str:
    first = str(cells_of(shown.file)[0].source)
    found = re.search(r"^\*\*Paper item\.\*\* (.*)", first, re.MULTILINE)
    return re.split(r",? of [A-Z]\w+(?: et al\.)?, ", found.group(1))[0] if found else ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _landing(
    folder: Path, parts: Parts, modules: Sequence[str], known: Judged, differences: Sequence[str], fresh: bool
) -> str:
    counts = claims.counts(known.values())
    drawn = _draw_overview(counts, folder / "overview.png")
    every = [shown for _, members in parts.values() for shown in members]
    bad = [s for s in every if s.state in (FAILED, DAMAGED) or (fresh and s.state == COMMITTED)]
    text = [
        "# KOALA, MEKA, APOLLO beside their papers\n",
        "Three papers see training as filtering. Here each of their tables, figures and theorems is run, and every "
        "number and statement has a verdict that was computed, never typed.\n",
    ]
    if bad:
        lines = "\n".join(
            f"- [{s.name}](notebooks/{s.name}.ipynb): {s.title if s.state == DAMAGED else s.state}" for s in bad
        )
        text.append(f":::{{warning}}\nNot everything ran:\n\n{lines}\n:::\n")
    if not fresh:
        text.append("Shown are the committed notebooks; `make reproduce` runs them here.\n")
    if differences:
        lines = "\n".join(f"- {line}" for line in differences)
        text.append(f":::{{admonition}} This machine's verdicts that differ from the committed ones\n{lines}\n:::\n")
    text += [
        f"```{{raw}} html\n{claim_pages.mosaic(known)}\n```\n",
        _doors(),
        "## What reproduces\n",
        f"![{_OVERVIEW}](overview.png)\n" if drawn else "",
        counts,
        "## How to read a verdict",
        (_TEXTS / "verdicts.md").read_text(encoding="utf-8"),
    ]
    for title, docs in _contents(parts, modules).items():
        text.append(f"```{{toctree}}\n:caption: {title}\n:hidden:\n:titlesonly:\n\n" + "\n".join(docs) + "\n```\n")
    return "\n".join(text)


def _draw_overview(counts: str, file: Path) -> bool:
    """Draw the count rows; say whether there is anything to draw."""
    rows = [row for row in overview.count_rows(f"{claims.BEGIN}\n{counts}\n{claims.END}") if any(row.counts.values())]
    if rows:
        figure = overview.draw(rows)
        figure.savefig(file, dpi=150)
        plt.close(figure)
    return bool(rows)


def _doors() -> str:
    """Return the cards of the landing page."""
    cards = [
        ("Find an equation", "", " · ".join(f"[{name}](equations/{paper}.md)" for paper, name in PAPERS.items())),
        ("Find a claim", "claims/index", "Filter all of them by paper, verdict, scale and source."),
        ("See the figures", "figures", "Each with what it was drawn from."),
        ("Be the filter", "be_the_filter", "Move R, Q, P₀ and κ, and watch KOALA in a valley."),
    ]
    lines = ["::::{grid} 1 2 2 4\n:gutter: 2\n"]
    for title, link, body in cards:
        options = f":link: {link}\n:link-type: doc\n" if link else ""
        lines.append(f":::{{grid-item-card}} {title}\n{options}\n{body}\n:::\n")
    return "\n".join([*lines, "::::\n"])


def _contents(parts: Parts, modules: Sequence[str]) -> dict[str, list[str]]:
    """Return the tables of contents by caption."""
    found: dict[str, list[str]] = {}
    for name, (title, members) in parts.items():
        docs = [name, *(f"notebooks/{shown.name}" for shown in members)]
        if name == "start":
            docs = [*docs[1:], *_EVERYWHERE]
        if name in PAPERS:
            docs += [f"equations/{name}", f"claims/{name}"]
        found[title] = docs
    orphaned = [name for name in PAPERS if name not in parts]
    rest = [doc for name in orphaned for doc in (f"equations/{name}", f"claims/{name}")]
    rest += [f"claims/{name}" for name in claims.available() if name not in PAPERS]
    found.setdefault("Start", _EVERYWHERE)
    found["Library"] = ["api/index", *modules, *rest]
    return found


# ---- equations


def _equations(paper: str, listed: Sequence[Equation], marks: Sequence[Mark], notebooks: Sequence[Shown]) -> str:
    places = _in_notebooks(paper, notebooks)
    text = [
        f"# {PAPERS[paper]}: its equations\n",
        "Every numbered equation of the paper: the notebooks that speak of it, the code that computes it, and tests. "
        "The links are read from the marks in docstrings, comments and notebooks. Symbols: "
        "[notation](/notebooks/01_notation.ipynb).\n"
        if any(s.name == "01_notation" for s in notebooks)
        else "",
    ]
    for equation in listed:
        mine = [m for m in marks if (m.paper, m.number) == (paper, equation.number)]
        text.append(_equation(paper, equation, mine, places.get(equation.number, [])))
    return "\n".join(text)


def _equation(paper: str, equation: Equation, marks: Sequence[Mark], places: Sequence[str]) -> str:
    where = f"section {equation.section}" if equation.section[0].isdigit() else equation.section
    text = [
        f"\n## eq. {equation.number}\n",
        "".join(f"```{{index}} ! {name} {equation.number}\n```\n" for name in ("eq.", f"{PAPERS[paper]} eq.")),
        f"{equation.says} ({where})\n",
        f"$$\n{equation.tex}\n$$\n",
    ]
    if places:
        text.append(f"- **notebooks:** {' · '.join(places)}")
    owners: dict[tuple[Path, str], Mark] = {}
    for mark in sorted(marks, key=_rank):
        owners.setdefault((mark.file, mark.owner), mark)
    links = [_code_link(m.file, m.line, f"{_module(m.file)}{'.' if m.owner else ''}{m.owner}") for m in owners.values()]
    text.append(f"- **code:** {' · '.join(links)}" if links else f"- **code:** none; {equation.no_code}")
    tests = equations.tests_of(equation, marks, ROOT)
    if tests:
        shown = [
            _code_link(t.file, t.line, t.name.removeprefix("test_").replace("_", " ")) for t in tests[:TESTS_SHOWN]
        ]
        more = f" and {len(tests) - TESTS_SHOWN} more" if len(tests) > TESTS_SHOWN else ""
        text.append(f"- **tests:** {' · '.join(shown)}{more}")
    return "\n".join(text) + "\n"


def _rank(mark: Mark) -> tuple[bool, bool, bool, str, int]:
    """Order marks: the library before the laboratory, functions before heads of files, the fast code first."""
    place = mark.file.as_posix()
    return ("/koala_lab/" in place, not mark.owner, "/reference/" in place, place, mark.line)


def _module(file: Path) -> str:
    return (
        file.relative_to(ROOT)
        .with_suffix("")
        .as_posix()
        .removeprefix("lab/")
        .removesuffix("/__init__")
        .replace("/", ".")
    )


def _code_link(file: Path, line: int, label: str) -> str:
    page = file.relative_to(ROOT).with_suffix("").as_posix()
    return f'<a href="../code/{page}.html#line-{line}"><code>{html.escape(label)}</code></a>'


def slug_of(heading: str) -> str:
    """Return the address of a heading on its page, as the configuration makes it."""
    return str(make_id(re.sub(r"\$[^$]*\$|`", "", heading)))


def _in_notebooks(paper: str, notebooks: Sequence[Shown]) -> dict[int, list[str]]:
    """Return links to the sections of a paper's notebooks that mark an equation, by its number."""
    found: dict[int, list[str]] = {}
    for shown in notebooks:
        if not shown.name.startswith(f"{paper}/"):
            continue
        seen: set[tuple[int, str]] = set()
        for heading, text in staging.sections(shown):
            if heading.startswith("Deviations"):
                continue
            for number in equations.numbers(re.sub(r"`[^`]*`|\]\([^)]*\)", "", text)):
                if (number, heading) not in seen:
                    seen.add((number, heading))
                    slug = "" if heading == shown.title else f"#{slug_of(heading)}"
                    short = shown.title.split(": ")[-1]
                    label = short if heading == shown.title else f"{short}: {heading}"
                    found.setdefault(number, []).append(f"[{label}](/notebooks/{shown.name}.ipynb{slug})")
    return found


def _code(folder: Path, extra: Path) -> None:
    """Write pages of the library's code, and of what the equations lead to besides, beside the sources."""
    linked = {
        ROOT / f"{name}.py"
        for page in (folder / "equations").glob("*.md")
        for name in re.findall(r'href="../code/([^"#]+)[.]html', page.read_text(encoding="utf-8"))
    }
    code.write({*linked, *(ROOT / "koala_lib").rglob("*.py")}, extra)
    (extra / "_static").mkdir(parents=True, exist_ok=True)
    (extra / "_static" / "code.css").write_text(code.stylesheet(), encoding="utf-8")


# ---- figures, library, the explorable


def _figures(folder: Path, pictures: Sequence[Picture]) -> str:
    """Return every figure with its notebook and its number of runs."""
    text = ["# Figures\n", "Every figure that the notebooks draw; each leads to its place.\n"]
    if not pictures:
        return "\n".join([*text, "No figure has been drawn yet.\n"])
    text.append("::::{grid} 1 2 2 3\n:gutter: 2\n")
    for picture in pictures:
        copy = folder / "figures" / f"{picture.name}.png"
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(picture.png, copy)
        count = len(picture.origin.get("runs", []))
        link = f'<a href="{picture.address}">{picture.origin["notebook"]}</a>'
        runs = f", {count} runs" if count else ""
        text.append(
            f":::{{grid-item-card}}\n:img-top: figures/{picture.name}.png\n:img-alt: figure {picture.name}\n\n"
            f"**{picture.name}**, from {link}{runs}\n:::\n"
        )
    return "\n".join([*text, "::::\n"])


def _library(folder: Path) -> list[str]:
    """Write a page per public module of the library, and return their names."""
    root = ROOT / "koala_lib"
    (folder / "api").mkdir(exist_ok=True)
    names = []
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root.parent).with_suffix("").parts
        module = ".".join(parts).removesuffix(".__init__")
        if any(part.startswith("_") and part != "__init__" for part in parts) or module in (
            "koala_lib",
            "koala_lib.optim",
        ):
            continue
        names.append(f"api/{module}")
        entries = staging.index_entries(ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "")
        listing = f"```{{eval-rst}}\n.. automodule:: {module}\n   :members:\n   :show-inheritance:\n```\n"
        text = f"# `{module}`\n\n{entries}{listing}"
        (folder / "api" / f"{module}.md").write_text(text, encoding="utf-8")
    listed = "\n".join(f"- [`{name.removeprefix('api/')}`]({name.removeprefix('api/')}.md)" for name in names)
    (folder / "api" / "index.md").write_text(
        "# koala_lib\n\nThe library needs torch alone. The examples in its docstrings are run by the tests.\n\n"
        f"{listed}\n",
        encoding="utf-8",
    )
    return names
