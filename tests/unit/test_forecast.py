"""Forecasts: reproducible, conditioned on what was seen, under any schedule, and leak-proof."""

import dataclasses

import numpy as np
import pytest

import biomodel as bm
from biomodel.calibration.calibrate import MAP, Laplace
from biomodel.errors import InputError
from biomodel.virtual import Matched, small_patient


@pytest.fixture(scope="module")
def whole():
    return small_patient(7, Matched()).patient


@pytest.fixture(scope="module")
def fit(whole):
    model = bm.ReactionDiffusion(bm.Logistic(), bm.Isotropic(), [bm.Chemotherapy(a) for a in whole.schedule.agents])
    return bm.calibrate(model, whole.until(2), method=Laplace(MAP(starts=1)))


@pytest.fixture(scope="module")
def forecast(fit, whole):
    return bm.forecast(fit, times=[v.day for v in whole.visits], draws=40, seed=3, curve_step=10.0)


def test_the_same_seed_gives_the_same_forecast(fit, forecast, whole):
    again = bm.forecast(fit, times=[v.day for v in whole.visits], draws=40, seed=3, curve_step=10.0)
    assert again.data.identical(forecast.data)
    other = bm.forecast(fit, until=30.0, draws=40, seed=4)
    assert not np.array_equal(other["volume"].values[:, -1], forecast["volume"].values[:, 1])


def test_shapes_units_and_coordinates(forecast, whole):
    data = forecast.data
    assert data["cell_fraction"].dims == ("draw", "time", "z", "y", "x") and data["cell_fraction"].dtype == np.float32
    assert data["probability"].dims == ("time", "z", "y", "x")
    for name in ("volume", "cells", "longest_diameter", "cell_fraction"):
        assert data[name].attrs["units"]
    assert data["time"].attrs["units"] == "days" and data["x"].attrs["units"] == "mm"
    assert float(data["probability"].max()) <= 1
    visible = (data["cell_fraction"] >= data.attrs["visible_fraction"]).sum(("z", "y", "x"))
    np.testing.assert_allclose(visible * whole.domain.voxel_volume / 1e3, data["volume"])
    assert "median" in forecast._repr_html_()


def test_the_first_visit_is_what_was_seen(forecast, whole):
    """Draws keep every voxel of the first region visible, so the first day's volume is at least the measured one."""
    seen = whole.volume_of(whole.visits[0])
    volumes = forecast["volume"].values[:, 0]
    assert (volumes >= seen - 1e-9).all() and np.median(volumes) < 1.1 * seen


def test_later_visits_do_not_change_a_forecast(fit, forecast, whole):
    later = (dataclasses.replace(v, adc=None, region=None, volume=50.0) for v in whole.visits[2:])
    spoiled = dataclasses.replace(whole, visits=(*whole.visits[:2], *later))
    again = bm.calibrate(fit.model, spoiled.until(2), method=Laplace(MAP(starts=1)))
    np.testing.assert_array_equal(again.z, fit.z)


def test_what_if_no_treatment_leaves_more_tumour(fit, whole):
    first = dataclasses.replace(whole.schedule, doses=tuple(d for d in whole.schedule.doses if d.day < 19))
    planned = bm.forecast(fit, times=[40.0], draws=20, seed=0, curve_step=20.0)
    stopped = bm.forecast(fit, times=[40.0], draws=20, seed=0, schedule=first, curve_step=20.0)
    assert (stopped["cells"].values >= planned["cells"].values).all()
    assert float(stopped["cells"].mean()) > 1.05 * float(planned["cells"].mean())


@pytest.mark.parametrize("arguments,words", [
    ({}, "give the last day"), ({"times": [-5.0]}, "before the first visit"), ({"until": float("nan")}, "finite"),
    ({"until": 50.0, "draws": 0}, "at least 1"), ({"until": 50.0, "curve_step": 0.0}, "positive number of days"),
])  # fmt: skip
def test_wrong_requests_are_told(fit, arguments, words):
    with pytest.raises(InputError, match=words):
        bm.forecast(fit, **arguments)


def test_a_map_fit_has_no_parameter_spread(fit, whole):
    point = bm.calibrate(fit.model, whole.until(2), method=MAP(starts=1))
    assert not point.covariance.any()
    draws = point.draw(7, 0)
    assert all(np.ptp(v) == 0 for v in draws.values())
    assert {r["informed_by"] for r in point.table()} == {"not computed"}
