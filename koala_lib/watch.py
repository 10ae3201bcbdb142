r"""What a momentum or a filter did: its innovations, their whiteness, and what it promised beside what came.

A momentum is a filter of the gradient whose gain k is fixed: :math:`m_t = m_{t-1} + k\,(g_t - m_{t-1})` with k = 1 -
momentum. Its innovation :math:`\nu_t = g_t - m_{t-1}` is what the last average did not foresee. If the full gradient
moves at random with variance q a step and a minibatch adds noise of variance :math:`\sigma`, then in the steady state
(p is the variance of the prediction's error)

.. math::
    p = \frac{k^2 \sigma + q}{k (2 - k)}, \qquad
    E\,\nu_t \nu_{t+1} = (1 - k)\,p - k \sigma = \frac{(1 - k)\,q - k^2 \sigma}{k (2 - k)},

which is zero exactly at the Kalman gain, :math:`k^2 / (1 - k) = q / \sigma`: the innovations of the best gain are white
(Mehra, 1970; Bar-Shalom et al., *Estimation with Applications*, ch. 5.4). Positive says that the gain is too small, the
momentum too large. Summed over weights it is zero at the one gain that is best for all of them together. "Best" is
the best prediction of the next minibatch gradient, and not the fastest training.

A watch reads a fixed sample of at most ``coordinates`` weights (all of a small network), in float64: per step one view
of each gradient and about fifteen operations on vectors of that length, however large the network is. Nothing is read
back before it is asked for. ``koala_lib/reference/watch.py`` is the same as a slow loop.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from koala_lib.optim import Meka
from koala_lib.optim._engine.checks import check_number
from koala_lib.optim._engine.samples import Sample
from koala_lib.optim._engine.sharded import is_sharded
from koala_lib.optim.filter import LossFilter
from koala_lib.step_size import improvement_probability

__all__ = ["Verdict", "Watch", "best_gain", "promised_variance", "reliability", "verdict_of", "watch"]

LEAST_PAIRS = 20  # below, nothing is said
OPERATIONS = 15  # of a watched step; and of a training step per tensor of weights, at the least:
OPERATIONS_PER_TENSOR = 10  # forward, two products backward, activation, gradient and optimizer
SHARE = 0.1  # of a training step, what a watch may cost

Row = dict[str, float]


# ---- the statistics --------------------------------------------------------------------------------------------------


class Verdict(NamedTuple):
    """What the innovations say of the momentum.

    Attributes:
        momentum: ``"too large"``, ``"too small"``, ``"right"``, or ``"undecided"`` after fewer than 20 pairs of steps.
        z: their lag-1 covariance in units of its own spread; normal around 0 if they are white.
        pairs: number of pairs of consecutive innovations.
        best_momentum: 1 - the gain whose innovations would have been white; NaN where groups differ in momentum.
    """

    momentum: str
    z: float
    pairs: int
    best_momentum: float


def verdict_of(products: Sequence[float], best_momentum: float = math.nan, *, level: float = 0.01) -> Verdict:
    r"""Test whether innovations are white.

    :math:`z = \sum_t c_t / \sqrt{\sum_t c_t^2}` with :math:`c_t = \nu_t^\top \nu_{t+1}`. White innovations make the
    :math:`c_t` martingale differences, so z is standard normal after many steps; for symmetric noise its tails are no
    wider after few (Efron, 1969). How many weights there are, how they are correlated and how the noise's size changes
    does not matter.

    Args:
        products: the c_t, at least 20 for an answer.
        best_momentum: is passed on.
        level: probability of not saying "right" where the innovations are white.

    >>> verdict_of([1.0, -1.0] * 10).momentum, verdict_of([1.0, 0.5] * 10).momentum
    ('right', 'too large')
    """
    pairs, size = len(products), math.sqrt(sum(c * c for c in products))
    z = sum(products) / size if size else math.nan
    limit = float(torch.special.ndtri(torch.tensor(1 - level / 2, dtype=torch.float64)))
    word = "right" if abs(z) <= limit else "too large" if z > 0 else "too small"
    return Verdict(word if pairs >= LEAST_PAIRS and size else "undecided", z, pairs, best_momentum)


def best_gain(gain: float, correlation: float) -> float:
    r"""Return the gain whose innovations would be white, from those of another gain.

    With :math:`\rho = E\,\nu_t \nu_{t+1} / E\,\nu_t^2` at the gain k, the steady state above gives
    :math:`r = q / \sigma = k (k + 2 \rho) / (1 - k - \rho)`, and :math:`k_*^2 / (1 - k_*) = r` the best gain.

    >>> best_gain(0.1, 0.0), best_gain(0.5, -0.25)  # white already; too large, even at no movement at all
    (0.1, 0.0)
    """
    noise = 1 - gain - correlation  # sigma / E nu^2
    if noise <= 0:
        return 1.0
    r = max(gain * (gain + 2 * correlation) / noise, 0.0)
    return round(2 * r / (r + math.sqrt(r * r + 4 * r)), 12) if r else 0.0


def promised_variance(gain: float, difference: float) -> float:
    r"""Return the variance of the innovation that a gain promises by being what it is.

    :math:`S = \sigma / (1 - k)` if k is the Kalman gain, and the mean square of :math:`g_t - g_{t-1}` is
    :math:`2 \sigma + q`, so :math:`S = E (g_t - g_{t-1})^2 / (1 + (1 - k)^2)`.

    >>> promised_variance(1.0, 3.0)  # no memory: the prediction is the last gradient
    3.0
    """
    return difference / (1 + (1 - gain) ** 2)


def reliability(rows: Iterable[tuple[float, bool]], bins: int = 5) -> list[Row]:
    """Sort probabilities into bins of equal width and count how often the event came.

    Args:
        rows: pairs of a probability and whether the event came.
        bins: how many; empty ones are left out.

    Returns:
        A row per bin: ``low``, ``high``, ``promised`` (mean probability), ``observed`` (share), ``n``.

    >>> reliability([(0.9, True), (0.7, False), (0.1, False)], bins=2)[1]
    {'low': 0.5, 'high': 1.0, 'promised': 0.8, 'observed': 0.5, 'n': 2}
    """
    cells: list[list[tuple[float, bool]]] = [[] for _ in range(bins)]
    for probability, came in rows:
        cells[min(int(probability * bins), bins - 1)].append((probability, came))
    found = []
    for i, cell in enumerate(cells):
        if cell:
            promised, observed = (sum(column) / len(cell) for column in zip(*cell, strict=True))
            edges = {"low": i / bins, "high": (i + 1) / bins}
            found.append(edges | {"promised": promised, "observed": observed, "n": len(cell)})
    return found


def gain_of(group: dict[str, Any]) -> float:
    """Return 1 - momentum of a param group, 1 where it names none: an optimizer that forgets the last gradient."""
    if "betas" in group:
        return 1 - float(group["betas"][0])
    return 1 - float(group.get("momentum", group.get("beta", 0.0)))


# ---- the watch -------------------------------------------------------------------------------------------------------

_PRODUCTS = len(Sample.NAMES) ** 2
_OF_MEKA = ("probability", "predicted", "predicted_variance", "value_variance")
_NUMBERS = ("loss", "after", "variance", "gain", "P", "R", *_OF_MEKA)  # what a step may tell beside inner products
_COLUMN = {name: _PRODUCTS + i for i, name in enumerate(_NUMBERS)}


class _Meta(NamedTuple):
    """What the host knows of a row."""

    step: int
    age: int  # steps since the filter of the watch began, from 1
    gain: float  # NaN where it differs between groups, or stands in the row
    weights: int


class Watch:
    """Numbers on every step of an optimizer; :func:`watch` makes it and says what it costs."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        gain: float | None,
        window: int,
        rest: int | None,
        coordinates: int,
        level: float,
        history: int,
    ) -> None:
        self.optimizer, self.window, self.level = optimizer, window, level
        self.model, self._gain, self._rest, self._coordinates, self._history = model, gain, rest, coordinates, history
        self._steps = self._age = 0  # of the optimizer; since the filter began
        self._weight: list[float] = []  # per group, the sum of the weights of its average
        self._sample: Sample | None = None
        self._rows: Tensor | None = None
        self._meta: deque[_Meta] = deque(maxlen=history)
        self._written = 0
        self._loss: Tensor | None = None
        self._ready = False  # whether the gradient of the step in progress was read
        self._P: Tensor | None = None
        self._hooks = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]
        if isinstance(optimizer, Meka):
            optimizer._seen = {}

    # -- what a user calls -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def observe(self, loss: Tensor | float) -> None:
        """Hand in the minibatch loss whose gradient the next step uses, before that step.

        What a closure returns, ``step(loss=...)`` of KOALA and the loss of MEKA need not be handed in.

        Args:
            loss: the mean loss, or the losses of the samples.
        """
        self._loss = torch.as_tensor(loss).detach().to(torch.float32 if self._on_mps() else torch.float64).mean()

    @torch.no_grad()
    def after(self, loss: Tensor | float) -> None:
        """Hand in the loss of the same minibatch after the last step: column ``delivered`` is what the step removed.

        It costs a forward pass, a third of a training step; every 30th step is enough for a mean.

        Args:
            loss: the mean loss, or the losses of the samples.
        """
        if self._rows is not None and self._meta and self._meta[-1].step == self._steps:
            self._write("after", torch.as_tensor(loss).detach().mean(), (self._written - 1) % self._history)

    def table(self) -> list[Row]:
        """Return a row per watched step, the last ``history`` of them; what is not known is NaN. Waits for the device.

        * ``step``: from 1; ``gain``: 1 - momentum, of MEKA the filter's;
        * ``innovation``: root mean square over the weights; ``whiteness``: cosine with the step's before;
        * ``nis``: square of the innovation over the variance that the gain promises, of MEKA over p + sigma;
        * ``promised``: decrease of the loss along the step, to first order, which is what KOALA-V's gains promise;
        * ``delivered``: decrease on the same minibatch (:meth:`after`); ``fresh``: from this minibatch to the next one;
        * ``loss``; ``loss_nis``: of KOALA's filter with target 0, L^2 / (P |g|^2 + R), on one block;
        * ``probability``: of improvement (MEKA, eq. 12) at the step it took, there its filter's ``predicted`` decrease
          of the loss, ``predicted_variance`` V and ``value_variance`` s, which V counts twice (eq. 11).
        """
        return self._table(self._meta)

    def scalars(self) -> Row:
        """Return the numbers of the last ``window`` steps, for TensorBoard or a CSV file. Waits for the device.

        The columns of :meth:`table` as means; ``nis`` and ``whiteness`` as ratios of sums, ``delivered_share`` and
        ``fresh_share`` of what was promised, ``z`` and ``best_momentum`` of :meth:`verdict`.
        """
        rows = self._recent()
        verdict, z = self._verdict(rows), [r["_c1"] for r in rows]
        whole = {"step": float(self._steps), "z": verdict.z, "best_momentum": verdict.best_momentum}
        whole["whiteness"] = _share(z, [r["_white"] for r in rows])
        whole["nis"] = _share([r["_c0"] for r in rows], [r["_S"] for r in rows])
        for name in ("delivered", "fresh"):
            whole[f"{name}_share"] = _share([r[name] for r in rows], [r["promised"] for r in rows])
        means = {n: _mean([r[n] for r in rows]) for n in (rows[0] if rows else {}) if n[0] != "_" and n not in whole}
        return whole | means

    def verdict(self) -> Verdict:
        """Say whether momentum is too large, too small or right, from the last ``window`` steps, at ``level``."""
        return self._verdict(self._recent())

    def close(self) -> None:
        """Stop watching; what was seen can still be read."""
        for hook in self._hooks:
            hook.remove()
        if isinstance(self.optimizer, Meka):
            self.optimizer._seen = None

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- during a step ---------------------------------------------------------------------------------------------

    def _before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
        """Read gradients and weights before the step; where a closure computes them, after its first call."""
        self._steps += 1
        self._ready = False
        if self._resting():
            self._loss = None
            return None
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if isinstance(optimizer, Meka):
            self._read_weights(list(optimizer._named_parameters().values()))
        elif callable(closure):
            wrapped = self._reading(closure)
            return ((args[0], wrapped, *args[2:]), kwargs) if len(args) > 1 else (args, kwargs | {"closure": wrapped})
        else:
            if kwargs.get("loss") is not None:
                self.observe(kwargs["loss"])
            self._read()
        return None

    def _reading(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        def read_after() -> Any:
            returned = closure()
            if not self._ready:
                if isinstance(returned, Tensor | float):
                    self.observe(returned)
                self._read()
            return returned

        return read_after

    @torch.no_grad()
    def _read(self) -> None:
        """Read p.grad and p."""
        mine = [p for p in self._watched() if p.grad is not None]
        if not mine:
            return
        sample = self._read_weights(mine)
        self._ready = True
        grads = [p.grad for p in sample.parameters if p.grad is not None]
        sample.gather(grads, sample.vectors[2])
        scale = getattr(self.optimizer, "grad_scale", None)  # of a gradient scaler, where the step itself divides by it
        if scale is not None:
            sample.vectors[2].div_(scale)
        if isinstance(self.optimizer, LossFilter) and "variance" in self.optimizer.filter_entries:
            self._P = self.optimizer._entries()["variance"].clone()

    @torch.no_grad()
    def _read_weights(self, parameters: list[Tensor]) -> Sample:
        if self._sample is None or not self._sample.fits(parameters):
            self._begin(parameters)
        elif self._age == 0:
            self._sample.mean.zero_()
        assert self._sample is not None
        self._sample.gather(None, self._sample.start)
        return self._sample

    @torch.no_grad()
    def _after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Compare with the prediction, and write a row of numbers."""
        sample, told = self._sample, {}
        seen = optimizer._seen if isinstance(optimizer, Meka) else None
        filtered = dict(seen) if seen else None
        if sample is None or not (self._ready or filtered):
            return
        self._age += 1
        vectors = sample.vectors
        innovation, gradient, move = vectors[(self._age + 1) % 2], vectors[2], vectors[4]
        if filtered:
            told = self._meka(filtered, innovation)
            optimizer._seen = {}  # type: ignore[attr-defined]
        gradient.mul_(sample.scale)
        torch.sub(gradient, sample.last, out=vectors[3])
        sample.last.copy_(gradient)
        gains = [math.nan] if filtered else self._average(innovation)
        sample.gather(None, move)
        torch.sub(sample.start, move, out=move).mul_(sample.scale)
        if self._loss is not None:
            told["loss"] = self._loss
        if self._P is not None:
            told |= {"P": self._P, "R": optimizer._entries()["measurement_noise"]}  # type: ignore[attr-defined]
        row = self._next_row(gains[0] if len(set(gains)) == 1 else math.nan)
        assert self._rows is not None
        self._rows[row, :_PRODUCTS] = (vectors @ vectors.T).flatten()
        for name, number in told.items():
            self._write(name, number, row)
        self._loss = self._P = None

    def _average(self, innovation: Tensor) -> list[float]:
        """Compare the gradient with the average of those before, corrected for its start as Adam's; return k."""
        sample = self._sample
        assert sample is not None
        torch.sub(sample.vectors[2], sample.mean, out=innovation)
        innovation.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)  # a gradient that is not finite is not kept
        gains = [gain_of(g) if self._gain is None else self._gain for g in self._groups]
        steps = []
        for i, k in enumerate(gains):
            self._weight[i] = (1 - k) * self._weight[i] + k
            steps.append(k / self._weight[i] if self._weight[i] else 0.0)
        if len(set(steps)) == 1:
            sample.mean.add_(innovation, alpha=steps[0])
        else:
            for part, step in zip(sample.parts, steps, strict=True):
                sample.mean[part].add_(innovation[part], alpha=step)
        return gains

    def _meka(self, seen: dict[str, Any], innovation: Tensor) -> dict[str, Tensor]:
        """Take over what MEKA compared itself; return what it tells."""
        sample = self._sample
        assert sample is not None
        sample.gather(seen["gradients"], sample.vectors[2])
        sample.gather(seen["predictions"], innovation)
        torch.sub(sample.vectors[2], innovation, out=innovation).mul_(sample.scale)
        told = {name: seen[name] for name in ("loss", "variance", "gain")}
        if "change" in seen:
            change, alpha = seen["change"], seen["step_size"]
            told |= {"predicted": -change.mean(alpha), "predicted_variance": change.variance(alpha)}
            told |= {"value_variance": change.value_variance, "probability": improvement_probability(change, alpha)}
        return told

    # -- bookkeeping -----------------------------------------------------------------------------------------------

    def _watched(self) -> list[Tensor]:
        ours = set(self.model.parameters())
        return [p for g in self.optimizer.param_groups for p in g["params"] if p.requires_grad and p in ours]

    def _begin(self, parameters: list[Tensor]) -> None:
        """Take a sample of these weights; the filter of the watch begins anew."""
        for p in parameters:
            if p.grad is not None and p.grad.layout != torch.strided:
                raise RuntimeError(
                    f"watch cannot read a sparse gradient (parameter of shape {tuple(p.shape)}): use a dense one, e.g. "
                    "Embedding(sparse=False), or watch a part of the model without it"
                )
        if len({p.device for p in parameters}) > 1:
            raise RuntimeError("watch reads weights of one device: watch a part of the model that lies on one")
        mine, groups = set(parameters), self.optimizer.param_groups
        parts = [[p for p in group["params"] if p in mine] for group in groups]
        self._groups = [group for group, part in zip(groups, parts, strict=True) if part]
        if isinstance(self.optimizer, Meka):
            parts = [parameters]  # in the order of its gradients
        self._sample = Sample([part for part in parts if part], self._coordinates)
        self._weight = [0.0] * len(self._groups)
        self._age = 0
        if self._rest is None:
            work = OPERATIONS_PER_TENSOR * len(parameters) * SHARE
            self._rest = max(0, math.ceil(self.window * (OPERATIONS / work - 1)))
        if self._rows is None:
            scale = self._sample.scale
            self._rows = scale.new_full((self._history, _PRODUCTS + len(_NUMBERS)), math.nan)

    def _resting(self) -> bool:
        """Say whether this step is left out; a new window begins anew after a rest."""
        if not self._rest:
            return False
        at = (self._steps - 1) % (self.window + self._rest)
        if at == 0:
            self._age, self._weight = 0, [0.0] * len(self._weight)
        return at >= self.window

    def _next_row(self, gain: float) -> int:
        assert self._rows is not None
        assert self._sample is not None
        row = self._written % self._history
        if self._written >= self._history:
            self._rows[row].fill_(math.nan)
        self._written += 1
        self._meta.append(_Meta(self._steps, self._age, gain, self._sample.weights))
        return row

    def _write(self, name: str, number: Tensor, row: int) -> None:
        assert self._rows is not None
        self._rows[row, _COLUMN[name]].copy_(number)

    def _on_mps(self) -> bool:
        return any(p.device.type == "mps" for g in self.optimizer.param_groups for p in g["params"][:1])

    # -- reading ---------------------------------------------------------------------------------------------------

    def _recent(self) -> list[Row]:
        return self._table(list(self._meta)[-self.window :], hidden=True)

    def _table(self, meta: Sequence[_Meta], hidden: bool = False) -> list[Row]:
        """Return rows of the last steps; with the inner products, whose names begin with _, if ``hidden``."""
        if self._rows is None or not meta:
            return []
        first = self._written - len(meta)
        order = [i % self._history for i in range(first, self._written)]
        numbers = self._rows[order].cpu().double().tolist()
        rows: list[Row] = []
        for about, row in zip(meta, numbers, strict=True):
            rows.append(_row(about, row, rows[-1] if rows else None))
        return rows if hidden else [{k: v for k, v in r.items() if k[0] != "_"} for r in rows]

    def _verdict(self, rows: list[Row]) -> Verdict:
        pairs = [r["_c1"] for r in rows if math.isfinite(r["_c1"])]
        rho = _share([r["_c1"] for r in rows], [r["_white"] for r in rows])
        gain = _mean([r["gain"] for r in rows]) if all(math.isfinite(r["gain"]) for r in rows) else math.nan
        best = 1 - best_gain(gain, rho) if math.isfinite(gain) and math.isfinite(rho) else math.nan
        return verdict_of(pairs, best, level=self.level)


