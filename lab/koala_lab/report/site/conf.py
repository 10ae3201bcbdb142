"""Sphinx configuration of the site; :mod:`koala_lab.report` writes the pages and calls Sphinx."""

import re

from sphinx.application import Sphinx

from koala_lab.report.code import address

project = "koala_lib"
author = "The koala_lib contributors"
copyright = "the koala_lib contributors, Apache-2.0"
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.linkcode",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx-mathjax-offline",
    "sphinx_copybutton",
    "sphinx_design",
]

nb_execution_mode = "off"  # what is shown was executed before
nb_merge_streams = True
nb_ipywidgets_js: dict[str, dict[str, str]] = {}  # of another server
myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
myst_heading_slug_func = "docutils.nodes.make_id"
suppress_warnings = ["mystnb.unknown_mime_type", "myst.header"]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
default_role = "literal"  # docstrings have names between single backticks
napoleon_numpy_docstring = False
add_module_names = False


def linkcode_resolve(domain: str, info: dict[str, str]) -> str | None:
    """Return the address of an object's source, from a page of the folder ``api``."""
    return address(info["module"], info["fullname"])


html_theme = "sphinx_book_theme"
html_title = "KOALA, MEKA, APOLLO beside their papers"
html_theme_options = {
    "use_download_button": False,
    "use_fullscreen_button": False,
    "use_sidenotes": False,
    "navigation_depth": 1,
    "show_navbar_depth": 1,
    "show_toc_level": 2,
    "navbar_start": [],
    "navbar_center": [],
    "navbar_end": [],
    "navbar_persistent": [],
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}
html_context = {"default_mode": "auto"}
html_static_path = ["static"]
html_css_files = ["site.css"]
html_js_files = ["site.js"]
html_copy_source = False
html_show_sourcelink = False
html_last_updated_fmt = None


def plain(app: object, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Keep |g|^2 and x_ in docstrings from being read as marks of reStructuredText, but for literals and formulas."""
    math: int | None = None
    for number, line in enumerate(lines):
        indent = len(line) - len(line.lstrip())
        if math is not None and line.strip() and indent <= math:
            math = None
        if line.lstrip().startswith(".. math::"):
            math = indent
        if math is None and not line.lstrip().startswith(">>>"):
            pieces = re.split(r"(``.*?``|`[^`]*`)", line)
            pieces[::2] = [re.sub(r"(?<!\\)\||(?<=\w)_(?!\w)", r"\\\g<0>", piece) for piece in pieces[::2]]
            lines[number] = "".join(pieces)


def skip(app: object, what: str, name: str, obj: object, skipped: bool, options: object) -> bool | None:
    """Leave out the fields of named tuples, of which Python knows no more than their number."""
    return True if str(getattr(obj, "__doc__", "")).startswith("Alias for field number") else None


def setup(app: Sphinx) -> None:
    """Connect what the configuration defines."""
    app.connect("autodoc-skip-member", skip)
    app.connect("autodoc-process-docstring", plain)
