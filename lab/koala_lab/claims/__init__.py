"""The papers' numbers as data, and what measurements say about them."""

from koala_lab.claims.judge import (
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
    "PRESETS", "STATUSES", "Claim", "Criterion", "Verdict", "available", "combine", "interval",
    "judge", "load", "read", "replace_block",
    "save", "saved", "scoreboard", "table",
]  # fmt: skip