def _row(about: _Meta, numbers: list[float], before: Row | None) -> Row:
    """Return what a row of the table says, from inner products and what is known of the step."""
    width = len(Sample.NAMES)
    now, past = (0, 1) if about.age % 2 else (1, 0)

    def product(i: int, j: int) -> float:
        return numbers[i * width + j]

    told = {name: numbers[column] for name, column in _COLUMN.items()}
    measured = math.isfinite(told["variance"])  # by MEKA
    valid = math.isfinite(product(2, 2)) and about.age > 1
    c0 = product(now, now) if valid else math.nan
    follows = before is not None and before["step"] == about.step - 1 and about.age > 1
    paired = valid and follows and before is not None and math.isfinite(before["_c0"])
    c1 = product(now, past) if paired else math.nan
    gain = told["gain"] if measured else about.gain
    S = about.weights * told["variance"] if measured else promised_variance(gain, product(3, 3))
    white = math.sqrt(c0 * before["_c0"]) if before is not None else math.nan
    if before is not None and follows:
        before["fresh"] = before["loss"] - told["loss"]
    return {
        "step": about.step,
        "gain": gain,
        "innovation": math.sqrt(c0 / about.weights),
        "whiteness": _ratio(c1, white),
        "nis": _ratio(c0, S) if about.age > 1 else math.nan,
        "loss": told["loss"],
        "promised": product(2, 4),
        "delivered": told["loss"] - told["after"],
        "fresh": math.nan,
        "loss_nis": _ratio(told["loss"] ** 2, told["P"] * product(2, 2) + told["R"]),
        **{name: told[name] for name in _OF_MEKA},
        "_c0": c0,
        "_c1": c1,
        "_white": white if math.isfinite(c1) else math.nan,
        "_S": S if about.age > 1 else math.nan,
    }


