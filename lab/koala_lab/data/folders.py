"""Photographs in folders, one folder per class: too many for memory, so each batch is decoded when its turn comes."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from koala_lab.data.formats import Array, DataError, reading

PARTS: Final = ("train", "val")
SUFFIXES: Final = (".jpeg", ".jpg", ".png")


class RandomArea(NamedTuple):
    """Random crop of such a share of the image's area and such a ratio of width to height; mirrored half of the time.

    The defaults are the usual ones (Szegedy et al., CVPR 2015).
    """

    area: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)


@dataclass(frozen=True)
class Listing:
    """What lies in the folders of one part of a data set: paths relative to the part, sorted, and their sizes."""

    root: Path
    files: Array  # bytes, (N,): a million of Python's strings would be copied into every process that decodes
    sizes: Array  # int64, (N,)

    @cached_property  # of a million names, asked for with the key of every run
    def classes(self) -> tuple[list[str], Array]:
        """The names of the classes, and of each file the number of its class, int64 ``(N,)``."""
        names, numbers = np.unique([file.split(b"/", 1)[0] for file in self.files.tolist()], return_inverse=True)
        return [os.fsdecode(name) for name in names.tolist()], numbers.astype(np.int64)

    @cached_property
    def digest(self) -> str:
        """The SHA-256 of names and sizes."""
        digest = hashlib.sha256()
        for name, size in zip(self.files.tolist(), self.sizes.tolist(), strict=True):
            digest.update(b"%s %d\n" % (name, size))
        return digest.hexdigest()


@lru_cache(maxsize=2)  # a million files take some seconds, or minutes on a shared file system: once a process
def listing(root: Path) -> Listing:
    """List the images of one part; raises :class:`DataError` if there are none."""
    found: list[tuple[bytes, int]] = []
    with reading(str(root)):
        for folder in os.scandir(root):
            if folder.is_dir():
                images = (entry for entry in os.scandir(folder) if entry.name.lower().endswith(SUFFIXES))
                found += [(os.fsencode(f"{folder.name}/{entry.name}"), entry.stat().st_size) for entry in images]
        if not found:
            raise ValueError("it has no folders with images")
    found.sort()
    return Listing(root, np.array([name for name, _ in found]), np.array([size for _, size in found], np.int64))


def content(root: Path) -> list[str]:
    """Return a line for each part with its number of images, and the SHA-256 of their names and sizes.

    Not of their content: reading 150 GB would take longer than many a run. A copy with scaled images has other sizes.
    """
    found = {part: listing(root / part) for part in PARTS}
    return [f"{part} {len(images.files)} sha256:{images.digest}" for part, images in found.items()]


def difference(root: Path, counts: tuple[int, int], num_classes: int) -> str:
    """Return in what a copy differs from the official numbers of images and classes; empty if in nothing."""
    for part, count in zip(PARTS, counts, strict=True):
        found = listing(root / part)
        classes = len(found.classes[0])
        if (len(found.files), classes) != (count, num_classes):
            return (
                f"{root / part} has {len(found.files)} images in {classes} folders, expected {count} in {num_classes}"
            )
    return ""


def parts(root: Path, size: int, short_side: int) -> tuple[Labelled, Labelled, int]:
    """Return images and labels for training and for tests, and the number of classes."""
    train, test = (listing(root / part) for part in PARTS)
    (classes, labels), (others, test_labels) = train.classes, test.classes
    if classes != others:
        odd = min(set(classes) ^ set(others))
        raise DataError(f"only one of {train.root} and {test.root} has images in a folder {odd}: each class needs both")
    images, test_images = (Photographs(part.root, part.files, size, short_side) for part in (train, test))
    return (images, torch.from_numpy(labels)), (test_images, torch.from_numpy(test_labels)), len(classes)


@dataclass(frozen=True)
class Photographs:
    """Images on a disk, in the place of a tensor ``(N, 3, size, size)``.

    Attributes:
        root: The folder where they lie.
        files: Paths below it, as bytes ``(N,)``.
        size: Side of the square crops, in pixels.
        short_side: What the shorter side is scaled to before the centre is cut out.
    """

    root: Path
    files: Array
    size: int
    short_side: int

    def __len__(self) -> int:
        return len(self.files)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Number, channels, height and width of the images."""
        return len(self), 3, self.size, self.size

    def __getitem__(self, index: Tensor) -> Photographs:
        """Return some of the images."""
        return Photographs(self.root, self.files[index.numpy(force=True)], self.size, self.short_side)

    def to(self, device: torch.device | str) -> Photographs:
        """Return itself: batches go to the device of their labels."""
        return self

    def decoded(
        self, chunks: list[Tensor], random: tuple[RandomArea, Tensor] | None, *, pin_memory: bool
    ) -> Iterator[Tensor]:
        """Yield uint8 ``(B, 3, size, size)`` for each chunk of image numbers, in order, decoded by other processes.

        Args:
            chunks: Numbers of the images of each batch, on the CPU.
            random: How crops are drawn, and the seed of each image, ``(N,)``; ``None``: the centre.
            pin_memory: Whether the batches go to a GPU.

        Raises:
            DataError: If an image cannot be read.
        """
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        batches: DataLoader[Tensor | str] = DataLoader(
            _Batches(self, chunks, random),
            batch_size=None,
            num_workers=min(cores, len(chunks), 16),
            pin_memory=pin_memory,
            # The default one draws from the generator that networks draw from, and a resumed run would draw once more.
            generator=torch.Generator(),
        )
        for batch in batches:
            if isinstance(batch, str):
                raise DataError(batch)
            yield batch


