"""The command ``koala``: list and train the runs of the notebooks, execute notebooks, build the report."""

from __future__ import annotations

import errno
import math
import os
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from koala_lab import notebook as nb
from koala_lab import paths
from koala_lab.checks import check_known
from koala_lab.parameters import PRESETS

if TYPE_CHECKING:
    from koala_lab.config import RunConfig
    from koala_lab.runs import Store
    from koala_lab.runs.training import RunResult

INTERRUPTED = 130  # exit code after Ctrl-C, as shells have it
FAILED = 3  # exit code when a run is stored as failed: a result, unlike 1 (an error) and 2 (wrong usage)


class _OneSentence(TyperGroup):
    """Ends at bad input, and at what the machine refuses, with what is wrong instead of a traceback."""

    def invoke(self, ctx: Any) -> object:
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort):
            raise
        except KeyboardInterrupt:
            _stop("interrupted; what is finished is kept, and the same command goes on", INTERRUPTED)
        except OSError as error:
            if error.errno == errno.EPIPE:  # as of `koala list | head`
                raise
            _stop(f"cannot use {error.filename}: {error.strerror}" if error.filename else str(error), 2)
        except (ValueError, RuntimeError) as error:  # RuntimeError: no such data set to be had
            _stop(str(error), 2)


app = typer.Typer(
    cls=_OneSentence,
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help=__doc__,
)
Preset = Annotated[str, typer.Option("--preset", help="quick, desktop or paper")]
Only = Annotated[str, typer.Option("--only", help="glob over notebook names, such as 'koala/2*'")]


def _stop(message: str, code: int) -> NoReturn:
    typer.echo(f"koala: {_line(message)}", err=True)
    raise typer.Exit(code)


def _line(text: object) -> str:
    return " ".join(str(text).split())


@app.callback()
def _in_a_checkout() -> None:
    warnings.formatwarning = lambda message, *_, **__: f"koala: {message}\n"  # without a line of code
    paths.root()
    paths.settle()


def plan(preset: str, only: str = "*") -> dict[str, list[RunConfig]]:
    """Return the grids of the notebooks that have a preset.

    Args:
        preset: ``quick``, ``desktop`` or ``paper``.
        only: Glob over notebook names.

    Returns:
        The configurations by notebook, without notebooks that train nothing.

    Raises:
        ValueError: For an unknown preset, or a glob that no notebook matches.
    """
    check_known("preset", preset, PRESETS)
    names = {name: path for name, path in nb.all_notebooks().items() if fnmatch(name, only)}
    if not names:
        raise ValueError(f"no notebook matches {only!r}; there are: {', '.join(nb.all_notebooks()) or 'none'}")
    has = {n: p for n, p in names.items() if preset == "quick" or nb.preset_file(n, preset).exists()}
    return {n: grid for n, p in has.items() if (grid := nb.grid_of(p, preset))}


