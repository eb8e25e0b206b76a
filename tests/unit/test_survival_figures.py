"""Figures show the numbers they are given."""

import numpy as np
import pytest

pytest.importorskip("sksurv")

from biomodel.errors import InputError  # noqa: E402
from survival import figures, metrics  # noqa: E402
from survival.curves import Curves  # noqa: E402

RNG = np.random.default_rng(0)
P = RNG.beta(2, 3, 200)
Y = (RNG.random(200) < P).astype(int)


def test_calibration():
    figure = figures.calibration(Y, P, bins=5)
    ax = figure.axes[0]
    points = [line for line in ax.lines if line.get_marker() == "o"]
    assert len(points) == 5
    first = np.argsort(P)[:40]
    assert (points[0].get_xdata()[0], points[0].get_ydata()[0]) == pytest.approx((P[first].mean(), Y[first].mean()))
    assert f"slope {metrics.calibration_line(Y, P)[0]:.2f}" in ax.get_title()
    with pytest.raises(InputError, match="3 patients for 5 bins"):
        figures.calibration(Y[:3], P[:3], bins=5)


def test_decision_curves():
    ax = figures.decision_curves(Y, {"model": P}).axes[0]
    lines = {line.get_label(): line for line in ax.lines}
    assert set(lines) == {"model", "everybody", "nobody"}
    x, shown = lines["model"].get_xdata(), lines["model"].get_ydata()
    assert shown == pytest.approx(metrics.net_benefit(Y, P, x))


def test_survival_curves():
    curves = Curves(np.array([1.0, 2.0]), np.array([[0.9, 0.4], [1.0, 0.8]]))
    ax = figures.survival_curves(curves, ["one", "other"], "months").axes[0]
    assert ax.lines[0].get_ydata().tolist() == [1.0, 0.9, 0.4] and "months" in ax.get_xlabel()
    with pytest.raises(InputError, match="1 names for 2 curves"):
        figures.survival_curves(curves, ["one"], "months")
