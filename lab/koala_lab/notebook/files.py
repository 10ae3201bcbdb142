"""Notebooks as files: names, titles, parameters, presets and grids, found without a kernel.

The cell tagged ``parameters`` is the schema of its notebook and, as it stands, the ``quick`` preset. Larger
presets are sparse overrides, ``notebooks/presets/<preset>/<notebook>.yaml``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from koala_lab import paths
from koala_lab.checks import check_known
from koala_lab.files import read_yaml
from koala_lab.parameters import PRESETS, Parameter, declared, resolve

if TYPE_CHECKING:
    from koala_lab.config import RunConfig
    from koala_lab.runs import Grid


def name_of(path: Path) -> str:
    """Return ``koala/20_table2`` for a notebook of the repository, the bare stem for any other."""
    path, home = path.resolve(), paths.notebooks().resolve()
    return path.relative_to(home).with_suffix("").as_posix() if path.is_relative_to(home) else path.stem


def all_notebooks() -> dict[str, Path]:
    """Return the notebooks by name, in reading order: all files whose name begins with two digits, but for copies."""
    found = (p for p in paths.notebooks().rglob("[0-9][0-9]_*.ipynb") if ".ipynb_checkpoints" not in p.parts)
    return {name_of(p): p for p in sorted(found) if not re.search(r"(\.failed|-Copy\d+)\.ipynb$", p.name)}


def cells_of(path: Path) -> list[Any]:
    """Read the cells of a notebook.

    Raises:
        ValueError: If the file holds no notebook with a cell.
    """
    import nbformat

    try:
        cells: list[Any] = nbformat.read(path, as_version=4).cells  # type: ignore[no-untyped-call]
        str(cells[0].source)
    except Exception as error:  # of many kinds for a file that is damaged
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:100]
        raise ValueError(f"{path} is no notebook ({reason}): restore it from git, or remove it") from error
    return cells


def title_of(path: Path) -> str:
    """Return the heading of a notebook's first cell, without the mark."""
    return str(cells_of(path)[0].source).partition("\n")[0].lstrip("# ")


def paper_item(path: Path) -> str:
    """Return the table, figure or section that a notebook reproduces (its line "Paper item."), or ""."""
    found = re.search(r"^\*\*Paper item\.\*\* (.*)", str(cells_of(path)[0].source), re.MULTILINE)
    return re.split(r",? of [A-Z]\w+(?: et al\.)?, ", found.group(1))[0] if found else ""


def tagged_source(path: Path, tag: str) -> str | None:
    """Return the source of the one code cell with a tag; ``None`` without one, an error with several."""
    cells = cells_of(path)
    sources = [str(c.source) for c in cells if c.cell_type == "code" and tag in c.metadata.get("tags", [])]
    if len(sources) > 1:
        raise ValueError(f"{path}: {len(sources)} cells are tagged {tag!r}, at most one may be")
    return sources[0] if sources else None


def declared_in(path: Path) -> dict[str, Parameter]:
    """Return the parameters of a notebook file."""
    source = tagged_source(path, "parameters")
    if source is None:
        raise ValueError(f"{path}: no cell is tagged 'parameters'")
    return declared(source, where=str(path))


def preset_file(name: str, preset: str) -> Path:
    """Return where the overrides of a larger preset are written down."""
    return paths.presets() / preset / f"{name}.yaml"


def overrides(path: Path, preset: str) -> dict[str, Any]:
    """Return what a preset changes in a notebook: nothing for quick, else the content of its YAML file.

    Raises:
        ValueError: For an unknown preset, a preset the notebook does not have, or a file that is no mapping
            or names another preset.
    """
    check_known("preset", preset, PRESETS)
    if preset == "quick":
        return {}
    file = preset_file(name_of(path), preset)
    if not file.exists():
        raise ValueError(f"{name_of(path)} has no preset {preset!r}: {file} does not exist")
    content = read_yaml(file)
    if not isinstance(content, dict) or content.get("preset") != preset:
        raise ValueError(f"{file}: expected 'name: value' lines, one of them 'preset: {preset}'")
    return content


class Declared(NamedTuple):
    """What the grid cell of a notebook assigns, and the seeds of its parameters."""

    grid: Grid
    pilot: Grid
    seeds: range


def declared_grid(path: Path, preset: str = "quick") -> Declared | None:
    """Return what the cell tagged ``grid`` declares at a preset, found without a kernel; ``None`` for no such cell.

    Executes the parameters cell, the preset's overrides and that cell, which assigns ``grid``, and perhaps ``pilot``,
    from the parameters alone.
    """
    source = tagged_source(path, "grid")
    if source is None:
        return None
    namespace = resolve(declared_in(path), overrides(path, preset))
    exec(compile(source, f"{path}, grid cell", "exec"), namespace)
    if not isinstance(namespace.get("grid"), Mapping):
        raise ValueError(f"{path}: the grid cell does not assign 'grid', a mapping of rows to configurations")
    return Declared(namespace["grid"], namespace.get("pilot", {}), seeds_of(namespace))


def seeds_of(parameters: Mapping[str, Any]) -> range:
    """Return the seeds that all rows share, from the parameters ``seed`` and ``n_seeds``."""
    first = parameters.get("seed", 0)
    return range(first, first + parameters.get("n_seeds", 1))


def grid_of(path: Path, preset: str = "quick") -> list[RunConfig]:
    """Return the runs that a notebook asks for, seeds outermost; empty for a notebook that trains nothing.

    Args:
        path: The notebook.
        preset: ``quick``, ``desktop`` or ``paper``.
    """
    from koala_lab.runs import expand

    declared = declared_grid(path, preset)
    return expand(declared.grid, declared.seeds, declared.pilot) if declared else []
