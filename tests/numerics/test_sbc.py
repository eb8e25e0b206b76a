"""Simulation-based calibration of the methods themselves, with truths from the fit's own prior (Talts et al. 2018)."""

import numpy as np
import pytest

import biomodel as bm
from biomodel.calibration.mcmc import NUTS, ByNutpie
from biomodel.calibration.population import Population
from biomodel.calibration.samples import Samples
from biomodel.calibration.volumes import VolumeNoise, volume_parameters
from biomodel.diagnostics import independent_draws, simulate_volumes, simulation_based_calibration
from biomodel.parameters import JointPrior

DAYS, PLAN = (0.0, 21.0, 42.0, 63.0), bm.Schedule.weekly("paclitaxel", 21.0, 3, 80, "mg/m^2")


def study(posterior, replications, sigma=0.7, seed=0):
    """Exponential growth under three doses; a prior of `sigma` for the logarithms of rate and efficacy."""
    drug = bm.Chemotherapy("paclitaxel", bm.LogNormal(0.1, sigma))
    model = bm.ReactionDiffusion(bm.Exponential(bm.LogNormal(0.02, sigma)), bm.NoDiffusion(), [drug])
    parameters = volume_parameters(model, 10.0)
    mean, sd = (np.array([getattr(p.prior, what) for p in parameters.values()]) for what in ("location", "scale"))
    joint = JointPrior(tuple(parameters), mean, np.diag(sd**2))
    people = Population(model, joint, parameters, VolumeNoise((0.0,), (0.2,), 8.0), 0, 0.0, ())
    template = bm.Patient.from_volumes("S", DAYS, [1.0] * 4, PLAN, floor=1e-6)
    return simulation_based_calibration(
        tuple(parameters), lambda n, rng: rng.multivariate_normal(mean, joint.covariance, n),
        lambda z, rng: simulate_volumes(people, template, z, rng),
        lambda patients, rng: posterior(people, patients, rng), replications, seed,
    )  # fmt: skip


def laplace(people, patients, rng):
    z, covariance = people.laplace(patients)
    white = rng.standard_normal((len(z), 63, z.shape[1]))
    return z[:, None] + np.einsum("npq,nsq->nsp", np.linalg.cholesky(covariance), white)


def importance(people, patients, rng):
    drawn = people.posterior(patients, draws=1024).draws
    return np.stack([independent_draws(Samples(z, w), 63, rng) for z, w in zip(drawn.z, drawn.weights, strict=True)])


def nuts(people, patients, rng):
    found = []
    for patient in patients:
        method = NUTS(1, 250, 150, seed=int(rng.integers(2**31)), engine=ByNutpie())
        found.append(independent_draws(bm.calibrate(people, patient, method=method).samples, 15, rng))
    return np.stack(found)


def test_importance_sampling_passes():
    found = study(importance, 300)
    assert (found.chi_squared > 0.01).all() and (found.ecdf_p > 0.01).all()


def test_laplace_passes_where_posteriors_are_nearly_gaussian():
    found = study(laplace, 300, sigma=0.05)
    # A prior so narrow leaves little to be learned but the first volume, whose logarithm is nearly Gaussian.
    assert (found.chi_squared > 0.01).all() and (found.ecdf_p > 0.01).all()


def test_laplace_fails_where_they_are_skewed():
    found = study(laplace, 300)
    k, efficacy = found.names.index("growth.k"), found.names.index("paclitaxel.efficacy")
    assert max(found.chi_squared[[k, efficacy]]) < 1e-4 and max(found.ecdf_p[[k, efficacy]]) < 1e-4
    # Draws too high: of a rate near 0 its logarithm may be anything low, a tail that a Gaussian at the mode lacks.
    assert all(found.table()[i]["lowest"] > 0.18 for i in (k, efficacy))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_nuts_passes():
    found = study(nuts, 40)
    assert (found.chi_squared > 0.01).all() and (found.ecdf_p > 0.01).all()
