"""What the pictures of filters draw."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from koala_lab import plots


def test_ellipse_has_mahalanobis_distance_two() -> None:
    _, ax = plt.subplots()
    mean, covariance = np.array([1.0, -2.0]), np.array([[2.0, 0.6], [0.6, 0.5]])
    plots.ellipse(ax, mean, covariance, color="k")
    offset = ax.lines[0].get_xydata() - mean
    np.testing.assert_allclose(np.einsum("ij,jk,ik->i", offset, np.linalg.inv(covariance), offset), 4.0)
    plt.close("all")


def test_contours_follow_the_function() -> None:
    _, ax = plt.subplots()
    plots.contours(ax, lambda x: 1 + x[:, 0] ** 2 + 4 * x[:, 1] ** 2, (-3.0, 2.0), (-1.0, 1.5), lines=5)
    (lines,) = ax.collections
    assert len(lines.levels) == 5
    for level, path in zip(lines.levels, lines.get_paths(), strict=True):
        np.testing.assert_allclose(1 + path.vertices[:, 0] ** 2 + 4 * path.vertices[:, 1] ** 2, level, rtol=5e-3)
    assert (ax.get_xlim(), ax.get_ylim()) == ((-3.0, 2.0), (-1.0, 1.5))
    plt.close("all")


def test_steps_draws_medians_of_the_columns_that_are_there() -> None:
    steps = np.arange(1, 31)
    v = pd.DataFrame({"step": steps, "loss": 1.0 / steps, "sd": 2.0})
    v.loc[10, "loss"] = 100.0  # a single outlier, which a median ignores
    m = v.assign(covariance=0.1)
    panels = {"loss": ("loss", "sd", "nats"), "C": ("covariance", "absent", "units")}
    fig = plots.steps({"koala_v": v, "koala_m": m}, panels, columns=2, window=5)
    first, second = fig.axes
    assert [len(first.lines), len(second.lines)] == [6, 2]  # raw, median and dashed for each; raw and median for one
    raw, median = (first.lines[i].get_ydata() for i in (0, 1))
    np.testing.assert_allclose(raw, v["loss"])
    np.testing.assert_allclose(median[12], np.median(v["loss"][10:15]))
    assert np.max(median) < 2
    assert [t.get_text() for t in first.get_legend().get_texts()] == ["KOALA-V", "KOALA-M"]
    assert first.get_ylabel() == "nats"
    assert first.get_yscale() == "log"
    plt.close("all")
