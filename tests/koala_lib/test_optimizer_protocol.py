"""Arguments and step protocol of the optimizers that filter the loss: what is accepted, and what is said if not."""

import inspect
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from koala_lib import KoalaM, KoalaPlusPlus, KoalaV
from tests.support.cases import (
    Case,
    Net,
    advance,
    assert_same,
    each_filter,
    evaluate,
    losses_of,
    snapshot,
    trained,
    weights,
)

FILTERS_OF_THE_LOSS = [KoalaV, KoalaM, KoalaPlusPlus]
NAN, INF = math.nan, math.inf

# --- constructor ------------------------------------------------------------------------------------------

NOT_NEGATIVE = [-0.1, NAN, INF, -INF]
OUT_OF_RANGE: dict[str, list[Any]] = {
    "lr": [*NOT_NEGATIVE, torch.tensor(-1.0), torch.ones(2), torch.tensor(1), torch.tensor(NAN), torch.tensor(1j)],
    "momentum": [*NOT_NEGATIVE, 1.0, 2.0],
    "initial_variance": NOT_NEGATIVE,
    "initial_velocity_variance": NOT_NEGATIVE,
    "initial_covariance": [NAN, INF, -INF, 0.2, -0.2],
    "process_noise": NOT_NEGATIVE,
    "velocity_noise": NOT_NEGATIVE,
    "measurement_noise": [*NOT_NEGATIVE, 0.0],
    "initial_measurement_noise": NOT_NEGATIVE,
    "noise_decay": [*NOT_NEGATIVE, 1.0],
    "target_risk": ["Relative", "", None, 0.5, ["relative"]],
    "blocks": ["layer", None, 1],
    "weight_decay": NOT_NEGATIVE,
    "min_grad_norm": NOT_NEGATIVE,
    "formulas": ["official", None, True],
}
NUMBER_WANTED = ["0.1", True, 1j, [0.1], (0.1,), torch.tensor(0.1)]
WRONG_TYPE: dict[str, list[Any]] = {
    name: [*NUMBER_WANTED, None] for name in OUT_OF_RANGE if name not in ("target_risk", "blocks", "formulas")
} | {
    "lr": [*NUMBER_WANTED[:-1], None],  # a tensor is fine
    "symmetric": [None, 1, "yes"],
    "positive_semidefinite": [None, 1, "yes"],
    "measurement_noise": NUMBER_WANTED,
    "foreach": [1, "yes", 0.0],
    "fused": [1, "yes", 0.0],
    "process_group": [1, "gloo"],
}
WRONG = [
    (cls, name, value, error)
    for table, error in ((OUT_OF_RANGE, ValueError), (WRONG_TYPE, TypeError))
    for name, values in table.items()
    for value in values
    for cls in FILTERS_OF_THE_LOSS
    if name in inspect.signature(cls).parameters
    if not (name == "process_noise" and value is None and cls is not KoalaPlusPlus)  # there it is the estimate
]


@pytest.mark.parametrize(("cls", "name", "value", "error"), WRONG, ids=lambda v: getattr(v, "__name__", repr(v)))
def test_bad_arguments_are_named(cls: type, name: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=rf"^{name}\b.* (must|is impossible)"):
        cls([nn.Parameter(torch.ones(2))], **{name: value})


@pytest.mark.parametrize("cls", FILTERS_OF_THE_LOSS)
def test_every_argument_is_checked(cls: type) -> None:
    assert set(inspect.signature(cls).parameters) == {"params"} | {name for c, name, *_ in WRONG if c is cls}


@pytest.mark.parametrize("cls", FILTERS_OF_THE_LOSS)
@pytest.mark.parametrize("name", ["learning_rate", "betas", "eps", "maximize", "sigma", "q", "r", "kappa"])
def test_no_keyword_is_swallowed(cls: type, name: str) -> None:
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
        cls([nn.Parameter(torch.ones(2))], **{name: 0.1})


