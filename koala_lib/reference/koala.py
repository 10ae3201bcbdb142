"""KOALA slowly: the paper's equations, one tensor after the other, in the paper's symbols.

These two classes are the oracle of the tests and the text to read beside Algorithm 1 of Davtyan et al.,
"KOALA: A Kalman Optimization Algorithm with Loss Adaptivity" (AAAI 2022, arXiv 2107.03331). They share no
code with :class:`koala_lib.KoalaV` and :class:`koala_lib.KoalaM`, keep every scalar as a Python float and
read tensors back to the host whenever that is shorter. Nothing here is fast; use float64 parameters.

The arguments have the names of the public classes. The attributes have the paper's symbols:

==========  ====================================================================================
x, p        parameters and velocities (eqs. 16, 17), lists over the tensors of all groups
P           variance of x in KOALA-V (eq. 13)
A, C, B     variance of x, covariance of x and p, variance of p in KOALA-M: σ_x², σ_c², σ_p²
Q, q_x      variance added to x in predict (eqs. 7, 24), the one used last; q_p: the same for p
x_avg       running average of x (eq. 23)
R           variance of the observed loss (eq. 22)
L           data loss at x̂, the mean over the minibatch (eq. 3)
g, h        gradient at x̂ of the data loss, and with weight decay: h = g + λ x̂
e           residual, loss minus target, before it is multiplied with the schedule ε (`lr`)
S, eta      innovation variance of every block, and max_i |h_i|² / S_i (eq. 25)
kappa       decay of the velocity (eq. 17); beta: every 0.9 of eqs. 22 to 24
==========  ====================================================================================

All variances here, the q's included, are variances (the paper writes them q², σ²).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor


def _square(tensors: Iterable[Tensor]) -> float:
    """Return |v|² of one vector that lies in several tensors."""
    return sum(float((t * t).sum()) for t in tensors)


@dataclass
class Tile:
    """One parameter tensor with a usable gradient: what the update needs to know about it."""

    index: int
    x: Tensor
    g: Tensor
    h: Tensor
    epsilon: float
    weight_decay: float


@dataclass
class Block:
    """The tensors that share one observation (eq. 25), its squared gradient norm and its residual."""

    tiles: list[Tile]
    h2: float
    e: float


class _Koala:
    """What KOALA-V and KOALA-M have in common: the noise estimates and the reading of one observation."""

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        lr: float = 1.0,
        *,
        process_noise: float | None,
        measurement_noise: float | None = None,
        initial_measurement_noise: float = 1.0,
        noise_decay: float = 0.9,
        target_risk: Literal["relative", "absolute"] = "relative",
        blocks: Literal["tensor", "global"] = "tensor",
        weight_decay: float = 0.0,
        min_grad_norm: float = 1e-9,
        formulas: Literal["paper", "released"] = "paper",
        noise_target: Literal["zero", "current"] = "zero",
    ) -> None:
        self.groups = [{"lr": lr, "weight_decay": weight_decay, **group} for group in groups]
        self.x: list[Tensor] = [x for group in self.groups for x in group["params"]]
        self.n = sum(x.numel() for x in self.x)
        self.beta, self.min_grad_norm = noise_decay, min_grad_norm
        self.target_risk, self.blocks, self.formulas = target_risk, blocks, formulas
        self.noise_target = noise_target  # "current" is eq. 22 to the letter, with one lr for all groups
        self.adapt_Q, self.adapt_R = process_noise is None, measurement_noise is None
        self.R = initial_measurement_noise if measurement_noise is None else measurement_noise
        # The released average of q starts at 0.01; the paper's formula has no initial value and needs none.
        self.q_x = (0.01 if formulas == "released" else 0.0) if process_noise is None else process_noise
        # x_avg starts from zero (released) or from x_0 (paper, which names no start: so the first q_x is 0).
        self.x_avg: list[Tensor] | None = None
        self.S: list[float] = []
        self.eta = 0.0
        self.L = math.nan
        self.skipped_steps = 0

    def _update_process_noise(self) -> None:
        """Compute eqs. 23 and 24 with x = x_{k-1}: before the step moves anything."""
        if not self.adapt_Q:
            return
        beta = self.beta
        if self.formulas == "paper":
            if self.x_avg is None:
                self.x_avg = [x.detach().clone() for x in self.x]
            for avg, x in zip(self.x_avg, self.x, strict=True):
                avg.copy_(beta * avg + (1 - beta) * x)
            self.q_x = _square(x - avg for avg, x in zip(self.x_avg, self.x, strict=True)) / self.n
        else:
            if self.x_avg is None:
                self.x_avg = [torch.zeros_like(x) for x in self.x]
            distance = math.sqrt(_square(x - avg for avg, x in zip(self.x_avg, self.x, strict=True)))
            self.q_x = beta * self.q_x + (1 - beta) * distance / self.n

    def _observe(self, losses: Tensor, grads: Sequence[Tensor | None]) -> list[Block]:
        """Read losses (B,) or () and gradients at x̂. No block means that the observation is missing."""
        finite = all(bool(t.isfinite().all()) for t in [losses, *grads] if t is not None)
        tiles = self._tiles(grads) if finite else []
        if not tiles:
            self.skipped_steps += 1
            return []
        self.L = float(losses.mean())
        if self.adapt_R:  # eq. 22, and R_k is used in the very step k
            square = float(((losses - self._noise_target()) ** 2).mean())
            self.R = self.beta * self.R + (1 - self.beta) * square
        parts = [tiles] if self.blocks == "global" else [[tile] for tile in tiles]
        return [Block(part, _square(tile.h for tile in part), self._residual(part)) for part in parts]

    def _tiles(self, grads: Sequence[Tensor | None]) -> list[Tile]:
        """Return the tensors that take part: with a gradient, and with one that is not too small."""
        settings = [group for group in self.groups for _ in group["params"]]
        tiles = []
        for i, (x, g, group) in enumerate(zip(self.x, grads, settings, strict=True)):
            if g is not None:
                decay = float(group["weight_decay"])
                tiles.append(Tile(i, x, g, g + decay * x, float(group["lr"]), decay))
        if self.formulas == "released":
            return [tile for tile in tiles if math.sqrt(_square([tile.g])) >= self.min_grad_norm]
        return tiles if math.sqrt(_square(tile.g for tile in tiles)) >= self.min_grad_norm else []

    def _residual(self, tiles: list[Tile]) -> float:
        """Return e at ε = 1: (b) the loss with the block's own penalty, target 0 (eq. 28); (a) one (eq. 27)."""
        if self.target_risk == "absolute":
            return 1.0
        return self.L + sum(tile.weight_decay / 2 * _square([tile.x]) for tile in tiles)

    def _noise_target(self) -> float:
        """Return the target in eq. 22: zero, as the authors ran it, or the current one, as they wrote it."""
        if self.noise_target == "zero":
            return 0.0
        (epsilon,) = {float(group["lr"]) for group in self.groups}
        return (1 - epsilon) * self.L if self.target_risk == "relative" else self.L - epsilon


