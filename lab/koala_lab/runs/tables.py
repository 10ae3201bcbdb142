"""Named grids and the tidy tables of their runs.

A notebook declares ``grid = {row: RunConfig or [RunConfig, ...]}`` without seeds. :func:`expand` crosses the seeds in,
:func:`frame` gives every run the name of its row back.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from koala_lab.claims import references
from koala_lab.config import RunConfig
from koala_lab.runs.training import RunResult

if TYPE_CHECKING:
    import pandas as pd

Grid = Mapping[str, RunConfig | Sequence[RunConfig]]

FIRST = ["row", "dataset", "model", "seed", "candidate", "key", "status"]  # columns from the left


def expand(grid: Grid, seeds: Sequence[int], pilot: Grid | None = None) -> list[RunConfig]:
    """Return the runs of a grid in the order in which they are trained: all rows of a seed before the next seed.

    Args:
        grid: One configuration or several per row: data sets, candidate rates.
        seeds: Shared by all rows.
        pilot: More candidates of the same rows, trained with the first seed only.

    Returns:
        Every configuration once, though several rows may have it.

    Raises:
        ValueError: For a configuration that has a seed already.
    """
    rows, tried = _flat(grid), _flat(pilot or {})
    wanted = [c.but(seed=seed) for i, seed in enumerate(seeds) for c in (*rows, *(tried if i == 0 else ()))]
    return list(dict.fromkeys(wanted))


def _flat(grid: Grid) -> list[RunConfig]:
    return [config for row in grid for config in _configs(grid, row)]


def _configs(grid: Grid, row: str) -> list[RunConfig]:
    entry = grid.get(row, [])
    configs = [entry] if isinstance(entry, RunConfig) else list(entry)
    for config in configs:
        if not isinstance(config, RunConfig) or config.seed != 0:
            raise ValueError(f"row {row!r}: expected RunConfigs without a seed (seeds are crossed in), got {config!r}")
    return configs


def frame(grid: Grid, results: Iterable[RunResult], pilot: Grid | None = None) -> pd.DataFrame:
    """Make a tidy table of the runs of a grid, rows in the grid's order, seeds within.

    Runs are matched by configuration, so that those on another copy of the data (tagged in ``data``) are found too;
    where there are both, the official copy's count. Results of no row are left out.

    Args:
        grid: As declared.
        results: Of its runs, in any order.
        pilot: As in :func:`expand`.

    Returns:
        One line per row and run: ``row``, ``dataset``, ``model``, ``seed``; ``candidate``, the place of the run in the
        list of its row, data set and model (0 for what stands first, such as the printed rate); ``key``, ``status``;
        the arguments of optimizer, task, network and wrapper and the other fields of the configuration; ``data``, the
        tag of the copy; the final metrics, NaN for a failed run. An argument with the name of a metric gives way to it,
        but ``lr`` is the one that was given, not the one that the schedule ended with.
    """
    import pandas as pd

    by_config: dict[RunConfig, RunResult] = {}
    for result in results:
        if result.config not in by_config or not _tag(result):
            by_config[result.config] = result
    by_start: dict[RunConfig, list[RunResult]] = defaultdict(list)
    for result in by_config.values():
        by_start[result.config.but(seed=0)].append(result)
    lines = []
    for row in dict.fromkeys((*grid, *(pilot or {}))):
        place: dict[tuple[str, str], int] = defaultdict(int)
        for config in dict.fromkeys((*_configs(grid, row), *_configs(pilot or {}, row))):
            case = (config.dataset, config.model)
            for result in sorted(by_start[config], key=lambda r: r.config.seed):
                lines.append({"row": row, "candidate": place[case]} | _settings(result) | _metrics(result))
            place[case] += 1
    table = pd.DataFrame(lines, columns=None if lines else FIRST)
    return table[FIRST + [c for c in table if c not in FIRST]]


def _tag(result: RunResult) -> str:
    return str(result.provenance.get("data", {}).get("tag", ""))


def _settings(result: RunResult) -> dict[str, Any]:
    fields = result.config.to_dict()
    arguments = [fields.pop(name) for name in ("wrapper_args", "model_args", "task_args", "optimizer_args")]
    for given in arguments:
        fields |= given
    config = result.config
    bar = references.key(config.task, config.dataset, config.train_size, dict(config.task_args))
    return fields | {"key": result.key, "status": result.status, "data": _tag(result), "reference": bar}


def _metrics(result: RunResult) -> dict[str, float]:
    return {name: value for name, value in result.final.items() if name != "lr"}


def learning_curves(frame: pd.DataFrame, results: Iterable[RunResult]) -> pd.DataFrame:
    """Make tidy learning curves of the runs in a table.

    Args:
        frame: Of :func:`frame`, or a part of one.
        results: At least those of its runs.

    Returns:
        The lines of the table, each once per epoch (from 1) and metric: ``row``, ``dataset``, ``model``, ``seed``,
        ``candidate``, ``key``, ``lr`` where the table has it, ``epoch``, ``metric``, ``value``.
    """
    import pandas as pd

    epochs = pd.DataFrame(
        [
            {"key": r.key, "epoch": i, "metric": metric, "value": value}
            for r in results
            for i, metrics in enumerate(r.epochs, start=1)
            for metric, value in metrics.items()
        ],
        columns=["key", "epoch", "metric", "value"],
    )
    kept = [c for c in (*FIRST[:-1], "lr") if c in frame]
    return frame[kept].merge(epochs.drop_duplicates(["key", "epoch", "metric"]), on="key", sort=False)


def summary(frame: pd.DataFrame, metrics: Sequence[str]) -> pd.DataFrame:
    """Return mean, standard deviation and number of finished runs per data set and row.

    Args:
        frame: Of :func:`frame`, or a part of one.
        metrics: Columns of it.

    Returns:
        One line per data set and row, in the table's order; networks, and learning rates of a row with several
        candidates, are told apart. Columns ``(metric, "mean")`` and ``(metric, "sd")``; ``("runs", "n")``, and
        ``("runs", "failed")`` if any failed.
    """
    import pandas as pd

    network = ["model"] if (frame.groupby("dataset")["model"].nunique() > 1).any() else []
    by = ["dataset", *network, "row", *(["lr"] if (frame["candidate"] > 0).any() else [])]
    groups = frame.groupby(by, sort=False, dropna=False)
    columns = {(m, name): groups[m].agg(how) for m in metrics for name, how in (("mean", "mean"), ("sd", "std"))}
    failed = groups["status"].agg(lambda s: int((s == "failed").sum()))
    columns["runs", "n"] = groups.size() - failed
    if failed.any():
        columns["runs", "failed"] = failed
    return pd.DataFrame(columns)
