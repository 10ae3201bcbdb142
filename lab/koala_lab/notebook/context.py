"""Start-up of a notebook: strict parameters, one thread, seeds, style; then runs, figures and verdicts.

The cell tagged ``parameters`` is the schema of its notebook and, as it stands, the ``quick`` preset. Larger
presets are sparse overrides, ``notebooks/presets/<preset>/<notebook>.yaml``.
"""

from __future__ import annotations

import ast
import os
import random
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from koala_lab import paths
from koala_lab.parameters import PRESETS, Parameter, declared, resolve

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from koala_lab.claims import Verdict
    from koala_lab.config import RunConfig
    from koala_lab.runs import Store
    from koala_lab.runs.training import RunResult

# ---------------------------------------------------------------- a notebook as a file


def name_of(path: Path) -> str:
    """``koala/20_table2`` for a notebook of the repository, the bare stem for any other."""
    path, home = path.resolve(), paths.notebooks().resolve()
    return path.relative_to(home).with_suffix("").as_posix() if path.is_relative_to(home) else path.stem


def all_notebooks() -> dict[str, Path]:
    """Every notebook of the repository by name, in reading order."""
    found = paths.notebooks().rglob("*.ipynb")
    found = (p for p in found if ".ipynb_checkpoints" not in p.parts and not p.name.endswith(".failed.ipynb"))
    return {name_of(p): p for p in sorted(found)}


def title_of(path: Path) -> str:
    """The heading of a notebook's first cell, without the mark."""
    import nbformat

    first = nbformat.read(path, as_version=4).cells[0]  # type: ignore[no-untyped-call]
    return str(first.source).splitlines()[0].lstrip("# ")


def paper_item(path: Path) -> str:
    """What of its paper a notebook is about, as the line "Paper item." of its first cell says; empty without one."""
    import nbformat

    first = nbformat.read(path, as_version=4).cells[0]  # type: ignore[no-untyped-call]
    found = re.search(r"^\*\*Paper item\.\*\* (.*)", str(first.source), re.MULTILINE)
    return re.split(r",? of [A-Z]\w+(?: et al\.)?, ", found.group(1))[0] if found else ""


def tagged_source(path: Path, tag: str) -> str | None:
    """Source of the one code cell with a tag; ``None`` without one, an error with several."""
    import nbformat

    cells = nbformat.read(path, as_version=4).cells  # type: ignore[no-untyped-call]
    sources = [str(c.source) for c in cells if c.cell_type == "code" and tag in c.metadata.get("tags", [])]
    if len(sources) > 1:
        raise ValueError(f"{path}: {len(sources)} cells are tagged {tag!r}, at most one may be")
    return sources[0] if sources else None


def declared_in(path: Path) -> dict[str, Parameter]:
    """The parameters of a notebook file."""
    source = tagged_source(path, "parameters")
    if source is None:
        raise ValueError(f"{path}: no cell is tagged 'parameters'")
    return declared(source, where=str(path))


def preset_file(name: str, preset: str) -> Path:
    """Where the overrides of a larger preset are written down."""
    return paths.presets() / preset / f"{name}.yaml"


def overrides(path: Path, preset: str) -> dict[str, Any]:
    """What a preset changes in a notebook: nothing for quick, else the content of its YAML file.

    Raises:
        ValueError: For an unknown preset, a preset the notebook does not have, or a file that is no mapping
            or names another preset.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset {preset!r} is none of {', '.join(PRESETS)}")
    if preset == "quick":
        return {}
    import yaml

    file = preset_file(name_of(path), preset)
    if not file.exists():
        raise ValueError(f"{name_of(path)} has no preset {preset!r}: {file} does not exist")
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or content.get("preset") != preset:
        raise ValueError(f"{file}: expected 'name: value' lines, one of them 'preset: {preset}'")
    return content


def grid_of(path: Path, preset: str = "quick") -> list[RunConfig]:
    """The runs a notebook asks for, found without a kernel.

    Executes the parameters cell, the preset's overrides and the cell tagged ``grid``, which assigns ``grid``
    from the parameters alone.

    Args:
        path: The notebook.
        preset: ``quick``, ``desktop`` or ``paper``.

    Returns:
        The configurations, empty for a notebook without a grid cell.
    """
    source = tagged_source(path, "grid")
    if source is None:
        return []
    namespace = resolve(declared_in(path), overrides(path, preset))
    exec(compile(source, f"{path}, grid cell", "exec"), namespace)
    if "grid" not in namespace:
        raise ValueError(f"{path}: the grid cell does not assign 'grid'")
    return list(namespace["grid"])


# ---------------------------------------------------------------- inside a running notebook


def _live_parameters(name: str, history: Sequence[str]) -> dict[str, Parameter]:
    """The parameters cell last executed here; nbval keeps no history, so then the one in the file."""
    for source in reversed(history):
        try:
            parameters = declared(source)
        except (SyntaxError, ValueError):
            continue
        if "preset" in parameters:
            return parameters
    path = paths.notebooks() / f"{name}.ipynb"
    if not path.exists():
        raise ValueError(f"nb.start({name!r}): no parameters cell was run and there is no {path}")
    return declared_in(path)


def _injected_names(history: Sequence[str]) -> list[str]:
    """What papermill's '# Parameters' cell assigns; these are the names a user gave."""
    for source in reversed(history):
        if source.startswith("# Parameters\n"):
            targets = [t for node in ast.parse(source).body if isinstance(node, ast.Assign) for t in node.targets]
            return [target.id for target in targets if isinstance(target, ast.Name)]
    return []