def test_options_follow_lr_by_keyword_only() -> None:
    for cls in FILTERS_OF_THE_LOSS:
        with pytest.raises(TypeError, match="positional"):
            cls([nn.Parameter(torch.ones(2))], 1.0, 0.1)


def test_the_released_koala_v_has_a_fixed_process_noise() -> None:
    with pytest.raises(ValueError, match="process_noise=None needs formulas='paper'"):
        KoalaV([nn.Parameter(torch.ones(2))], formulas="released", process_noise=None)


def test_a_covariance_is_symmetric() -> None:
    with pytest.raises(ValueError, match="positive_semidefinite=True is impossible with symmetric=False"):
        KoalaPlusPlus([nn.Parameter(torch.ones(2))], symmetric=False, positive_semidefinite=True)


@each_filter
def test_limits_of_the_ranges(case: Case) -> None:
    optimizer = case(Net().parameters(), lr=0, noise_decay=0, weight_decay=0, min_grad_norm=0, initial_variance=0)
    assert optimizer.param_groups[0]["lr"] == 0
    assert optimizer.filter_state().get("variance", 0) == 0


# --- step protocol ----------------------------------------------------------------------------------------


@each_filter
def test_a_loss_without_predict(case: Case) -> None:
    net, optimizer = trained(case, 1)
    before = snapshot(net, optimizer)
    losses = losses_of(net, 1)
    for call in (lambda: optimizer.step(loss=losses), lambda: optimizer.observe(losses)):
        with pytest.raises(RuntimeError, match=r"without predict\(\).*before the forward pass"):
            call()
    with pytest.raises(RuntimeError, match=r"step\(\) needs the losses: use step\(closure\)"):
        optimizer.step()
    assert_same(snapshot(net, optimizer), before)
    optimizer.predict()
    with pytest.raises(RuntimeError, match=r"step\(\) needs the losses"):
        optimizer.step()


@each_filter
def test_closures_that_go_wrong(case: Case) -> None:
    net, optimizer = trained(case, 1)
    with pytest.raises(RuntimeError, match="a closure or a loss, not both"):
        optimizer.step(lambda: evaluate(net, optimizer, 1), loss=torch.ones(()))
    with pytest.raises(TypeError, match=r"step\(\) takes a closure, got a Tensor; losses go in as step\(loss=...\)"):
        optimizer.step(torch.ones(3))
    with pytest.raises(TypeError, match=r"losses must be a tensor or a float, got a str"):
        optimizer.step(lambda: "one")
    with pytest.raises(TypeError, match="closure must return the losses, got None"):
        optimizer.step(lambda: (evaluate(net, optimizer, 1), None)[1])

    def fails() -> Tensor:
        raise KeyError("of the user")

    with pytest.raises(KeyError, match="of the user"):
        optimizer.step(fails)
    advance(net, optimizer, range(1, 5))  # the prediction is not made twice
    assert torch.equal(weights(net), weights(trained(case, 5)[0]))


BAD_LOSSES = [
    (torch.ones(3, dtype=torch.int64), TypeError, "losses must be real floating-point numbers, got dtype torch.int64"),
    (torch.ones(3, dtype=torch.bool), TypeError, "got dtype torch.bool"),
    (torch.ones((), dtype=torch.complex64), TypeError, "got dtype torch.complex64"),
    (1, TypeError, "got dtype torch.int64"),
    (torch.ones(0), ValueError, "losses are empty"),
]


@pytest.mark.parametrize(("losses", "error", "message"), BAD_LOSSES, ids=str)
@each_filter
def test_losses_that_are_none(case: Case, losses: Any, error: type[Exception], message: str) -> None:
    net, optimizer = trained(case, 1)
    optimizer.predict()
    good = evaluate(net, optimizer, 1)
    for call in (optimizer.observe, lambda loss: optimizer.step(loss=loss)):
        with pytest.raises(error, match=message):
            call(losses)
    optimizer.step(loss=good)
    assert torch.equal(weights(net), weights(trained(case, 2)[0]))


