"""Batches of a data set: shuffled and augmented on the device, or decoded from photographs on a disk."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from koala_lab.data.folders import Photographs, RandomArea
from koala_lab.data.images import Augmentation


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    """Return the generator of one epoch's order and augmentation, on the CPU.

    A function of ``(seed, epoch)`` alone, so that no state has to be saved to resume. On the CPU whatever the device,
    so that all devices see the same batches.
    """
    digest = hashlib.sha256(f"koala epoch {seed} {epoch}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))


def num_batches(size: int, batch_size: int, *, drop_last: bool = False) -> int:
    """Return how many batches an epoch over ``size`` images has."""
    return size // batch_size if drop_last else -(-size // batch_size)


def batches(
    images: Tensor | Photographs,
    labels: Tensor,
    batch_size: int,
    *,
    mean: Tensor,
    std: Tensor,
    generator: torch.Generator | None = None,
    augment: Augmentation | RandomArea | None = None,
    drop_last: bool = False,
    start: int = 0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Iterate over one epoch.

    Order, crops and flips of the whole epoch are drawn here, at once, and moved to the device; after that a batch
    needs no transfer and no synchronisation. Photographs have a seed each instead, for the process that decodes them.
    Hence batch k does not depend on ``start``: a resumed epoch goes on with the very batches it would have had.

    Args:
        images: uint8 ``(N, C, H, W)`` on the device, or photographs.
        labels: ``(N,)``, on the device.
        batch_size: Images per batch.
        mean: ``(C,)``, in units of 0 to 1. Its dtype is that of the batches.
        std: As ``mean``.
        generator: Source of all randomness, see :func:`epoch_generator`. ``None``: in order.
        augment: Crop and flip, see :class:`Augmentation`, of photographs :class:`RandomArea`; needs a generator.
            ``None``: images as they are, of photographs the centres.
        drop_last: Leave out an incomplete last batch.
        start: Number of batches to skip.

    Returns:
        An iterator over images ``(B, C, H, W)``, ``(pixel / 255 - mean) / std``, and labels ``(B,)``.

    Raises:
        ValueError: If there would be no batch, ``start`` is outside the epoch, or ``augment`` comes without a generator
            or is that of the other kind of images.
        DataError: If a photograph cannot be read.
    """
    count = num_batches(len(images), batch_size, drop_last=drop_last) if batch_size > 0 else 0
    if count == 0:
        raise ValueError(f"batch_size {batch_size} gives no batch of {len(images)} images (drop_last={drop_last})")
    if not 0 <= start <= count:
        raise ValueError(f"start must be between 0 and the number of batches, {count}, got {start}")
    if augment is not None and generator is None:
        raise ValueError("augment needs a generator")
    if augment is not None and isinstance(images, Photographs) != isinstance(augment, RandomArea):
        raise ValueError(f"these images cannot be augmented by {augment}")
    device, channels = labels.device, (1, -1, 1, 1)
    scale = (1 / (255 * std)).to(device).view(channels)
    shift = (-mean / std).to(device).view(channels)
    order = None if generator is None else torch.randperm(len(images), generator=generator, device=generator.device)
    placed = None if order is None else order.to(device)
    chunks = [slice(k * batch_size, min((k + 1) * batch_size, len(images))) for k in range(start, count)]
    if isinstance(images, Photographs):
        numbers = torch.arange(len(images)) if order is None else order
        random = None
        if isinstance(augment, RandomArea):
            random = augment, torch.randint(2**32, (len(images),), generator=generator)
        pixels = images.decoded([numbers[chunk] for chunk in chunks], random, pin_memory=device.type == "cuda")
    else:
        crops = None
        if isinstance(augment, Augmentation) and generator is not None:
            crops = augment.pad, _draw(len(images), augment, generator).to(device)
        pixels = _pixels(images, chunks, placed, crops)
    shuffled = labels if placed is None else labels[placed]
    return (
        (x.to(device, scale.dtype, non_blocking=True).mul_(scale).add_(shift), shuffled[chunk])
        for x, chunk in zip(pixels, chunks, strict=True)
    )


def _pixels(
    images: Tensor, chunks: list[slice], order: Tensor | None, crops: tuple[int, Tensor] | None
) -> Iterator[Tensor]:
    for chunk in chunks:
        x = images[chunk if order is None else order[chunk]]
        yield x if crops is None else _crop(x, crops[1][:, chunk], crops[0])


def _draw(count: int, augment: Augmentation, generator: torch.Generator) -> Tensor:
    """Draw row offset, column offset and whether to flip; int64, (3, count)."""
    offsets = torch.randint(2 * augment.pad + 1, (2, count), generator=generator, device=generator.device)
    flips = torch.randint(1 + augment.flip, (1, count), generator=generator, device=generator.device)
    return torch.cat([offsets, flips])


def _crop(x: Tensor, crops: Tensor, pad: int) -> Tensor:
    """Cut ``(B, C, H, W)`` out of the images padded with black, each at its own place, some mirrored."""
    batch, channels, height, width = x.shape
    top, left, flip = crops.unsqueeze(2)  # each (B, 1)
    column = torch.arange(width, device=x.device)
    rows = top + torch.arange(height, device=x.device)
    columns = left + torch.where(flip.bool(), width - 1 - column, column)
    padded = functional.pad(x, (pad, pad, pad, pad))
    image = torch.arange(batch, device=x.device)[:, None, None, None]
    channel = torch.arange(channels, device=x.device)[:, None, None]
    return padded[image, channel, rows[:, None, :, None], columns[:, None, None, :]]