def start(name: str) -> Notebook:
    """Check the parameters of the running notebook and set it up; call it right after the parameters cell.

    Args:
        name: Path below ``notebooks/`` without suffix, such as ``"koala/20_table2_dynamics_and_noise"``.

    Returns:
        The context through which the notebook runs its grid, saves figures and gives verdicts.

    Raises:
        ValueError: For an unknown or ill-typed parameter.
        RuntimeError: Outside a notebook.
    """
    import numpy as np
    import torch
    from IPython.core.getipython import get_ipython

    from koala_lab import plots
    from koala_lab.runs import Store

    shell = get_ipython()
    if shell is None:
        raise RuntimeError("nb.start works inside a notebook; a script calls runs.run_all directly")
    namespace: dict[str, Any] = shell.user_ns
    history = [str(source) for source in namespace.get("In", [])]
    parameters = _live_parameters(name, history)
    given = [*_injected_names(history), *(p for p in parameters if p in namespace)]
    values = resolve(parameters, {p: namespace[p] for p in given})
    namespace.update(values)

    torch.set_num_threads(1)  # bits depend on the number of threads
    seed = values.get("seed", 0)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - for libraries that read the global state
    torch.manual_seed(seed)
    for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
        warnings.simplefilter("ignore", category)
    plots.style()
    print(f"{name}: " + " ".join(f"{p}={v}" for p, v in values.items()))
    return Notebook(name=name, preset=values["preset"], params=values, store=Store())


@dataclass
class Notebook:
    """What a running notebook knows about itself.

    Attributes:
        name: Path below ``notebooks/`` without suffix.
        preset: The scale it runs at.
        params: The resolved parameters.
        store: The run store.
    """

    name: str
    preset: str
    params: dict[str, Any]
    store: Store
    _verdicts: list[Verdict] = field(default_factory=list, repr=False)

    def run(self, grid: Sequence[RunConfig]) -> list[RunResult]:
        """Results of a grid, in its order; what the store does not have is trained now."""
        from IPython.display import display

        from koala_lab.runs import run_all

        # A line for a person who watches; batch runs and nbval set KOALA_BATCH, so that outputs stay the same.
        watched = not os.environ.get("KOALA_BATCH")
        line = display({"text/plain": ""}, raw=True, display_id=True) if watched else None  # type: ignore[no-untyped-call]

        def show(text: str) -> None:
            if line is not None:
                line.update({"text/plain": text}, raw=True)

        def progress(ready: int, total: int, config: RunConfig) -> None:
            show(f"run {ready + 1}/{total}: {config.label}")

        results = run_all(grid, store=self.store, device=self.params["device"], progress=progress)
        show("")
        failed = sum(r.status == "failed" for r in results)
        print(f"{len(results)} runs: {len(results) - failed} done, {failed} failed")
        return results

    def stored(self, preset: str) -> list[RunResult]:
        """The committed results of a larger preset, empty where there are none yet."""
        from koala_lab.runs import read_results, results_file

        return read_results(results_file(preset, self.name))

    def figure(self, fig: Figure, name: str, runs: Sequence[RunResult] = ()) -> None:
        """Show a figure and save it as PNG, PDF and JSON sidecar.

        Args:
            fig: A matplotlib figure; it is closed.
            name: File name without suffix.
            runs: The results it is drawn from; their keys go into the sidecar.
        """
        from IPython.display import Image, display

        from koala_lab import plots

        origin = {
            "notebook": self.name,
            "parameters": self.params,
            "runs": sorted({r.key for r in runs}),
            "versions": plots.versions(),
        }
        png = plots.save(fig, paths.figures_dir() / name, origin)
        display(Image(data=png.read_bytes(), format="png", alt=name))  # type: ignore[no-untyped-call]

    def judge(
        self, claim_id: str, *, preset: str | None = None, cases: Mapping[str, Any] | None = None, **evidence: Any
    ) -> Verdict:
        """`claims.judge` at this notebook's preset, or another for stored results; keeps the verdict.

        Args:
            claim_id: The claim.
            preset: The preset of the measurements; default is the notebook's own.
            cases: ``arms`` by data set, where a claim is judged on several; see `claims.combine`.
            evidence: See `claims.judge`.
        """
        from koala_lab import claims

        at = preset or self.preset
        if cases is None:
            verdict = claims.judge(claim_id, preset=at, **evidence)
        else:
            verdict = claims.combine({c: claims.judge(claim_id, preset=at, arms=arms) for c, arms in cases.items()})
        self._verdicts.append(verdict)
        return verdict

    def verdicts(self) -> None:
        """Print the verdicts given so far and write them to ``report/verdicts/<name>.json``."""
        from koala_lab import claims

        claims.save(self._verdicts, self.name)
        print(claims.table(self._verdicts).to_string())
