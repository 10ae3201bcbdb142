"""The optimizers as slow loops in the papers' symbols: read these first, beside the papers."""

from koala_lib.reference.apollo import ReferenceApollo
from koala_lib.reference.koala import ReferenceKoalaM, ReferenceKoalaV
from koala_lib.reference.koala_plus_plus import ReferenceKoalaPlusPlus
from koala_lib.reference.meka import ReferenceMeka
from koala_lib.reference.watch import reference_watch

__all__ = [
    "ReferenceApollo", "ReferenceKoalaM", "ReferenceKoalaPlusPlus", "ReferenceKoalaV", "ReferenceMeka",
    "reference_watch",
]  # fmt: skip
