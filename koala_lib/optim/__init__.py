from koala_lib.optim.koala import KoalaM, KoalaV
from koala_lib.optim.meka import Meka

__all__ = ["KoalaM", "KoalaV", "Meka"]
