"""The papers' numbers and statements as data, and what measurements say about them.

``data/claims/<paper>.yaml`` holds one claim per printed number and per checkable statement; the header of
``koala.yaml`` explains the format and the tests. :func:`judge` compares a claim with measurements,
:func:`judge_table` all claims of a notebook with its table of runs, :func:`scoreboard` shows what came out.
"""

from koala_lab.claims.evidence import chosen, circumstances, compared, judge_table
from koala_lab.claims.judge import NOT_RUN, STATUSES, Verdict, available, combine, find, judge, load, of
from koala_lab.claims.schema import ANY, Claim, Criterion, read
from koala_lab.claims.scoreboard import (
    BEGIN,
    END,
    counts,
    differences,
    lines,
    paper_name,
    read_verdicts,
    replace_block,
    save,
    saved,
    scoreboard,
    write_verdicts,
)
from koala_lab.claims.statistics import interval
from koala_lab.parameters import PRESETS

__all__ = [
    "ANY", "BEGIN", "END", "NOT_RUN", "PRESETS", "STATUSES",
    "Claim", "Criterion", "Verdict", "available", "chosen", "circumstances", "combine", "compared", "counts",
    "differences", "find", "interval", "judge", "judge_table", "lines", "load", "of", "paper_name", "read",
    "read_verdicts",
    "replace_block", "save", "saved", "scoreboard", "write_verdicts",
]  # fmt: skip
