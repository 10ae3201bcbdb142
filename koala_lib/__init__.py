"""Kalman-style optimizers for PyTorch, reproduced from their papers."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from koala_lib.optim import Apollo, KoalaM, KoalaPlusPlus, KoalaV, Meka

__all__ = ["Apollo", "KoalaM", "KoalaPlusPlus", "KoalaV", "Meka"]


def __getattr__(name: str) -> Any:
    """Import the optimizers, and torch with them, when they are asked for."""
    if name in __all__:
        from koala_lib import optim

        return getattr(optim, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
