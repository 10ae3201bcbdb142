"""Notebooks as pages: what is folded, how figures and verdicts are shown, where links lead."""

from __future__ import annotations

import html
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode
from nbformat.v4 import new_markdown_cell, new_notebook, new_output

from koala_lab import claims, paths
from koala_lab.notebook.files import cells_of
from koala_lab.report.equations import PAPERS
from koala_lab.report.shown import COMMITTED, DAMAGED, FAILED, Picture, Shown

LONG = 12  # lines of code that are shown without a click

_LINK = re.compile(r"(\]\()([^)\s#:]+)([^)\s]*\))")
_ITEM = re.compile(r"(?:Table|Figure|Theorem|Proposition|Algorithm) \d+")
_FIGURE = re.compile(r"""ctx\.figure\(.+?,\s*(f?)["']([^"']+)["']""", re.DOTALL)
_DECIDED = re.compile(r"  (reproduced|mixed|contradicted)( \([^)]*\))?: (\S+): (.*?), n = (\d+ \w+)(?:; rates (.*))?")


def stage(shown: Shown, folder: Path, pictures: Mapping[str, Picture], fresh: bool) -> set[str]:
    """Write a notebook as the site shows it.

    Args:
        shown: The notebook.
        folder: Of the site's sources.
        pictures: All figures by name.
        fresh: Whether the report is about notebooks that were executed, so that others are marked.

    Returns:
        The names of the figures that it shows; its file is ``notebooks/<name>.ipynb`` in the folder.
    """
    target = folder / "notebooks" / f"{shown.name}.ipynb"
    target.parent.mkdir(parents=True, exist_ok=True)
    placed: set[str] = set()
    if shown.state == DAMAGED:
        book = new_notebook(cells=[_markdown(f"# {shown.name}\n\n:::{{danger}}\n{shown.title}\n:::")])  # type: ignore[no-untyped-call]
    else:
        book = nbformat.read(shown.file, as_version=4)  # type: ignore[no-untyped-call]
        shutil.copy(shown.file, target.with_suffix(".original"))
        book.cells = [each for cell in book.cells for each in _cells(cell, shown, target, pictures)]
        placed = {name for cell in book.cells for name in cell.metadata.get("figures", [])}
        _caption_figures(book.cells)
        book.cells.insert(1, _markdown(head(shown, fresh)))
    book.metadata = {"language_info": {"name": "python", "pygments_lexer": "python"}}
    nbformat.write(book, target)  # type: ignore[no-untyped-call]
    return placed


def _markdown(text: str, **metadata: bool) -> NotebookNode:
    cell: NotebookNode = new_markdown_cell(text, metadata=metadata)  # type: ignore[no-untyped-call]
    return cell


def _output(kind: str, **fields: Any) -> NotebookNode:
    output: NotebookNode = new_output(kind, **fields)  # type: ignore[no-untyped-call]
    return output


def head(shown: Shown, fresh: bool) -> str:
    """Return what stands under the title: whether it ran, where its claims are, the file itself."""
    notes = {
        FAILED: ":::{danger}\nThis notebook **failed** here; the page shows how far it came.\n:::\n\n",
        COMMITTED: ":::{warning}\n**Not executed** here: this is the committed notebook.\n:::\n\n" if fresh else "",
    }
    mine = claims.of(shown.name)
    parts = [f"{{download}}`The notebook <{Path(shown.name).name}.original>`"]
    if mine:
        paper = mine[0].id.split(".")[0]
        up = "../" * (shown.name.count("/") + 1)
        parts.append(f'<a href="{up}claims/index.html#notebook={shown.name}">its {len(mine)} claims</a>')
        if paper in PAPERS:
            parts.append(f"[the paper's equations](/equations/{paper}.md)")
    if repository := os.environ.get("KOALA_REPOSITORY"):  # owner/name on GitHub, where the site is published from there
        place = f"notebooks/{shown.name}.ipynb"
        parts.append(f"[Binder](https://mybinder.org/v2/gh/{repository}/HEAD?urlpath=lab/tree/{place})")
        parts.append(f"[Colab](https://colab.research.google.com/github/{repository}/blob/HEAD/{place})")
        folder = repository.rpartition("/")[2]
        get = f"!git clone https://github.com/{repository} && pip install -e {folder} -e {folder}/lab"
        parts[-1] += f"\n\nIn Colab run this in a cell of its own, restart the runtime, then go on: `{get}`"
    return notes.get(shown.state, "") + index_entries(shown.title) + " · ".join(parts)


