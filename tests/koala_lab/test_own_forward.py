"""Optimizers that run the forward pass themselves, inside a training run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from koala_lab.config import RunConfig
from koala_lab.runs.trace import trace
from koala_lab.runs.training import TrainingRun, train
from koala_lib.optim import Meka

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
    run = TrainingRun(CONFIG.but(optimizer=name), torch.device("cpu"))
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


SWITCH = CONFIG.but(
    epochs=3,
    milestones=(),
    optimizer_args={"step_size": "constant", "lr": 0.1},
    wrapper="switch",
    wrapper_args={"epoch": 1, "step_size": "pi", "lr": 0.4, "curvature_smoothing": 0.9},
    task_args={"landscape_size": 40},
)


def test_a_switch_changes_options_and_keeps_the_filter() -> None:
    result, record = train(SWITCH), trace(SWITCH, 15)
    run = TrainingRun(SWITCH.but(wrapper="", wrapper_args={}), torch.device("cpu"))
    [optimizer], losses = run.optimizers.values(), []
    for epoch in range(3):
        if epoch == 1:
            optimizer.param_groups[0].update(step_size="pi", lr=0.4, curvature_smoothing=0.9)
        losses += [optimizer.step(x, y).item() for x, y in run.task.batches(epoch)]  # type: ignore[call-arg, arg-type]
    assert record["loss"].tolist() == losses
    assert record["step_size"][:5].tolist() == [0.1] * 5
    assert record["slope"].isna().tolist() == [True] * 5 + [False] * 10
    for k, metrics in enumerate(result.epochs):
        for metric in ("step_size", "model_error", "value_variance"):
            mean = record[metric][5 * k : 5 * k + 5].mean()
            assert metrics[metric] == pytest.approx(mean, rel=1e-5, abs=1e-12)
    assert [metrics["lr"] for metrics in result.epochs] == [0.1, 0.4, 0.4]


@pytest.mark.parametrize("config", [CONFIG, SWITCH], ids=["rule", "switch"])
def test_an_interrupted_run_has_the_same_bits(config: RunConfig, tmp_path: Path) -> None:
    whole = train(config)

    class Stop(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done == 7:
            raise Stop

    file = tmp_path / "checkpoint.pt"
    with pytest.raises(Stop):
        train(config, checkpoint=file, checkpoint_seconds=0, on_step=stop)
    resumed = train(config, checkpoint=file)
    assert resumed.provenance["weights_sha256"] == whole.provenance["weights_sha256"]
    assert resumed.epochs == whole.epochs


def test_the_landscape_of_the_training_loss() -> None:
    run = TrainingRun(SWITCH.but(train_size=40, batch_size=20), torch.device("cpu"))
    digits, network = run.task.data, run.task.network
    x = (digits.train_images.double() / 255 - digits.mean.double()) / digits.std.double()
    y = digits.train_labels
    found = run.task.evaluate(network)
    network.double()
    weights = [*network.parameters()]
    rows = []
    for i in range(40):
        loss = nn.functional.cross_entropy(network(x[i : i + 1]), y[i : i + 1])
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)]))
    gradients = torch.stack(rows)
    g, theta, h = gradients.mean(0), nn.utils.parameters_to_vector(weights).detach(), 1e-5

    def slope(at: torch.Tensor) -> torch.Tensor:
        nn.utils.vector_to_parameters(at, weights)
        loss = nn.functional.cross_entropy(network(x), y)
        return torch.cat([t.flatten() for t in torch.autograd.grad(loss, weights)]) @ g

    curvature = float((slope(theta + h * g) - slope(theta - h * g)) / (2 * h) / (g @ g))
    assert found["curvature"] == pytest.approx(curvature, rel=1e-3)
    assert found["gradient_variance"] == pytest.approx(float(gradients.var(0).mean()), rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"wrapper_args": {"epoch": 3}}, "switch needs an epoch from 0 to 2, got 3"),
        ({"wrapper_args": {"epoch": 1, "step_size": "golden"}}, "step_size"),
        ({"task_args": {"landscape_size": 1}}, "landscape_size=1: needs 2 to 320 training samples"),
    ],
)
def test_an_impossible_switch_or_landscape_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(SWITCH.but(**changes))


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