class ReferenceKoalaV(_Koala):
    """KOALA-V, Algorithm 1 (`blocks="global"`) and its layer-wise version (`blocks="tensor"`, eq. 25).

    Args:
        groups: list of dicts with "params" (float64 tensors, changed in place) and, if wanted, "lr" and "weight_decay".
        noise_target: "zero" or "current" (eq. 22 to the letter); exists here only.
        others: as in :class:`koala_lib.KoalaV`.

    Raises:
        ValueError: for an adaptive process noise with ``formulas="released"``, which the released KOALA-V lacks.
    """

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        lr: float = 1.0,
        *,
        initial_variance: float = 0.1,
        process_noise: float | None = 1.0,
        **rest: Any,
    ) -> None:
        super().__init__(groups, lr, process_noise=process_noise, **rest)
        if self.adapt_Q and self.formulas == "released":
            raise ValueError("process_noise: the released KOALA-V has a fixed Q, give a number")
        self.P = initial_variance

    @property
    def Q(self) -> float:
        """Process noise Q_k, a variance."""
        return self.q_x

    @torch.no_grad()
    def predict(self) -> None:
        """Set x̂_k = x_{k-1}, P̂_k = P_{k-1} + Q."""
        self._update_process_noise()
        self.P = self.P + self.Q

    @torch.no_grad()
    def update(self, losses: Tensor, grads: Sequence[Tensor | None]) -> None:
        """Compute eqs. 12 and 13 (per block, eq. 25).

        Args:
            losses: of the samples at x̂_k, (B,), or their mean, ().
            grads: gradient of their mean at x̂_k for every tensor, in its shape; ``None`` where there is none.
        """
        blocks = self._observe(losses, grads)
        if not blocks:
            return
        P, R = self.P, self.R
        self.S = [P * block.h2 + R for block in blocks]
        for block, S in zip(blocks, self.S, strict=True):
            for tile in block.tiles:
                # The released code leaves weight decay out of the direction, and only there.
                direction = tile.g if self.formulas == "released" else tile.h
                tile.x -= P * (tile.epsilon * block.e) / S * direction
        self.eta = max(block.h2 / S for block, S in zip(blocks, self.S, strict=True))
        # (13) in the form that (25) asks for. It loses digits where P |h|² >> R; the fast code writes R/S P.
        self.P = P - self.eta * P**2