@each_filter
def test_predict_twice_moves_once_and_forgets_losses(case: Case) -> None:
    net, optimizer = trained(case, 3)
    for k in range(3, 6):
        optimizer.predict()
        optimizer.observe(torch.tensor([100.0, 200.0]))
        optimizer.predict()
        optimizer.step(loss=evaluate(net, optimizer, k))
    assert torch.equal(weights(net), weights(trained(case, 6)[0]))


@each_filter
def test_micro_batches_add_up(case: Case) -> None:
    """observe() of parts of unequal size is observe() of the whole."""
    net, optimizer = trained(case, 2)
    optimizer.predict()
    losses = evaluate(net, optimizer, 2)
    for part in (losses[:1], losses[1:3].reshape(1, 2), losses[3:]):
        optimizer.observe(part)
    returned = optimizer.step()
    whole, of_whole = trained(case, 3)
    torch.testing.assert_close(weights(net), weights(whole), rtol=0, atol=1e-14)
    assert optimizer.filter_state() == pytest.approx(of_whole.filter_state(), rel=1e-12)
    assert float(returned) == pytest.approx(float(losses.detach().mean()), rel=1e-14)


@each_filter
def test_a_scalar_is_one_sample(case: Case) -> None:
    results = []
    for form in (lambda value: torch.tensor(value), lambda value: torch.tensor([value]), float):
        net, optimizer = trained(case, 2)
        optimizer.predict()
        value = float(evaluate(net, optimizer, 2).detach().mean().float())  # a number that float32 has, too
        returned = optimizer.step(loss=form(value))
        assert returned.shape == ()
        assert float(returned) == value
        results.append(snapshot(net, optimizer))
    assert_same(results[1], results[0])
    assert_same(results[2], results[0])


@each_filter
def test_what_a_step_returns(case: Case) -> None:
    net, optimizer = trained(case, 2)
    seen = []

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        seen.append(evaluate(net, optimizer, 2))
        return seen[-1]

    with torch.no_grad():
        returned = optimizer.step(closure)
    assert len(seen) == 1
    torch.testing.assert_close(returned, seen[0].detach().mean(), rtol=1e-14, atol=0)
    assert not returned.requires_grad
    # Also where nothing could be learned from it.
    assert optimizer.step(lambda: evaluate(net, optimizer, 3) * torch.nan).isnan()
    optimizer.zero_grad()
    assert optimizer.step(lambda: torch.tensor([1.0, 3.0])) == 2


@each_filter
def test_filter_state(case: Case) -> None:
    _, optimizer = trained(case, 3)
    state = optimizer.filter_state()
    noises = ("process_noise", "measurement_noise")
    momentum = ("covariance", "velocity_variance") if case.factory is KoalaM else ()
    if case.factory is KoalaPlusPlus:
        assert tuple(state) == (*noises, "drift_variance")
    else:
        assert tuple(state) == ("variance", *momentum, *noises)
    assert all(type(value) is float for value in state.values())
    assert optimizer.skipped_steps == 0
    assert type(optimizer.skipped_steps) is int


@each_filter
def test_nothing_uncertain_nothing_learned(case: Case) -> None:
    """S = A |g|^2 + R = 0 is no division by zero."""
    x = nn.Parameter(torch.ones(2))
    fixed = {"process_noise": 0.1} if case.kwargs.get("measurement_noise") is None else {}
    optimizer = case([x], min_grad_norm=0.0, initial_measurement_noise=0.0, weight_decay=0.0, **fixed)
    for k in range(3):
        optimizer.predict()
        x.grad = torch.zeros(2)
        optimizer.step(loss=torch.zeros(4))
        assert all(math.isfinite(value) for value in optimizer.filter_state().values())
        nothing = fixed or case.factory is KoalaPlusPlus  # to which a gradient of zeros is no observation of a tensor
        assert optimizer.skipped_steps == (k + 1 if nothing else 0)
    assert torch.equal(x, torch.ones(2))
    optimizer.predict()
    x.grad = torch.ones(2)
    optimizer.step(loss=torch.ones(4))
    assert (x < 1).all()
