"""Classification of images."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from koala_lib import data, models
from koala_lib.config import RunConfig
from koala_lib.tasks._base import Task, autocast

Batch = tuple[Tensor, Tensor]


class Classification(Task):
    """Cross-entropy on images and labels. The data set lies on the device and is augmented there.

    Test metrics are ``test_loss`` (nats), ``test_error`` and ``test_error_top5`` (%).

    Raises:
        ValueError: if a batch is larger than the training set.
    """

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self.data = data.load(config.dataset, device=device, train_size=config.train_size)
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
        self._forward: Callable[[Tensor, Tensor], Tensor] = self._losses
        if device.type == "cuda":
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
        images, labels, top = self.data.test_images, self.data.test_labels, min(5, self.data.num_classes)
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        for x, y in data.batches(images, labels, 1000, mean=self.data.mean, std=self.data.std):
            logits = network(x).float()
            hits = logits.topk(top, dim=1).indices == y[:, None]
            loss = nn.functional.cross_entropy(logits, y, reduction="sum")
            sums += torch.stack([loss.double(), hits[:, 0].sum().double(), hits.sum().double()])
        loss_sum, first, five = (sums / len(labels)).tolist()
        return {"test_loss": loss_sum, "test_error": 100 * (1 - first), "test_error_top5": 100 * (1 - five)}
