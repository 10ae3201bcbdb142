"""The slow twins themselves: against hand calculation, the dense extended Kalman filter, and known limits."""

from collections.abc import Callable, Sequence
from fractions import Fraction as F

import numpy as np
import pytest
import torch
from torch import Tensor

from koala_lib.reference.koala import ReferenceKoalaM, ReferenceKoalaV

Loss = Callable[[Sequence[Tensor]], Tensor]
Twin = ReferenceKoalaV | ReferenceKoalaM


def tensors(*values: float | list[float]) -> list[Tensor]:
    return [torch.tensor(value, dtype=torch.float64) for value in values]


def group(*values: float | list[float], **options: float) -> dict:
    return {"params": tensors(*values), **options}


def evaluate(loss_fn: Loss, x: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    leaves = [t.clone().requires_grad_() for t in x]
    losses = loss_fn(leaves)
    return losses.detach(), list(torch.autograd.grad(losses.mean(), leaves))


def step(twin: Twin, loss_fn: Loss) -> None:
    twin.predict()
    twin.update(*evaluate(loss_fn, twin.x))


def assert_values(actual: Sequence[float | Tensor], expected: Sequence[F | float]) -> None:
    assert [float(a) for a in actual] == pytest.approx([float(e) for e in expected], rel=1e-13, abs=1e-15)


def half_square(x: Sequence[Tensor]) -> Tensor:
    return x[0] ** 2 / 2


# --- by hand ---------------------------------------------------------------------------------------------


def test_koala_v_two_steps_by_hand() -> None:
    # L = x²/2 from x = 2 with P = 1, Q = 1, R = 2.
    # 1: P̂ = 2, g = 2, L = 2, S = 2·4 + 2 = 10, x = 2 - 2·2/10·2 = 6/5, P = 2/10·2 = 2/5
    # 2: P̂ = 7/5, g = 6/5, L = 18/25, S = 7/5·36/25 + 2 = 502/125,
    #    x = 6/5 (1 - 7/5·18/25·125/502) = 6/5·188/251, P = 2·125/502·7/5 = 175/251
    twin = ReferenceKoalaV([group(2.0)], initial_variance=1.0, process_noise=1.0, measurement_noise=2.0)
    step(twin, half_square)
    assert_values([*twin.x, twin.P, *twin.S, twin.eta, twin.L], [F(6, 5), F(2, 5), 10, F(4, 10), 2])
    step(twin, half_square)
    assert_values([*twin.x, twin.P, *twin.S], [F(1128, 1255), F(175, 251), F(502, 125)])
    assert (twin.R, twin.Q, twin.skipped_steps) == (2.0, 1.0, 0)


def test_koala_m_two_steps_by_hand() -> None:
    # L = x²/2 from x = 2, p = 0 with κ = 1/2, A = B = 1, C = 0, q_x = 1, q_p = 1/2, R = 2.
    twin = ReferenceKoalaM(
        [group(2.0)],
        momentum=0.5,
        initial_variance=1.0,
        initial_velocity_variance=1.0,
        process_noise=1.0,
        velocity_noise=0.5,
        measurement_noise=2.0,
    )
    # 1: Â = 1 + 0 + 1 + 1 = 3, Ĉ = 1/2, B̂ = 1/4 + 1/2 = 3/4; g = 2, L = 2, S = 3·4 + 2 = 14, η = 2/7
    twin.predict()
    assert_values([*twin.x, *twin.p, twin.A, twin.C, twin.B], [2, 0, 3, F(1, 2), F(3, 4)])
    twin.update(*evaluate(half_square, twin.x))
    # x = 2 - 3·2/14·2, p = -1/2·2/14·2, A = 3·2/14, C = 1/2·2/14, B = 3/4 - 2/7·1/4
    expected = [F(8, 7), -F(1, 7), F(3, 7), F(1, 14), F(19, 28)]
    assert_values([*twin.x, *twin.p, twin.A, twin.C, twin.B], expected)
    # 2: x̂ = 1, p̂ = -1/14, Â = 3/7 + 1/7 + 19/28 + 1 = 9/4, Ĉ = (1/14 + 19/28)/2 = 3/8, B̂ = 19/112 + 1/2
    twin.predict()
    assert_values([*twin.x, *twin.p, twin.A, twin.C, twin.B], [1, -F(1, 14), F(9, 4), F(3, 8), F(75, 112)])
    twin.update(*evaluate(half_square, twin.x))
    # S = 9/4 + 2 = 17/4, e = 1/2
    expected = [F(25, 34), -F(55, 476), F(18, 17), F(3, 17), F(303, 476)]
    assert_values([*twin.x, *twin.p, twin.A, twin.C, twin.B], expected)


def test_two_blocks_by_hand() -> None:
    # L = 3a + 4b from (1, 1), P̂ = 9/25 + 16/25 = 1 and R = 9: S = (18, 25), η = max(9/18, 16/25) = 16/25,
    # so that P = 9/25 again. The second residual is negative and turns the step round.
    def loss(x: Sequence[Tensor]) -> Tensor:
        return 3 * x[0] + 4 * x[1]

    settings = {"initial_variance": 9 / 25, "process_noise": 16 / 25, "measurement_noise": 9.0}
    twin = ReferenceKoalaV([group(1.0, 1.0)], **settings)
    step(twin, loss)  # L = 7
    assert_values([*twin.x, twin.P, *twin.S, twin.eta], [-F(1, 6), -F(3, 25), F(9, 25), 18, 25, F(16, 25)])
    step(twin, loss)  # L = -49/50
    assert_values([*twin.x, twin.P], [-F(1, 300), F(23, 625), F(9, 25)])

    whole = ReferenceKoalaV([group(1.0, 1.0)], blocks="global", **settings)
    step(whole, loss)  # S = 25 + 9 = 34
    assert_values([*whole.x, whole.P, *whole.S], [1 - F(21, 34), 1 - F(28, 34), F(9, 34), 34])


def test_paper_noise_estimates_by_hand() -> None:
    # β = 1/2, P = 1, R = 1; x = 2 and three zeros that never get a gradient, so n = 4.
    twin = ReferenceKoalaV([group(2.0, [0.0, 0.0, 0.0])], initial_variance=1.0, process_noise=None, noise_decay=0.5)
    twin.predict()  # x_avg = x_0, so q = 0
    # losses (1, 3): L = 2, R = 1/2 + (1 + 9)/2/2 = 3; g = 3: S = 12, x = 2 - 2/12·3, P = 1 - 9/12
    twin.update(torch.tensor([1.0, 3.0], dtype=torch.float64), [*tensors(3.0), None])
    assert_values([twin.Q, twin.R, twin.x[0], twin.P], [0, 3, F(3, 2), F(1, 4)])
    # x_avg = (2 + 3/2)/2 = 7/4, q = (1/4)²/4 = 1/64, P̂ = 17/64
    # losses (0, 4): L = 2, R = 3/2 + 8/2 = 11/2; g = 4: S = 17/4 + 11/2 = 39/4
    twin.predict()
    twin.update(torch.tensor([0.0, 4.0], dtype=torch.float64), [*tensors(4.0), None])
    assert_values([twin.Q, twin.R, twin.x[0], twin.P], [F(1, 64), F(11, 2), F(50, 39), F(187, 1248)])
    assert twin.x[1].tolist() == [0.0, 0.0, 0.0]


def test_released_noise_estimates_and_weight_decay_by_hand() -> None:
    # β = κ = lr = 1/2, λ = 1, x = 2. q = .01/2 + |2 - 0|/2 = 1.005, Â = .495 + .5 + 1.005 = 2
    twin = ReferenceKoalaM(
        [group(2.0, lr=0.5, weight_decay=1.0)],
        momentum=0.5,
        initial_variance=0.495,
        initial_velocity_variance=0.5,
        velocity_noise=0.375,
        noise_decay=0.5,
        formulas="released",
    )
    twin.predict()
    assert_values([twin.q_x, twin.A, twin.C, twin.B], [F(201, 200), 2, F(1, 4), F(1, 2)])
    # losses (1, 3): R = 1/2 + 5/2 = 3 without the penalty; e = 2 + 2²/2 = 4, h = 1 + 2 = 3, S = 18 + 3 = 21
    # x = 2 - 2·(4/2)/21·3 = 10/7, p = -1/4·(4/2)/21·3 = -1/14, η = 3/7
    twin.update(torch.tensor([1.0, 3.0], dtype=torch.float64), tensors(1.0))
    expected = [3, F(10, 7), -F(1, 14), F(2, 7), F(1, 28), F(53, 112)]
    assert_values([twin.R, *twin.x, *twin.p, twin.A, twin.C, twin.B], expected)
    # x_avg = (0 + 10/7)/2 = 5/7, so the next q is 201/400 + (10/7 - 5/7)/2
    twin.predict()
    assert_values([twin.q_x, *twin.x], [F(201, 400) + F(5, 14), F(10, 7) - F(1, 14)])


def test_literal_equation_22() -> None:
    # Against the current target the bracket is Var_i + ε² L² under (b) and Var_i + ε² under (a).
    losses = torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64)  # mean 3, variance (4 + 1 + 9)/3 = 14/3
    for target_risk, expected in (("relative", F(14, 3) + F(1, 16) * 9), ("absolute", F(14, 3) + F(1, 16))):
        twin = ReferenceKoalaV([group(1.0)], lr=0.25, target_risk=target_risk, noise_target="current")
        twin.predict()
        twin.update(losses, tensors(1.0))
        assert_values([twin.R], [F(9, 10) + expected / 10])
    zero = ReferenceKoalaV([group(1.0)], lr=0.25)
    zero.predict()
    zero.update(losses, tensors(1.0))
    assert_values([zero.R], [F(9, 10) + F(41, 3) / 10])


