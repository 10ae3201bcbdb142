"""What the pictures of filters draw."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from koala_lab import plots
from koala_lab.claims import statistics


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


def table_of_runs() -> pd.DataFrame:
    """Two rows with five shared seeds each; the first is better by 1 to 5 points."""
    lines = [
        {"row": row, "dataset": "digits", "model": "resnet8", "seed": seed, "test_error": 2.0 + seed * (row == "sgd")}
        for row in ("koala_m", "sgd")
        for seed in range(1, 6)
    ]
    return pd.DataFrame(lines)


def comparison(test: str, margin: float) -> pd.DataFrame:
    frame = table_of_runs().pivot(index="seed", columns="row", values="test_error")
    gain = (frame["sgd"] - frame["koala_m"]).rename("gain").reset_index()
    told = {"dataset": "digits", "model": "resnet8", "claim": "koala.x", "subject": "koala_m", "other": "sgd"}
    return gain.assign(**told, test=test, margin=margin, confidence=0.95, paper=2.5)


def test_a_table_shows_the_paper_every_seed_and_what_is_judged() -> None:
    printed = {"koala_m": 1.0, "sgd": 3.5}
    fig = plots.table(table_of_runs(), "test_error", printed=printed, compared=comparison("better", 0.5))
    paper, seeds, judged = fig.axes
    assert [text.get_text() for text in paper.get_yticklabels()] == ["KOALA-M", "SGD"]
    assert seeds.get_title() == "digits, ResNet-8, n = 5"
    assert [text.get_text() for text in judged.get_yticklabels()] == ["KOALA-M better than SGD"]
    told = plots.drawn(fig)
    last = told[told["panel"].str.startswith("3")]
    found = last.groupby("series")["x"].apply(list)
    mean, low, high = statistics.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found["KOALA-M better than SGD: seeds"] == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert found["KOALA-M better than SGD: mean"] == [mean]
    np.testing.assert_allclose(found["KOALA-M better than SGD: end of the 95% interval"], [low, high])
    assert found["KOALA-M better than SGD: paper"] == [2.5]
    assert told[told["series"] == "SGD: paper"]["x"].tolist() == [3.5]
    assert set(told[told["panel"].str.startswith("2")]["series"]) >= {"SGD: seeds", "KOALA-M: mean"}
    plt.close("all")


def test_the_box_of_a_comparison_is_what_its_test_asks_for() -> None:
    for test, margin, start, end in (("better", 0.5, 0.5, None), ("no_worse", 0.5, -0.5, None), ("on_par", 1.0, -1, 1)):
        _, ax = plt.subplots()
        plots.judged(ax, comparison(test, margin), {}, "test error (%)")
        [box] = ax.patches
        assert box.get_x() == start
        assert box.get_x() + box.get_width() == (ax.get_xlim()[1] if end is None else end)
        assert "(points)" in ax.get_xlabel()
    plt.close("all")


def test_what_lies_beyond_the_axis_is_said() -> None:
    _, ax = plt.subplots()
    plots.gains(ax, {"far": [-9.0, -10.0, -11.0], "near": [0.5, 1.0, 0.75]}, limit=2.0)
    assert [text.get_text() for text in ax.texts] == ["-10"]
    assert ax.get_xlim() == (-2.0, 2.0)
    ids = [line.get_gid() for line in ax.lines]
    assert "far: beyond the axis, with a mean of -10" in ids
    assert "far: mean" not in ids
    assert "near: mean" in ids
    plt.close("all")


def test_rows_differ_in_colour_or_marker_and_colours_in_luminance() -> None:
    rows = [f"row {i}" for i in range(30)]
    looks = list(zip(plots.row_colours(rows).values(), plots.row_markers(rows).values(), strict=True))
    assert len(set(looks)) == len(rows)
    white = {name: contrast(shade) for name, shade in plots.PALETTE.items()}
    assert min(white.values()) > 2.0, white  # nothing as pale as yellow on white


def contrast(shade: str) -> float:
    """WCAG's contrast of a colour against white."""
    parts = [int(shade[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 1.05 / (float(np.dot([0.2126, 0.7152, 0.0722], linear)) + 0.05)


def test_bands_and_runs_are_in_the_data_of_a_figure() -> None:
    fig, ax = plt.subplots()
    ax.fill_between([0, 1], [1, 2], [3, 4], label="band")
    ax.axhline(2.0)
    told = plots.drawn(fig)
    assert {(x, y) for x, y in told[told["series"] == "band"][["x", "y"]].itertuples(index=False)} >= {(0, 1), (1, 4)}
    plt.close("all")
