"""Images, texts and pairs of sentences: found or downloaded, verified, kept as tensors on the device.

Nothing is parsed before its checksum has been compared with the published one. A copy whose checksum differs is
refused, unless the caller allows it; then the ``tag`` and ``identity`` of what is loaded say so.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from koala_lab.checks import check_known
from koala_lab.data.folders import Photographs, RandomArea
from koala_lab.data.formats import DataError
from koala_lab.data.images import Augmentation, Folders, ImageData, Images
from koala_lab.data.iteration import batches, epoch_generator, num_batches
from koala_lab.data.pairs import PairData, Pairs, Sentences
from koala_lab.data.registry import DATASETS
from koala_lab.data.source import Copy, Data, File, Source, allowed
from koala_lab.data.text import Text, TextData

__all__ = [
    "DATASETS",
    "Augmentation",
    "DataError",
    "File",
    "Folders",
    "ImageData",
    "Images",
    "PairData",
    "Pairs",
    "Photographs",
    "RandomArea",
    "Sentences",
    "Text",
    "TextData",
    "batches",
    "epoch_generator",
    "fetch",
    "identity",
    "load",
    "names",
    "num_batches",
]


def names(*kinds: type[Source]) -> list[str]:
    """Return the names of the data sets of some kinds, such as :class:`Images`, in the order of the registry."""
    return [name for name, row in DATASETS.items() if isinstance(row, kinds)]


def _row(name: str) -> Source:
    check_known("data set", name, DATASETS)
    return DATASETS[name]


def identity(name: str, *, allow_unverified: bool | None = None) -> str:
    """Return what identifies the content of a data set: 64 hexadecimal digits, part of the key of every run.

    It is the SHA-256 of the published checksums of its files, and so a constant that needs no data. Only where
    unverified data are allowed, and an unverified copy is found, that copy's files are hashed instead; and files
    without a published checksum, because each version of their package has its own, always are. Of photographs in
    folders the numbers, names and sizes are hashed, where they are found.

    Args:
        name: A name in :data:`DATASETS`.
        allow_unverified: As in :func:`load`.

    Raises:
        ValueError: For an unknown name.
        DataError: If a file of an unverified copy cannot be read.
    """
    return _row(name).identity(may_differ=allowed(allow_unverified))


def fetch(name: str, *, allow_unverified: bool | None = None) -> Copy:
    """Find a data set in ``KOALA_DATA`` or ``data/raw``, else download it to ``data/raw``; verify it.

    The first folder that holds the whole data set counts, even if its copy is refused. Arguments and errors are those
    of :func:`load`.
    """
    return _row(name).fetch(may_differ=allowed(allow_unverified))


def load(
    name: str,
    *,
    device: torch.device | str = "cpu",
    train_size: int | None = None,
    allow_unverified: bool | None = None,
) -> ImageData | TextData | PairData:
    """Load a data set onto a device, downloading it where necessary.

    Args:
        name: A name in :data:`DATASETS`.
        device: Where all tensors go; photographs stay on the disk.
        train_size: Size of the training part: of images a class-balanced subset, the same for everyone, of texts so
            many tokens and of pairs so many pairs from the beginning. ``None``: all of it.
        allow_unverified: Accept files whose checksum is not the published one. ``None``: whether the environment has
            ``KOALA_ALLOW_UNVERIFIED_DATA=1``.

    Raises:
        ValueError: For an unknown name, or a ``train_size`` that the training part does not have.
        DataError: If the data set is missing, not verified or damaged.

    Examples:
        >>> digits = load("digits")
        >>> digits.train_images.shape, len(digits.test_images)
        (torch.Size([1297, 1, 8, 8]), 500)
        >>> text = load("pydoc-topics", train_size=1000)
        >>> text.unit, text.train.shape
        ('character', torch.Size([1000]))
        >>> pairs = load("numbers", train_size=1000)
        >>> len(pairs.train[0]), pairs.test_lines[0][0], pairs.test_lines[1][0]
        (1000, 'sechstausendsechshunderteinunddreißig', 'six thousand, six hundred and thirty-one')
    """
    row = _row(name)
    loaded = _read(row, fetch(name, allow_unverified=allow_unverified))
    if train_size is not None:
        if not 0 < train_size <= loaded.size:
            raise ValueError(f"train_size must be between 1 and {loaded.size} on {row.title}, got {train_size}")
        loaded = loaded.first(train_size)
    return loaded.to(device)  # type: ignore[return-value]


@lru_cache(maxsize=2)  # every run of a grid asks for the same data
def _read(row: Source, copy: Copy) -> Data:
    return row.read(copy)
