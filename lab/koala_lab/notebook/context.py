"""What a running notebook calls: start-up, runs, tables, figures and verdicts.

A notebook reads::

    ctx = nb.start("koala/20_table2_dynamics_and_noise")   # after the cell tagged `parameters`
    grid = {"v": RunConfig(...), "m_k05": [RunConfig(...), RunConfig(...)]}   # in the cell tagged `grid`
    live = ctx.run(grid)                 # tidy table, one line per row and run
    stored = ctx.stored("desktop")       # the same from the committed results
    ctx.judge_table(live)                # every value and ordering of this notebook whose rows are there
    ctx.judge_table(stored, at="desktop")
    ctx.judge("koala.text.memory", measured=2.0)   # evidence of another kind
    ctx.verdicts()                       # prints what is decided, counts the rest, saves all

See ``notebooks/_template.ipynb``.
"""

from __future__ import annotations

import ast
import os
import random
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from koala_lab import paths
from koala_lab.notebook.files import Declared, declared_grid, declared_in, overrides, preset_file, seeds_of
from koala_lab.parameters import Parameter, declared, resolve

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from koala_lab.claims import Verdict
    from koala_lab.config import RunConfig
    from koala_lab.runs import Grid, Store
    from koala_lab.runs.training import RunResult

CUSTOM = "custom"  # the scale of a run whose parameters are those of no preset


def _live_parameters(name: str, history: Sequence[str]) -> dict[str, Parameter]:
    """Return the parameters cell last executed here; nbval keeps no history, so then the one in the file."""
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
    """Return what papermill's '# Parameters' cell assigns; these are the names a user gave."""
    for source in reversed(history):
        if source.startswith("# Parameters\n"):
            targets = [t for node in ast.parse(source).body if isinstance(node, ast.Assign) for t in node.targets]
            return [target.id for target in targets if isinstance(target, ast.Name)]
    return []


def scale_of(name: str, values: Mapping[str, Any]) -> str:
    """Return the preset whose parameters these are, every one of them but ``device``; else ``"custom"``.

    A verdict belongs to a preset only where the parameters are that preset's.

    Args:
        name: Of the notebook; the presets are those of its file.
        values: All parameters, resolved.
    """
    path = paths.notebooks() / f"{name}.ipynb"
    preset = str(values["preset"])
    if not path.exists():
        return CUSTOM
    try:
        wanted = resolve(declared_in(path), overrides(path, preset))
    except ValueError:  # a preset that the notebook does not have
        return CUSTOM
    same = {**values, "device": ""} == {**wanted, "device": ""}
    return preset if same else CUSTOM


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
    import pandas as pd
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
    warnings.filterwarnings("ignore", message="IProgress not found")  # of tqdm, which some packages import
    pd.set_option("display.width", 100, "display.max_rows", None, "display.max_columns", None, "display.precision", 3)
    plots.style()
    scale = scale_of(name, values)
    print(textwrap.fill(f"{name}: " + " ".join(f"{p}={v}" for p, v in values.items()), 100, break_long_words=False))
    if scale == CUSTOM:
        print(f"custom: not the parameters of preset {values['preset']}; nothing here enters the scoreboard")
    return Notebook(name=name, preset=values["preset"], params=values, store=Store(), scale=scale)


