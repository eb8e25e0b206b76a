"""Figures of a posterior show the prior's density and the draws."""

import numpy as np
import pytest

import biomodel as bm
from biomodel.errors import InputError
from biomodel.figure_posterior import correlations, marginals
from biomodel.virtual import small_patient


@pytest.fixture(scope="module")
def known():
    return small_patient(3).patient.until(2)


@pytest.fixture(scope="module")
def fit(known):
    return bm.calibrate(bm.default_model(known), known)


def test_each_parameter_has_its_prior_and_its_posterior(fit):
    figure = marginals(fit)
    assert [axes.get_title().split(",")[0] for axes in figure.axes] == list(fit.names)
    drawn = fit.draw(4000, 0)
    for name, axes in zip(fit.names, figure.axes, strict=True):
        (line,) = axes.lines
        x, density = line.get_data()
        # Both are densities on the axis that is drawn, nearly all of which lies within it.
        assert np.trapezoid(density, x) == pytest.approx(1.0, abs=0.02), name
        bars = np.array([[p.get_x(), p.get_width(), p.get_height()] for p in axes.patches])
        assert (bars[:, 1] * bars[:, 2]).sum() == pytest.approx(1.0, abs=1e-6)
        centre = np.median(drawn[name])
        centre = np.log10(centre) if isinstance(fit.parameters[name].prior, bm.LogNormal) else centre
        assert np.average(bars[:, 0] + bars[:, 1] / 2, weights=bars[:, 2]) == pytest.approx(centre, abs=0.1)


def test_correlations_name_what_cannot_be_told_apart(fit):
    figure = correlations(fit)
    table = figure.axes[0].images[0].get_array()
    sd = fit.sd
    expected = fit.covariance / np.outer(sd, sd)
    np.testing.assert_allclose(table, expected, atol=0.08)
    i, j = fit.names.index("carboplatin.efficacy"), fit.names.index("paclitaxel.efficacy")
    assert table[i, j] < -0.5
    assert "−0.9" in {text.get_text() for text in figure.axes[0].texts}


@pytest.mark.parametrize("draw", [marginals, correlations])
def test_a_fit_without_posterior_is_refused(known, draw):
    fit = bm.calibrate(bm.default_model(known), known, method=bm.MAP(starts=1, iterations=3))
    with pytest.raises(InputError, match="a MAP fit has no posterior"):
        draw(fit)
