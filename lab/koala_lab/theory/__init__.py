"""The papers' theorems as functions, and the problems on which they are tried."""
