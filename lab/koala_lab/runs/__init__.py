"""One training, the store of runs, and tables of them."""

from koala_lab.runs.store import (
    Store,
    merge_results,
    read_results,
    results_file,
    run_all,
)
from koala_lab.runs.tables import Grid, expand, frame, learning_curves, summary
from koala_lab.runs.training import RunResult, train

__all__ = [
    "Grid",
    "RunResult",
    "Store",
    "expand",
    "frame",
    "learning_curves",
    "merge_results",
    "read_results",
    "results_file",
    "run_all",
    "summary",
    "train",
]