@pytest.mark.parametrize("formulas", ["paper", "released"])
def test_missing_observation_leaves_the_prediction(formulas: str) -> None:
    # The velocity still moves x, the variances still grow, and R keeps its value.
    twin = ReferenceKoalaM([group([2.0, 1.0])], formulas=formulas, process_noise=0.3)
    losses = torch.tensor([1.0, 2.0], dtype=torch.float64)
    twin.predict()
    twin.update(losses, tensors([1.0, -1.0]))
    x, p, R, A, B, C = twin.x[0].clone(), twin.p[0].clone(), twin.R, twin.A, twin.B, twin.C
    nan, inf = float("nan"), float("inf")
    for count, (bad_losses, grads) in enumerate(
        [
            (torch.tensor([1.0, nan], dtype=torch.float64), tensors([1.0, 1.0])),
            (losses, tensors([1.0, inf])),
            (losses, tensors([1e-10, 1e-10])),
            (losses, [None]),
        ],
        start=1,
    ):
        twin.predict()
        twin.update(bad_losses, grads)
        A, B, C = A + 2 * C + B + 0.3, 0.81 * B + 0.01, 0.9 * (C + B)
        x, p = x + p, 0.9 * p
        assert_values([twin.A, twin.B, twin.C, twin.R, twin.skipped_steps], [A, B, C, R, count])
        assert_values([*twin.x[0], *twin.p[0]], [*x, *p])
    assert float(p.norm()) > 0


