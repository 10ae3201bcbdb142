"""The HTML report: scoreboard, executed notebooks, every figure. A view of files; it computes nothing."""

from __future__ import annotations

import html
import os
import re
import warnings
from pathlib import Path

import mistune

from koala_lab import claims, paths
from koala_lab import notebook as nb
from koala_lab.files import read_json, write_bytes
from koala_lab.report import overview

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>koala_lib: what reproduces</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
table {{ border-collapse: collapse; display: block; overflow-x: auto; font-size: .9rem }}
th, td {{ border-bottom: 1px solid #ddd; padding: .3rem .6rem; text-align: left; vertical-align: top }}
figure {{ margin: 1.5rem 0 }} img {{ max-width: 100% }} figcaption {{ color: #555; font-size: .9rem }}
.failed, .contradicted {{ color: #b00020 }} .reproduced {{ color: #1b6e2e }} .mixed {{ color: #8a5a00 }}
</style></head><body>
<h1>koala_lib: what reproduces</h1>
<h2>Notebooks</h2>
{notebooks}
<h2>Scoreboard</h2>
{differences}
{scoreboard}
<h2>Figures</h2>
{figures}
</body></html>
"""

_HOW = """Made by `make figures` from the verdicts of the notebooks; nothing here is typed. A table lists what is
decided: `reproduced`, `contradicted`, or `mixed`, where data sets or conditions differ. The rest is counted:
`inconclusive` (the measurements cannot tell, or nothing could have failed, or no network has learned the task),
`not run yet`, and `not run at this scale`, where the claim lists no test for it. † marks verdicts that another
processor flips.
"""


def scoreboard() -> str:
    """Return the scoreboard of all verdicts in the report folder, as Markdown."""
    return claims.scoreboard(claims.saved())


def build() -> Path:
    """Write ``index.html`` into the report folder from what lies there.

    Returns:
        The page.
    """
    folder = paths.report_dir()
    folder.mkdir(parents=True, exist_ok=True)
    page = _PAGE.format(
        notebooks=_notebooks(folder), differences=_differences(), scoreboard=_table(), figures=_figures(folder)
    )
    index = folder / "index.html"
    write_bytes(index, page.encode())
    return index


def _table() -> str:
    """Return the scoreboard as HTML, its cells in the colour of their verdict."""
    table = str(mistune.create_markdown(escape=False, plugins=["table"])(scoreboard()))
    return re.sub(r"<td([^>]*)>(reproduced|mixed|contradicted)\b", r'<td\1 class="\2">\2', table)


def committed() -> Path:
    """Return where the verdicts that the repository shows are committed."""
    return paths.results_dir() / "verdicts.json"


def differences(folder: Path | None = None) -> list[str]:
    """Return where the verdicts in the report folder differ from those below another one, or from the committed ones.

    Args:
        folder: Such as the ``verdicts`` of a report that was made under another kernel path.
    """
    if folder is not None and not folder.is_dir():
        raise ValueError(f"{folder} is no folder of verdicts")
    there = claims.read_verdicts(committed()) if folder is None else claims.saved(folder)
    return claims.differences(claims.saved(), there)


def _differences() -> str:
    try:
        lines = "".join(f"<li>{html.escape(line)}</li>" for line in differences())
    except ValueError as error:  # the committed verdicts are damaged, which the rest of the page does not need
        warnings.warn(f"{error}; the report does not say where it differs from them", stacklevel=2)
        return ""
    return f"<p>This machine's verdicts that differ from the committed ones:</p><ul>{lines}</ul>" if lines else ""


def _notebooks(folder: Path) -> str:
    """Return one list item per notebook: a link if it ran, otherwise "failed" or "not executed"."""
    lines = []
    for name, file in nb.all_notebooks().items():
        try:
            title = html.escape(nb.title_of(file))
        except ValueError as error:
            lines.append(f'<span class="failed">{html.escape(str(error))}</span>')
            continue
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
    """Return every figure with its notebook and its number of runs, from the sidecars."""
    blocks = []
    for sidecar in sorted(paths.figures_dir().rglob("*.json")):
        try:
            origin = read_json(sidecar)
            if "notebook" not in origin:  # the picture of the README
                continue
            name, runs = html.escape(origin["notebook"]), len(origin["runs"])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            warnings.warn(
                f"{sidecar} is no file of a figure ({error!r}), which is left out: run its notebook", stacklevel=2
            )
            continue
        stem = html.escape(Path(os.path.relpath(sidecar.with_suffix(""), folder)).as_posix())
        title = html.escape(sidecar.relative_to(paths.figures_dir()).with_suffix("").as_posix())
        caption = f'{title} (<a href="{stem}.pdf">PDF</a>), from '
        caption += f'<a href="notebooks/{name}.html">{name}</a>' + (f", {runs} runs" if runs else "")
        blocks.append(f'<figure><img src="{stem}.png" alt="{title}"><figcaption>{caption}</figcaption></figure>')
    return "\n".join(blocks) or "<p>No figure has been drawn yet.</p>"


def scoreboard_page(verdicts: list[claims.Verdict]) -> str:
    """Return SCOREBOARD.md."""
    return f"# Scoreboard\n\n{_HOW}\n{claims.scoreboard(verdicts)}"


def refresh_committed() -> list[Path]:
    """Write what the repository shows of the verdicts: README's count rows, SCOREBOARD.md, picture, verdicts."""
    verdicts = claims.saved()
    readme, board = paths.ROOT / "README.md", paths.ROOT / "SCOREBOARD.md"
    text = claims.replace_block(readme.read_text(encoding="utf-8"), claims.counts(verdicts))
    write_bytes(readme, text.encode())
    write_bytes(board, scoreboard_page(verdicts).encode())
    return [readme, board, overview.save(), claims.write_verdicts(verdicts, committed())]
