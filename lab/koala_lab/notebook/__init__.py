"""Notebooks as files, and what a running notebook calls."""

from koala_lab.notebook.context import CUSTOM, Notebook, scale_of, start
from koala_lab.notebook.files import (
    Declared,
    all_notebooks,
    declared_grid,
    declared_in,
    grid_of,
    name_of,
    overrides,
    paper_item,
    preset_file,
    tagged_source,
    title_of,
)

__all__ = [
    "CUSTOM",
    "Declared",
    "Notebook",
    "all_notebooks",
    "declared_grid",
    "declared_in",
    "grid_of",
    "name_of",
    "overrides",
    "paper_item",
    "preset_file",
    "scale_of",
    "start",
    "tagged_source",
    "title_of",
]
