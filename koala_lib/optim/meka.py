"""MEKA: the full gradient as a hidden state that curvature carries on (Chen et al., 2020, arXiv 2011.04803).

The minibatch gradient is a noisy observation of the full gradient; between two steps the full gradient changes by the
Hessian times the displacement, which the minibatch gives too. How noisy both are is measured from the per-sample
gradients and Hessian-vector products of the very minibatch (:mod:`koala_lib.moments`). The recursions are in
:mod:`koala_lib.kalman`, the step sizes in :mod:`koala_lib.step_size`; ``koala_lib/reference/meka.py`` holds the same
optimizer with full matrices and slow loops in the paper's symbols.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from koala_lib import kalman
from koala_lib.moments import METHODS, Along, observe, sample_moments
from koala_lib.optim._engine.checks import check_bool, check_choice, check_number, check_problem, options_among
from koala_lib.optim._engine.lists import dot
from koala_lib.optim._engine.passes import left_behind
from koala_lib.optim._engine.sharded import is_sharded
from koala_lib.optim.filter import Entries, ScalarFilter
from koala_lib.step_size import RULES, PredictedChange

__all__ = ["Meka"]

ADAM_EPS = 1e-8  # epsilon of eq. (9)
VARIANCES = ("mean", "directional", "sum")


class _Observed(NamedTuple):
    """What a minibatch says: means and their variances; scalars in float64, lists in the order of the parameters."""

    mean_loss: Tensor  # y as it came
    loss: Tensor  # y
    loss_variance: Tensor  # the new r
    gradient_variance: Tensor  # the new sigma
    product_variance: Tensor  # q
    curvature_variance: Tensor  # d^T Q d
    gradients: list[Tensor]  # g
    products: list[Tensor]  # Hessian times direction
    along: Callable[[Mapping[str, Tensor]], Along] | None  # slope and curvature along another direction


class _Ahead(NamedTuple):
    """What a minibatch says about the new direction delta."""

    curvature: Tensor  # delta^T B delta
    slope_variance: Tensor  # delta^T P delta
    curvature_variance: Tensor  # delta^T Q delta


def _weights(tensors: list[Tensor]) -> int:
    """Return n, the number of weights."""
    return sum(t.numel() for t in tensors)


def _direction(means: list[Tensor], variance: Tensor, kind: str) -> list[Tensor]:
    """Return -m, or -m / (sqrt(m^2 + p) + eps): a N(m, p) variable has the second moment m^2 + p (eq. 9)."""
    if kind == "gradient":
        return list(torch._foreach_neg(means))
    return [-m / ((m.square() + variance.to(m.dtype)).sqrt() + ADAM_EPS) for m in means]


def reading_is_free(device: torch.device) -> bool:
    """Say whether a step may read a tensor: an accelerator would be waited for; masks are three times a copy's work."""
    return device.type == "cpu"


