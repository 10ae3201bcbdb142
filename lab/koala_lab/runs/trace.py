"""A training run watched from inside: what the filter of KOALA or MEKA believed at every step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from koala_lab import data
from koala_lab.config import RunConfig
from koala_lab.runs.training import TrainingRun
from koala_lib import Meka, kalman
from koala_lib.optim.filter import LossFilter


def trace(
    config: RunConfig, steps: int, *, device: str | torch.device = "cpu", full_gradient: bool = False
) -> pd.DataFrame:
    """Train for some steps and record the filter; slow, since every step is read back.

    Weights, batches and steps are those of :func:`koala_lab.runs.training.train`, schedule included.

    Args:
        config: what to train; the optimizer must be one of KOALA's or MEKA's. ``epochs`` does not matter.
        steps: how many steps to take.
        device: where data, weights and filter live.
        full_gradient: for MEKA, compare its gradients with that of the whole training set, at the same weights and
            without augmentation; as many times slower as there are batches.

    Returns:
        One row per step, k = 1, 2, ... in ``step``:

        * ``loss``: minibatch loss L at the predicted weights, with KOALA's target 0 the innovation;
        * the entries of ``filter_state()`` after the step.

        For KOALA also, before the latter:

        * ``gradient_norm``: |h_i| (weight decay included) of the block with the largest, the one that conditions the
          covariance (25). The following three are of that block too:
        * ``innovation_variance``: S = P^ |h_i|^2 + R, in units of loss^2;
        * ``gain``: H K = P^ |h_i|^2 / S in [0, 1], the share of the innovation that the step removes from a linear
          loss; ``smallest_gain`` is that of the block with the smallest gradient;
        * ``rate``: P^ e / S, with which SGD would take the same step in that block (12); e = lr L under the relative
          target, lr under the absolute one, without the penalty of weight decay;
        * ``predicted_variance``: P^ (A^ in KOALA-M).

        For MEKA with ``full_gradient``, Euclidean norms over all weights:

        * ``full_loss``, ``full_gradient_norm``: the mean training loss before the step, and the norm of its gradient;
        * ``filtered_error``, ``minibatch_error``: distances of m_t and g_t from it.

    Raises:
        ValueError: for another optimizer, KOALA with ``full_gradient``, or a warm-up.
    """
    if config.warmup_steps:
        raise ValueError(f"a trace has no warm-up, but warmup_steps={config.warmup_steps}; leave it out")
    run = TrainingRun(config, torch.device(device))
    optimizer: Any = run.optimizers.get("network")
    if not hasattr(optimizer, "filter_state") or config.optimizer == "koala_plus_plus":  # whose variance is no scalar
        raise ValueError(
            f"optimizer={config.optimizer!r} has no filter to record; use koala_v, koala_m, meka or adameka"
        )
    if not hasattr(optimizer, "predict"):
        rows = (_meka_step(run, optimizer, batch, full_gradient) for batch in _batches(run))
    elif full_gradient:
        raise ValueError("full_gradient=True compares the filtered gradient, which only MEKA has")
    else:
        rows = (_koala_step(run, optimizer, batch) for batch in _batches(run))
    return pd.DataFrame({"step": k, **row} for k, row in zip(range(1, steps + 1), rows, strict=False))


def _koala_step(run: TrainingRun, optimizer: LossFilter, batch: Any) -> dict[str, float]:
    optimizer.predict()
    predicted = optimizer.filter_state()["variance"]
    optimizer.zero_grad()
    losses = run.task.sample_losses(batch)
    losses.mean().backward()  # type: ignore[no-untyped-call]
    norms, group = _squared_block_norms(optimizer), optimizer.param_groups[0]
    optimizer.step(loss=losses)
    state, loss, largest = optimizer.filter_state(), losses.mean().item(), max(norms)
    residual = float(group["lr"]) * (loss if group["target_risk"] == "relative" else 1.0)
    S = kalman.innovation_variance(predicted, largest, state["measurement_noise"])
    smallest = kalman.innovation_variance(predicted, min(norms), state["measurement_noise"])
    return {
        "loss": loss,
        "gradient_norm": largest**0.5,
        "innovation_variance": S,
        "gain": predicted * largest / S,
        "smallest_gain": predicted * min(norms) / smallest,
        "rate": predicted * residual / S,
        "predicted_variance": predicted,
        **state,
    }


def _meka_step(run: TrainingRun, optimizer: Meka, batch: Any, full_gradient: bool) -> dict[str, float]:
    row: dict[str, float] = {}
    if full_gradient:
        full, row["full_loss"] = _mean_gradient(run, _training_set(run))
        minibatch, _ = _mean_gradient(run, [batch])
    row["loss"] = run.task.step(batch, run.optimizers).item()
    if full_gradient:
        filtered = torch.cat([optimizer.state[p]["mean"].flatten() for p in run.task.network.parameters()])
        row["full_gradient_norm"] = full.norm().item()
        row["filtered_error"] = (filtered - full).norm().item()
        row["minibatch_error"] = (minibatch - full).norm().item()
    return row | optimizer.filter_state()


def _mean_gradient(run: TrainingRun, batches: Iterable[Any]) -> tuple[Tensor, float]:
    """Return the gradient of the mean loss over all samples of some batches, as one vector, and that loss."""
    parameters = [*run.task.network.parameters()]
    total, loss, samples = torch.zeros(sum(p.numel() for p in parameters), device=run.device), 0.0, 0
    for batch in batches:
        losses = run.task.sample_losses(batch)
        total += torch.cat([g.flatten() for g in torch.autograd.grad(losses.sum(), parameters)])
        loss += losses.sum().item()
        samples += len(losses)
    return total / samples, loss / samples


def _training_set(run: TrainingRun) -> Iterable[Any]:
    images = run.task.data
    return data.batches(images.train_images, images.train_labels, 1000, mean=images.mean, std=images.std)


def _batches(run: TrainingRun) -> Iterator[Any]:
    """Epoch after epoch, with schedule and switch."""
    while True:
        run.begin_epoch()
        yield from run.task.batches(run.epoch)
        run.schedulers["network"].step()
        run.epoch += 1


@torch.no_grad()
def _squared_block_norms(optimizer: LossFilter) -> list[float]:
    """|g_i + lambda x_i|^2 of every tensor that has a gradient."""
    tensors = [
        p.grad + group["weight_decay"] * p
        for group in optimizer.param_groups
        for p in group["params"]
        if p.grad is not None
    ]
    return [float(torch.linalg.vector_norm(t, dtype=torch.float64)) ** 2 for t in tensors]