# --- the dense extended Kalman filter ---------------------------------------------------------------------


class DenseFilter:
    """Table 1 with full matrices; only the covariance update uses (11)/(21), and (25) for several blocks.

    `exact=True` uses no approximation at all, which for n = 1 must give the same.
    """

    def __init__(self, x: np.ndarray, P0: np.ndarray, F: np.ndarray, Q: np.ndarray, exact: bool = False):
        self.n, self.exact = x.size, exact
        identity = np.eye(self.n)
        self.order = P0.shape[0]
        self.state = np.concatenate([x, np.zeros((self.order - 1) * self.n)])
        self.P, self.F, self.Q = np.kron(P0, identity), np.kron(F, identity), np.kron(Q, identity)

    def predict(self) -> np.ndarray:
        self.state = self.F @ self.state
        self.P = self.F @ self.P @ self.F.T + self.Q
        return self.state[: self.n]

    def update(self, gradients: np.ndarray, residual: np.ndarray, R: float) -> None:
        """`gradients` (blocks, n): row i is the gradient of block i, zero elsewhere; `residual` is h - z."""
        H = np.hstack([gradients, np.zeros((len(gradients), (self.order - 1) * self.n))])
        S = H @ self.P @ H.T + R * np.eye(len(H))
        K = self.P @ H.T @ np.linalg.inv(S)
        self.state = self.state - K @ residual
        if self.exact:
            self.P = (np.eye(len(self.P)) - K @ H) @ self.P
            return
        largest = max((H[i] @ H[i]) / S[i, i] for i in range(len(H)))
        only_x = np.zeros((self.order, self.order))
        only_x[0, 0] = largest
        self.P = self.P - self.P @ np.kron(only_x, np.eye(self.n)) @ self.P