class Meka(ScalarFilter):
    r"""MEKA (``direction="gradient"``) and AdaMEKA (``"adam"``), with fixed or self-chosen step sizes.

    With the minibatch means y of the loss, g of the gradient and b = B d of the Hessian times the last displacement,
    their variances r, :math:`\sigma`, q, and :math:`\hat p = p + q`:

    .. math::
        k = \hat p / (\hat p + \sigma), \qquad m \leftarrow (1 - k)(m + b) + k g, \qquad p \leftarrow (1 - k) \hat p

    (eqs. 6-8 with scalar covariances), the loss filtered likewise (App. B), and :math:`\theta \leftarrow \theta +
    \mathrm{lr}\,\alpha\,\delta` along :math:`\delta = -m`, or :math:`-m / (\sqrt{m^2 + p} + 10^{-8})` (eq. 9).
    :math:`\alpha` is chosen from slope, curvature and their variances along :math:`\delta`
    (:mod:`koala_lib.step_size`). One filter serves all weights.

    Args:
        model: all its parameters that require a gradient are optimised. No batch normalisation: samples must not
            see each other.
        loss_fn: ``loss_fn(model(inputs), targets)`` -> losses of the B samples, shape (B,).
        lr: factor of the step size (c of Figure 6), or the step size itself for ``"constant"``. Schedulers act on it.
        step_size: ``"pi"`` (eq. 12), ``"quadratic"``, ``"ei"`` or ``"constant"``.
        direction: ``"gradient"`` or ``"adam"``.
        smoothing: coefficient of the averages of sigma, r and alpha (0.999 in the paper); 0 switches them off. They
            are corrected for their start, as Adam's are.
        max_step_size: alpha where a rule has no finite optimum (``"quadratic"`` with b <= 0, say). It bounds no other:
            finite optima are used as they are.
        moments: how per-sample moments are computed: ``"auto"``, ``"vmap"`` or ``"structured"``.
        prior_variance: p and s before the first step, where m = u = 0.
        variances: what stands for :math:`\delta^\top P \delta` and :math:`\delta^\top Q \delta` in eq. 11, and for the
            same of the last displacement in the filter of the loss (eq. 16). ``"mean"`` is section 4 to the letter
            ("we approximate them as scalar objects ... by averaging over all dimensions"): p and q times
            :math:`|\delta|^2`, which is right where the noise is the same in all directions, and far too small along
            a gradient of a network. ``"directional"`` is what eq. 11 asks for, the variances of
            :math:`\delta^\top g` and :math:`\delta^\top B \delta` themselves, over the samples of the minibatch: P is
            K Sigma by eqs. 7 and 8, so that :math:`\delta^\top P \delta` is k times the former. ``"sum"`` has the
            traces of P and Q in place of their means, n times as large for n weights: no direction is more uncertain
            than that. The gain k is a ratio, the same in all three.
        third_order: appendix B.2: "we can instead add the term [lambda |alpha delta|^6] to the variance", with
            lambda / |d|^6 (eq. 23) from the last displacement d. It keeps the steps of ``"pi"`` finite where the
            curvature is negative. In the filter of the loss nothing else changes, but that there is no model error
            where d = 0. "We did not fully test this approach", the paper says.
        curvature_smoothing: coefficient of an average of b / |delta|^2, with which a rule then computes alpha* instead
            of the minibatch's own. Appendix B.2 has "the exponential moving averaged curvature used in practice", and
            not how; 0 is the algorithm of section 3 and appendix A, which average no curvature. With ``lr=1`` it
            matters more than ``variances``: one minibatch that shows little curvature makes a large step, and the
            average of alpha goes on making it.

    Raises:
        ValueError, TypeError: for an option out of range or of the wrong type; the message names it.

    sigma, q and r are variances of minibatch *means*: the unbiased variances of the samples, averaged over the weights,
    divided by B. A rule needs the curvature and its variance along the new direction: one more pass of tangents a step
    for ``"directional"`` and for ``"quadratic"``, else all moments a second time. Where the paper's formulas are
    misprinted this is what they must mean: the process noise of eq. 6 is that of the b added, and m stands squared in
    the denominator of eq. 9.

    One process only: DDP and FSDP hand over averaged gradients, which say nothing about the variance between samples.

    A step whose loss, gradient or products are not finite is a missing observation: weights, filter and displacement
    stay, so that the next minibatch carries the gradient over; ``skipped_steps`` counts. Every group of
    parameters has its ``lr``; ``step_size`` and the other options belong to all and may be changed between steps (all
    groups alike), but for ``prior_variance``. State per parameter: the filtered gradient and the last displacement.

    Example, the losses (x - t)^2 / 2 of the two samples t = 0, 2 at x = 5: y = 8.5, g = 4, and m = g but for the prior.

    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> _ = torch.nn.init.constant_(model.weight, 5.0)
    >>> optimizer = Meka(model, lambda outputs, targets: (outputs - targets).square().sum(1) / 2, step_size="quadratic")
    >>> optimizer.step(torch.ones(2, 1), torch.tensor([[0.0], [2.0]]))
    tensor(8.5000)
    >>> model.weight.data  # the curvature is 1, so the step goes to the mean of the targets
    tensor([[1.0004]])
    >>> round(optimizer.filter_state()["measurement_noise"], 4)  # variance 2 of the gradients, divided by B = 2
    1.0
    """

    filter_entries = (
        "variance",  # p
        "process_noise",  # q
        "measurement_noise",  # sigma, averaged
        "gain",  # k
        "value",  # u
        "value_variance",  # s
        "value_noise",  # r, averaged
        "model_error",  # lambda
        "slope",  # a
        "curvature",  # b
        "step_size_optimum",  # alpha*
        "step_size",  # lr alpha
        # not reported: d^T P d of the last displacement; averages and the sums of their weights
        "displacement_variance",
        "alpha",  # of alpha*
        "curvature_average",  # of b / |delta|^2
        "measurement_noise_weight",
        "value_noise_weight",
        "alpha_weight",
        "curvature_average_weight",
        "skipped_steps",
    )
    fixed = ("prior_variance",)
    traced = ("step_size", "model_error", "value_variance")  # entries whose means describe a run
    _hidden = filter_entries[filter_entries.index("displacement_variance") :]
    _of_rules = ("slope", "curvature", "step_size_optimum")
    _seen: dict[str, Any] | None = None  # what a step saw, where koala_lib.watch asks for it

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Tensor, Tensor], Tensor],
        lr: float | Tensor = 1.0,
        *,
        step_size: str = "pi",
        direction: str = "gradient",
        smoothing: float = 0.999,
        max_step_size: float = 1.0,
        moments: str = "auto",
        prior_variance: float = 1e4,
        variances: str = "mean",
        third_order: bool = False,
        curvature_smoothing: float = 0.0,
    ) -> None:
        options = options_among(locals())
        check_problem(type(self).__name__, model, loss_fn)
        self.model, self.loss_fn = model, loss_fn
        initial = dict.fromkeys(self.filter_entries, 0.0)
        initial |= {"variance": prior_variance, "value_variance": prior_variance}
        super().__init__((p for p in model.parameters() if p.requires_grad), options, initial)

    def _check_options(self, options: dict[str, Any]) -> None:
        check_choice("step_size", options["step_size"], ("constant", *RULES))
        check_choice("direction", options["direction"], ("gradient", "adam"))
        check_number("smoothing", options["smoothing"], high=1.0)
        check_number("max_step_size", options["max_step_size"], open_low=True)
        check_choice("moments", options["moments"], METHODS)
        check_number("prior_variance", options["prior_variance"], open_low=True)
        check_choice("variances", options["variances"], VARIANCES)
        check_bool("third_order", options["third_order"])
        check_number("curvature_smoothing", options["curvature_smoothing"], high=1.0)

    # -- a step --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, inputs: Tensor, targets: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Make one step on a minibatch of B >= 2 samples.

        Args:
            inputs: what the model is called with, shape (B, ...).
            targets: what ``loss_fn`` gets beside the outputs, shape (B, ...).

        Returns:
            The mean loss before the step as a 0-dim tensor, still on the device.

        Raises:
            ValueError: if there are fewer than two samples, or ``loss_fn`` does not return one loss for each.
            TypeError: if either is no tensor, as in ``step(closure)``. Both also for options that were changed in a
                param group, as :meth:`KoalaV.predict` has them.
        """
        if targets is None:
            raise TypeError(f"{type(self).__name__} runs forward and backward itself: call step(inputs, targets)")
        self._check_changes()
        named = self._named_parameters()
        means, moves = ([self.state[p][name] for p in named.values()] for name in ("mean", "displacement"))
        observed = self._observe(inputs, targets, named, moves)
        entries = self._entries()
        missing = entries | {"skipped_steps": entries["skipped_steps"] + 1}

        cubic = self._filter_value(entries, observed, means, moves)
        means = self._filter_gradient(entries, observed, means)
        options = self.param_groups[0]
        direction = _direction(means, entries["variance"], options["direction"])
        ahead = self._ahead(entries, observed, inputs, targets, named, direction)
        alpha = self._choose_step(entries, ahead, means, direction, cubic)
        entries["step_size"] = alpha * options["lr"]
        if options["variances"] == "directional":
            variance = self._displacement_variance(entries, observed, ahead, named, direction, len(targets))
            entries["displacement_variance"] = alpha.square() * variance

        # sigma and q are not finite if any entry of a gradient or a product is not
        usable = torch.stack(list(entries.values())).isfinite().all()
        self._move(usable, named, means, direction, alpha)
        new, old = (torch.stack([e[name] for name in self.filter_entries]) for e in (entries, missing))
        self._filter().copy_(torch.where(usable, new, old))
        return observed.mean_loss

    def _filter_value(self, entries: Entries, observed: _Observed, means: list[Tensor], moves: list[Tensor]) -> Tensor:
        """Filter the loss with m and p of the step before: u, s, r, lambda and q (appendix B).

        Returns:
            lambda / |d|^6 (eq. 23), 0 where d = 0.
        """
        options = self.param_groups[0]
        q = entries["process_noise"] = observed.product_variance
        r = self._average(entries, "value_noise", observed.loss_variance, options["smoothing"])
        m_d, d_d, d_b = dot(means, moves), dot(moves, moves), dot(moves, observed.products)
        if options["variances"] == "directional":
            d_P_d, d_Q_d = entries["displacement_variance"], observed.curvature_variance
        else:
            factor = _weights(means) if options["variances"] == "sum" else 1
            d_P_d, d_Q_d = factor * entries["variance"] * d_d, factor * q * d_d
        predicted = kalman.predict_value(entries["value"], entries["value_variance"], m_d, d_b, d_P_d, d_Q_d)
        estimate = self._condition_value(*predicted, observed.loss, r)
        if options["third_order"]:  # the error is lambda3 |d|^6, which is none without a displacement
            at_rest = kalman.condition_trusted_value(*predicted, observed.loss, r)
            pairs = zip(estimate, at_rest, strict=True)
            estimate = kalman.ValueEstimate(*(torch.where(d_d > 0, moved, rest) for moved, rest in pairs))
        entries |= {"value": estimate.value, "value_variance": estimate.variance, "model_error": estimate.model_error}
        return torch.where(d_d > 0, estimate.model_error / d_d**3, 0.0)

    def _filter_gradient(self, entries: Entries, observed: _Observed, means: list[Tensor]) -> list[Tensor]:
        """Filter the gradient: k, p, sigma (eqs. 6-8); return m."""
        decay = self.param_groups[0]["smoothing"]
        sigma = self._average(entries, "measurement_noise", observed.gradient_variance, decay)
        p = kalman.predict_position(entries["variance"], entries["process_noise"])
        k = kalman.gain(p, sigma)
        entries |= {"gain": k, "variance": kalman.condition_variance(p, sigma)}
        transported = torch._foreach_add(means, observed.products)
        if self._seen is not None:
            self._seen |= {"gradients": observed.gradients, "predictions": list(transported), "loss": observed.loss}
            self._seen |= {"variance": p + sigma, "gain": k}
        return [m.lerp(g, k.to(m.dtype)) for m, g in zip(transported, observed.gradients, strict=True)]

    @staticmethod
    def _average(entries: Entries, name: str, value: Tensor, decay: float) -> Tensor:
        """Add a value to a bias-corrected average, as Adam's are, and return it."""
        weight = decay * entries[name + "_weight"] + (1 - decay)
        average = kalman.corrected_average(entries[name], value, weight, decay)
        entries |= {name: average, name + "_weight": weight}
        return average

    def _ahead(
        self,
        entries: Entries,
        observed: _Observed,
        inputs: Tensor,
        targets: Tensor,
        named: dict[str, Tensor],
        direction: list[Tensor],
    ) -> _Ahead | None:
        """Return delta^T B delta, and what stands for delta^T P delta and delta^T Q delta, where a rule asks for them.

        Q is that of the Hessian times the new direction. P = k Sigma, so along delta it is k times the variance of
        delta^T g.
        """
        options, samples = self.param_groups[0], len(targets)
        new = dict(zip(named, direction, strict=True))
        if observed.along is not None:
            along = Along(*(number.to(self._filter()) for number in observed.along(new)))
            p, q = entries["gain"] * along.slope_variance, along.curvature_variance
            return _Ahead(along.curvature, p / samples, q / samples)
        if options["step_size"] == "constant":
            return None
        moments = sample_moments(self.model, self.loss_fn, inputs, targets, new, method=options["moments"])
        assert moments.curvature is not None
        assert moments.hvp_variance is not None
        curvature, q = (number.to(self._filter()) for number in (moments.curvature, moments.hvp_variance))
        squared = dot(direction, direction) * (_weights(direction) if options["variances"] == "sum" else 1)
        return _Ahead(curvature, entries["variance"] * squared, q / samples * squared)

    def _choose_step(
        self, entries: Entries, ahead: _Ahead | None, means: list[Tensor], direction: list[Tensor], cubic: Tensor
    ) -> Tensor:
        """Return alpha (section 3); write what the rule found out into ``entries``."""
        options = self.param_groups[0]
        if options["step_size"] == "constant":
            return torch.ones_like(entries["alpha"])
        assert ahead is not None
        squared, curvature = dot(direction, direction), ahead.curvature
        if options["curvature_smoothing"]:
            relative = torch.where(squared > 0, curvature / squared, entries["curvature_average"])
            self._average(entries, "curvature_average", relative, options["curvature_smoothing"])
            curvature = entries["curvature_average"] * squared
        change = PredictedChange(
            slope=-dot(direction, means),
            curvature=curvature,
            value_variance=entries["value_variance"],
            slope_variance=ahead.slope_variance,
            curvature_variance=ahead.curvature_variance,
            third_order=cubic * squared**3 if options["third_order"] else None,
        )
        optimum = RULES[options["step_size"]](change, options["max_step_size"])
        entries |= {"slope": change.slope, "curvature": ahead.curvature, "step_size_optimum": optimum}
        alpha = self._average(entries, "alpha", optimum, options["smoothing"])
        if self._seen is not None:
            self._seen |= {"change": change, "step_size": alpha * options["lr"]}
        # a product that is not finite may leave a finite optimum behind, the cap
        return torch.where(change.curvature_variance.isfinite(), alpha, torch.nan)

    def _displacement_variance(
        self,
        entries: Entries,
        observed: _Observed,
        ahead: _Ahead | None,
        named: dict[str, Tensor],
        direction: list[Tensor],
        samples: int,
    ) -> Tensor:
        """Return v^T P v of v = lr delta; the displacement is alpha v."""
        assert ahead is not None
        if len(self.param_groups) == 1:
            scaled: Tensor = ahead.slope_variance * self.param_groups[0]["lr"] ** 2
            return scaled
        lr = self._rates()  # which may differ, so that v is no multiple of delta
        assert observed.along is not None
        moved = observed.along({name: delta * lr[p] for (name, p), delta in zip(named.items(), direction, strict=True)})
        return entries["gain"] * moved.slope_variance.to(self._filter()) / samples

    def _rates(self) -> dict[Tensor, float | Tensor]:
        """Return lr of every parameter."""
        return {p: group["lr"] for group in self.param_groups for p in group["params"]}

    def _move(
        self, usable: Tensor, named: dict[str, Tensor], means: list[Tensor], direction: list[Tensor], alpha: Tensor
    ) -> None:
        """Store the filtered gradients and displace the weights, where there was an observation."""
        lr, states = self._rates(), [self.state[p] for p in named.values()]
        moves = [delta * (alpha * lr[p]) for p, delta in zip(named.values(), direction, strict=True)]
        kept = [[state[name] for state in states] for name in ("mean", "displacement")]
        steps = moves
        if reading_is_free(usable.device):
            if not usable:
                return
        else:
            means, moves = ([torch.where(usable, new, x) for new, x in zip(news, old, strict=True)]
                            for news, old in zip((means, moves), kept, strict=True))  # fmt: skip
            steps = [torch.where(usable, step, 0.0) for step in steps]
        for old, news in zip(kept, (means, moves), strict=True):
            torch._foreach_copy_(old, news)
        torch._foreach_add_(list(named.values()), steps)

    # for variants that condition the value otherwise
    _condition_value = staticmethod(kalman.condition_value)

    def _observe(self, inputs: Tensor, targets: Tensor, named: dict[str, Tensor], moves: list[Tensor]) -> _Observed:
        """Return what the minibatch says at the weights as they are, and of its Hessian times the last displacement."""
        return self._moments(inputs, targets, named, moves)

    def _moments(self, inputs: Tensor, targets: Tensor, named: dict[str, Tensor], direction: list[Tensor]) -> _Observed:
        """Measure a minibatch at the weights as they are, with its Hessian times a direction."""
        problem = self.model, self.loss_fn, inputs, targets, dict(zip(named, direction, strict=True))
        along = None
        if self._along_is_enough():
            moments, along = observe(*problem, method=self.param_groups[0]["moments"])
        else:
            moments = sample_moments(*problem, method=self.param_groups[0]["moments"])
        variances = (
            moments.loss_variance, moments.gradient_variance, moments.hvp_variance, moments.curvature_variance
        )  # fmt: skip
        r, sigma, q, directional = (v.to(self._filter()) / len(targets) for v in variances if v is not None)
        assert moments.hvp is not None  # there was a direction
        gradients, products = ([moment[name] for name in named] for moment in (moments.gradient, moments.hvp))
        loss = moments.loss
        return _Observed(loss, loss.to(self._filter()), r, sigma, q, directional, gradients, products, along)

    def _along_is_enough(self) -> bool:
        """Say whether slope and curvature along the new direction are all that is asked for."""
        variances, rule = (self.param_groups[0][name] for name in ("variances", "step_size"))
        return bool(variances == "directional" or rule == "quadratic")

    def _named_parameters(self) -> dict[str, Tensor]:
        """Return the parameters to move, by their names in the model; create the state that does not exist yet."""
        ours = {p for group in self.param_groups for p in group["params"]}
        named: dict[str, Tensor] = {}
        for name, p in self.model.named_parameters():
            if p.requires_grad and p in ours:
                named[name] = p
                self.state[p].update({key: t.to(p) for key, t in left_behind(p, self.state[p]).items()})
                if "mean" not in self.state[p]:
                    for key in ("mean", "displacement"):
                        self.state[p][key] = torch.zeros_like(p, memory_format=torch.preserve_format)
        return named

    # -- the filter's scalars, groups and state ------------------------------------------------------------------------

    def filter_state(self) -> dict[str, float]:
        """Return the filter's scalars by name, as numbers. Reading them waits for the device.

        Returns:
            p, q, sigma, k, u, s, r, lambda and lr alpha (with the lr of the first group), and where a rule chooses the
            step also a, b and alpha* (``slope``, ``curvature``, ``step_size_optimum``).
        """
        constant = self.param_groups[0]["step_size"] == "constant"
        hidden = self._hidden + (self._of_rules if constant else ())
        values = zip(self.filter_entries, self._filter().tolist(), strict=True)
        return {name: value for name, value in values if name not in hidden}

    def entries(self, names: Sequence[str]) -> Tensor:
        """Return entries of :meth:`filter_state` as a float64 vector that stays on the device.

        Args:
            names: which, in this order.
        """
        return self._filter()[[self.filter_entries.index(name) for name in names]]

    def _check_group(self, group: dict[str, Any]) -> None:
        models = set(self.model.parameters())
        for p in group["params"]:
            if p not in models:
                raise ValueError(
                    f"the model has no such parameter (shape {tuple(p.shape)}): Meka runs the forward pass itself and "
                    "moves parameters of its model only"
                )
            if is_sharded(p):
                raise ValueError(
                    f"Meka runs in one process, but a parameter (shape {tuple(p.shape)}) is a DTensor: give it a model "
                    "without fully_shard and the whole batch"
                )
        super()._check_group(group)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"model": self.model, "loss_fn": self.loss_fn}
