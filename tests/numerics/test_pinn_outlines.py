"""D / k and seed of a virtual glioma in a plane, from the outlines of one visit."""

import numpy as np
import pytest

import biomodel as bm
from biomodel.errors import CalibrationError, InputError
from biomodel.terms import NoDiffusion
from biomodel.testing import check_term
from biomodel.truth import Hazard, average, integrate
from pinn import DURATION, Imaged, Infiltration, PinnSolver, WhiteGrey, glioma_problem, infer_joint, resampled

SHAPE, SPACING, FINER = (1, 26, 26), (4.0, 4.0, 4.0), 3
D, K, PLACE = 0.6, 0.055, (46.0, 54.0)


def imaged(diffusivity, seed=0):
    """Outlines and PET of a truth on voxels a third as wide; voxels at their edges err."""
    n = 26 * FINER
    at = (np.arange(n) + 0.5) * 4.0 / FINER - 2.0
    start = 0.5 * np.exp(-((at[:, None] - PLACE[0]) ** 2 + (at - PLACE[1]) ** 2) / (2 * 4.0**2))[None]
    run = list(integrate(start[None], np.ones((1, n, n), bool), diffusivity(n), (4.0, 4.0 / FINER, 4.0 / FINER), K,
                         Hazard.none(), [DURATION]))  # fmt: skip
    u = average(run[0], (1, FINER, FINER))[0]
    rng = np.random.default_rng(seed)
    t1c, flair = (((u + 0.03 * rng.standard_normal(SHAPE)) > level) * 1.0 for level in (0.7, 0.15))
    pet = np.where(t1c > 0.5, 0.8 * u + 0.05 * rng.standard_normal(SHAPE), np.nan)
    return Imaged(t1c, np.maximum(t1c, flair), pet)


@pytest.fixture(scope="module")
def fit():
    seen = imaged(lambda n: np.full((1, n, n), D))
    return infer_joint(glioma_problem(bm.Domain.box(SHAPE, SPACING), seen))


def test_ratio_and_seed_lie_within_their_intervals(fit):
    assert fit.converged
    found = Infiltration.of(fit)
    print(found)
    # Outlines weigh little (a voxel counts as a sixth), so intervals are wide.
    assert found.ratio[0] < D / K < found.ratio[2]
    assert found.ratio[2] / found.ratio[0] < 6
    assert found.length == pytest.approx(np.sqrt(found.ratio))
    assert found.generations[0] < K * DURATION < found.generations[2]
    for name, place in zip(("focus1.y", "focus1.x"), PLACE, strict=True):
        low, _, high = found.seed[name]
        assert low < place < high and high - low < 12
    weighed = Infiltration.of(resampled(fit, draws=128))
    assert weighed.ratio[0] < D / K < weighed.ratio[2]


def test_the_network_agrees(fit):
    network = infer_joint(fit.problem.by(PinnSolver(rtol=1e-2, frequencies=5, hidden=(12, 12))), begin=fit.z)
    off = (network.z - fit.z) / fit.sd
    print("network off the classical optimum (posterior sd):", dict(zip(fit.problem.names, off, strict=True)))
    assert np.abs(off[:2]).max() < 0.5
    one, two = (Infiltration.of(f).ratio[1] for f in (network, fit))
    assert one == pytest.approx(two, rel=0.2)


def test_tissues():
    """Fast on one side, slow on the other: D in white matter is found, and the term is sound on every back end."""
    check_term(WhiteGrey())
    white = np.zeros(SHAPE)
    white[..., 13:] = 1.0
    domain = bm.Domain.box(SHAPE, SPACING, tissues={"white": white, "grey": 1 - white})
    seen = imaged(lambda n: np.repeat(np.repeat(D * (white + 0.1 * (1 - white)), FINER, 1), FINER, 2))
    problem = glioma_problem(domain, seen)
    assert isinstance(problem.model.diffusion, WhiteGrey)
    found = Infiltration.of(infer_joint(problem))
    assert found.ratio[0] < D / K < found.ratio[2]


def test_finer_voxels_do_not_make_more_data():
    seen = imaged(lambda n: np.full((1, n, n), D))
    coarse = bm.Domain.box(SHAPE, SPACING)
    thin = bm.Domain.box(SHAPE, (4.0, 2.0, 4.0))
    weights = [seen.observations(d)[0].modality.weight for d in (coarse, thin)]
    assert weights == pytest.approx([0.16, 0.08])
    assert seen.observations(bm.Domain.box(SHAPE, (20.0,) * 3))[0].modality.weight == 1.0


def test_refusals(fit):
    seen = imaged(lambda n: np.full((1, n, n), D))
    ring = np.where(seen.t1c > 0.5, 0.0, seen.flair)
    with pytest.raises(InputError, match="flair: 100% of the T1c region lies outside.*union"):
        glioma_problem(bm.Domain.box(SHAPE, SPACING), Imaged(seen.t1c, ring))
    still = glioma_problem(bm.Domain.box(SHAPE, SPACING), seen, diffusion=NoDiffusion())
    with pytest.raises(CalibrationError, match="expected the parameters"):
        Infiltration.of(infer_joint(still))
