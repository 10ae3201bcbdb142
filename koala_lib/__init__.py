"""Kalman-style optimizers for PyTorch, reproduced from their papers."""

from koala_lib.optim import KoalaM, KoalaV

__all__ = ["KoalaM", "KoalaV"]
