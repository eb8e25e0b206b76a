"""Calibration of models with mechanics: exact derivatives, what holding the stress changes, and forecasts."""

import numpy as np
import pytest
import torch

import biomodel as bm
import biomodel.solvers.coupled as coupled
from biomodel.calibration.gaussnewton import prior_of
from biomodel.calibration.images import ImageProblem, computing_box
from biomodel.mechanics import StressDamped
from biomodel.virtual import SMALL_BREAST, SMALL_SPACING, virtual_patient


@pytest.fixture(scope="module")
def patient():
    """One slice of a virtual breast."""
    return virtual_patient(7, shape=(1, 24, 24), spacing=SMALL_SPACING, anatomy=SMALL_BREAST).patient


def model_of(patient):
    drugs = [bm.Chemotherapy(agent) for agent in patient.schedule.agents]
    return bm.ReactionDiffusion(bm.Logistic(), StressDamped(), drugs)


def test_residuals_have_the_derivatives_that_calibration_uses(patient):
    known = patient.until(visit=2)
    problem = ImageProblem(model_of(known), known, bm.TorchSolver(linear_rtol=1e-11))
    z = prior_of(problem.parameters).mean
    problem.replan(z)
    linear = problem.linearise(z, False)
    active = linear.weights.active
    for name in ("growth.k", "diffusion.D", "diffusion.gamma", "initial.halo"):
        i = problem.names.index(name)
        step = np.zeros(len(z))
        step[i] = 1e-3
        around = [problem.residual(z + s * step)[active] for s in (-2, -1, 1, 2)]
        difference = (around[0] - 8 * around[1] + 8 * around[2] - around[3]) / 12e-3
        size = np.linalg.norm(linear.jacobian[i])
        assert size > 0
        # Residuals are data minus prediction.
        assert np.linalg.norm(difference + linear.jacobian[i]) < 1e-5 * size, name


def test_the_computing_box_leaves_tissue_for_support(patient):
    known = patient.until(visit=2)
    model = model_of(known)
    plain = bm.ReactionDiffusion(model.growth, bm.Isotropic(), model.treatments)
    region = patient.visits[0].region
    for box, wide in zip(computing_box(known, plain, 5.0), computing_box(known, model, 5.0), strict=True):
        assert wide.start <= box.start and wide.stop >= box.stop
    full = patient.domain.bounding_box(np.logical_or(region, known.visits[1].region), 20.0)
    assert computing_box(known, model, 5.0) == full


@pytest.mark.slow
def test_calibration_and_forecast_with_mechanics(patient):
    known = patient.until(visit=2)
    fit = bm.calibrate(model_of(known), known)
    assert fit.converged and "diffusion.gamma" in fit.values
    sd = dict(zip(fit.names, np.sqrt(np.diag(fit.covariance)), strict=True))
    assert sd["diffusion.gamma"] <= fit.parameters["diffusion.gamma"].prior.scale
    forecast = bm.forecast(fit, until=patient.visits[-1].day, draws=8, seed=0, curve_step=20.0)
    assert np.isfinite(forecast["volume"].values).all() and (forecast["volume"].values >= 0).all()


class Full(coupled.HeldLinearisation):
    """The whole derivative by the initial state: a solve for the stress per step and product."""

    def __init__(self, simulation, values, u, plan):
        super().__init__(simulation, values, u, plan)
        self.arguments, self.trail = (values, u, plan), []
        with torch.no_grad():
            simulation._run(values, u, plan, keep=lambda m: self.trail.append(m.displacements[0]))

    def push(self, du0):
        values, u, plan = self.arguments
        x = self._in(du0)
        with torch.no_grad():
            moved = self.simulation._tangents(values, u, x, [None] * len(x), plan, self.trail)
        return self.simulation._unbox(moved)

    def pull(self, cotangents):
        values, u, plan = self.arguments
        y = self._in(cotangents)[:, 0]
        many = u.repeat(len(y), 1, 1, 1).requires_grad_()
        known = iter([(w.repeat(len(y), 1, 1, 1, 1),) for w in self.trail])
        with torch.enable_grad():
            out = torch.stack(self.simulation._run(values, many, plan, known=known), 1)
            (found,) = torch.autograd.grad(out, many, y)
        return self.simulation._unbox(torch.where(self.simulation.mask, found, 0.0))[:, None]


@pytest.mark.slow
def test_holding_the_stress_in_the_noise_hardly_moves_the_posterior(patient, monkeypatch):
    known = patient.until(visit=2)
    held = bm.calibrate(model_of(known), known)
    monkeypatch.setattr(coupled, "HeldLinearisation", Full)
    full = bm.calibrate(model_of(known), known)
    sd = np.sqrt(np.diag(full.covariance))
    moved, width = np.abs(held.z - full.z) / sd, np.sqrt(np.diag(held.covariance)) / sd
    print(f"stress held in the noise: means move by {moved.max():.2g} sd, widths by {abs(width - 1).max():.2g}, "
          f"log evidence by {abs(held.log_evidence - full.log_evidence):.2g}")  # fmt: skip
    assert moved.max() < 0.05 and np.abs(width - 1).max() < 0.05
