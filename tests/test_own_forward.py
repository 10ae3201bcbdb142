"""Optimizers that run the forward pass themselves, inside a training run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from koala_lib.optim import Meka
from koala_lib.train import RunConfig, _Run, train

CONFIG = RunConfig(
    dataset="digits",
    model="mlp_100",
    optimizer="meka",
    optimizer_args={"smoothing": 0.0},
    epochs=2,
    batch_size=64,
    train_size=320,
    milestones=(1,),
    gamma=0.5,
)


@pytest.mark.parametrize("name", ["meka", "adameka"])
def test_a_run_is_the_optimizer_on_the_batches_of_the_task(name: str) -> None:
    torch.manual_seed(CONFIG.seed)
    run = _Run(CONFIG.but(optimizer=name), torch.device("cpu"))
    network = run.task.network
    expected = {k: v.clone() for k, v in network.state_dict().items()}
    torch.manual_seed(1)  # nothing is drawn from here on
    losses = []
    for lr, epoch in ((1.0, 0), (0.5, 1)):
        network.train()
        for group in run.optimizers["network"].param_groups:
            assert group["lr"] == lr
        for batch in run.task.batches(epoch):
            run.train_step(batch)
        run.end_epoch()
        losses.append(run.epochs[-1]["train_loss"])
    found = {k: v.clone() for k, v in network.state_dict().items()}

    network.load_state_dict(expected)
    direction = "adam" if name == "adameka" else "gradient"
    loss_fn = nn.CrossEntropyLoss(reduction="none")
    optimizer = Meka(network, loss_fn, smoothing=0.0, direction=direction)
    for lr, epoch in ((1.0, 0), (0.5, 1)):
        optimizer.param_groups[0]["lr"] = lr
        steps = [optimizer.step(x, y) for x, y in run.task.batches(epoch)]
        assert losses[epoch] == pytest.approx(torch.stack(steps).mean().item(), rel=1e-5)
    for key, value in network.state_dict().items():
        assert torch.equal(value, found[key])
    assert losses[1] < losses[0] < 3.0


def test_an_interrupted_run_has_the_same_bits(tmp_path: Path) -> None:
    whole = train(CONFIG)

    class Stop(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done == 7:
            raise Stop

    file = tmp_path / "checkpoint.pt"
    with pytest.raises(Stop):
        train(CONFIG, checkpoint=file, checkpoint_seconds=0, on_step=stop)
    resumed = train(CONFIG, checkpoint=file)
    assert resumed.provenance["weights_sha256"] == whole.provenance["weights_sha256"]
    assert resumed.epochs == whole.epochs


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "gan", "model": "dcgan_small", "milestones": ()}, "optimizer='meka' runs the forward pass itself"),
        ({"precision": "bfloat16"}, "optimizer='meka' runs the forward pass itself"),
        ({"model": "resnet8"}, "BatchNorm"),
        ({"wrapper": "lookahead"}, "wrapper='lookahead'"),
        ({"optimizer": "adameka", "optimizer_args": {"step_size": "golden"}}, "step_size"),
    ],
)
def test_what_cannot_be_done_is_said(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(CONFIG.but(**changes))