@dataclass
class Notebook:
    """What a running notebook knows about itself.

    Attributes:
        name: Path below ``notebooks/`` without suffix.
        preset: The scale it runs at.
        params: The resolved parameters.
        store: The run store.
        scale: The preset, or ``"custom"`` where any parameter differs from the preset's.
    """

    name: str
    preset: str
    params: dict[str, Any]
    store: Store
    scale: str = CUSTOM
    _verdicts: list[Verdict] = field(default_factory=list, repr=False)
    _results: dict[str, RunResult] = field(default_factory=dict, repr=False)

    # ---- runs and tables

    def run(self, grid: Grid, pilot: Grid | None = None) -> pd.DataFrame:
        """Train what the store does not have, and return the table of all runs.

        Args:
            grid: ``{row: RunConfig or list of them}``, without seeds: every row is trained with the seeds ``seed``,
                ``seed + 1``, ... of the parameters, all rows with one seed before the next. A list holds data sets,
                networks or candidate rates; what stands first is the printed rate.
            pilot: More candidates of the same rows, trained with the first seed only.

        Returns:
            A tidy table, see `runs.frame`: ``row``, ``dataset``, ``model``, ``seed``, ``candidate``, ``key``,
            ``status``, the settings and the final metrics, NaN for a failed run.
        """
        from koala_lab import runs

        results = self._train(runs.expand(grid, seeds_of(self.params), pilot))
        return runs.frame(grid, results, pilot)

    def _train(self, configs: Sequence[RunConfig]) -> list[RunResult]:
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

        results = run_all(configs, store=self.store, device=self.params["device"], progress=progress)
        show("")
        self._results |= {r.key: r for r in results}
        failed = sum(r.status == "failed" for r in results)
        print(f"{len(results)} runs: {len(results) - failed} done, {failed} failed")
        return results

    def stored(self, preset: str) -> pd.DataFrame:
        """Return the table of the committed results of another preset; empty where there are none yet.

        Rows get their names from the grid cell evaluated at that preset; results on another copy of the data are
        matched by configuration, and column ``data`` says so.

        Returns:
            As `run`.

        Raises:
            ValueError: If the notebook has no grid.
        """
        from koala_lab import runs

        results = runs.read_results(runs.results_file(preset, self.name))
        self._results |= {r.key: r for r in results}
        declared = self._declared(preset)
        table = runs.frame(declared.grid, results, declared.pilot)
        wanted = len(runs.expand(declared.grid, declared.seeds, declared.pilot))
        where = "; ".join(sorted({str(r.provenance.get("device", "")) for r in results}))
        print(f"{preset}: {table['key'].nunique()} of {wanted} runs stored" + (f", {where}" if where else ""))
        return table

    def _declared(self, preset: str) -> Declared:
        path = paths.notebooks() / f"{self.name}.ipynb"
        has = preset == "quick" or preset_file(self.name, preset).exists()
        declared = declared_grid(path, preset if has else "quick")  # without the preset nothing is stored either
        if declared is None:
            raise ValueError(f"{self.name} has no cell tagged 'grid', so it has no runs")
        return declared

    def results(self, frame: pd.DataFrame) -> list[RunResult]:
        """Return the runs of a table, each once, with what does not fit into it: provenance, pictures, epochs."""
        return [self._results[key] for key in dict.fromkeys(frame["key"])]

    def curves(self, frame: pd.DataFrame) -> pd.DataFrame:
        """Tidy learning curves of a table's runs: its columns of names, and ``epoch``, ``metric``, ``value``."""
        from koala_lab.runs import learning_curves

        return learning_curves(frame, self.results(frame))

    def summary(self, frame: pd.DataFrame, metrics: Sequence[str]) -> pd.DataFrame:
        """Summarise metrics: mean and standard deviation, and the number of runs, per data set and row."""
        from koala_lab.runs import summary

        return summary(frame, metrics)

    def chosen(self, frame: pd.DataFrame) -> pd.DataFrame:
        """Return the part of a table that has, per row and data set, the candidate with the best validation metric."""
        from koala_lab.claims import chosen

        return chosen(frame)

    # ---- figures

    def figure(self, fig: Figure, name: str, runs: pd.DataFrame | Sequence[RunResult] = ()) -> None:
        """Show a figure and save it as PNG, PDF and JSON sidecar; that of a custom run below ``report/custom``.

        Args:
            fig: A matplotlib figure; it is closed.
            name: File name without suffix; its folder is that of the notebook.
            runs: The table or the results that it is drawn from; their keys go into the sidecar.
        """
        from IPython.display import Image, display

        from koala_lab import plots

        keys = {r.key for r in runs} if isinstance(runs, Sequence) else set(runs["key"])
        origin = {
            "notebook": self.name,
            "parameters": self.params,
            "runs": sorted(keys),
            "versions": plots.versions(),
        }
        folder = self._folder() / "figures" if self.scale == CUSTOM else paths.figures_dir()
        png = plots.save(fig, folder / self.name.rpartition("/")[0] / name, origin)
        display(Image(data=png.read_bytes(), format="png", alt=name))  # type: ignore[no-untyped-call]

    def printed(self, metric: str) -> dict[str, float]:
        """Return the paper's printed values of a metric by row, from the claims of this notebook, for figures."""
        from koala_lab import claims

        mine = [c for c in claims.of(self.name) if c.row and c.metric == metric]
        return {c.row: c.expected for c in mine if c.expected is not None}

    def compared(self, frame: pd.DataFrame, metric: str, at: str | None = None) -> pd.DataFrame:
        """Return the paired differences by which this notebook's orderings of a metric are judged, for figures.

        Args:
            frame: As for `judge_table`.
            metric: The column that is compared.
            at: The preset of the measurements; default is this notebook's own.
        """
        from koala_lab import claims

        return claims.compared(frame, claims.of(self.name), metric, at or self.preset)

    # ---- verdicts

    def judge_table(self, frame: pd.DataFrame, at: str | None = None) -> None:
        """Judge every value and ordering claim of this notebook whose rows and metric are in a table.

        A claim knows its rows, its metric and how rates are chosen. On each data set (and network) it is judged by
        itself, and their verdicts are combined. Claims without a test at the preset are left out.

        Args:
            frame: Of `run` or `stored`, with further metrics as columns where claims name them.
            at: The preset of the measurements; default is this notebook's own.
        """
        from koala_lab import claims

        preset = at or self.preset
        self._keep(claims.judge_table(frame, claims.of(self.name), preset), preset)

    def judge(
        self,
        claim_id: str,
        *,
        preset: str | None = None,
        cases: Mapping[str, Any] | None = None,
        frame: pd.DataFrame | None = None,
        **evidence: Any,
    ) -> Verdict:
        """Call `claims.judge` at this notebook's preset, or another for stored results; keeps the verdict.

        Args:
            claim_id: The claim.
            preset: The preset of the measurements; default is the notebook's own.
            cases: ``arms`` by data set, where a claim is judged on several; see `claims.combine`.
            frame: The runs that the evidence was made from, where there are any: names data and network in the
                scoreboard, and the claim is decided only if the task was learned.
            evidence: See `claims.judge`.
        """
        from koala_lab import claims

        at = preset or self.preset
        if frame is not None:
            evidence |= claims.circumstances(frame, at)
        if cases is None:
            verdict = claims.judge(claim_id, preset=at, **evidence)
        else:
            each = {c: claims.judge(claim_id, preset=at, arms=arms, **evidence) for c, arms in cases.items()}
            verdict = claims.combine(each)
        self._keep([verdict], at)
        return verdict

    def _keep(self, verdicts: Sequence[Verdict], at: str) -> None:
        from dataclasses import replace

        own = at == self.preset and self.scale == CUSTOM
        self._verdicts += [replace(v, preset=CUSTOM) if own else v for v in verdicts]

    def verdicts(self, at: str | None = None) -> None:
        """Print what is decided, and how many claims are not; without ``at`` also save all verdicts.

        They go to ``report/verdicts/<name>.json``, those of a custom run below ``report/custom``.

        Args:
            at: Only the verdicts at this preset, such as those of the stored runs, which are the same everywhere.

        Raises:
            RuntimeError: If a claim of this notebook that has a test at its preset was not judged.
        """
        from koala_lab import claims

        if at is not None:
            print(claims.lines([v for v in self._verdicts if v.preset == at]))
            return
        mine = claims.of(self.name)
        judged = {v.claim_id for v in self._verdicts if v.preset in (self.preset, claims.ANY, CUSTOM)}
        if missing := [c.id for c in mine if c.criterion(self.preset) and c.id not in judged]:
            raise RuntimeError(f"{self.name} does not judge {', '.join(missing)}, which have a test at {self.preset}")
        print(claims.lines(self._verdicts, mine, self.preset))
        claims.save(self._verdicts, self.name, self._folder() if self.scale == CUSTOM else None)

    def _folder(self) -> Path:
        return paths.report_dir() / CUSTOM / self.name
