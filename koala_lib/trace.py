"""A training run watched from inside: what KOALA's filter believed at every step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pandas as pd
import torch

from koala_lib import kalman
from koala_lib.optim import KoalaM, KoalaV
from koala_lib.optim._base import LossFilter, squared_norms
from koala_lib.train import RunConfig, _Run


def trace(config: RunConfig, steps: int, *, device: str | torch.device = "cpu") -> pd.DataFrame:
    """Train for some steps and record the filter; slow, since every step is read back.

    Weights, batches and steps are those of :func:`koala_lib.train.train`, schedule included.

    Args:
        config: what to train; the optimizer must be ``"koala_v"`` or ``"koala_m"``. ``epochs`` does not matter.
        steps: how many steps to take.
        device: where data, weights and filter live.

    Returns:
        One row a step, k = 1, 2, ... in ``step``:

        * ``loss``: minibatch loss L at the predicted weights, with target 0 the innovation;
        * ``gradient_norm``: |h_i| (weight decay included) of the block with the largest, the one that conditions the
          covariance (25). The following three are of that block too:
        * ``innovation_variance``: S = P^ |h_i|^2 + R, in units of loss^2;
        * ``gain``: H K = P^ |h_i|^2 / S in [0, 1], the share of the innovation that the step removes from a linear
          loss; ``smallest_gain`` is that of the block with the smallest gradient;
        * ``rate``: P^ e / S, with which SGD would take the same step in that block (12); e = lr L under the relative
          target, lr under the absolute one, without the penalty of weight decay;
        * ``predicted_variance``: P^ (A^ in KOALA-M);
        * the entries of ``filter_state()`` after the step: ``variance``, in KOALA-M ``covariance`` and
          ``velocity_variance``, ``process_noise``, ``measurement_noise``.

    Raises:
        ValueError: for another optimizer.
    """
    run = _Run(config, torch.device(device))
    optimizer = run.optimizers.get("network")
    if not isinstance(optimizer, KoalaV | KoalaM):
        raise ValueError(f"optimizer={config.optimizer!r} has no filter to record; use koala_v or koala_m")
    rows = []
    for k, batch in zip(range(1, steps + 1), _batches(run), strict=False):
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
        rows.append(
            {
                "step": k,
                "loss": loss,
                "gradient_norm": largest**0.5,
                "innovation_variance": S,
                "gain": predicted * largest / S,
                "smallest_gain": predicted * min(norms) / smallest,
                "rate": predicted * residual / S,
                "predicted_variance": predicted,
                **state,
            }
        )
    return pd.DataFrame(rows)


def _batches(run: _Run) -> Iterator[Any]:
    """Epoch after epoch, with the schedule."""
    run.task.network.train()
    while True:
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
    return [float(norm) for norm in squared_norms(tensors)]