def index_entries(title: str) -> str:
    """Return MyST that makes the search list a page first for each item of a paper that its title names."""
    return "".join(f"```{{index}} ! {item}\n```\n\n" for item in dict.fromkeys(_ITEM.findall(title)))


def _cells(cell: NotebookNode, shown: Shown, target: Path, pictures: Mapping[str, Picture]) -> Iterator[NotebookNode]:
    cell.pop("attachments", None)
    if cell.cell_type != "code":
        cell.source = _LINK.sub(lambda m: m[1] + _linked(m[2], shown, target) + m[3], cell.source)
        yield cell
        return
    drawn = _pictures(cell, shown, pictures)
    cell.metadata = _folded(cell, bool(drawn))
    for output in cell.outputs:
        if "text/markdown" in output.get("data", {}):
            text = str(output.data["text/markdown"])
            output.data = {"text/markdown": re.sub(r"\.ipynb(?=[#)])", ".html", text)}
    if "ctx.verdicts(" in cell.source:
        cell.outputs = [piece for output in cell.outputs for piece in _tables(output, shown.name)]
    if not drawn:
        yield cell
        return
    yield from _figures(cell, drawn, target)


def _folded(cell: NotebookNode, drawn: bool) -> dict[str, Any]:
    """Return the metadata of a code cell: what is folded, and the words on the fold."""
    tags = cell.metadata.get("tags", [])
    if "parameters" in tags or cell.source.startswith("# Parameters"):
        return _fold("cell", "the parameters")
    if "grid" in tags:
        return _fold("cell", "the runs")
    if "nb.start(" in cell.source:
        return _fold("cell", "imports and start")
    long = len([line for line in cell.source.splitlines() if line.strip()]) > LONG
    return _fold("input", "the code") if drawn or long else {}


def _fold(part: str, what: str) -> dict[str, Any]:
    words = {"code_prompt_show": f"Show {what}", "code_prompt_hide": f"Hide {what}"}
    return {"tags": [f"hide-{part}"], "mystnb": words}


def _linked(link: str, shown: Shown, target: Path) -> str:
    """Return the link of a page; a file of the repository is copied beside the page's sources, to be downloaded."""
    if link.endswith(".ipynb"):
        return link
    file = (paths.notebooks() / f"{shown.name}.ipynb").parent / link
    if file.is_file():
        copy = Path(os.path.normpath(target.parent / link))
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, copy)
    return link


# ---- figures


def _pictures(cell: NotebookNode, shown: Shown, pictures: Mapping[str, Picture]) -> list[Picture]:
    """Return the figures whose images a cell has as outputs, in their order."""
    names = [o.metadata.get("image/png", {}).get("alt", "") for o in cell.outputs if "image/png" in o.get("data", {})]
    where = shown.name.rpartition("/")[0]
    return [pictures[key] for name in names if (key := f"{where}/{name}".lstrip("/")) in pictures]


def _figures(cell: NotebookNode, drawn: Sequence[Picture], target: Path) -> Iterator[NotebookNode]:
    """Yield a cell, and under it an address and the data of each of its figures."""
    lines = []
    for picture in drawn:
        name = Path(picture.name).name
        files = [picture.png.with_suffix(suffix) for suffix in (".csv", ".json", ".pdf", ".png")]
        links = []
        for file in files:
            if file.exists():
                shutil.copy(file, target.parent / file.name)
                links.append(f"{{download}}`{_kind(file)} <{file.name}>`")
        runs = len(picture.origin.get("runs", []))
        drawn_from = f", drawn from {runs} runs" if runs else ""
        lines.append(f'<span id="figure-{html.escape(name)}"></span>**Figure {name}**{drawn_from}: {" · ".join(links)}')
    cell.metadata["figures"] = [picture.name for picture in drawn]
    yield cell
    yield _markdown("\\\n".join(lines), caption=True)


