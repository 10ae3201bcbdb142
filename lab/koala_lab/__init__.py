"""The laboratory: from the papers' claims to runs, figures and verdicts."""