def wavy(x: Sequence[Tensor]) -> Tensor:
    """Per-sample losses (3,) of any number of tensors: smooth, not convex, positive."""
    flat = torch.cat([t.reshape(-1) for t in x])
    places = torch.arange(1.0, 4.0, dtype=torch.float64)[:, None]
    features = torch.sin(places * torch.arange(1.0, len(flat) + 1, dtype=torch.float64))
    return ((torch.tanh(flat) - features) ** 2).sum(1) + torch.cosh(flat * places).mean(1)


@pytest.mark.parametrize("target_risk", ["relative", "absolute"])
@pytest.mark.parametrize("blocks", ["tensor", "global"])
@pytest.mark.parametrize("shape", [[1], [2, 3, 4], [10]])
@pytest.mark.parametrize("kind", ["V", "M"])
def test_twin_is_the_dense_extended_kalman_filter(kind: str, shape: list[int], blocks: str, target_risk: str) -> None:
    n, lr, q, q_p, kappa, R = sum(shape), 0.3, 0.05, 0.02, 0.8, 0.5
    start = torch.linspace(-1, 1, n, dtype=torch.float64) + 0.3
    params = {"params": [part.clone() for part in start.split(shape)]}
    common = {
        "lr": lr,
        "process_noise": q,
        "measurement_noise": None,
        "initial_measurement_noise": R,
        "blocks": blocks,
        "target_risk": target_risk,
    }
    twin: Twin
    if kind == "V":
        twin = ReferenceKoalaV([params], initial_variance=0.2, **common)
        dense = DenseFilter(start.numpy(), np.array([[0.2]]), np.eye(1), np.array([[q]]), exact=n == 1)
    else:
        twin = ReferenceKoalaM(
            [params],
            momentum=kappa,
            initial_variance=0.2,
            initial_velocity_variance=0.3,
            initial_covariance=-0.1,
            velocity_noise=q_p,
            **common,
        )
        P0, transition = np.array([[0.2, -0.1], [-0.1, 0.3]]), np.array([[1.0, 1.0], [0.0, kappa]])
        dense = DenseFilter(start.numpy(), P0, transition, np.diag([q, q_p]), exact=n == 1)

    for _ in range(25):
        twin.predict()
        np.testing.assert_allclose(torch.cat(twin.x), dense.predict(), rtol=1e-10, atol=1e-12)
        twin.update(*evaluate(wavy, twin.x))

        losses, (g,) = evaluate(wavy, [torch.from_numpy(dense.state[:n].copy())])
        edges = np.cumsum([0, n] if blocks == "global" else [0, *shape])
        rows = np.zeros((len(edges) - 1, n))
        for row, begin, end in zip(rows, edges, edges[1:], strict=False):
            row[begin:end] = g[begin:end]
        R = 0.9 * R + 0.1 * float((losses**2).mean())
        target = (1 - lr) * losses.mean() if target_risk == "relative" else losses.mean() - lr
        dense.update(rows, np.full(len(rows), float(losses.mean() - target)), R)

        np.testing.assert_allclose(torch.cat(twin.x), dense.state[:n], rtol=1e-10, atol=1e-12)
        variances = [[twin.P]] if kind == "V" else [[twin.A, twin.C], [twin.C, twin.B]]
        np.testing.assert_allclose(dense.P, np.kron(variances, np.eye(n)), rtol=1e-10, atol=1e-12)
        assert np.linalg.eigvalsh(dense.P).min() > 0
        if kind == "M":
            np.testing.assert_allclose(torch.cat(twin.p), dense.state[n:], rtol=1e-10, atol=1e-12)