@app.command("list")
def list_runs(
    preset: Preset = "quick",
    only: Only = "*",
    pending: Annotated[bool, typer.Option("--pending", help="only runs without a result")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N; the hours are those there")] = "cpu",
) -> None:
    """Print one line per run: key, notebook, label, status; then (on stderr) how many are pending, and their hours.

    Hours are extrapolated from finished runs of the same kind; kinds without any are listed as unknown.
    """
    from koala_lab.runs import Store

    _check_device(device, here=False)
    grids = plan(preset, only)
    store = Store()
    known = {c.key: result for grid in grids.values() for c in grid if (result := store.get(c.key))}
    for name, grid in grids.items():
        for config in grid:
            result = known.get(config.key)
            if not (pending and result):
                typer.echo(f"{config.key}  {name}  {config.label}  {result.status if result else 'pending'}")
    _summary(grids, known, device)


def _summary(grids: Mapping[str, list[RunConfig]], known: Mapping[str, RunResult], device: str) -> None:
    from koala_lab.bench.cost import Costs

    costs = Costs(known.values(), device=device)
    every = {c.key: c for grid in grids.values() for c in grid}
    shared = len(every) < sum(map(len, grids.values()))
    width = max((len(name) for name in grids), default=0)
    lines = {**grids, ("all, shared runs once" if shared else "all"): [*every.values()]}
    unknown = 0
    for name, grid in lines.items():
        pending = [c for c in grid if c.key not in known]
        seconds = [costs.seconds(c) for c in pending]
        unknown = seconds.count(None)
        hours = sum(s for s in seconds if s is not None) / 3600
        cost = f"{hours:10,.1f} h" + (f" and {unknown} runs of unknown cost" if unknown else "")
        typer.echo(f"{name:{width}} {len(grid):5} runs, {len(pending):5} pending {cost}", err=True)
    if unknown:
        typer.echo("unknown: no run of the same kind has finished here", err=True)


@app.command()
def run(
    preset: Preset = "quick",
    only: Only = "*",
    key: Annotated[str, typer.Option(help="only the run with this key")] = "",
    pending: Annotated[bool, typer.Option("--pending", help="leave out what has a result, failed or not")] = False,
    time_budget: Annotated[
        float, typer.Option(help="seconds; a run that does not fit stops behind its checkpoint and goes on next time")
    ] = math.inf,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N")] = "cpu",
    allow_unverified_data: Annotated[
        bool, typer.Option("--allow-unverified-data", help="take data with another checksum; results are tagged")
    ] = False,
) -> None:
    """Train what has no result yet, then merge the results of desktop and paper into data/results.

    Exit code 0: every run is done, or was left for later by the time budget; 3: some runs diverged and are stored as
    failed; 1: something broke.
    """
    from koala_lab.runs import Store, merge_results, results_file

    if allow_unverified_data:
        os.environ["KOALA_ALLOW_UNVERIFIED_DATA"] = "1"
    _check_device(device)
    if not time_budget > 0:
        raise ValueError(f"--time-budget {time_budget}: expected a number of seconds above 0")
    grids = plan(preset, only)
    store = Store()
    configs = {c.key: c for grid in grids.values() for c in grid}
    if key and key not in configs:
        _stop(f"no run of preset {preset} has the key {key}; 'koala list --preset {preset}' shows them", 2)
    known = {k: result for k in configs if (result := store.get(k))}
    wanted = [k for k in configs if key in ("", k) and not (pending and k in known)]
    todo = [configs[k] for k in wanted if k not in known]
    trained, missed = _train(todo, store, device, time_budget)
    broken = missed
    results = [known[k] for k in wanted if k in known] + trained
    for name, grid in grids.items() if preset != "quick" else ():  # quick is computed live, a copy would prevent that
        try:
            merge_results(results_file(preset, name), grid, results)
        except (OSError, ValueError) as error:  # the others are merged, and the runs stay in the store
            broken += 1
            typer.echo(f"koala: {_line(error)}", err=True)
    failed = sum(r.status == "failed" for r in results)
    left = len(wanted) - len(results) - missed
    typer.echo(f"{len(results) - failed} done, {failed} failed, {broken} broken, {left} left for later")
    raise typer.Exit(1 if broken else FAILED if failed else 0)


def _check_device(device: str, *, here: bool = True, option: str = "--device ") -> None:
    """Raise for a name of no device, or for one that this machine lacks where it is to be used ``here``."""
    import torch

    try:
        kind = torch.device(device).type
        if kind not in ("cpu", "cuda"):
            raise RuntimeError(f"{kind} is neither cpu nor cuda")
        if here:
            torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{option}{device} cannot be used here ({reason}); {option}cpu always can") from error


def _free_first(todo: list[RunConfig], store: Store) -> Iterator[RunConfig]:
    """Yield each run once; those that another process is at come last, so that several processes share a list."""
    busy = []
    for config in todo:
        if store.busy(config.key):
            busy.append(config)
        else:
            yield config
    yield from busy


def _train(todo: list[RunConfig], store: Store, device: str, budget: float) -> tuple[list[RunResult], int]:
    """Return the results of the runs that fitted into the budget, and the number of those that raised."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    from koala_lab.runs.training import Stopped

    started, broken = time.monotonic(), 0
    results: list[RunResult] = []
    shape = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
    with tqdm(total=len(todo), disable=None, smoothing=0, bar_format=shape) as bar:  # silent without a terminal
        for number, config in enumerate(_free_first(todo, store), start=1):
            if time.monotonic() - started >= budget:
                break
            bar.set_description(f"run {number}/{len(todo)}")

            def advance(step: int, steps: int, before: int = number - 1) -> None:
                bar.update(before + step / steps - bar.n)

            try:
                results.append(store.run(config, device=device, on_step=advance, until=started + budget))
                bar.write(f"{config.key}  {config.label}  {results[-1].status}")
            except Stopped as stop:
                bar.write(f"{config.key}  {stop}, for the time is over; the same command goes on")
                break
            except Exception as error:  # the other runs go on; this one has no result and is tried again next time
                broken += 1
                reason = f"broken: {type(error).__name__}: {_line(error)}"
                bar.write(f"{config.key}  {config.label}  {reason}", file=sys.stderr)
    return results, broken


@app.command()
def notebook(
    path: Annotated[str, typer.Argument(help="a notebook file, or its name below notebooks/")],
    preset: Preset = "quick",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="executed .ipynb")] = None,
    in_place: Annotated[bool, typer.Option("--in-place", help="refresh the notebook itself")] = False,
    parameter: Annotated[
        list[str] | None, typer.Option("--parameter", "-p", help="name=value, may be repeated")
    ] = None,
) -> None:
    """Execute one notebook and write it, normalised.

    If a cell fails the notebook is kept as <output>.failed.ipynb and the exit code is 1.
    """
    from koala_lab.notebook import execute

    file = _notebook_file(path)
    if (output is None) != in_place:
        raise ValueError("say where the executed notebook goes: -o OUTPUT.ipynb, or --in-place")
    if output is not None and output.is_dir():
        raise ValueError(f"-o {output} is a folder: name a file in it that ends in .ipynb")
    if output is not None and output.suffix != ".ipynb":
        raise ValueError(f"-o {output}: expected a name that ends in .ipynb")
    pairs = [_pair(text) for text in parameter or []]
    given = dict(pairs)
    if len(given) < len(pairs):
        twice = next(name for i, (name, _) in enumerate(pairs) if name in dict(pairs[:i]))
        raise ValueError(f"-p {twice} is given twice")
    values = execute.parameters(file, preset, given)
    if "device" in given:
        _check_device(values["device"], option="-p device=")
    target = (output or file).resolve()
    try:
        execute.execute(file, target, values)
    except execute.NotebookFailed as error:
        _stop(str(error), 1)


def _notebook_file(text: str) -> Path:
    for file in (Path(text), paths.notebooks() / f"{text}.ipynb"):
        if file.is_file():
            return file.resolve()
    raise ValueError(f"no notebook {text!r}; there are: {', '.join(nb.all_notebooks()) or 'none'}")


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"-p {text}: expected name=value")
    return name.strip(), value


@app.command()
def report(
    readme: Annotated[
        bool, typer.Option("--readme", help="also refresh README.md, SCOREBOARD.md, their picture and stored verdicts")
    ] = False,
    compare: Annotated[
        Path | None, typer.Option(help="a folder of verdicts; list where this report's differ, and do nothing else")
    ] = None,
) -> None:
    """Build the site of report/index.html from what was executed, or from the committed notebooks where nothing was."""
    from koala_lab import report as pages

    if compare is not None:
        for line in pages.differences(compare):
            typer.echo(line)
        return
    typer.echo(pages.build())
    if readme:
        typer.echo("\n".join(map(str, pages.refresh_committed())))


@app.command()
def bench(
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N")] = "cpu",
    training_step: Annotated[
        bool, typer.Option("--training-step", help="also whole training steps of ResNet-18, some minutes on a CPU")
    ] = False,
    meka: Annotated[
        bool, typer.Option("--meka", help="MEKA's moments and whole steps instead, a quarter of an hour on a CPU")
    ] = False,
) -> None:
    """Time and memory of a step of each optimizer, kept in data/results/bench.json."""
    from koala_lab.bench import steps as benchmark

    _check_device(device)
    benchmark.main(device, whole=training_step, meka=meka)


@app.command("references")
def measure_references(preset: Preset = "quick", only: Only = "*") -> None:
    """Measure the simple models that runs must beat to count, where data/results/references.json lacks them."""
    from koala_lab.runs import references

    references.store([c for grid in plan(preset, only).values() for c in grid], typer.echo)


@app.command()
def data(name: Annotated[str, typer.Argument(help="such as cifar10")]) -> None:
    """Download a data set and check it."""
    from koala_lab import data as sets

    typer.echo(sets.fetch(name))


if __name__ == "__main__":
    app()
