"""File formats of image data sets: bytes in, arrays out. Nothing is unpickled."""

from __future__ import annotations

import io
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Contents = Iterator[tuple[str, bytes]]  # (name for messages, content) of every file, in the registry's order
Shape = tuple[int, int, int]  # channels, height, width
Split = tuple[Array, Array]  # images (N, C, H, W), uint8; labels (N,), int64, from 0
Parser = Callable[[Contents, Shape, int], list[Split]]  # the int is the number of classes; training and test set

# Whatever a decoder raises on damaged input; TypeError: len() of an array without dimensions.
_DAMAGE = (OSError, EOFError, KeyError, TypeError, ValueError, zlib.error, tarfile.TarError, zipfile.BadZipFile)


class DataError(RuntimeError):
    """A data set is missing, not verified or damaged. The message is one sentence for the user."""


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Turn what goes wrong while a file is read into a :class:`DataError` that names it."""
    try:
        yield
    except _DAMAGE as error:
        reason = str(error).partition("\n")[0].rstrip(":")  # tarfile lists what it has tried, a line each
        raise DataError(f"{name} cannot be read: {reason}") from error


def _images(images: Array, shape: Shape) -> Array:
    if len(images) == 0 or images[0].size != np.prod(shape):
        raise ValueError(f"it holds an array of shape {images.shape}, expected images of {shape} pixels")
    return np.ascontiguousarray(images.reshape(-1, *shape))


def _labels(labels: Array, count: int, num_classes: int) -> Array:
    if len(labels) != count:
        raise ValueError(f"it holds {len(labels)} labels for {count} images")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(f"its labels reach from {labels.min()} to {labels.max()}, expected 0 to {num_classes - 1}")
    return labels.astype(np.int64)


def parse_csv(contents: Contents, shape: Shape, num_classes: int, *, test_size: int, largest: int) -> list[Split]:
    """Read one image per line: pixels from 0 to ``largest``, then the label.

    Such a file has no test set of its own: a class-balanced one of ``test_size`` images is taken from it.
    """
    name, raw = next(contents)
    with reading(name):
        table = np.loadtxt(io.BytesIO(raw), delimiter=",", dtype=np.float32, ndmin=2)
        images, labels = _images(table[:, :-1], shape), _labels(table[:, -1], len(table), num_classes)
        if images.min() < 0 or images.max() > largest:
            raise ValueError(f"its pixels reach from {images.min()} to {images.max()}, expected 0 to {largest}")
    images = np.rint(images * (255 / largest)).astype(np.uint8)
    order = balanced_order(labels)
    test, train = np.sort(order[:test_size]), np.sort(order[test_size:])
    return [(images[train], labels[train]), (images[test], labels[test])]


def parse_idx(contents: Contents, shape: Shape, num_classes: int) -> list[Split]:
    """Read pairs of files of images and labels in MNIST's format: magic number, big-endian sizes, bytes."""
    splits = []
    for (image_name, image_raw), (label_name, label_raw) in zip(contents, contents, strict=True):
        with reading(image_name):
            images = _images(_idx(image_raw), shape)
        with reading(label_name):
            splits.append((images, _labels(_idx(label_raw), len(images), num_classes)))
    return splits


def _idx(raw: bytes) -> Array:
    if raw[:3] != b"\0\0\x08" or len(raw) < 4 + 4 * raw[3]:
        raise ValueError("it does not begin with the header of an idx file of bytes")
    start = 4 + 4 * raw[3]
    shape = tuple(np.frombuffer(raw[4:start], ">u4").tolist())
    return np.frombuffer(bytearray(raw), np.uint8, offset=start).reshape(shape)


def parse_csv_then_idx(contents: Contents, shape: Shape, num_classes: int) -> list[Split]:
    """Train on all of the first file, as :func:`parse_csv`; test on the pair of idx files after it."""
    train, _ = parse_csv(contents, shape, num_classes, test_size=0, largest=255)
    return [train, *parse_idx(contents, shape, num_classes)]


def parse_cifar(contents: Contents, shape: Shape, num_classes: int, *, label_bytes: int) -> list[Split]:
    """Read records of label bytes, of which the last counts, and one image; the last file is the test set."""
    size, parts = label_bytes + int(np.prod(shape)), []
    for name, raw in contents:
        with reading(name):
            if not raw or len(raw) % size:
                raise ValueError(f"{len(raw)} bytes are not a whole number of records of {size} bytes")
            records = np.frombuffer(raw, np.uint8).reshape(-1, size)
            labels = _labels(records[:, label_bytes - 1], len(records), num_classes)
            parts.append((_images(records[:, label_bytes:], shape), labels))
    return [_joined(parts[:-1]), parts[-1]]


def parse_npz(contents: Contents, shape: Shape, num_classes: int) -> list[Split]:
    """Read numpy archives with ``data``, uint8, and ``labels`` from 1; the last one is the test set."""
    parts = []
    for name, raw in contents:
        with reading(name):
            archive = np.load(io.BytesIO(raw), allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("it is a single array, not an archive with data and labels")
            images, labels = archive["data"], archive["labels"].astype(np.int64) - 1
            if images.dtype != np.uint8:
                raise ValueError(f"its pixels are of type {images.dtype}, expected uint8")
            parts.append((_images(images, shape), _labels(labels, len(images), num_classes)))
    return [_joined(parts[:-1]), parts[-1]]


def _joined(parts: list[Split]) -> Split:
    return np.concatenate([x for x, _ in parts]), np.concatenate([y for _, y in parts])


def balanced_order(labels: Array) -> Array:
    """Return a fixed permutation of ``range(len(labels))``, each prefix of which is as class-balanced as can be."""
    # RandomState, not Generator: its stream is frozen (NEP 19), so the subsets are the same for everyone, always.
    shuffled = np.random.RandomState(0).permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    rank_in_class = np.concatenate([np.arange(n) for n in np.unique(labels, return_counts=True)[1]])
    return by_class[np.argsort(rank_in_class, kind="stable")]
