"""Analytic posteriors: diffusion alone is linear in the state at the first visit."""

import numpy as np
import pytest
import torch

import biomodel as bm
from biomodel.calibration.field import FieldLaplace
from biomodel.calibration.field_evidence import FieldEvidence, LearnedMatern
from biomodel.calibration.field_prior import FieldPrior, Matern, Multiplied
from biomodel.calibration.field_problem import FieldProblem
from biomodel.parameters import LogNormal
from biomodel.patient import CellularitySettings

SHAPE, SPACING, DAYS = (1, 9, 8), (2.0, 2.0, 2.0), (0.0, 10.0, 25.0)
SETTINGS = CellularitySettings(adc_w=3e-3, adc_min=1e-3, voxel_cv=0.05, repeatability_cv=0.0, visible_fraction=0.05)


def blurred(diffusivity: float):
    """A slice all of which is tumour, diffusing and nothing else, with noise at every visit."""
    rng = np.random.default_rng(3)
    domain = bm.Domain.box(SHAPE, SPACING)
    model = bm.ReactionDiffusion(bm.Exponential(k=bm.Fixed(2e-6)), bm.Isotropic(D=bm.Fixed(diffusivity)))
    start = 0.4 + 0.2 * rng.standard_normal(SHAPE)
    states = bm.TorchSolver(rtol=1e-6).build(model, domain, bm.Schedule())({}, start, DAYS[1:])[0].numpy()
    visits = []
    for number, (day, u) in enumerate(zip(DAYS, [start, *states], strict=True), start=1):
        noisy = (3e-3 - 2e-3 * u) * (1 + 0.02 * rng.standard_normal(SHAPE))
        visits.append(bm.Visit(number=number, day=day, adc=noisy, region=np.ones(SHAPE, bool)))
    return bm.Patient(
        id="virtual-blur", organ="breast", domain=domain, visits=tuple(visits), schedule=bm.Schedule(),
        cellularity=SETTINGS,
    )  # fmt: skip


def test_posterior_of_the_start_is_the_analytic_one():
    patient = blurred(0.3)
    # A rate that is as good as 0: what is left is diffusion, which is linear in the state at the first visit.
    model = bm.ReactionDiffusion(bm.Exponential(k=LogNormal(2e-6, 1e-3)), bm.Isotropic(D=bm.Fixed(0.3)))
    method = FieldLaplace(Matern(8.0, 1e-3), noise_length=3.0, tolerance=1e-10, most=1000, floor=1e-10)
    fit = bm.calibrate(model, patient, method=method)
    found = fit.rate_map
    n = found.noise.size
    assert fit.converged and n == np.prod(SHAPE) and np.prod(found.prior.shape) == np.prod(SHAPE)

    # The problem's own numbers, put together by dense linear algebra from runs of the solver alone.
    problem = FieldProblem(model, patient, bm.TorchSolver(), Matern(8.0, 1e-3), Multiplied(), 3.0)
    problem.replan(found.mode)
    simulation, plan = problem.base.simulation, problem.base.plan
    units = torch.eye(n, dtype=torch.float64).reshape(n, *SHAPE)
    grid = problem.base.grid_error
    flow = simulation({"growth.k": 2e-6}, units, DAYS[1:], plan=plan).reshape(n, -1).numpy()
    root = np.stack([found.noise.root(w).ravel() for w in np.eye(n)], 1)
    names = list(fit.names)
    others = np.zeros((len(grid), len(names)))
    others[:, names.index("grid.error")] = grid * problem.root[names.index("grid.error"), names.index("grid.error")]
    matrix = np.concatenate((others, flow.T @ root), 1)
    measured = problem.base.value - problem.base.initial.base.ravel() @ flow - grid * problem.gaussian.mean[
        names.index("grid.error")
    ]  # fmt: skip
    precision = np.linalg.inv(np.eye(matrix.shape[1]) + (matrix.T / problem.variance) @ matrix)
    mean = precision @ (matrix.T / problem.variance) @ measured
    keep = np.r_[0 : len(names), len(names) + found.prior.size : len(found.mode)]
    np.testing.assert_allclose(found.mode[keep], mean, atol=1e-6)
    covariance = found.lowrank.covariance(np.eye(len(found.mode))[keep])[:, keep]
    np.testing.assert_allclose(covariance, precision, atol=1e-6)
    start = root @ mean[len(names) :]
    np.testing.assert_allclose(found.noise.root(found.mode[len(names) + found.prior.size :]).ravel(), start, atol=1e-6)