Labelled = tuple[Photographs, Tensor]


@dataclass(frozen=True)
class _Batches(Dataset[Tensor | str]):
    """Batches by number.

    If a batch cannot be read, its item is the message: exceptions from DataLoader workers arrive as full tracebacks.
    """

    images: Photographs
    chunks: list[Tensor]
    random: tuple[RandomArea, Tensor] | None

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, k: int) -> Tensor | str:
        numbers = self.chunks[k].tolist()
        try:
            return torch.stack([self._decode(i) for i in numbers])
        except DataError as error:
            return str(error)

    def _decode(self, i: int) -> Tensor:
        path = self.images.root / os.fsdecode(bytes(self.images.files[i]))
        with reading(str(path)), Image.open(path) as file:
            image = file.convert("RGB")
        if self.random is None:
            image = centre_crop(image, self.images.size, self.images.short_side)
        else:
            augment, seeds = self.random
            image = random_crop(image, self.images.size, augment, seed=int(seeds[i]))
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def centre_crop(image: Image.Image, size: int, short_side: int) -> Image.Image:
    """Scale the shorter side to ``short_side`` pixels and cut the square of ``size`` pixels out of the centre."""
    width, height = (short_side * side // min(image.size) for side in image.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    scaled = image.resize((width, height), Image.Resampling.BILINEAR)
    return scaled.crop((left, top, left + size, top + size))


def random_crop(image: Image.Image, size: int, augment: RandomArea, *, seed: int) -> Image.Image:
    """Cut out a rectangle of random area, shape and place, scale it to a square, and mirror half of them.

    As ``RandomResizedCrop`` and ``RandomHorizontalFlip`` of torchvision: if ten rectangles do not fit, the largest one
    of an allowed shape in the centre.
    """
    random = np.random.RandomState(seed)  # not Generator: its stream is frozen (NEP 19)
    full_width, full_height = image.size
    for _ in range(10):
        area = full_width * full_height * random.uniform(*augment.area)
        ratio = math.exp(random.uniform(math.log(augment.ratio[0]), math.log(augment.ratio[1])))
        width, height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < width <= full_width and 0 < height <= full_height:
            left, top = random.randint(full_width - width + 1), random.randint(full_height - height + 1)
            break
    else:
        width = min(full_width, round(full_height * augment.ratio[1]))
        height = min(full_height, round(full_width / augment.ratio[0]))
        left, top = (full_width - width) // 2, (full_height - height) // 2
    crop = image.crop((left, top, left + width, top + height)).resize((size, size), Image.Resampling.BILINEAR)
    return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if random.randint(2) else crop
