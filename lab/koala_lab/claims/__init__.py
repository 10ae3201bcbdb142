"""The papers' numbers as data, and what measurements say about them."""

from koala_lab.claims.judge import (
    BEGIN,
    END,
    NOT_RUN,
    PRESETS,
    STATUSES,
    Claim,
    Criterion,
    Verdict,
    available,
    combine,
    interval,
    judge,
    load,
    read,
    replace_block,
    save,
    saved,
    scoreboard,
    table,
)

__all__ = [
    "BEGIN", "END", "NOT_RUN", "PRESETS", "STATUSES",
    "Claim", "Criterion", "Verdict", "available", "combine", "interval",
    "judge", "load", "read", "replace_block",
    "save", "saved", "scoreboard", "table",
]  # fmt: skip
