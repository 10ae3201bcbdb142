"""Images, texts and pairs of sentences: found or downloaded, verified, kept as tensors on the device.

Nothing is parsed before its checksum has been compared with the published one. A copy whose checksum differs is
refused, unless the caller allows it; then the ``tag`` and ``identity`` of what is loaded say so.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from koala_lab.data.files import Copy, contents, fetch, identity, row, row_of
from koala_lab.data.folders import FOLDERS, Folders, Photographs, RandomArea, parts
from koala_lab.data.formats import Array, DataError, Split, balanced_order
from koala_lab.data.iteration import batches, epoch_generator, num_batches
from koala_lab.data.pairs import PAIRS, Lines, Pairs, Sentences, learn, tokenized
from koala_lab.data.registry import DATASETS, Augmentation, Dataset
from koala_lab.data.text import TEXTS, Text, encode

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = [
    "DATASETS",
    "FOLDERS",
    "PAIRS",
    "TEXTS",
    "Augmentation",
    "DataError",
    "ImageData",
    "PairData",
    "Photographs",
    "RandomArea",
    "Sentences",
    "TextData",
    "batches",
    "epoch_generator",
    "fetch",
    "identity",
    "load",
    "load_pairs",
    "load_text",
    "num_batches",
]


@dataclass(frozen=True)
class ImageData:
    """A data set on a device; photographs in folders stay on the disk, with all else on the device.

    Attributes
    ----------
    train_images, test_images
        uint8, ``(N, C, H, W)``, 0 to 255; or photographs.
    train_labels, test_labels
        int64, ``(N,)``, from 0.
    mean, std
        float32, ``(C,)``, of pixels in units of 0 to 1.
    num_classes
        Number of classes.
    augmentation
        What "random crop and flip" means on this data set; for :func:`batches`.
    name, title
        Name in :data:`DATASETS` or :data:`FOLDERS`, and the name to print.
    tag
        Empty for verified data, else ``"unverified: content 1a2b3c4d"``, to be shown beside every result.
    identity
        See :func:`identity`; the same for every ``train_size``.
    """

    train_images: Tensor | Photographs
    train_labels: Tensor
    test_images: Tensor | Photographs
    test_labels: Tensor
    mean: Tensor
    std: Tensor
    num_classes: int
    augmentation: Augmentation | RandomArea
    name: str
    title: str
    tag: str
    identity: str


def load(
    name: str,
    *,
    device: torch.device | str = "cpu",
    train_size: int | None = None,
    allow_unverified: bool | None = None,
) -> ImageData:
    """Load a data set onto a device, downloading it where necessary.

    Parameters
    ----------
    name
        A name in :data:`DATASETS` or :data:`FOLDERS`.
    device
        Where all tensors go.
    train_size
        Size of a class-balanced subset of the training set, the same for everyone; a smaller subset is part of every
        larger one. ``None``: all of it.
    allow_unverified
        Accept files whose checksum is not the published one. ``None``: whether the environment has
        ``KOALA_ALLOW_UNVERIFIED_DATA=1``.

    Raises
    ------
    ValueError
        For an unknown name, or a ``train_size`` that the training set does not have.
    DataError
        If the data set is missing, not verified or damaged.

    Examples
    --------
    >>> digits = load("digits")
    >>> digits.train_images.shape, len(digits.test_images)
    (torch.Size([1297, 1, 8, 8]), 500)
    """
    dataset = row(name)
    if not isinstance(dataset, Folders):
        dataset = row_of(name, Dataset)
    copy = fetch(name, allow_unverified=allow_unverified)
    train: tuple[Tensor | Photographs, Tensor]
    test: tuple[Tensor | Photographs, Tensor]
    if isinstance(dataset, Folders):
        train, test, num_classes = parts(dataset, copy.files[0])
    else:
        train, test = ((torch.from_numpy(x), torch.from_numpy(y)) for x, y in _images(name, dataset, copy))
        num_classes = dataset.num_classes
    _check_train_size(train_size, len(train[1]), dataset.title)
    if train_size is not None:
        chosen = torch.from_numpy(np.sort(balanced_order(train[1].numpy())[:train_size]))
        train = train[0][chosen], train[1][chosen]
    return ImageData(
        train_images=train[0].to(device),
        train_labels=train[1].to(device),
        test_images=test[0].to(device),
        test_labels=test[1].to(device),
        mean=torch.tensor(dataset.mean, device=device),
        std=torch.tensor(dataset.std, device=device),
        num_classes=num_classes,
        augmentation=dataset.augmentation,
        name=name,
        title=dataset.title,
        tag=copy.tag,
        identity=copy.identity,
    )


@lru_cache(maxsize=1)  # every run of a grid asks for the same images
def _images(name: str, dataset: Dataset, copy: Copy) -> list[Split]:
    return dataset.parse(contents(name, copy), dataset.shape, dataset.num_classes)


def _check_train_size(train_size: int | None, size: int, title: str) -> None:
    if train_size is not None and not 0 < train_size <= size:
        raise ValueError(f"train_size must be between 1 and {size} on {title}, got {train_size}")


@dataclass(frozen=True)
class TextData:
    """A text on a device.

    Attributes
    ----------
    train, validation, test
        Tokens, int32, ``(N,)``, in the order of the text.
    vocabulary
        The tokens by number.
    unit
        ``"character"`` or ``"word"``.
    name, title, tag, identity
        As in :class:`ImageData`.
    """

    train: Tensor
    validation: Tensor
    test: Tensor
    vocabulary: tuple[str, ...]
    unit: str
    name: str
    title: str
    tag: str
    identity: str


def load_text(
    name: str,
    *,
    device: torch.device | str = "cpu",
    train_size: int | None = None,
    allow_unverified: bool | None = None,
) -> TextData:
    """Load a text onto a device, downloading it where necessary.

    Parameters
    ----------
    name
        A name in :data:`TEXTS`.
    device
        Where the tokens go.
    train_size
        Number of tokens, from the beginning of the training part. ``None``: all of it.
    allow_unverified
        As in :func:`load`.

    Raises
    ------
    ValueError
        For an unknown name, or a ``train_size`` that the training part does not have.
    DataError
        If the text is missing, not verified or damaged.

    Examples
    --------
    >>> text = load_text("pydoc-topics", train_size=1000)
    >>> text.unit, text.train.shape
    ('character', torch.Size([1000]))
    """
    text = row_of(name, Text)
    copy = fetch(name, allow_unverified=allow_unverified)
    (train, validation, test), vocabulary = _encoded(name, text, copy)
    _check_train_size(train_size, len(train), text.title)
    return TextData(
        train=torch.from_numpy(train[:train_size]).to(device),
        validation=torch.from_numpy(validation).to(device),
        test=torch.from_numpy(test).to(device),
        vocabulary=vocabulary,
        unit=text.unit,
        name=name,
        title=text.title,
        tag=copy.tag,
        identity=copy.identity,
    )


@lru_cache(maxsize=2)  # every run of a grid asks for the same text
def _encoded(name: str, text: Text, copy: Copy) -> tuple[list[Array], tuple[str, ...]]:
    return encode(text, contents(name, copy))


@dataclass(frozen=True)
class PairData:
    """Pairs of sentences on a device.

    Attributes
    ----------
    train, validation, test
        Source and target sentences.
    test_lines
        Source and target of the test part as text.
    tokenizer
        From text to tokens and back.
    name, title, tag, identity
        As in :class:`ImageData`.
    """

    train: tuple[Sentences, Sentences]
    validation: tuple[Sentences, Sentences]
    test: tuple[Sentences, Sentences]
    test_lines: tuple[Lines, Lines]
    tokenizer: Tokenizer
    name: str
    title: str
    tag: str
    identity: str


def load_pairs(
    name: str,
    *,
    device: torch.device | str = "cpu",
    train_size: int | None = None,
    allow_unverified: bool | None = None,
) -> PairData:
    """Load pairs of sentences onto a device, downloading them where necessary.

    Parameters
    ----------
    name
        A name in :data:`PAIRS`.
    device
        Where the tokens go.
    train_size
        Number of pairs, from the beginning of the training part. ``None``: all of it.
    allow_unverified
        As in :func:`load`.

    Raises
    ------
    ValueError
        For an unknown name, or a ``train_size`` that the training part does not have.
    DataError
        If the data set is missing, not verified or damaged.

    Examples
    --------
    >>> pairs = load_pairs("numbers", train_size=1000)
    >>> len(pairs.train[0]), pairs.test_lines[0][0], pairs.test_lines[1][0]
    (1000, '', '')
    """
    row = row_of(name, Pairs)
    copy = fetch(name, allow_unverified=allow_unverified)
    parts, test_lines, tokenizer = _pairs(name, row, copy)
    _check_train_size(train_size, len(parts[0][0]), row.title)
    train, validation, test = ((source.to(device), target.to(device)) for source, target in parts)
    return PairData(
        train=(train[0].first(train_size), train[1].first(train_size)),
        validation=validation,
        test=test,
        test_lines=test_lines,
        tokenizer=tokenizer,
        name=name,
        title=row.title,
        tag=copy.tag,
        identity=copy.identity,
    )


@lru_cache(maxsize=1)  # every run of a grid asks for the same pairs
def _pairs(
    name: str, row: Pairs, copy: Copy
) -> tuple[list[tuple[Sentences, Sentences]], tuple[Lines, Lines], Tokenizer]:
    parts = row.parse(contents(name, copy))
    tokenizer = learn(row, parts[0])
    encoded = [(tokenized(tokenizer, source), tokenized(tokenizer, target)) for source, target in parts]
    return encoded, parts[-1], tokenizer
