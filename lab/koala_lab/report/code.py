"""Pages of the source code, every line with an address, so that an equation leads to the line that computes it."""

from __future__ import annotations

import ast
import html
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from pygments import highlight  # type: ignore[import-untyped]
from pygments.formatters import HtmlFormatter  # type: ignore[import-untyped]
from pygments.lexers import PythonLexer  # type: ignore[import-untyped]

import koala_lib

ROOT = Path(koala_lib.__file__).parents[1]  # of the code that runs, which a test's paths.ROOT is not

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name}</title><link rel="stylesheet" href="{up}_static/code.css"></head>
<body><header><a href="{up}index.html">KOALA, MEKA, APOLLO beside their papers</a> <code>{name}</code></header>
{body}</body></html>
"""


def write(files: Iterable[Path], folder: Path) -> None:
    """Write ``code/<file>.html`` for each Python file into a folder; line 7 has the address ``#line-7``."""
    formatter = HtmlFormatter(linenos="inline", lineanchors="line", anchorlinenos=True, wrapcode=True)
    for file in sorted(files):
        name = file.relative_to(ROOT)
        target = folder / "code" / name.with_suffix(".html")
        target.parent.mkdir(parents=True, exist_ok=True)
        body = highlight(file.read_text(encoding="utf-8"), PythonLexer(), formatter)
        page = _PAGE.format(name=html.escape(name.as_posix()), up="../" * len(name.parts), body=body)
        target.write_text(page, encoding="utf-8")


def stylesheet() -> str:
    """Return the style of these pages, light and dark."""
    light, dark = (
        HtmlFormatter(style=f"a11y-high-contrast-{mode}").get_style_defs(".highlight") for mode in ("light", "dark")
    )
    common = (
        "body { font: 15px/1.45 system-ui, sans-serif; margin: 0; background: #fff; color: #222 }\n"
        "header { padding: .6rem 1rem; border-bottom: 1px solid #8888 } header a { color: inherit }\n"
        "pre { margin: 0; padding: 1rem; overflow-x: auto } .linenos { opacity: .6; margin-right: 1em }\n"
        "a[id]:target, a[name]:target { outline: 2px solid #de8f05 } a { text-decoration: none }\n"
    )
    night = "body, .highlight { background: #161b22; color: #e6e6e6 }"
    return f"{common}{light}\n@media (prefers-color-scheme: dark) {{\n{dark}\n{night}\n}}\n"


@cache
def spans(file: Path) -> dict[str, tuple[int, int]]:
    """Return the first and the last line of every function and class of a file, by qualified name."""
    found: dict[str, tuple[int, int]] = {}

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                found[f"{prefix}{child.name}"] = (child.lineno, child.end_lineno or child.lineno)
                visit(child, f"{prefix}{child.name}.")

    visit(ast.parse(file.read_text(encoding="utf-8")), "")
    return found


def address(module: str, name: str) -> str | None:
    """Return the address of an object's source from a page one folder down; ``None`` where there is no such page."""
    stem = ROOT.joinpath(*module.split("."))
    file = next((f for f in (stem.with_suffix(".py"), stem / "__init__.py") if f.exists()), None)
    if file is None or name not in spans(file):
        return None
    return f"../code/{file.relative_to(ROOT).with_suffix('').as_posix()}.html#line-{spans(file)[name][0]}"
