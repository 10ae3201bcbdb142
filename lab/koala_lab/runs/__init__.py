"""One training, the store of runs, and tables of them."""

from koala_lab.runs.store import (
    Store,
    curves,
    merge_results,
    read_results,
    results_file,
    run_all,
    table,
    write_json,
)
from koala_lab.runs.training import RunResult, train

__all__ = [
    "RunResult",
    "Store",
    "curves",
    "merge_results",
    "read_results",
    "results_file",
    "run_all",
    "table",
    "train",
    "write_json",
]
