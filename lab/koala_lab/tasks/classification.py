"""Classification of images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from koala_lab import data, models
from koala_lab.checks import check_whole
from koala_lab.data.formats import balanced_order
from koala_lab.tasks._base import Task, autocast
from koala_lib.moments import sample_moments

if TYPE_CHECKING:
    from koala_lab.config import RunConfig

Batch = tuple[Tensor, Tensor]
Labelled = tuple[Tensor | data.Photographs, Tensor]

CHUNK = 500  # test images at a time; with 1000 small ResNets take half as long again on a CPU


class Classification(Task):
    """Cross-entropy on images and labels.

    The data set lies on the device and is augmented there, unless it is photographs.

    Test metrics are ``test_loss`` (nats), ``test_error`` and ``test_error_top5`` (%); with a validation set the same
    with ``validation_`` come after them.

    Args:
        config: the run.
        device: where it runs.
        validation_size: so many class-balanced samples of the training set are held out, beside the ``train_size``
            that are trained on; for choosing hyper-parameters, which must not see the test set.
        landscape_size: the metrics also say how the training loss looks where the network is, on so many class-balanced
            training samples without augmentation: ``curvature``, g^T H g / g^T g along their mean gradient g, and
            ``gradient_variance``, between samples, averaged over the weights. As in Figure 7 of the MEKA paper.

    Raises:
        ValueError: if a batch is larger than the training set, or one of the sizes is impossible.
    """

    datasets = data.names(data.Images, data.Folders)
    networks = models.MODELS

    def __init__(
        self, config: RunConfig, device: torch.device, *, validation_size: int = 0, landscape_size: int = 0
    ) -> None:
        check_whole("validation_size", validation_size)
        self.config, self.device = config, device
        size = config.train_size and config.train_size + validation_size
        self.data = data.load(config.dataset, device=device, train_size=size)
        self._evaluated = {"test": (self.data.test_images, self.data.test_labels)}
        if validation_size:
            self.data, self._evaluated["validation"] = _hold_out(self.data, validation_size)
        images, labels = self.data.train_images, self.data.train_labels
        self.steps_per_epoch = len(labels) // config.batch_size
        if self.steps_per_epoch == 0:
            raise ValueError(f"batch_size={config.batch_size} exceeds the {len(labels)} training samples")
        network = models.build(
            config.model,
            num_classes=self.data.num_classes,
            in_channels=images.shape[1],
            image_size=images.shape[-1],
            **dict(config.model_args),
        )
        # Convolutions are a fifth faster in this layout on CPUs, and much faster with tensor cores.
        self.network = network.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.parts = {"network": self.network}
        if config.precision == "float32":
            self.loss_fn = partial(nn.functional.cross_entropy, reduction="none")
        self._landscape_samples = self._landscape_batch(landscape_size) if landscape_size else None
        self._forward: Callable[[Tensor, Tensor], Tensor] = self._losses
        if device.type == "cuda" and not self.second_order:  # what is compiled has no second derivative
            self._forward = torch.compile(self._losses)

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        return data.batches(
            self.data.train_images,
            self.data.train_labels,
            self.config.batch_size,
            mean=self.data.mean,
            std=self.data.std,
            generator=data.epoch_generator(self.config.seed, epoch),
            augment=self.data.augmentation if self.config.augment else None,
            drop_last=True,
            start=start,
        )

    def _losses(self, x: Tensor, y: Tensor) -> Tensor:
        with autocast(self.config, self.device):
            return nn.functional.cross_entropy(self.network(x).float(), y, reduction="none")

    def sample_losses(self, batch: Batch) -> Tensor:
        return self._forward(*batch)

    @torch.no_grad()
    def evaluate(self, network: nn.Module) -> dict[str, float]:
        top, metrics = min(5, self.data.num_classes), {}
        for name, (images, labels) in self._evaluated.items():
            sums = torch.zeros(3, dtype=torch.float64, device=self.device)
            for x, y in data.batches(images, labels, CHUNK, mean=self.data.mean, std=self.data.std):
                logits = network(x).float()
                hits = logits.topk(top, dim=1).indices == y[:, None]
                loss = nn.functional.cross_entropy(logits, y, reduction="sum")
                sums += torch.stack([loss.double(), hits[:, 0].sum().double(), hits.sum().double()])
            loss_sum, first, five = (sums / len(labels)).tolist()
            metrics[f"{name}_loss"] = loss_sum
            metrics |= {f"{name}_error": 100 * (1 - first), f"{name}_error_top5": 100 * (1 - five)}
        return metrics | self._landscape(network)

    def _landscape_batch(self, size: int) -> Batch:
        images, labels = self.data.train_images, self.data.train_labels
        if self.loss_fn is None or type(size) is not int or not 2 <= size <= len(labels):
            raise ValueError(f"landscape_size={size!r}: needs 2 to {len(labels)} training samples, and float32")
        order = torch.from_numpy(balanced_order(labels.numpy(force=True)))[:size].to(labels.device)
        chosen, mean, std = images[order], self.data.mean, self.data.std
        [batch] = data.batches(chosen, labels[order], size, mean=mean, std=std)
        return batch

    def _landscape(self, network: nn.Module) -> dict[str, float]:
        if self._landscape_samples is None:
            return {}
        assert self.loss_fn is not None
        g = sample_moments(network, self.loss_fn, *self._landscape_samples).gradient
        moments = sample_moments(network, self.loss_fn, *self._landscape_samples, g)
        assert moments.hvp is not None
        along, square = (sum(float((g[n] * t).sum()) for n, t in ts.items()) for ts in (moments.hvp, g))
        return {"curvature": along / square, "gradient_variance": float(moments.gradient_variance)}


def _hold_out(dataset: data.ImageData, size: int) -> tuple[data.ImageData, Labelled]:
    """Return the data set without ``size`` class-balanced samples of its training set, and those."""
    images, labels = dataset.train_images, dataset.train_labels
    if size >= len(labels):
        raise ValueError(f"validation_size={size} leaves nothing of the {len(labels)} training samples")
    order = torch.from_numpy(balanced_order(labels.numpy(force=True))).to(labels.device)
    kept, held = (part.sort().values for part in (order[:-size], order[-size:]))
    return replace(dataset, train_images=images[kept], train_labels=labels[kept]), (images[held], labels[held])
