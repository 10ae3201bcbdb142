"""Images: data sets that fit on a device, and photographs that stay in folders on a disk."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from koala_lab import paths
from koala_lab.data import folders
from koala_lab.data.folders import Photographs, RandomArea
from koala_lab.data.formats import DataError, Parser, balanced_order
from koala_lab.data.source import ALLOW, Copy, Data, Source


class Augmentation(NamedTuple):
    """Random crop after ``pad`` black pixels on each side; with ``flip``, mirrored left to right half of the time."""

    pad: int
    flip: bool


@dataclass(frozen=True, kw_only=True)
class ImageData(Data):
    """Images on a device; photographs stay on the disk, with all else on the device.

    Attributes:
        train_images: uint8, ``(N, C, H, W)``, 0 to 255; or photographs.
        train_labels: int64, ``(N,)``, from 0.
        test_images: As ``train_images``.
        test_labels: As ``train_labels``.
        mean: float32, ``(C,)``, of pixels in units of 0 to 1.
        std: As ``mean``.
        num_classes: Number of classes.
        augmentation: What "random crop and flip" means on this data set; for :func:`koala_lab.data.batches`.
    """

    train_images: Tensor | Photographs
    train_labels: Tensor
    test_images: Tensor | Photographs
    test_labels: Tensor
    mean: Tensor
    std: Tensor
    num_classes: int
    augmentation: Augmentation | RandomArea

    @property
    def size(self) -> int:
        """Number of training images."""
        return len(self.train_labels)

    def first(self, train_size: int) -> Self:
        """Return a class-balanced subset, the same for everyone; a smaller one is part of every larger one."""
        chosen = torch.from_numpy(np.sort(balanced_order(self.train_labels.numpy())[:train_size]))
        return replace(self, train_images=self.train_images[chosen], train_labels=self.train_labels[chosen])

    def to(self, device: torch.device | str) -> Self:
        """Return the same on a device."""
        names = ("train_images", "train_labels", "test_images", "test_labels", "mean", "std")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


@dataclass(frozen=True, kw_only=True)
class Images(Source):
    """A row of images that lie in a few files.

    Attributes:
        shape: Channels, height, width.
        num_classes: Number of classes.
        mean: Per channel, of pixels in units of 0 to 1.
        std: As ``mean``.
        augmentation: What "random crop and flip" means here.
        parse: Reads the files, in their order.
    """

    shape: tuple[int, int, int]
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augmentation: Augmentation
    parse: Parser

    def read(self, copy: Copy) -> ImageData:
        """Parse the files."""
        train, test = self.parse(self.contents(copy), self.shape, self.num_classes)
        return ImageData(
            train_images=torch.from_numpy(train[0]),
            train_labels=torch.from_numpy(train[1]),
            test_images=torch.from_numpy(test[0]),
            test_labels=torch.from_numpy(test[1]),
            mean=torch.tensor(self.mean),
            std=torch.tensor(self.std),
            num_classes=self.num_classes,
            augmentation=self.augmentation,
            **self.origin(copy),
        )


@dataclass(frozen=True, kw_only=True)
class Folders(Source):
    """A row of photographs that lie as ``NAME/train/CLASS/*.JPEG`` and ``NAME/val/CLASS/*.JPEG`` in a data folder.

    Attributes:
        num_classes: Number of classes; they are numbered in the order of their folders' names.
        counts: Official numbers of images, for training and for tests.
        size: Side of the square crops, in pixels.
        short_side: What the shorter side of an image is scaled to before the centre is cut out.
        mean: Per channel, of pixels in units of 0 to 1.
        std: As ``mean``.
        augmentation: What "random crop and flip" means here.
    """

    num_classes: int
    counts: tuple[int, int]
    size: int
    short_side: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augmentation: RandomArea

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height, width of what a network sees."""
        return 3, self.size, self.size

    def identity(self, *, may_differ: bool) -> str:
        """Hash numbers, names and sizes of the images; without a complete copy the official numbers."""
        found = self.find()
        if found is None or (not may_differ and self._difference(found[0])):
            return self.manifest([f"{part} {count}" for part, count in zip(folders.PARTS, self.counts, strict=True)])
        return self.manifest(folders.content(found[0]))

    def find(self) -> tuple[Path, ...] | None:
        """Return the first folder that has photographs for training and for tests."""
        roots = [folder / self.name for folder in paths.data_dirs()]
        return next(((root,) for root in roots if all((root / part).is_dir() for part in folders.PARTS)), None)

    def checked(self, found: tuple[Path, ...], *, may_differ: bool) -> Copy:
        """Compare the numbers of images and classes; nobody publishes more of them."""
        content = folders.content(found[0])
        if differs := self._difference(found[0]):
            if not may_differ:
                raise DataError(f"{differs}: complete it, or {ALLOW}")
            return self.unverified(found, content)
        return Copy(found, self.manifest(content), tag="")

    def download(self) -> None:
        """Say where a person gets it: nobody may download it without registering."""
        raise DataError(
            self.missing(
                f": get it from {self.source}, unpack it as {self.name}/train/CLASS/*.JPEG and "
                f"{self.name}/val/CLASS/*.JPEG, and name the folder that holds {self.name} in KOALA_DATA"
            )
        )

    def read(self, copy: Copy) -> ImageData:
        """List the images; they are decoded batch by batch."""
        (train, labels), (test, test_labels), classes = folders.parts(copy.files[0], self.size, self.short_side)
        return ImageData(
            train_images=train,
            train_labels=labels,
            test_images=test,
            test_labels=test_labels,
            mean=torch.tensor(self.mean),
            std=torch.tensor(self.std),
            num_classes=classes,
            augmentation=self.augmentation,
            **self.origin(copy),
        )

    def _difference(self, root: Path) -> str:
        return folders.difference(root, self.counts, self.num_classes)