@pytest.fixture(scope="module")
def grown():
    """A linearised problem with a map of the rate, in a slice."""
    from biomodel.virtual import Breast, Matched, virtual_patient

    made = virtual_patient(3, shape=(1, 20, 20), spacing=(3.0, 3.0, 3.0), anatomy=Breast(radius=(9.0, 10.0)))
    known = made.patient.until(3)
    drugs = [bm.Chemotherapy(agent) for agent in known.schedule.agents]
    model = bm.ReactionDiffusion(bm.Logistic(), bm.Isotropic(), drugs).with_priors(Matched().priors())
    problem = FieldProblem(model, known, bm.TorchSolver(), Matern(8.0, 0.5), Multiplied(), padding=12.0)
    white = 0.3 * np.random.default_rng(0).standard_normal(problem.size)
    problem.replan(white)
    return problem, white


def test_evidence_of_length_and_sd_equals_dense_algebra(grown):
    problem, white = grown
    linear = problem.linearise(white)
    evidence = FieldEvidence(linear, most=300)
    p, n = problem.p, problem.field.size
    root = np.sqrt(linear.precision)
    columns = np.stack([root * linear.forward(unit) for unit in np.eye(problem.size)], 1)
    data = root * linear.residual + columns @ white
    left, values, _ = np.linalg.svd(columns, full_matrices=False)
    left = left[:, values**2 >= 1]

    def dense(matern):
        prior = FieldPrior(matern, problem.base.domain.shape, problem.base.domain.spacing, 12.0)
        ratio = (prior.root_spectrum / problem.field.root_spectrum).ravel()
        scaled = left.T @ np.concatenate((columns[:, :p], columns[:, p : p + n] * ratio, columns[:, p + n :]), 1)
        covariance = np.eye(left.shape[1]) + scaled @ scaled.T
        reduced = left.T @ data
        return -0.5 * reduced @ np.linalg.solve(covariance, reduced) - 0.5 * np.linalg.slogdet(covariance)[1]

    assert len(evidence.root) == left.shape[1]
    base = Matern(8.0, 0.5)
    for other in (Matern(8.0, 0.1), Matern(15.0, 0.5), Matern(20.0, 0.2), Matern(8.0, 1.0)):
        assert evidence(other) - evidence(base) == pytest.approx(dense(other) - dense(base), abs=0.15)


def test_another_prior_of_the_same_field(grown):
    problem, white = grown
    before, old = problem.decode(white)[1], problem.field.matern
    moved = problem.exchange(white, Matern(14.0, 0.2))
    np.testing.assert_allclose(problem.decode(moved)[1], before, rtol=1e-9, atol=1e-12)
    back = problem.exchange(moved, old)
    np.testing.assert_allclose(back, white, rtol=1e-9)


def test_learned_length_is_no_shorter_than_two_voxels(grown):
    problem, white = grown
    rough = LearnedMatern(length=LogNormal(2.0, 0.1))
    assert rough.reference(3.0).length == 6.0
    moved = problem.exchange(white, rough.reference(3.0))
    found = FieldEvidence(problem.linearise(moved)).best(rough, Matern(6.0, 0.25))
    assert found.length >= 6.0
    problem.exchange(moved, Matern(8.0, 0.5))
