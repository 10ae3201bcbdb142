"""A watched run: the same run as an unwatched one, and columns that fit each other."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

from koala_lab import data, models
from koala_lab.config import RunConfig
from koala_lab.runs.trace import trace
from koala_lab.runs.training import train

CONFIG = RunConfig(
    dataset="digits",
    model="resnet8",
    optimizer="koala_m",
    optimizer_args={"weight_decay": 0.05},
    epochs=2,
    batch_size=64,
    milestones=(1,),
    gamma=0.2,
    train_size=320,
)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module", params=["koala_v", "koala_m"])
def run(request: pytest.FixtureRequest) -> pd.DataFrame:
    return trace(CONFIG.but(optimizer=request.param), 10)


def test_it_is_the_run_that_train_makes(run: pd.DataFrame) -> None:
    optimizer = "koala_m" if "covariance" in run else "koala_v"
    result = train(CONFIG.but(optimizer=optimizer))
    for epoch, recorded in enumerate(result.epochs):
        mean = run["loss"].iloc[5 * epoch : 5 * epoch + 5].mean()
        assert mean == pytest.approx(recorded["train_loss"], rel=5e-6)  # train rounds to 6 digits
    assert run["step"].tolist() == list(range(1, 11))


def test_the_columns_fit_each_other(run: pd.DataFrame) -> None:
    P, g2, R, S = (
        run[name] for name in ("predicted_variance", "gradient_norm", "measurement_noise", "innovation_variance")
    )
    exact = {"check_names": False, "rtol": 1e-9}
    pd.testing.assert_series_equal(S, P * g2**2 + R, **exact)
    pd.testing.assert_series_equal(run["gain"], 1 - R / S, **exact)
    pd.testing.assert_series_equal(run["variance"], P * R / S, rtol=1e-5, check_names=False)  # (13), float32 norms
    lr = pd.Series([1.0] * 5 + [0.2] * 5)  # the schedule
    pd.testing.assert_series_equal(run["rate"], lr * P * run["loss"] / S, **exact)
    assert ((run["smallest_gain"] > 0) & (run["smallest_gain"] < run["gain"]) & (run["gain"] < 1)).all()
    if "covariance" in run:
        added = 2 * run["covariance"] + run["velocity_variance"]
        later = (run["variance"] + added).shift() + run["process_noise"]
        pd.testing.assert_series_equal(P[1:], later[1:], **exact)
    else:
        pd.testing.assert_series_equal(P[1:], run["variance"].shift()[1:] + 1.0, **exact)


def test_the_first_row_by_hand() -> None:
    run = trace(CONFIG.but(optimizer="koala_v"), 1).iloc[0]
    digits = data.load("digits", train_size=320)
    torch.manual_seed(0)
    network = models.build("resnet8", num_classes=10, in_channels=1, image_size=8)
    [(x, y), *_] = data.batches(
        digits.train_images, digits.train_labels, 64, mean=digits.mean, std=digits.std,
        generator=data.epoch_generator(0, 0), drop_last=True,
    )  # fmt: skip
    losses = torch.nn.functional.cross_entropy(network(x), y, reduction="none")
    losses.mean().backward()
    norms = [float((p.grad + 0.05 * p.detach()).norm()) for p in network.parameters() if p.grad is not None]
    assert run["loss"] == pytest.approx(float(losses.detach().mean()), rel=1e-5)
    assert run["gradient_norm"] == pytest.approx(max(norms), rel=1e-4)
    assert run["measurement_noise"] == pytest.approx(0.9 + 0.1 * float(losses.detach().square().mean()), rel=1e-5)
    S = 1.1 * min(norms) ** 2 + run["measurement_noise"]
    assert run["smallest_gain"] == pytest.approx(1.1 * min(norms) ** 2 / S, rel=1e-3)


def test_the_rate_of_the_absolute_target_has_no_loss() -> None:
    args = {"target_risk": "absolute", "lr": 0.3}
    run = trace(CONFIG.but(optimizer="koala_v", optimizer_args=args), 2)
    expected = 0.3 * run["predicted_variance"] / run["innovation_variance"]
    pd.testing.assert_series_equal(run["rate"], expected, check_names=False, rtol=1e-12)


def test_an_optimizer_without_a_filter_is_refused() -> None:
    with pytest.raises(
        ValueError, match="optimizer='sgd' has no filter to record; use koala_v, koala_m, meka or adameka"
    ):
        trace(CONFIG.but(optimizer="sgd", optimizer_args={"lr": 0.1}), 1)


def test_a_warm_up_is_refused() -> None:
    with pytest.raises(ValueError, match="a trace has no warm-up, but warmup_steps=3; leave it out"):
        trace(CONFIG.but(warmup_steps=3), 1)


# ---------------------------------------------------------------- MEKA

MEKA = CONFIG.but(model="mlp_100", optimizer="meka", optimizer_args={"lr": 0.1, "step_size": "constant"})


@pytest.mark.parametrize(("optimizer", "rule"), [("meka", "constant"), ("meka", "pi"), ("adameka", "quadratic")])
def test_mekas_run_is_the_one_that_train_makes(optimizer: str, rule: str) -> None:
    config = MEKA.but(optimizer=optimizer, optimizer_args={"lr": 0.1, "step_size": rule, "smoothing": 0.0})
    run = trace(config, 10, full_gradient=True)
    assert [run["loss"][:5].mean(), run["loss"][5:].mean()] == pytest.approx(
        [epoch["train_loss"] for epoch in train(config).epochs], rel=5e-6
    )
    assert ("step_size_optimum" in run) == (rule != "constant")


def test_distances_to_the_full_gradient_against_a_loop_by_hand() -> None:
    """The filter written out with a loop over samples and a numerical Hessian-vector product."""
    run = trace(MEKA, 4, full_gradient=True)
    digits = data.load("digits", train_size=320)
    torch.manual_seed(0)
    network = models.build("mlp_100", num_classes=10, in_channels=1, image_size=8).double()
    images = [
        (x.double(), y)
        for x, y in data.batches(
            digits.train_images, digits.train_labels, 64, mean=digits.mean, std=digits.std,
            generator=data.epoch_generator(0, 0), drop_last=True,
        )
    ]  # fmt: skip

    def gradient(x: torch.Tensor, y: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        torch.nn.utils.vector_to_parameters(at, network.parameters())
        loss = torch.nn.functional.cross_entropy(network(x), y)
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, [*network.parameters()])])

    theta = torch.nn.utils.parameters_to_vector(network.parameters()).detach().clone()
    m, p, d = torch.zeros_like(theta), 1e4, torch.zeros_like(theta)
    everything = torch.cat([x for x, _ in images]), torch.cat([y for _, y in images])
    sigma = weight = 0.0
    for row, (x, y) in zip(run.itertuples(), images, strict=False):
        singles = [(x[i : i + 1], y[i : i + 1]) for i in range(len(y))]
        gradients = torch.stack([gradient(*one, theta) for one in singles])
        h = 1e-4
        ahead, behind = (torch.stack([gradient(*one, theta + s * h * d) for one in singles]) for s in (1, -1))
        products = (ahead - behind) / (2 * h)
        g, b, full = gradients.mean(0), products.mean(0), gradient(*everything, theta)
        weight = 0.999 * weight + 0.001
        sigma += 0.001 / weight * (float(gradients.var(0).mean()) / 64 - sigma)
        p += float(products.var(0).mean()) / 64
        k = p / (p + sigma)
        m, p = (1 - k) * (m + b) + k * g, (1 - k) * p
        loss = torch.nn.functional.cross_entropy(network(everything[0]), everything[1])  # at theta, by the line above
        assert row.full_loss == pytest.approx(float(loss), rel=1e-5)
        assert row.full_gradient_norm == pytest.approx(float(full.norm()), rel=1e-4)
        assert row.filtered_error == pytest.approx(float((m - full).norm()), rel=1e-3)
        assert row.minibatch_error == pytest.approx(float((g - full).norm()), rel=1e-3)
        d = -0.1 * m
        theta = theta + d
    assert p == pytest.approx(run["variance"].iloc[-1], rel=1e-3)


def test_koala_has_no_filtered_gradient_to_compare() -> None:
    with pytest.raises(ValueError, match="which only MEKA has"):
        trace(CONFIG, 1, full_gradient=True)
