"""Draws of the stages are the posterior's, linear answers those of refits, and shares go when their stage goes."""

from dataclasses import replace

import numpy as np
import pytest

import biomodel as bm
from biomodel.stage_chain import Chain, Errors
from biomodel.stages import stages
from biomodel.virtual import Matched, small_patient

STATED = {"edge_sd_mm": 0.7, "misalignment_sd_mm": 0.5}


def model_of(patient):
    drugs = [bm.Chemotherapy(a) for a in patient.schedule.agents]
    return bm.ReactionDiffusion(bm.Logistic(), bm.Isotropic(), drugs).with_priors(Matched().priors())


@pytest.fixture(scope="module")
def virtual():
    return small_patient(7).patient


@pytest.fixture(scope="module")
def fit(virtual):
    known = virtual.until(2)
    known = replace(known, cellularity=replace(known.cellularity, **STATED))
    return bm.calibrate(model_of(known), known)


@pytest.fixture(scope="module")
def chain(fit, virtual):
    return Chain(fit, virtual.visits[2].day, None)


@pytest.mark.slow
def test_draws_have_the_posterior_covariance(fit, chain):
    ratio = np.sqrt(np.diag(chain.covariance)) / fit.sd
    print(f"\nsd of the chain over that of the fit: {ratio.min():.3f} to {ratio.max():.3f}")
    assert np.allclose(ratio, 1, atol=0.05)
    answers = [chain.answer(Errors((5, i))) for i in range(400)]
    dz = np.stack([sum(a.moves.values()) for a in answers])
    # Whitened by the posterior, draws are standard normal; the eigenvalues of 400 such lie well within these bounds.
    white = np.linalg.solve(np.linalg.cholesky(chain.covariance), dz.T)
    eigenvalues = np.linalg.eigvalsh(white @ white.T / len(dz))
    edge = np.sqrt(len(fit.z) / len(dz))
    print(f"eigenvalues of whitened draws {eigenvalues[0]:.2f} to {eigenvalues[-1]:.2f}")
    assert (1 - edge) ** 2 - 0.15 < eigenvalues[0] and eigenvalues[-1] < (1 + edge) ** 2 + 0.15


@pytest.mark.slow
def test_the_linear_answer_is_that_of_a_refit(fit, chain):
    """The second visit's ADC is measured anew; a calibration from the old optimum moves as the linear answer says."""
    known, settings = fit.patient, fit.patient.cellularity
    rng, predicted, found = np.random.default_rng(0), [], []
    whiten = np.linalg.inv(np.linalg.cholesky(chain.covariance))
    for _ in range(3):
        second = known.visits[1]
        # Noise of voxels and a shift of all of them, so that the answer is large against what the search leaves open.
        change = second.adc * (0.05 * rng.standard_normal(second.adc.shape) + 0.1 * rng.choice([-1, 1]))
        changed = replace(known, visits=(known.visits[0], replace(second, adc=second.adc + change)))
        refit = bm.calibrate(fit.model, changed, method=bm.MAP(starts=1, tolerance=0.02, start_at=fit.values))
        found.append(whiten @ (refit.z - fit.z))
        full = np.zeros(chain.problem.rows.shape)
        full[0] = (-change / (settings.adc_w - settings.adc_min))[chain.problem.box]
        measured = chain.problem.sign[chain.active] == 0
        predicted.append(whiten @ (chain.gain @ np.where(measured, full.ravel()[chain.where], 0.0)))
    for linear, whole in zip(predicted, found, strict=True):
        print(f"\nanswer, posterior sd: linear {np.linalg.norm(linear):.2f}, refit {np.linalg.norm(whole):.2f}, "
              f"apart {np.linalg.norm(whole - linear):.2f}")  # fmt: skip
        assert np.linalg.norm(whole - linear) < 0.35 * np.linalg.norm(whole) + 0.1


@pytest.mark.slow
def test_shares_sum_to_the_variance_and_go_with_their_stage(fit, virtual):
    day = virtual.visits[2].day
    found = stages(fit, day, draws=300, seed=1, switch_off=True)
    for quantity in ("volume", "log_cells"):
        total, low, high = found.sum(quantity)
        print(f"\n{quantity}: sum {total:.3f} ({low:.3f} to {high:.3f})")
        assert low <= 1 <= high and abs(total - 1) < 0.25
        for row in found.table(quantity):
            print(f"{row.label:28s}{row.contribution:7.3f} ({row.low:.3f} to {row.high:.3f}), off "
                  f"{row.off:7.3f} ({row.off_low:.3f} to {row.off_high:.3f})")  # fmt: skip
            # Both are estimates: their 90 % intervals meet.
            assert row.off_low <= row.high + 0.02 and row.off_high >= row.low - 0.02
    # Without the treatment's error, the variance is that of the forecast's own draws.
    same = stages(fit, day, draws=300, seed=2, treatment=None)
    drawn = bm.forecast(fit, times=[day], draws=600, seed=3, curve_step=1e3)["volume"].values[:, 0]
    ratio = same.variance("volume") / drawn.var()
    print(f"variance of the volume over that of bm.forecast: {ratio:.3f}; means {same.values().mean():.3f}, "
          f"{drawn.mean():.3f} cm³")  # fmt: skip
    assert 0.6 < ratio < 1.6
    assert abs(same.values().mean() - drawn.mean()) < 0.25 * drawn.std()


@pytest.mark.slow
def test_a_drug_map_has_a_share(virtual):
    known = virtual.until(2)
    grid = np.indices(known.domain.shape)[2]
    supply = np.where(known.domain.mask, 0.5 + grid / grid.max(), 0.0)
    known = replace(known, visits=(replace(known.visits[0], drug_map=supply), *known.visits[1:]))
    drugs = [bm.Chemotherapy(a, map="drug_map") for a in known.schedule.agents]
    model = bm.ReactionDiffusion(bm.Logistic(), bm.Isotropic(), drugs).with_priors(Matched().priors())
    fit = bm.calibrate(model, known)
    found = stages(fit, virtual.visits[2].day, draws=24, seed=0)
    share = {r.stage: r for r in found.table("log_cells")}["drug_map"]
    print(f"\ndrug map: {share.contribution:.4f} ({share.low:.4f} to {share.high:.4f})")
    assert share.total_effect > 0
    exact = stages(fit, virtual.visits[2].day, draws=12, seed=0, drug_map=None)
    assert exact.absent["drug_map"] == "taken as exact"
