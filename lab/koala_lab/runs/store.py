"""The store of runs: one folder per run key, written atomically, trained once, collected into tables.

``data/runs/<key>/run.json`` holds a finished run, ``checkpoint.pt`` an interrupted one. Results of the larger presets
are committed in ``data/results/<preset>/<notebook>.json`` and count as finished too, so that nobody repeats them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from warnings import warn

from filelock import FileLock, Timeout

from koala_lab import paths
from koala_lab.config import RunConfig
from koala_lab.files import read_json, set_aside, write_json
from koala_lab.runs.training import RunResult, train

SHARED = 0o666  # of lock files: users of one store must be able to take each other's


class Store:
    """Finished runs by key.

    Args:
        root: the folder of the runs; the default is ``data/runs``, or ``KOALA_RUNS``.
    """

    def __init__(self, root: Path | None = None) -> None:
        self.root = root if root is not None else paths.runs_dir()
        self._committed: dict[str, RunResult] | None = None

    def get(self, key: str) -> RunResult | None:
        """Return the finished run of that key, from the store or the committed results; ``None`` if there is none."""
        path = self.root / key / "run.json"
        if path.exists():
            try:
                result = RunResult.from_json(read_json(path))
                if result.key != key:
                    raise ValueError(f"it is run {result.key}")
                return result
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                if isinstance(error.__cause__, OSError):  # somebody else's, who can read it
                    warn(f"{error}; it counts as a run without a result", stacklevel=2)
                else:
                    set_aside(path, error, "the run will be repeated")
        if self._committed is None:
            self._committed = {r.key: r for r in _all_committed()}
        return self._committed.get(key)

    def put(self, result: RunResult) -> None:
        """Store a run and drop its checkpoint.

        Raises:
            OSError: If it cannot be written, not even after half a minute, in which somebody may make room.
        """
        for pause in (1, 10, 20, None):
            try:
                write_json(self.root / result.key / "run.json", result.to_json())
                break
            except OSError as error:
                if pause is None:
                    raise OSError(f"run {result.key} is trained, but {error}") from error
                warn(f"{error}; trying again in {pause} s", stacklevel=2)
                time.sleep(pause)
        self.checkpoint(result.key).unlink(missing_ok=True)

    def checkpoint(self, key: str) -> Path:
        """Return where the run of that key keeps its checkpoint."""
        return self.root / key / "checkpoint.pt"

    @contextmanager
    def lock(self, key: str) -> Iterator[None]:
        """Hold a run for oneself: somebody else who wants it waits and then finds it done.

        Raises:
            OSError: If the folder of the run cannot be written, before anything is trained.
        """
        folder = self.root / key
        try:
            folder.mkdir(parents=True, exist_ok=True)
            held = FileLock(folder / "lock", mode=SHARED)
            held.acquire()
        except OSError as error:
            reason = error.strerror or error
            raise OSError(f"cannot write {folder}: {reason}; name another store in KOALA_RUNS") from error
        try:
            yield
        finally:
            held.release()

    def busy(self, key: str) -> bool:
        """Say whether somebody holds the run at this moment."""
        folder = self.root / key
        try:
            with FileLock(folder / "lock", blocking=False, mode=SHARED) if folder.exists() else nullcontext():
                return False
        except Timeout:
            return True
        except OSError:  # of a folder that is not ours; who wants the run is told then
            return False

    def run(self, config: RunConfig, *, on_step: Callable[[int, int], None] | None = None, **options: Any) -> RunResult:
        """Return the result of a configuration: found, or continued from its checkpoint, or trained.

        Args:
            config: what to train.
            on_step: see :func:`koala_lab.runs.training.train`.
            **options: see there, too.
        """
        key = config.key
        if (result := self.get(key)) is not None:
            return result
        with self.lock(key):
            result = self.get(key)
            if result is None:
                result = train(config, checkpoint=self.checkpoint(key), on_step=on_step, **options)
                self.put(result)
        return result


def run_all(
    configs: Sequence[RunConfig],
    *,
    store: Store | None = None,
    device: str = "cpu",
    progress: Callable[[int, int, RunConfig], None] | None = None,
) -> list[RunResult]:
    """Run a grid, skipping what is done, in the order given.

    Args:
        configs: the grid.
        store: where runs are found and kept.
        device: torch device to train on.
        progress: called with (runs ready, runs in all, the next configuration) before each run.
    """
    store = store or Store()
    results = []
    for i, config in enumerate(configs):
        if progress is not None:
            progress(i, len(configs), config)
        results.append(store.run(config, device=device))
    return results


# ---- committed results -------------------------------------------------------------------------------------------


def results_file(preset: str, notebook: str) -> Path:
    """Return where the results of a notebook at a preset are committed."""
    return paths.results_dir() / preset / f"{notebook}.json"


def read_results(file: Path) -> list[RunResult]:
    """Read the runs of one committed file; none if there is no such file."""
    if not file.exists():
        return []
    try:
        return [RunResult.from_json(record) for record in read_json(file)["runs"]]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is no file of results ({error!r}): restore it from git") from error


def _all_committed() -> Iterator[RunResult]:
    """Yield the runs of all committed files; a damaged one is named in a warning and left out."""
    for file in sorted(paths.results_dir().glob("*/**/*.json")):  # a folder per preset
        try:
            yield from read_results(file)
        except ValueError as error:
            warn(str(error), stacklevel=3)


def locked(what: str) -> FileLock:
    """Return a lock for a committed file that several processes read, change and write."""
    paths.runs_dir().mkdir(parents=True, exist_ok=True)
    return FileLock(paths.runs_dir() / f"{what}.lock", mode=SHARED)


def merge_results(file: Path, grid: Iterable[RunConfig], results: Iterable[RunResult]) -> None:
    """Bring a committed file up to date: the finished runs of a grid, in its order; one writer at a time.

    Runs that the grid no longer has (an older algorithm, another setting) go, or a table would show them twice. Runs of
    the grid on another copy of the data stay, with the tag that says so.
    """
    with locked("merge"):
        old = read_results(file)
        have = {r.key: r for r in [*old, *results]}
        configs = {c.key: c for c in grid}
        tagged = [r for r in old if r.provenance.get("data", {}).get("tag") and r.config in configs.values()]
        new = [have[key] for key in configs if key in have]
        new += [r for r in tagged if r.key not in configs]
        if new != old:
            write_json(file, {"runs": [r.to_json() for r in new]})