class ReferenceKoalaM(_Koala):
    """KOALA-M (eqs. 16 to 21) with the covariance [[A, C], [C, B]] ⊗ I.

    Args:
        groups: as in :class:`ReferenceKoalaV`.
        others: as there and in :class:`koala_lib.KoalaM`.
    """

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        lr: float = 1.0,
        *,
        momentum: float = 0.9,
        initial_variance: float = 0.1,
        initial_velocity_variance: float = 0.1,
        initial_covariance: float = 0.0,
        process_noise: float | None = None,
        velocity_noise: float = 0.01,
        **rest: Any,
    ) -> None:
        super().__init__(groups, lr, process_noise=process_noise, **rest)
        self.kappa, self.q_p = momentum, velocity_noise
        self.A, self.B, self.C = initial_variance, initial_velocity_variance, initial_covariance
        self.p = [torch.zeros_like(x) for x in self.x]

    @torch.no_grad()
    def predict(self) -> None:
        """Compute eqs. 16 and 17; P̂ = F P Fᵀ + Q. Every tensor moves, whether it will get a gradient or not."""
        self._update_process_noise()
        for x, p in zip(self.x, self.p, strict=True):
            x += p
            p *= self.kappa
        A, B, C, kappa = self.A, self.B, self.C, self.kappa
        self.A = A + 2 * C + B + self.q_x
        self.C = kappa * (C + B)
        self.B = kappa**2 * B + self.q_p

    @torch.no_grad()
    def update(self, losses: Tensor, grads: Sequence[Tensor | None]) -> None:
        """Compute Table 1 with the approximations (21) and (25).

        Args:
            losses: as in :meth:`ReferenceKoalaV.update`.
            grads: likewise.
        """
        blocks = self._observe(losses, grads)
        if not blocks:
            return
        A, B, C, R = self.A, self.B, self.C, self.R
        self.S = [A * block.h2 + R for block in blocks]
        for block, S in zip(blocks, self.S, strict=True):
            for tile in block.tiles:
                tile.x -= A * (tile.epsilon * block.e) / S * tile.h
                self.p[tile.index] -= C * (tile.epsilon * block.e) / S * tile.h
        eta = self.eta = max(block.h2 / S for block, S in zip(blocks, self.S, strict=True))
        self.A = A - eta * A**2
        self.C = C - eta * A * C
        self.B = B - eta * C**2
        if self.formulas == "released" and self.x_avg is not None:
            # The released code averages the posterior x_k, and only where there was a usable gradient.
            for tile in (tile for block in blocks for tile in block.tiles):
                avg = self.x_avg[tile.index]
                avg.copy_(self.beta * avg + (1 - self.beta) * tile.x)