# --- limits and identities --------------------------------------------------------------------------------


@pytest.mark.parametrize("R", [1e-6, 0.1, 10.0])
def test_linear_loss_contracts_by_R_over_S(R: float) -> None:
    slope = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)

    def linear(x: Sequence[Tensor]) -> Tensor:
        return x[0] @ slope + 4

    twin = ReferenceKoalaV([group([1.0, 1.0, 1.0])], measurement_noise=R)
    for _ in range(3):
        step(twin, linear)
        (S,) = twin.S
        assert float(linear(twin.x)) == pytest.approx(R / S * twin.L, rel=1e-9, abs=1e-13)


def test_without_measurement_noise_the_step_is_polyaks() -> None:
    for P in (0.01, 100.0):  # and does not depend on the variance
        twin = ReferenceKoalaV([group([3.0, -1.0], [2.0])], initial_variance=P, measurement_noise=1e-300)
        losses, grads = evaluate(wavy, twin.x)
        expected = [x - losses.mean() / (g @ g) * g for x, g in zip(twin.x, grads, strict=True)]
        step(twin, wavy)
        torch.testing.assert_close(twin.x, expected, rtol=1e-13, atol=1e-13)


def test_with_large_measurement_noise_the_step_is_sgd() -> None:
    # R -> inf: SGD with rate P̂ e / R, here with target (a), whose e is the constant ε.
    R, rate, Q = 1e14, 0.05, 0.5
    twin = ReferenceKoalaV(
        [group([0.3, -0.2], 0.7)],
        lr=rate * R / Q,
        initial_variance=1e-20,
        process_noise=Q,
        measurement_noise=R,
        target_risk="absolute",
    )
    plain = [x.clone() for x in twin.x]
    for k in range(5):
        step(twin, wavy)
        _, grads = evaluate(wavy, plain)
        # With the gradient far below R nothing is learned about P, which grows by Q at every step.
        plain = [x - rate * (k + 1) * g for x, g in zip(plain, grads, strict=True)]
    torch.testing.assert_close(twin.x, plain, rtol=1e-9, atol=1e-12)


def test_koala_m_without_velocities_is_koala_v() -> None:
    common = {"initial_variance": 0.2, "process_noise": None, "weight_decay": 0.1}
    v = ReferenceKoalaV([group([0.3, -0.2], 0.7)], **common)
    m = ReferenceKoalaM([group([0.3, -0.2], 0.7)], initial_velocity_variance=0.0, velocity_noise=0.0, **common)
    for _ in range(10):
        step(v, wavy)
        step(m, wavy)
        assert (v.P, v.R, v.q_x) == (m.A, m.R, m.q_x)
        torch.testing.assert_close(v.x, m.x, rtol=0, atol=0)
    assert v.q_x > 0


def test_information_form_and_largest_block() -> None:
    # 1/P = 1/P̂ + max_i |g_i|²/R: the shared update is the one of the block with the largest gradient.
    twin = ReferenceKoalaV([group([0.3, -0.2], [1.7, 0.1, 0.4], -0.9)], lr=0.1, measurement_noise=0.7)
    for _ in range(10):
        twin.predict()
        losses, grads = evaluate(wavy, twin.x)
        predicted = twin.P
        twin.update(losses, grads)
        largest = max(float((g * g).sum()) for g in grads)
        assert_values([1 / twin.P], [1 / predicted + largest / 0.7])


def test_released_koala_v_has_no_adaptive_process_noise() -> None:
    with pytest.raises(ValueError, match="process_noise"):
        ReferenceKoalaV([group(1.0)], process_noise=None, formulas="released")
