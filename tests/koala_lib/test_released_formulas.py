"""`formulas="released"`: where the authors' code and the paper differ, one explicit calculation per difference.

The row numbers are those of the table "paper and released code" in notebooks/koala/10_kalman_view_of_training.ipynb.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from koala_lib import KoalaM, KoalaV

BOTH = pytest.mark.parametrize("cls", [KoalaV, KoalaM])
FORMULAS = pytest.mark.parametrize("formulas", ["paper", "released"])


def tensor(value: Any) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def parameters(*values: Any) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(tensor(value)) for value in values]


def released(cls: type, params: list[torch.nn.Parameter], **options: Any) -> Any:
    return cls(params, **{"formulas": "released", **options})


def step(optimizer: Any, losses: Any, *grads: Any) -> None:
    optimizer.predict()
    params = optimizer.param_groups[0]["params"]
    for p, g in zip(params, grads, strict=True):
        p.grad = None if g is None else tensor(g)
    optimizer.step(loss=tensor(losses))


def near(value: Any) -> Any:
    return pytest.approx(value, rel=1e-13, abs=1e-15)


def test_row_1_process_noise_is_a_smoothed_norm_over_n() -> None:
    x = parameters([3.0, 4.0])
    optimizer = released(KoalaM, x)
    optimizer.predict()
    q = 0.9 * 0.01 + 0.1 * 5 / 2  # |x - 0| = 5, n = 2
    assert optimizer.filter_state()["process_noise"] == near(q)
    # The average stands in P̂ as a variance.
    assert optimizer.filter_state()["variance"] == near(0.1 + 2 * 0 + 0.1 + q)


def test_row_1_process_noise_of_the_paper_is_the_squared_distance_over_n() -> None:
    x = parameters([3.0, 4.0])
    optimizer = KoalaM(x)
    optimizer.predict()
    assert optimizer.filter_state()["process_noise"] == near(0)  # x_avg = x_0
    x[0].grad = tensor([1.0, 0.0])
    optimizer.step(loss=tensor(2.0))
    moved = 3.0 - x[0][0].item()
    optimizer.predict()
    # x_avg = .9 x_0 + .1 x_1, so x_1 - x_avg = .9 (x_1 - x_0)
    assert optimizer.filter_state()["process_noise"] == near((0.9 * moved) ** 2 / 2)
    assert moved > 0.1


def test_row_2_average_starts_at_zero_and_follows_the_update_of_usable_gradients() -> None:
    x, tiny, none = params = parameters(2.0, 1.0, 5.0)
    optimizer = released(KoalaM, params)
    step(optimizer, 1.0, 1.0, 1e-10, None)
    first = 0.9 * 0.01 + 0.1 * (4 + 1 + 25) ** 0.5 / 3
    assert optimizer.filter_state()["process_noise"] == near(first)
    assert (tiny.item(), none.item()) == (1.0, 5.0)
    # Only x_avg of x has moved, to a tenth of the posterior x.
    second = 0.9 * first + 0.1 * ((0.9 * x.item()) ** 2 + 1 + 25) ** 0.5 / 3
    optimizer.predict()
    assert optimizer.filter_state()["process_noise"] == near(second)


@FORMULAS
def test_row_3_velocity_noise_is_the_constant_001(formulas: str) -> None:
    optimizer = KoalaM(parameters(1.0), formulas=formulas)
    optimizer.predict()
    assert optimizer.filter_state()["velocity_variance"] == near(0.9**2 * 0.1 + 0.01)


@FORMULAS
@BOTH
def test_row_4_measurement_noise_starts_at_one_and_is_updated_before_use(cls: type, formulas: str) -> None:
    (x,) = params = parameters(2.0)
    optimizer = cls(params, formulas=formulas, process_noise=1.0)
    predicted = 0.1 + 1.0 + (0.1 if cls is KoalaM else 0.0)
    step(optimizer, [1.0, 3.0], 1.5)
    R = 0.9 * 1 + 0.1 * (1 + 9) / 2
    assert optimizer.filter_state()["measurement_noise"] == near(R)
    assert x.item() == near(2 - predicted * 2 / (predicted * 1.5**2 + R) * 1.5)


@FORMULAS
@BOTH
@pytest.mark.parametrize("target_risk", ["relative", "absolute"])
def test_row_5_measurement_noise_has_target_zero_and_no_penalty(cls: type, formulas: str, target_risk: str) -> None:
    optimizer = cls(
        parameters(2.0), lr=0.25, weight_decay=0.5, formulas=formulas, target_risk=target_risk, process_noise=1.0
    )
    step(optimizer, [1.0, 3.0], 1.5)
    assert optimizer.filter_state()["measurement_noise"] == near(0.9 + 0.1 * (1 + 9) / 2)


@BOTH
def test_row_6_lr_scales_the_gains_and_not_the_covariance(cls: type) -> None:
    outcomes = []
    for lr in (1.0, 0.25):
        (x,) = params = parameters(2.0)
        optimizer = released(cls, params, lr=lr, process_noise=0.5)
        step(optimizer, 3.0, 1.5)
        state = optimizer.filter_state()
        corrected = x.item() - 2
        optimizer.predict()  # KOALA-M moves on by p, which lr scaled too
        outcomes.append((corrected, x.item() - 2 - corrected, state))
    (full, velocity, state), (quarter, quarter_velocity, same_state) = outcomes
    assert quarter == near(full / 4)
    assert quarter_velocity == near(velocity / 4)
    assert same_state == state
    assert full < 0
    assert (velocity < 0) == (cls is KoalaM)


@FORMULAS
def test_row_7_a_layer_is_a_parameter_tensor(formulas: str) -> None:
    a, b = params = parameters([1.0], 1.0)  # a weight and its bias: two observations
    optimizer = KoalaV(params, formulas=formulas, initial_variance=0.0, measurement_noise=9.0)
    step(optimizer, 7.0, [3.0], 4.0)  # P̂ = 1, S = 18 and 25
    assert (a.item(), b.item()) == near((1 - 7 / 18 * 3, 1 - 7 / 25 * 4))
    assert optimizer.filter_state()["variance"] == near(1 - 16 / 25)


@BOTH
def test_row_8_a_tensor_with_a_small_gradient_is_left_out_alone(cls: type) -> None:
    small, x = params = parameters(2.0, 2.0)
    options = {"process_noise": 1.0, "measurement_noise": 1.0, "weight_decay": 0.5}
    optimizer = released(cls, params, **options)
    predicted = 1.1 + (0.1 if cls is KoalaM else 0.0)
    step(optimizer, 3.0, 1e-10, 3.0)
    assert small.item() == 2.0  # although λx = 1
    assert x.item() < 2.0
    assert optimizer.filter_state()["variance"] == near(predicted / (predicted * (3 + 1) ** 2 + 1))
    assert optimizer.skipped_steps == 0
    # The paper looks at the norm of the whole gradient and corrects both.
    other, _ = params = parameters(2.0, 2.0)
    step(cls(params, **options), 3.0, 1e-10, 3.0)
    assert other.item() < 2.0


@FORMULAS
@BOTH
def test_row_8_all_gradients_small_is_a_missing_observation(cls: type, formulas: str) -> None:
    # The authors' code raises here; we keep the prediction.
    params = parameters(2.0, [1.0, 1.0])
    optimizer = cls(params, formulas=formulas, process_noise=1.0)
    predicted = 1.1 + (0.1 if cls is KoalaM else 0.0)
    step(optimizer, 3.0, 1e-10, [0.0, 1e-10])
    assert optimizer.filter_state()["variance"] == near(predicted)
    assert optimizer.filter_state()["measurement_noise"] == 1.0
    assert optimizer.skipped_steps == 1
    assert [p.tolist() for p in params] == [2.0, [1.0, 1.0]]


@pytest.mark.parametrize(
    ("cls", "formulas", "direction"),
    [(KoalaV, "released", 1.0), (KoalaV, "paper", 2.0), (KoalaM, "released", 2.0), (KoalaM, "paper", 2.0)],
)
def test_row_9_released_koala_v_moves_along_the_raw_gradient(cls: type, formulas: str, direction: float) -> None:
    (x,) = params = parameters(2.0)
    optimizer = cls(params, formulas=formulas, process_noise=1.0, measurement_noise=1.0, weight_decay=0.5)
    predicted = 1.1 + (0.1 if cls is KoalaM else 0.0)
    step(optimizer, 3.0, 1.0)  # h = 1 + .5·2 = 2, e = 3 + .25·2² = 4
    S = predicted * 2**2 + 1
    assert x.item() == near(2 - predicted * 4 / S * direction)
    assert optimizer.filter_state()["variance"] == near(predicted / S)


@FORMULAS
def test_row_10_each_tensor_adds_its_own_penalty_only(formulas: str) -> None:
    params = parameters(2.0, [0.0, 4.0])
    optimizer = KoalaM(params, formulas=formulas, weight_decay=0.5, measurement_noise=1.0, process_noise=0.8)
    step(optimizer, 3.0, 1.0, [1.0, 0.0])  # Â = 1; h = 2 and (1, 2), e = 3 + 1 and 3 + 4
    assert params[0].item() == near(2 - 4 / (4 + 1) * 2)
    assert params[1].tolist() == near([0 - 7 / (5 + 1) * 1, 4 - 7 / (5 + 1) * 2])


@FORMULAS
def test_row_11_koala_v_starts_from_01_and_adds_1(formulas: str) -> None:
    optimizer = KoalaV(parameters(1.0), formulas=formulas)
    assert optimizer.filter_state() == {"variance": 0.1, "process_noise": 1.0, "measurement_noise": 1.0}
    optimizer.predict()
    assert optimizer.filter_state()["variance"] == near(1.1)


@FORMULAS
def test_row_12_a_number_switches_the_adaptive_process_noise_off(formulas: str) -> None:
    # The authors' code has no such switch, the paper's Table 2 needs one.
    fixed = KoalaM(parameters(2.0), formulas=formulas, process_noise=0.01)
    adaptive = KoalaM(parameters(2.0), formulas=formulas)
    for optimizer in (fixed, adaptive):
        for _ in range(3):
            step(optimizer, 3.0, 1.0)
    assert fixed.filter_state()["process_noise"] == 0.01
    assert abs(adaptive.filter_state()["process_noise"] - 0.01) > 1e-3


@FORMULAS
def test_row_16_predict_moves_every_parameter_and_step_leaves_the_posterior(formulas: str) -> None:
    params = parameters(2.0, 1.0)
    optimizer = KoalaM(params, formulas=formulas, process_noise=1.0, measurement_noise=1.0)
    step(optimizer, 3.0, 1.0, 1.0)
    # Â = 1.2, Ĉ = .09, S = 2.2; after the step the weights are x_1 and no velocity has been added
    velocity = -0.09 * 3 / 2.2
    assert params[1].item() == near(1 - 1.2 * 3 / 2.2)
    step(optimizer, 3.0, 1.0, None)
    assert params[1].item() == near(1 - 1.2 * 3 / 2.2 + velocity)
    step(optimizer, 3.0, 1.0, None)
    assert params[1].item() == near(1 - 1.2 * 3 / 2.2 + 1.9 * velocity)


@FORMULAS
@BOTH
def test_row_19_filter_is_float64_and_weights_keep_their_dtype(cls: type, formulas: str) -> None:
    x = torch.nn.Parameter(torch.tensor([2.0, 0.0], dtype=torch.float32))
    optimizer = cls([x], formulas=formulas, process_noise=0.3)
    for _ in range(2):  # the second time from a variance that no float32 holds
        before = optimizer.filter_state()
        optimizer.predict()
        x.grad = torch.tensor([2.0, 0.0])
        optimizer.step(loss=torch.tensor([1.0, 3.0]))
        after = optimizer.filter_state()
        predicted = before["variance"] + 2 * before.get("covariance", 0) + before.get("velocity_variance", 0) + 0.3
        R = 0.9 * before["measurement_noise"] + 0.1 * 5
        assert after["measurement_noise"] == pytest.approx(R, rel=1e-15)
        assert after["variance"] == pytest.approx(predicted * R / (4 * predicted + R), rel=1e-14)
    assert x.dtype == torch.float32
    assert all(t.dtype == torch.float32 for t in optimizer.state[x].values())


@FORMULAS
@BOTH
def test_row_21_losses_and_gradients_are_those_of_the_predicted_point(cls: type, formulas: str) -> None:
    (x,) = params = parameters(2.0)
    optimizer = cls(params, formulas=formulas, process_noise=1.0)
    places = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        places.append(x.item())
        loss = x**2 / 2
        loss.backward()
        return loss

    optimizer.step(closure)
    posterior, R = x.item(), optimizer.filter_state()["measurement_noise"]
    loss = optimizer.step(closure)
    velocity = 0.09 / 1.2 * (posterior - 2) if cls is KoalaM else 0.0  # p = Ĉ/Â of the correction of x
    assert places == near([2.0, posterior + velocity])
    assert loss.item() == near(places[1] ** 2 / 2)
    assert optimizer.filter_state()["measurement_noise"] == near(0.9 * R + 0.1 * loss.item() ** 2)
