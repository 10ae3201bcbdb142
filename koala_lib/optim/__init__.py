"""The optimizers, one algorithm per file, in the order of its paper's equations."""

from koala_lib.optim.apollo import Apollo
from koala_lib.optim.koala import KoalaM, KoalaV
from koala_lib.optim.koala_plus_plus import KoalaPlusPlus
from koala_lib.optim.meka import Meka

__all__ = ["Apollo", "KoalaM", "KoalaPlusPlus", "KoalaV", "Meka"]
