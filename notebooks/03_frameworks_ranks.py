"""Lightning on ranks that share every micro-batch, as 03_frameworks.ipynb launches it:

torchrun --standalone --nproc-per-node 2 03_frameworks_ranks.py FILE

FILE receives the weights.
"""

from __future__ import annotations

import logging
import sys
import warnings
from typing import Any

import lightning
import torch
from torch import Tensor, distributed, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from koala_lib import KoalaM

EPOCHS, SAMPLES, SIZE, PIECES, CLIP = 4, 24, 6, 2, 0.5  # SIZE samples are a micro-batch, PIECES of them make a step


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double()


def samples() -> TensorDataset:
    inputs = torch.randn(SAMPLES, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return TensorDataset(inputs, inputs.sin().sum(dim=1, keepdim=True))


def losses_of(model: Any, batch: list[Tensor]) -> Tensor:
    losses: Tensor = (model(batch[0]) - batch[1]).square().squeeze(1)
    return losses


def rate(step: int) -> float:
    """The factor of the learning rate: smaller in every epoch."""
    return float(0.7 ** (step * PIECES * SIZE // SAMPLES))


# the module
class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = make_model()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.optimizers().predict()  # KOALA

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        losses = losses_of(self.model, batch)
        self.optimizers().observe(losses)  # KOALA
        return losses.mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("validation", losses_of(self.model, batch).mean(), sync_dist=True)

    def configure_optimizers(self) -> Any:
        optimizer = KoalaM(self.parameters(), process_group=distributed.group.WORLD)  # KOALA
        return [optimizer], [{"scheduler": LambdaLR(optimizer, rate), "interval": "step"}]


class Manual(Module):
    automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        loss, optimizer = super().training_step(batch, batch_idx), self.optimizers()
        if batch_idx % PIECES == 0:
            optimizer.zero_grad()
        self.manual_backward(loss / PIECES)
        if batch_idx % PIECES == PIECES - 1:
            self.clip_gradients(optimizer, CLIP, "norm")
            optimizer.step()
            self.lr_schedulers().step()


# the script
def trainer(epochs: int, **options: Any) -> lightning.Trainer:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return lightning.Trainer(accelerator="cpu", max_epochs=epochs, **quiet, **options)


def main(file: str) -> None:
    train = trainer(
        EPOCHS, devices=2, strategy="ddp", accumulate_grad_batches=PIECES, gradient_clip_val=CLIP,
        use_distributed_sampler=False,
    )  # fmt: skip
    share = DistributedSampler(samples(), 2, train.global_rank, shuffle=False)
    batches = DataLoader(samples(), batch_size=SIZE // 2, sampler=share)
    module = Module()
    train.fit(module, batches, batches)
    filters: list[Any] = [None, None]
    distributed.all_gather_object(filters, module.optimizers().filter_state())  # type: ignore[union-attr]
    if train.is_global_zero:
        print(f"two ranks, one filter on both: {filters[0] == filters[1]}")
        torch.save(module.model.state_dict(), file)


if __name__ == "__main__":
    main(sys.argv[1])
