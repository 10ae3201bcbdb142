"""The HTML report: scoreboard, executed notebooks, every figure. A view of files; it computes nothing."""

from __future__ import annotations

import html
import json
import os
import re
from pathlib import Path

import mistune

from koala_lab import claims, paths
from koala_lab import notebook as nb

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>koala_lib: what reproduces</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
table {{ border-collapse: collapse; display: block; overflow-x: auto; font-size: .9rem }}
th, td {{ border-bottom: 1px solid #ddd; padding: .3rem .6rem; text-align: left; vertical-align: top }}
figure {{ margin: 1.5rem 0 }} img {{ max-width: 100% }} figcaption {{ color: #555; font-size: .9rem }}
.failed, .contradicted {{ color: #b00020 }} .reproduced {{ color: #1b6e2e }} .inconclusive {{ color: #8a5a00 }}
</style></head><body>
<h1>koala_lib: what reproduces</h1>
<h2>Notebooks</h2>
{notebooks}
<h2>Scoreboard</h2>
{short}
<h2>Figures</h2>
{figures}
<h2>Every claim</h2>
{full}
</body></html>
"""


def scoreboard(*, full: bool) -> str:
    """The scoreboard of all verdicts in the report folder, as Markdown."""
    return claims.scoreboard(claims.saved(), full=full)


def build() -> Path:
    """Write ``index.html`` into the report folder from what lies there.

    Returns:
        The page.
    """
    folder = paths.report_dir()
    folder.mkdir(parents=True, exist_ok=True)
    page = _PAGE.format(
        notebooks=_notebooks(folder), short=_table(full=False), figures=_figures(folder), full=_table(full=True)
    )
    index = folder / "index.html"
    index.write_text(page, encoding="utf-8")
    return index


def _table(*, full: bool) -> str:
    """The scoreboard as HTML, its cells in the colour of their verdict."""
    table = str(mistune.create_markdown(escape=False, plugins=["table"])(scoreboard(full=full)))
    return re.sub(r"<td([^>]*)>(reproduced|inconclusive|contradicted)\b", r'<td\1 class="\2">\2', table)


def _notebooks(folder: Path) -> str:
    """A line a notebook of the repository: a link where it was executed, a word where it failed or is missing."""
    lines = []
    for name, file in nb.all_notebooks().items():
        title = html.escape(nb.title_of(file))
        page = folder / "notebooks" / f"{name}.html"
        failed = page.with_suffix(".failed.ipynb")
        link = f'<a href="notebooks/{html.escape(name)}.html">{html.escape(name)}</a>: {title}'
        if failed.exists():
            where = html.escape(failed.relative_to(folder).as_posix())
            lines.append(f'{html.escape(name)}: <span class="failed">failed</span>, see <a href="{where}">{where}</a>')
        else:
            lines.append(link if page.exists() else f"{html.escape(name)}: not executed")
    return "<ul>\n" + "\n".join(f"<li>{line}</li>" for line in lines) + "\n</ul>"


def _figures(folder: Path) -> str:
    """Every figure with its notebook and its number of runs, from the sidecars."""
    blocks = []
    for sidecar in sorted(paths.figures_dir().rglob("*.json")):
        origin = json.loads(sidecar.read_text(encoding="utf-8"))
        stem = html.escape(Path(os.path.relpath(sidecar.with_suffix(""), folder)).as_posix())
        name, runs = html.escape(origin["notebook"]), len(origin["runs"])
        caption = f'{html.escape(origin["figure"])} (<a href="{stem}.pdf">PDF</a>), from '
        caption += f'<a href="notebooks/{name}.html">{name}</a>' + (f", {runs} runs" if runs else "")
        alt = html.escape(origin["figure"])
        blocks.append(f'<figure><img src="{stem}.png" alt="{alt}"><figcaption>{caption}</figcaption></figure>')
    return "\n".join(blocks) or "<p>No figure has been drawn yet.</p>"


def refresh_readme() -> Path:
    """Replace the generated scoreboard block of the README."""
    readme = paths.ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    readme.write_text(claims.replace_block(text, scoreboard(full=False)), encoding="utf-8")
    return readme
