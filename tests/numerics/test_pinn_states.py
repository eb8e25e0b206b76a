"""Parameters from noisy states by a network, against maximum likelihood and posterior of the reference solver."""

import numpy as np
import pytest
import torch
from scipy.optimize import least_squares

import biomodel as bm
from biomodel.errors import CalibrationError
from fisher_kpp import Problem
from pinn import PinnSolver, StateProblem, infer

NAMES = ["growth.k", "diffusion.D"]


def reference(problem, data, sd):
    """Maximum likelihood of (log k, log D) by the spectral solver, and the covariance there."""
    found = least_squares(
        lambda q: ((problem.predicted(*q) - data) / sd).ravel(),
        np.log([problem.values[n] for n in NAMES]), x_scale=0.01, diff_step=1e-4,
    )  # fmt: skip
    return found.x, np.linalg.inv(found.jac.T @ found.jac)


def fitted(problem, data, sd, seed=0):
    simulation = PinnSolver(seed=seed).build(problem.model, problem.domain, bm.Schedule())
    return infer(StateProblem(problem.model, simulation, problem.u0, problem.days[:2], data, sd))


@pytest.mark.parametrize(
    ("dimensions", "noise", "seed"),
    [
        (1, 0.05, 0),
        pytest.param(1, 0.01, 1, marks=pytest.mark.slow),
        pytest.param(2, 0.05, 2, marks=pytest.mark.slow),
    ],
)
def test_within_a_fraction_of_the_posterior_sd(dimensions, noise, seed):
    problem = Problem(dimensions)
    data, sd = problem.noisy(noise, seed)
    best, covariance = reference(problem, data, sd)
    found = fitted(problem, data, sd, seed)
    assert list(found.values) == NAMES and found.converged
    off = (found.z - best) / np.sqrt(np.diag(covariance))
    print("off the maximum likelihood (posterior sd):", off, "sd ratio:", found.sd / np.sqrt(np.diag(covariance)))
    assert np.abs(off).max() < 0.3
    assert np.allclose(found.covariance, covariance, rtol=0.05)


@pytest.mark.slow
def test_sd_is_that_of_markov_chains():
    """Posterior of both parameters by Metropolis with the spectral solver, no Gaussian assumed."""
    problem = Problem(1)
    data, sd = problem.noisy(0.05, 3)
    best, covariance = reference(problem, data, sd)
    rng, root = np.random.default_rng(0), np.linalg.cholesky(covariance)

    def misfit(q):
        return 0.5 * float(((problem.predicted(*q) - data) ** 2).sum()) / sd**2

    q, now, chain = best, misfit(best), []
    for _ in range(4000):
        trial = q + 1.7 * root @ rng.standard_normal(2)
        value = misfit(trial)
        if np.log(rng.random()) < now - value:
            q, now = trial, value
        chain.append(q)
    sampled = np.std(chain, axis=0)
    found = fitted(problem, data, sd)
    print("sd over that of the chain:", found.sd / sampled)
    assert np.allclose(found.sd, sampled, rtol=0.15)


def test_what_an_error_of_the_prediction_moves():
    problem = Problem(1)
    data, sd = problem.noisy(0.05, 0)
    simulation = bm.TorchSolver(rtol=1e-4).build(problem.model, problem.domain, bm.Schedule())
    posed = StateProblem(problem.model, simulation, problem.u0, problem.days[:2], data, sd)
    found = infer(posed)
    error = 0.02 * (found.jacobian[0] - 0.5 * found.jacobian[1])
    moved = infer(StateProblem(problem.model, simulation, problem.u0, problem.days[:2], data + sd * error.reshape(
        data.shape), sd))  # fmt: skip
    # Data that are higher act as a prediction that is lower by the same.
    assert np.allclose((moved.z - found.z) / found.sd, found.displaced(error), atol=0.05)
    assert np.abs(found.displaced(error)).min() > 0.1


def test_voxels_that_were_not_measured_do_not_count():
    problem = Problem(1)
    data, sd = problem.noisy(0.05, 0)
    data[0, ..., :40] = np.nan
    simulation = bm.TorchSolver(rtol=1e-3).build(problem.model, problem.domain, bm.Schedule())
    posed = StateProblem(problem.model, simulation, problem.u0, problem.days[:2], data, sd)
    assert infer(posed).jacobian.shape == (2, 256 - 40)
    with pytest.raises(CalibrationError, match="no value is measured"):
        StateProblem(problem.model, simulation, problem.u0, problem.days[:2], np.full_like(data, np.nan), sd)
    with pytest.raises(CalibrationError, match="shape"):
        StateProblem(problem.model, simulation, torch.zeros(1, 1, 1, 64), problem.days[:2], data, sd)
