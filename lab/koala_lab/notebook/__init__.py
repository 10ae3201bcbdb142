"""Notebooks as files, and what a running notebook calls."""

from koala_lab.notebook.context import (
    Notebook,
    all_notebooks,
    declared_in,
    grid_of,
    name_of,
    overrides,
    paper_item,
    preset_file,
    start,
    tagged_source,
    title_of,
)

__all__ = [
    "Notebook",
    "all_notebooks",
    "declared_in",
    "grid_of",
    "name_of",
    "overrides",
    "paper_item",
    "preset_file",
    "start",
    "tagged_source",
    "title_of",
]
