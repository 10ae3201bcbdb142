"""The script of the page "Be the filter" computes what the library computes."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from koala_lab import report
from koala_lib import KoalaM, KoalaV, kalman
from koala_lib.kalman import MomentumCovariance

SCRIPT = Path(report.__file__).parent / "site" / "static" / "filter.js"
OPTIONS = [
    {"R": 1.0, "Q": 0.01, "P0": 0.1, "kappa": 0.0, "noise": 0.35, "steps": 60, "seed": 1},
    {"R": 0.03, "Q": 0.2, "P0": 2.0, "kappa": 0.0, "noise": 0.1, "steps": 60, "seed": 7},
    {"R": 5.0, "Q": 0.001, "P0": 0.5, "kappa": 0.9, "noise": 0.35, "steps": 60, "seed": 3},
]


def node(expression: str) -> Any:
    program = shutil.which("node")
    if program is None:
        pytest.skip("there is no node on this machine to run the script with")
    code = f"const f = require({json.dumps(str(SCRIPT))}); console.log(JSON.stringify({expression}))"
    return json.loads(subprocess.run([program, "-e", code], capture_output=True, text=True, check=True).stdout)


def test_the_recursions_of_the_script_are_those_of_kalman() -> None:
    g = torch.Generator().manual_seed(0)
    drawn = torch.rand(50, 6, generator=g, dtype=torch.float64)
    drawn[:, 1] *= (drawn[:, 0] * drawn[:, 2]).sqrt()  # the covariance of two variances
    cases = drawn.tolist()
    found = node(
        f"{json.dumps(cases)}.map(([A, C, B, g, R, Q]) => [f.innovationVariance(A, g, R), f.predictPosition(A, Q), "
        "f.conditionPosition(A, g, R), ...f.predictMomentum([A, C, B], 0.9, Q, 0.01), "
        "...f.conditionMomentum([A, C, B], g, R)])"
    )
    for (A, C, B, squared_norm, R, Q), told in zip(cases, found, strict=True):
        a, c, b, norm, r, added = (torch.tensor(value, dtype=torch.float64) for value in (A, C, B, squared_norm, R, Q))
        wanted = [
            kalman.innovation_variance(A, squared_norm, R),
            kalman.predict_position(A, Q),
            kalman.condition_position(A, squared_norm, R),
            *kalman.predict_momentum(MomentumCovariance(a, c, b), 0.9, added, 0.01),
            *kalman.condition_momentum(MomentumCovariance(a, c, b), norm, r),
        ]
        torch.testing.assert_close(
            torch.tensor(told, dtype=torch.float64),
            torch.tensor([float(value) for value in wanted], dtype=torch.float64),
            rtol=1e-12,
            atol=1e-12,
        )


@pytest.mark.parametrize("options", OPTIONS)
def test_the_path_of_the_script_is_that_of_the_optimizer(options: dict[str, float]) -> None:
    trace, start, curvatures = node(f"[f.walk({json.dumps(options)}), f.START, f.CURVATURES]")
    x = torch.nn.Parameter(torch.tensor(start, dtype=torch.float64))
    h = torch.tensor(curvatures, dtype=torch.float64)
    fixed = {"initial_variance": options["P0"], "process_noise": options["Q"], "measurement_noise": options["R"]}
    optimizer: KoalaV | KoalaM
    if options["kappa"]:
        velocity = {"momentum": options["kappa"], "initial_velocity_variance": options["P0"], "velocity_noise": 0.01}
        optimizer = KoalaM([x], blocks="global", **fixed, **velocity)
    else:
        optimizer = KoalaV([x], blocks="global", **fixed)
    for step in trace:

        def closure(shift: list[float] = step["shift"]) -> torch.Tensor:
            optimizer.zero_grad()
            loss = (h * (x - torch.tensor(shift, dtype=torch.float64)) ** 2).sum() / 2
            loss.backward()
            return loss

        optimizer.step(closure)
        torch.testing.assert_close(x.data, torch.tensor(step["x"], dtype=torch.float64), rtol=1e-12, atol=1e-12)
        assert optimizer.filter_state()["variance"] == pytest.approx(step["variance"], rel=1e-12)


def test_the_script_is_small_and_asks_nobody() -> None:
    text = SCRIPT.read_text(encoding="utf-8")
    assert len(text.encode()) < 200_000
    assert "http" not in text
    assert "import(" not in text