def _ratio(a: float, b: float) -> float:
    return a / b if b else math.nan


def _mean(values: list[float]) -> float:
    known = [v for v in values if math.isfinite(v)]
    return sum(known) / len(known) if known else math.nan


def _share(parts: list[float], wholes: list[float]) -> float:
    """Return the ratio of two sums, over the steps at which both are known."""
    known = [(a, b) for a, b in zip(parts, wholes, strict=True) if math.isfinite(a) and math.isfinite(b)]
    return _ratio(sum(a for a, _ in known), sum(b for _, b in known))


def watch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    gain: float | None = None,
    window: int = 100,
    rest: int | None = None,
    coordinates: int = 10_000,
    level: float = 0.01,
    history: int = 10_000,
) -> Watch:
    """Watch an optimizer without changing its steps.

    Any ``torch.optim.Optimizer`` will do, ours included; KOALA is watched as a filter of the loss, too, and MEKA by the
    innovations of its own filter, whose prediction curvature has carried on.

    Args:
        model: whose weights are watched, as far as the optimizer steps them; a part of a model is one, too.
        optimizer: may be a wrapper's inner one. Groups may differ in momentum and be added later; where the weights
            that have gradients change, the filter of the watch begins anew.
        gain: 1 - momentum; ``None`` reads ``betas[0]``, ``momentum`` or ``beta`` of each group at every step. Say it
            where these mean something else: Lion's average has 1 - betas[1].
        window: steps that scalars and verdict look back on.
        rest: steps without watching after each window. ``None``: none for a network of 15 tensors and more, and for a
            smaller one, whose steps have few operations, as many as keep the watch below a tenth of them.
        coordinates: how many weights are read at most; inner products are scaled up to all.
        level: of the test, the probability of another verdict than "right" where the innovations are white.
        history: rows that are kept.

    Returns:
        The watch; ``close`` it, or use it in a ``with`` block, to stop. It has no ``state_dict``: nothing of the
        training depends on it, and after a resume it knows the same within a window.

    Raises:
        TypeError, ValueError: for anything but a model and an optimizer of its weights, or a number out of range.
        RuntimeError: from the first step, for sparse gradients and for weights on several devices.

    >>> model = nn.Linear(2, 1)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    >>> watched = watch(model, optimizer, rest=0)
    >>> for _ in range(40):  # a full batch has no noise, so averaging only lags behind
    ...     loss = (model(torch.eye(2)) - 3).square().mean()
    ...     optimizer.zero_grad()
    ...     loss.backward()
    ...     watched.observe(loss)
    ...     optimizer.step()
    >>> watched.verdict().momentum
    'too large'
    >>> for name, value in watched.scalars().items():
    ...     pass  # writer.add_scalar(f"watch/{name}", value, step), or a row of csv.DictWriter
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got a {type(model).__name__}")
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got a {type(optimizer).__name__}")
    for name, number in (("window", window), ("coordinates", coordinates), ("history", history)):
        check_number(name, number, low=1)
    check_number("rest", 0 if rest is None else rest)
    check_number("level", level, high=1.0, open_low=True)
    if gain is not None and not 0 < gain <= 1:
        raise ValueError(f"gain must be a number > 0 and <= 1, got {gain!r}")
    ours = set(model.parameters())
    stepped = [p for group in optimizer.param_groups for p in group["params"] if p in ours]
    if not stepped:
        raise ValueError("the optimizer steps no parameter of this model: give watch the model whose weights it has")
    for p in stepped:
        if is_sharded(p):
            raise TypeError(f"watch reads whole tensors, but a parameter (shape {tuple(p.shape)}) is a DTensor")
        if not p.is_floating_point():
            raise TypeError(f"watch reads real numbers, but a parameter (shape {tuple(p.shape)}) is {p.dtype}")
    return Watch(model, optimizer, gain, int(window), rest, int(coordinates), level, max(int(history), int(window)))