def _kind(file: Path) -> str:
    return {".csv": "data (CSV)", ".json": "origin (JSON)", ".pdf": "PDF", ".png": "PNG"}[file.suffix]


def _caption_figures(cells: Sequence[NotebookNode]) -> None:
    """Give each image an alternative text: its name, and what the text before its cell says of it."""
    said = title = ""
    for cell in cells:
        if cell.cell_type == "markdown":
            if not cell.metadata.pop("caption", None):
                title = title or _plain(cell.source.partition("\n")[0])
                said = _plain(cell.source.strip().rpartition("\n\n")[2])
        elif names := cell.metadata.pop("figures", None):
            alt = f"Figure {', '.join(Path(name).name for name in names)} of {title}. {said}"[:400]
            cell.metadata["mystnb"] = {**cell.metadata.get("mystnb", {}), "image": {"alt": alt}}


def _plain(markdown: str) -> str:
    """Return Markdown without its marks, on one line."""
    text = re.sub(r"\[([^]]*)\]\([^)]*\)|[#*`$|]", r"\1", markdown)
    return " ".join(text.split())


# ---- verdicts


def _tables(output: NotebookNode, name: str) -> Iterator[NotebookNode]:
    """Yield an output with the lines of :func:`koala_lab.claims.lines` as a table; other lines as they are."""
    if output.output_type != "stream":
        yield output
        return
    rows: list[str] = []
    text: list[str] = []
    setting = ""
    for line in _paragraphs(str(output.text)):
        found = _DECIDED.fullmatch(line)
        if found:
            rows.append(_row(found, setting, name))
        elif re.match(r"(quick|desktop|paper|custom|at any scale)(: [^:]*)?$", line) and not re.match(
            r"\w+: \d+ ", line
        ):
            setting = line
        else:
            text.append(line)
    if not rows:
        yield output
        return
    head = "<tr><th>verdict</th><th>claim</th><th>measured</th><th>n</th><th>on</th></tr>"
    table = f'<table class="verdicts"><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table>'
    yield _output("display_data", data={"text/html": table, "text/plain": "\n".join(rows)})
    if text:
        yield _output("stream", name="stdout", text="\n".join(text) + "\n")


def _paragraphs(text: str) -> Iterator[str]:
    """Yield the lines of a text; those over which a verdict was wrapped are joined."""
    whole = ""
    for line in text.rstrip("\n").split("\n"):
        verdict = re.match(r"(  )?(quick|desktop|paper|any|reproduced|mixed|contradicted)\b", whole)
        if verdict and line.startswith("    "):
            whole += f" {line.strip()}"
            continue
        if whole:
            yield whole
        whole = line
    yield whole


def _row(found: re.Match[str], setting: str, name: str) -> str:
    status, share, short, measured, n, rates = found.groups(default="")
    claim = next((c for c in claims.of(name) if c.id.split(".", 1)[1] == short), None)
    label = html.escape(short)
    if claim is not None:
        up = "../" * (name.count("/") + 1)
        paper = claim.id.split(".")[0]
        label = f'<a href="{up}claims/{paper}.html#{claim.id}">{html.escape(claim.text)}</a> <code>{label}</code>'
    on = "; ".join(filter(None, (setting, f"rates {rates}" if rates else "")))
    cells = (f'<span class="{status}">{status}</span>{share}', label, html.escape(measured), n, html.escape(on))
    names = ("verdict", "claim", "measured", "n", "on")
    return "<tr>" + "".join(f'<td data-label="{k}">{c}</td>' for k, c in zip(names, cells, strict=True)) + "</tr>"


def sections(shown: Shown) -> Iterator[tuple[str, str]]:
    """Yield the headings of a notebook with the text below each; for a damaged one nothing."""
    if shown.state == DAMAGED:
        return
    heading = shown.title
    for cell in cells_of(shown.file):
        if cell.cell_type != "markdown":
            continue
        for part in re.split(r"^(?=#{1,3} )", str(cell.source), flags=re.MULTILINE):
            if part.startswith("#"):
                heading = part.partition("\n")[0].lstrip("# ").strip()
            yield heading, part
