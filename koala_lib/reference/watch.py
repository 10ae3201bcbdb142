"""The numbers of :mod:`koala_lib.watch` as a slow loop over weights."""

from __future__ import annotations

import math
from collections.abc import Sequence

Vector = Sequence[float]


def reference_watch(
    gradients: Sequence[Vector], moves: Sequence[Vector], gains: Sequence[float]
) -> list[dict[str, float]]:
    """Compare every gradient with the average of those before.

    Args:
        gradients: g_1, g_2, ..., n numbers each.
        moves: displacements of the weights by the step that follows each gradient.
        gains: k = 1 - momentum at each step.

    Returns:
        A row per step, NaN where there is no earlier one: ``innovation`` (root mean square over the weights),
        ``product`` (inner product with the one before), ``whiteness`` (its cosine), ``nis``, ``promised``.
    """
    n, rows = len(gradients[0]), []
    mean, weight = [0.0] * n, 0.0
    innovation, last = [math.nan] * n, [math.nan] * n
    for g, d, k in zip(gradients, moves, gains, strict=True):
        before, innovation = innovation, [g[i] - mean[i] if weight else math.nan for i in range(n)]
        weight = (1 - k) * weight + k
        mean = [mean[i] + k / weight * (g[i] - mean[i]) for i in range(n)]  # sum of (1 - k)^(t - i) k g_i / weight
        squared = sum(v * v for v in innovation)
        product = sum(v * w for v, w in zip(innovation, before, strict=True))
        S = sum((g[i] - last[i]) ** 2 for i in range(n)) / (1 + (1 - k) ** 2)
        rows.append(
            {
                "innovation": math.sqrt(squared / n),
                "product": product,
                "whiteness": product / math.sqrt(squared * sum(v * v for v in before)),
                "nis": squared / S,
                "promised": -sum(g[i] * d[i] for i in range(n)),
            }
        )
        last = list(g)
    return rows
