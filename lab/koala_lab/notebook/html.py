"""nbconvert's page with formulas as MathML, which browsers draw by themselves, instead of MathJax from a server."""

from __future__ import annotations

import html
import re
from typing import Any

from jinja2 import pass_context
from latex2mathml.converter import convert
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath


def mathml(tex: str, display: str = "inline") -> str:
    """Return a formula as MathML; as its TeX where the converter does not know it.

    Args:
        tex: TeX without dollar signs.
        display: ``inline`` or ``block``.
    """
    try:
        converted: str = convert(tex.replace("{aligned}", "{align*}"), display=display)
    except Exception:  # whatever the converter stumbles over, the reader still gets the source
        converted = "\\"
    unknown = "\\" in converted or "<mi>&</mi>" in converted
    return f"<code>{html.escape(tex)}</code>" if unknown else converted


class _Renderer(IPythonRenderer):
    def inline_math(self, body: str) -> str:
        return mathml(body)

    def block_math(self, body: str) -> str:
        return mathml(body, "block")

    def latex_environment(self, name: str, body: str) -> str:
        return mathml(rf"\begin{{{name}}}{body}\end{{{name}}}", "block")


class Exporter(HTMLExporter):
    """`HTMLExporter` that renders Markdown offline."""

    @pass_context
    def markdown2html(self, context: Any, source: str) -> str:
        """Render Markdown; links to notebooks become links to their pages."""
        page = str(MarkdownWithMath(renderer=_Renderer(escape=False)).render(source))
        return re.sub(r'href="(?!\w+:)([^"#]+)\.ipynb', r'href="\1.html', page)
