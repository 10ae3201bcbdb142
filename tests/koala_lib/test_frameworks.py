"""The optimizers inside Lightning, transformers, accelerate, skorch and Ignite end where the plain loop ends.

Every framework trains with accumulated gradients, clipping, a scheduler, an evaluation after each epoch, and in two
halves with a checkpoint between them. The recipes are those of notebooks/03_frameworks.ipynb.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from koala_lib import Apollo, KoalaM, KoalaPlusPlus, KoalaV, Meka
from tests.support.cases import Net, weights

MICRO, EPOCHS, CLIP = 2, 4, 0.5  # two micro-batches make a step; the checkpoint is written after half of the epochs
ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.filterwarnings("ignore")  # of the frameworks, about loggers and workers that nobody wants
each = pytest.mark.parametrize("make", [KoalaV, KoalaM, KoalaPlusPlus])


@pytest.fixture(autouse=True)
def quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("lightning.pytorch", "lightning.fabric", "ignite", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)


def dataset() -> TensorDataset:
    inputs = torch.randn(32, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return TensorDataset(inputs, inputs.sum(1).sin())


def loader() -> DataLoader[Any]:
    return DataLoader(dataset(), batch_size=4)


def losses_of(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square()


def schedule(optimizer: Any, micro: int = MICRO) -> LambdaLR:
    """One rate for every epoch, though schedulers take a step with the optimizer: skorch resumes no other one."""
    steps = len(loader()) // micro
    return LambdaLR(optimizer, lambda k: 0.7 ** (k // steps))


def plain(make: Any, micro: int = MICRO, clip: float = CLIP, missing: int | None = None) -> tuple[Net, Any]:
    """The loop that everyone is held to; ``missing`` is the number of a micro-batch that has no loss."""
    net = Net()
    optimizer = make(net.parameters())
    scheduler = schedule(optimizer, micro)
    for _ in range(EPOCHS):
        for i, (inputs, targets) in enumerate(loader()):
            if i % micro == 0:
                optimizer.predict()
                optimizer.zero_grad()
            if i != missing:
                losses = losses_of(net(inputs), targets)
                optimizer.observe(losses)
                (losses.mean() / micro).backward()
            if i % micro == micro - 1:
                nn.utils.clip_grad_norm_(net.parameters(), clip)
                optimizer.step(lambda: None)  # the bare step() that allows a batch without a loss
                scheduler.step()
    return net, optimizer


def test_clipping_schedule_and_pieces_change_the_plain_loop() -> None:
    """So equality with it says something about each."""
    ends = [plain(KoalaM), plain(KoalaM, clip=1e9), plain(KoalaM, micro=1), plain(KoalaM, missing=2)]
    rates = {float(optimizer.param_groups[0]["lr"]) for _, optimizer in ends}
    assert max(rates) < 0.5
    assert len({tuple(weights(net).tolist()) for net, _ in ends}) == len(ends)


def same(net: Any, optimizer: Any, expected: tuple[Net, Any]) -> None:
    assert torch.equal(weights(net), weights(expected[0]))
    assert optimizer.filter_state() == expected[1].filter_state()
    assert optimizer.skipped_steps == expected[1].skipped_steps


def observed(optimizer: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """What a framework takes for its loss function: hands the losses in where there are gradients."""

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        losses = losses_of(outputs, targets)
        if losses.requires_grad:
            optimizer.observe(losses)
        return losses.mean()

    return loss


# ---- Lightning


def lightning_module(make: Any, micro: int = MICRO, missing: int | None = None, manual: bool = False) -> Any:
    L = pytest.importorskip("lightning", reason="pip install './lab[frameworks]'")

    class Module(L.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net, self.automatic_optimization, self.validated = Net(), not manual, 0

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.optimizers().predict()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
            if batch_idx == missing:
                return None
            losses = losses_of(self.net(batch[0]), batch[1])
            self.optimizers().observe(losses)
            if manual:
                self.step_by_hand(losses.mean() / MICRO, batch_idx)
            return losses.mean()

        def step_by_hand(self, loss: Tensor, batch_idx: int) -> None:
            optimizer = self.optimizers()
            if batch_idx % MICRO == 0:
                optimizer.zero_grad()
            self.manual_backward(loss)
            if batch_idx % MICRO == MICRO - 1:
                self.clip_gradients(optimizer, CLIP, "norm")
                optimizer.step()
                self.lr_schedulers().step()

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.validated += 1
            losses_of(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            optimizer = make(self.parameters(), process_group=dist.group.WORLD)
            return [optimizer], [{"scheduler": schedule(optimizer, micro), "interval": "step"}]

    return Module()


def lightning_trainer(epochs: int, micro: int = MICRO, clip: float | None = CLIP, **more: Any) -> Any:
    L = pytest.importorskip("lightning")
    off = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(
        accelerator="cpu", max_epochs=epochs, accumulate_grad_batches=micro, gradient_clip_val=clip, **off, **more
    )


@each
@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
def test_lightning(make: Any, manual: bool) -> None:
    arguments = {"micro": 1, "clip": None} if manual else {}
    first, second = lightning_module(make, manual=manual), lightning_module(make, manual=manual)
    trainer = lightning_trainer(EPOCHS // 2, **arguments)
    trainer.fit(first, loader(), loader())
    trainer.save_checkpoint("half.ckpt")
    lightning_trainer(EPOCHS, **arguments).fit(second, loader(), loader(), ckpt_path="half.ckpt")
    assert first.validated > 0
    same(second, second.optimizers(), plain(make))


@each
@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("missing", [2, 3])
def test_lightning_without_a_loss(make: Any, micro: int, missing: int) -> None:
    module = lightning_module(make, micro, missing)
    lightning_trainer(EPOCHS, micro).fit(module, loader(), loader())
    expected = plain(make, micro, missing=missing)
    assert expected[1].skipped_steps == (EPOCHS if micro == 1 else 0)
    same(module, module.optimizers(), expected)


def test_lightning_runs_meka_and_apollo() -> None:
    """Meka owns the forward pass, so it runs by hand; Apollo asks for nothing."""
    L = pytest.importorskip("lightning")

    class ByHand(L.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net, self.automatic_optimization = Net(), False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.optimizers(use_pl_optimizer=False).step(*batch)

        def configure_optimizers(self) -> Any:
            return Meka(self.net, losses_of)

    class Automatic(L.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return losses_of(self.net(batch[0]), batch[1]).mean()

        def configure_optimizers(self) -> Any:
            return Apollo(self.parameters(), lr=0.1, warmup_steps=0)

    meka, apollo = ByHand(), Automatic()
    for module in (meka, apollo):
        lightning_trainer(1, micro=1, clip=None).fit(module, loader())
    net, other = Net(), Net()
    by_hand, automatic = Meka(net, losses_of), Apollo(other.parameters(), lr=0.1, warmup_steps=0)
    for inputs, targets in loader():
        by_hand.step(inputs, targets)
        automatic.zero_grad()
        losses_of(other(inputs), targets).mean().backward()
        automatic.step()
    assert torch.equal(weights(meka), weights(net))
    assert torch.equal(weights(apollo), weights(other))


# ---- transformers


class Named(Net):
    """Inputs by name and a dictionary of outputs, as models of transformers have them."""

    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:  # type: ignore[override]
        return {"logits": super().forward(inputs)}


def transformers_trainer(make: Any, epochs: int, batch_size: int = 4) -> tuple[Net, Any, Any]:
    transformers = pytest.importorskip("transformers", reason="pip install './lab[frameworks]'")
    pytest.importorskip("accelerate", reason="pip install './lab[frameworks]'")
    arguments = transformers.TrainingArguments(
        output_dir="out", num_train_epochs=epochs, per_device_train_batch_size=batch_size, max_grad_norm=CLIP,
        gradient_accumulation_steps=MICRO, use_cpu=True, eval_strategy="epoch", save_strategy="epoch",
        train_sampling_strategy="sequential", disable_tqdm=True, report_to="none",
    )  # fmt: skip
    net = Named()
    optimizer = make(net.parameters(), process_group=dist.group.WORLD)

    class Predict(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            optimizer.predict()

    def loss(outputs: Tensor, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        losses = losses_of(outputs["logits"], labels)
        if losses.requires_grad:
            optimizer.observe(losses)
        return losses.sum() / (len(losses) if num_items_in_batch is None else num_items_in_batch)

    rows = [{"inputs": inputs, "labels": targets} for inputs, targets in dataset()]
    trainer = transformers.Trainer(
        net, arguments, train_dataset=rows, eval_dataset=rows, compute_loss_func=loss, callbacks=[Predict()],
        optimizers=(optimizer, schedule(optimizer)),
    )  # fmt: skip
    return net, optimizer, trainer


@each
def test_transformers(make: Any) -> None:
    transformers_trainer(make, EPOCHS // 2)[2].train()
    net, optimizer, trainer = transformers_trainer(make, EPOCHS)
    trainer.train(resume_from_checkpoint=True)
    same(net, optimizer, plain(make))


# ---- accelerate


def accelerate_train(make: Any, epochs: range, **options: Any) -> tuple[Net, Any]:
    accelerate = pytest.importorskip("accelerate", reason="pip install './lab[frameworks]'")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=MICRO, **options)
    net = Net()
    koala = make(net.parameters(), process_group=dist.group.WORLD)
    model, optimizer, batches, scheduler = accelerator.prepare(net, koala, loader(), schedule(koala))
    if epochs.start:
        accelerator.load_state("half")
    for _ in epochs:
        for inputs, targets in batches:
            with accelerator.accumulate(model):
                koala.predict()
                losses = losses_of(model(inputs), targets)
                koala.observe(losses)
                accelerator.backward(losses.mean())
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), CLIP)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
        with torch.no_grad():
            losses_of(model(inputs), targets)
    accelerator.save_state("half")
    return net, koala


@each
def test_accelerate(make: Any) -> None:
    accelerate_train(make, range(EPOCHS // 2))
    same(*accelerate_train(make, range(EPOCHS // 2, EPOCHS)), plain(make))


# ---- skorch


@each
@pytest.mark.parametrize("micro", [1, 2])
def test_skorch(make: Any, micro: int) -> None:
    skorch = pytest.importorskip("skorch", reason="pip install './lab[frameworks]'")
    from skorch import callbacks
    from skorch.helper import predefined_split

    class Regressor(skorch.NeuralNet):  # type: ignore[misc]
        def get_loss(self, y_pred: Tensor, y_true: Tensor, X: Any = None, training: bool = False) -> Tensor:
            losses = super().get_loss(y_pred, y_true, X, training)
            if training:
                self.optimizer_.observe(losses)
            return losses.mean()

    class Accumulating(Regressor):
        """By skorch's own recipe for accumulation, with the prediction before."""

        batches = 0

        def get_loss(self, *args: Any, **kwargs: Any) -> Tensor:
            return super().get_loss(*args, **kwargs) / MICRO

        def train_step(self, batch: Any, **fit_params: Any) -> Any:
            if self.batches % MICRO == 0:
                self.optimizer_.predict()
                self.optimizer_.zero_grad()
            step = self.train_step_single(batch, **fit_params)
            self.batches += 1
            if self.batches % MICRO == 0:
                self.notify("on_grad_computed", named_parameters=self.get_all_learnable_params(), batch=batch)
                self.optimizer_.step()
            return step

    def net() -> Any:
        every = callbacks.LRScheduler(LambdaLR, lr_lambda=lambda epoch: 0.7**epoch)
        clip = callbacks.GradientNormClipping(CLIP)
        return (Regressor if micro == 1 else Accumulating)(
            Net, nn.MSELoss, criterion__reduction="none", optimizer=make, lr=1.0, max_epochs=EPOCHS // 2, batch_size=4,
            train_split=predefined_split(dataset()), callbacks=[every, clip], callbacks__print_log=None,
        ).initialize()  # fmt: skip

    assert skorch.NeuralNet(Net, nn.MSELoss).lr == 0.01  # what it hands on where no rate is given
    first, second = net(), net()
    first.fit(dataset())
    first.save_params(f_params="weights", f_optimizer="optimizer", f_history="history")
    second.load_params(f_params="weights", f_optimizer="optimizer", f_history="history")
    second.partial_fit(dataset())
    assert len(second.history) == EPOCHS
    assert "valid_loss" in second.history[-1]
    same(second.module_, second.optimizer_, plain(make, micro))


