"""Calibration of models with mechanics: exact derivatives, what holding the stress changes, and forecasts."""

import numpy as np
import pytest
import torch

import biomodel as bm
import biomodel.solvers.coupled as coupled
from biomodel.calibration.gaussnewton import prior_of
from biomodel.calibration.images import ImageProblem, computing_box
from biomodel.fenics.mesh import BoxMesh
from biomodel.mechanics import Elastic, StressDamped
from biomodel.scanner import Scan, observe
from biomodel.virtual import SMALL_BREAST, SMALL_SPACING, virtual_patient
from biomodel.visit import CellularitySettings
from fenics_here import require_fenics


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
    # Two images before and under treatment tell nothing of it, and the fit says so.
    assert sd["diffusion.gamma"] <= fit.parameters["diffusion.gamma"].prior.scale
    assert "diffusion.gamma" not in fit.identified and fit.shrinkage["diffusion.gamma"] > 0.8
    forecast = bm.forecast(fit, until=patient.visits[-1].day, draws=8, seed=0, curve_step=20.0)
    assert np.isfinite(forecast["volume"].values).all() and (forecast["volume"].values >= 0).all()


@pytest.mark.slow
def test_finite_elements_find_the_same_posterior(patient):
    """By FEniCS's own derivatives through the mechanics; widths are alike, and means nearer than a quarter of them."""
    require_fenics()
    known, method = patient.until(visit=2), bm.Laplace(bm.MAP(starts=1))
    fits = [
        bm.calibrate(model_of(known), known, solver=s, method=method) for s in (bm.TorchSolver(), bm.FenicsSolver())
    ]
    apart = np.abs(fits[0].z - fits[1].z) / fits[0].sd
    print("calibration with mechanics: torch", fits[0].values, "FEniCS", fits[1].values, "apart (sd)", apart)
    assert fits[1].converged and apart.max() < 0.25
    np.testing.assert_allclose(fits[1].sd, fits[0].sd, rtol=0.1)


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


def coupled_patient(gamma, seed):
    """Three images of an untreated tumour between soft and stiff tissue, whose cells follow the stress.

    Truth is solved by finite elements on a mesh twice as fine, with steps of its own.
    """
    shape, spacing, days = (1, 24, 24), 2.5, (0.0, 30.0, 60.0)
    y, x = np.meshgrid(*((np.arange(n) - n / 2 + 0.5) * spacing for n in shape[1:]), indexing="ij")
    radius = np.hypot(x, y)[None]
    organ = radius < 29
    stiff = ((x[None] > 0) & organ).astype(float)
    domain = bm.Domain.box(shape, (spacing,) * 3, organ, {"adipose": 1 - stiff, "fibroglandular": stiff})
    mechanics = Elastic(moduli=(bm.Fixed(2.0), bm.Fixed(30.0)))
    diffusion = StressDamped(gamma=bm.LogNormal(2.0, 0.7), mechanics=mechanics)
    model = bm.ReactionDiffusion(bm.Logistic(), diffusion)
    truth = {"growth.k": 0.06, "diffusion.D": 0.4, "diffusion.gamma": gamma}
    finer = bm.FenicsSolver(mesh=BoxMesh(2), rtol=1e-4).build(model, domain, bm.Schedule())
    states = finer(truth, 0.8 * np.exp(-((radius / 6) ** 2)) * organ, days)[0].numpy()
    scan = Scan()
    cells = {n: getattr(scan, n) for n in ("adc_w", "adc_min", "repeatability_cv", "voxel_cv", "visible_fraction")}
    visits = tuple(
        observe(k + 1, day, np.clip(states[k], 0, 1), domain, scan, np.random.default_rng([seed, k]))
        for k, day in enumerate(days)
    )
    notes = ("Virtual: an untreated tumour between soft and stiff tissue.",)
    return model, bm.Patient("coupled", "breast", domain, visits, cellularity=CellularitySettings(**cells), notes=notes)


@pytest.mark.slow
@pytest.mark.parametrize("gamma", [1.0, 4.0])
def test_the_coupling_is_found_where_data_tell_it(gamma):
    require_fenics()
    model, known = coupled_patient(gamma, seed=0)
    fit = bm.calibrate(model, known, method=bm.Laplace(bm.MAP(starts=1)))
    i = fit.names.index("diffusion.gamma")
    away = (np.log(fit.values["diffusion.gamma"]) - np.log(gamma)) / fit.sd[i]
    print(f"gamma {gamma:g}/kPa: found {fit.values['diffusion.gamma']:.2f}, times or over {np.exp(fit.sd[i]):.2f} (one "
          f"sd), {away:+.2f} sd away; sd {fit.shrinkage['diffusion.gamma']:.2f} of the prior's")  # fmt: skip
    assert "diffusion.gamma" in fit.identified and abs(away) < 2.6
