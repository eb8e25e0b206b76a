"""Forecasts of several models, mixed by their weights."""

from dataclasses import replace

import numpy as np
import pytest

import biomodel as bm
from biomodel.averaging import average
from biomodel.errors import InputError
from biomodel.virtual import small_patient


@pytest.fixture(scope="module")
def forecasts():
    known = small_patient(5).patient.until(2)
    slow = bm.default_model(known).with_priors({"diffusion.D": bm.LogNormal(0.02, 0.1)})
    models = [bm.default_model(known), slow]
    return [bm.forecast(bm.calibrate(m, known), times=[30.0, 45.0], draws=40, seed=1, curve_step=5.0) for m in models]


def test_shares_of_the_draws_are_the_weights(forecasts):
    mixed = average(forecasts, [3.0, 1.0])
    assert mixed.draws == 40 and np.bincount(mixed["model"].values).tolist() == [30, 10]
    for m, forecast in enumerate(forecasts):
        own = mixed["volume"].values[mixed["model"].values == m]
        assert {tuple(v) for v in own} <= {tuple(v) for v in forecast["volume"].values}
    assert mixed.fit is forecasts[0].fit and "75%" in mixed.notes[0]
    assert mixed["volume"].attrs["units"] == "cm^3" and mixed.curves.sizes["draw"] == 40


def test_maps_lie_where_they_were(forecasts):
    """Boxes differ between models; every voxel of the patient's grid keeps its draws."""
    mixed = average(forecasts, [1.0, 1.0])
    assert forecasts[0].box != forecasts[1].box
    whole = np.zeros((40, *mixed.fit.patient.domain.shape))
    whole[(slice(None), *mixed.box)] = mixed["cell_fraction"].values[:, 1]
    visible = whole >= mixed.data.attrs["visible_fraction"]
    expected = visible.sum((1, 2, 3)) * mixed.fit.patient.domain.voxel_volume / 1e3
    assert np.allclose(expected, mixed["volume"].values[:, 1])
    assert np.allclose(mixed["probability"].values[1], visible.mean(0)[mixed.box])


def test_one_model_alone_is_itself(forecasts):
    alone = average(forecasts, [0.0, 1.0])
    assert np.array_equal(np.sort(alone["volume"].values, 0), np.sort(forecasts[1]["volume"].values, 0))


def test_a_mixture_can_be_reported_and_scored(forecasts):
    mixed = average(forecasts, [1.0, 2.0])
    assert "Forecast of" in mixed._repr_html_()
    q = mixed["volume"].quantile([0.05, 0.95], "draw").values
    assert (q[0] <= q[1]).all()


def test_without_images():
    patient = bm.Patient.from_volumes("P", [0, 20, 40], [5.0, 6.0, 7.5])
    fits = bm.compare([bm.ReactionDiffusion(g, bm.NoDiffusion()) for g in (bm.Logistic(), bm.Gompertz())], patient)
    drawn = [bm.forecast(f, times=[60.0], draws=50) for f in fits.fits]
    mixed = average(drawn, fits.evidence_weights)
    assert mixed.draws == 50 and mixed.box is None and "measured_volume" in mixed.data


def test_what_does_not_fit_together_is_refused(forecasts):
    with pytest.raises(InputError, match="2 forecasts and 1 weights"):
        average(forecasts, [1.0])
    with pytest.raises(InputError, match="expected numbers from 0 up"):
        average(forecasts, [0.0, 0.0])
    other = bm.forecast(forecasts[0].fit, times=[30.0], draws=3, curve_step=5.0)
    with pytest.raises(InputError, match="forecast all for the same days"):
        average([forecasts[0], other], [1, 1])
    with pytest.raises(InputError, match="different treatments"):
        average([forecasts[0], replace(forecasts[1], schedule=bm.Schedule())], [1, 1])
    fit = replace(forecasts[1].fit, patient=replace(forecasts[1].fit.patient, id="X"))
    with pytest.raises(InputError, match="different patients"):
        average([forecasts[0], replace(forecasts[1], fit=fit)], [1, 1])