# ---- Ignite


@each
def test_ignite(make: Any) -> None:
    pytest.importorskip("ignite", reason="pip install './lab[frameworks]'")
    from ignite.engine import Events, create_supervised_evaluator, create_supervised_trainer
    from ignite.handlers import Checkpoint
    from ignite.metrics import Loss

    def made() -> tuple[Net, Any, Any, Any]:
        net = Net()
        optimizer = make(net.parameters())

        def clip(*_: Any) -> None:
            nn.utils.clip_grad_norm_(net.parameters(), CLIP)

        optimizer.register_step_pre_hook(clip)
        scheduler = schedule(optimizer)
        trainer = create_supervised_trainer(net, optimizer, observed(optimizer), gradient_accumulation_steps=MICRO)
        trainer.add_event_handler(Events.ITERATION_STARTED, lambda: optimizer.predict())
        trainer.add_event_handler(Events.ITERATION_COMPLETED(every=MICRO), lambda: scheduler.step())
        evaluator = create_supervised_evaluator(net, {"loss": Loss(observed(optimizer))})
        trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: evaluator.run(loader()))
        return net, optimizer, trainer, {"net": net, "optimizer": optimizer, "scheduler": scheduler, "trainer": trainer}

    _, _, trainer, saved = made()
    trainer.run(loader(), max_epochs=EPOCHS // 2)
    torch.save({name: of.state_dict() for name, of in saved.items()}, "half.pt")
    net, optimizer, trainer, to_load = made()
    Checkpoint.load_objects(to_load, torch.load("half.pt"))
    trainer.run(loader(), max_epochs=EPOCHS)
    same(net, optimizer, plain(make))


# ---- two ranks, which share every micro-batch


def lightning_rank() -> tuple[Any, Any]:
    module = lightning_module(KoalaM)
    trainer = lightning_trainer(EPOCHS, devices=2, strategy="ddp", use_distributed_sampler=False)
    rows = DistributedSampler(dataset(), 2, int(os.environ["RANK"]), shuffle=False)
    batches = DataLoader(dataset(), batch_size=2, sampler=rows)
    trainer.fit(module, batches, batches)
    return module, module.optimizers()


def transformers_rank() -> tuple[Any, Any]:
    net, optimizer, trainer = transformers_trainer(KoalaM, EPOCHS, batch_size=2)
    trainer.train()
    return net, optimizer


def accelerate_rank() -> tuple[Any, Any]:
    from accelerate.utils import DataLoaderConfiguration

    # Otherwise a prepared scheduler takes a step for every rank.
    split = DataLoaderConfiguration(split_batches=True)
    return accelerate_train(KoalaM, range(EPOCHS), dataloader_config=split)


def keep(train: Callable[[], tuple[Any, Any]]) -> None:
    """What a rank of the test below runs."""
    warnings.filterwarnings("error", ".*without a process_group")
    net, optimizer = train()
    torch.save({"weights": weights(net), "filter": optimizer.filter_state()}, f"{os.environ['RANK']}.pt")


@pytest.mark.parametrize("train", [lightning_rank, transformers_rank, accelerate_rank])
def test_two_ranks(train: Any) -> None:
    pytest.importorskip(train.__name__.removesuffix("_rank"), reason="pip install './lab[frameworks]'")
    script = f"from tests.koala_lib import test_frameworks as t\nt.keep(t.{train.__name__})"
    Path("ranks.py").write_text(script)
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "ranks.py"]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    net, optimizer = plain(KoalaM)
    for rank in range(2):
        found = torch.load(f"{rank}.pt")
        assert torch.allclose(found["weights"], weights(net), rtol=1e-9, atol=1e-9)
        assert found["filter"] == pytest.approx(optimizer.filter_state(), rel=1e-9)
