"""Tissue mechanics on finite elements: patch tests, agreement with torch on the same voxels, and the coupled run."""

import numpy as np
import pytest
import torch

import biomodel as bm
from biomodel.domain import Domain
from biomodel.mechanics import Clamped, Elastic, StressDamped, TractionFree
from biomodel.parameters import Fixed
from biomodel.schedule import Schedule
from biomodel.solvers.elastic_kernels import lame
from fenics_here import require_fenics


@pytest.fixture(autouse=True)
def fenics():
    require_fenics()


def gap(a, b):
    return float((a - b).norm() / b.norm())


def body(shape, spacing, mechanics, tissues=None, mask=None, **settings):
    """A simulation with mechanics on a box, by default of one tissue."""
    tissues = tissues or {"tissue": np.ones(shape)}
    domain = Domain.box(shape, spacing, mask=mask, tissues=tissues)
    model = bm.ReactionDiffusion(bm.Logistic(), StressDamped(mechanics=mechanics))
    return bm.FenicsSolver(stress_rtol=1e-13, linear_rtol=1e-13, **settings).build(model, domain, Schedule())


# Exact solutions ------------------------------------------------------------------------------------------------------


def one_tissue(edge, poisson=0.45, young=3.0, pressure=10.0):
    return Elastic(("tissue",), (Fixed(young),), tumour=None, coupling=Fixed(pressure), poisson=poisson, edge=edge)


@pytest.mark.parametrize("degree", [1, 2])
@pytest.mark.parametrize("shape", [(5, 6, 7), (1, 6, 7), (1, 1, 7)])
def test_patch_uniform_pressure_without_support_expands_evenly(shape, degree):
    """Displacement is linear on any body: the same strain everywhere, no rigid motion."""
    mask = np.ones(shape, bool)
    if shape[1] > 1:
        mask[shape[0] // 2, 2, 3] = mask[0, 0, :3] = False
    spacing, u = (3.0, 1.5, 1.0), 0.05
    simulation = body(shape, spacing, one_tissue(TractionFree()), mask=mask, displacement_degree=degree)
    von_mises, w = simulation.stress({}, np.full(shape, u) * mask)
    mu, lam = lame(3.0, 0.45)
    axes = [a for a in range(3) if shape[2 - a] > 1]
    expansion = 10.0 * u / (2 * mu + len(axes) * lam)
    places = np.meshgrid(*(simulation.domain.coords[k] for k in "zyx"), indexing="ij")[::-1]
    for a in range(3):
        x = places[a][mask]
        expected = expansion * (x - x.mean()) if a in axes else 0 * x
        np.testing.assert_allclose(w[0, a].numpy()[mask], expected, atol=1e-11)
    # Two dimensions are plane strain and one is uniaxial: the axes that do not move carry another stress.
    law = {1: 1.0, 2: 1.0, 3: 0.0}[len(axes)] * 2 * mu * expansion
    np.testing.assert_allclose(von_mises[0].numpy()[mask], law, atol=1e-10)
    assert not w.numpy()[..., ~mask].any() and not von_mises.numpy()[..., ~mask].any()


@pytest.mark.parametrize("degree", [1, 2])
def test_layers_in_a_clamped_bar_are_exact(degree):
    """One dimension: stress minus pressure is constant, whatever the moduli of the voxels."""
    n, h, u = 13, 1.5, 0.3
    share = np.random.default_rng(2).random((1, 1, n))
    mechanics = Elastic(("soft", "stiff"), (Fixed(1.0), Fixed(9.0)), tumour=None, coupling=Fixed(2.0))
    simulation = body((1, 1, n), (h, h, h), mechanics, {"soft": 1 - share, "stiff": share}, displacement_degree=degree)
    mu, lam = lame((1 + 8 * share)[0, 0], 0.45)
    modulus, pressure = 2 * mu + lam, 2.0 * u
    constant = -(pressure / modulus).sum() / (1 / modulus).sum()
    strain = (pressure + constant) / modulus
    von_mises, w = simulation.stress({}, np.full((1, 1, n), u))
    np.testing.assert_allclose(von_mises[0, 0, 0].numpy(), 2 * mu * np.abs(strain), atol=1e-11)
    ends = np.concatenate(([0.0], np.cumsum(strain) * h))
    np.testing.assert_allclose(w[0, 0, 0, 0].numpy(), (ends[1:] + ends[:-1]) / 2, atol=1e-11)


# Beside torch ---------------------------------------------------------------------------------------------------------


def breast(n: int, dimensions: int, edge):
    """A box of 24 × 28 × 32 mm with voxels of 2 / n mm, tissues that blend into each other, and a tumour."""
    shape = tuple(k * n if k > 1 else 1 for k in ((12, 14, 16) if dimensions == 3 else (1, 14, 16)))
    affine = np.diag([2 / n] * 3 + [1.0])
    affine[:3, 3] = 1 / n
    place = Domain(np.ones(shape, bool), (2 / n,) * 3, affine)
    z, y, x = np.meshgrid(*(place.coords[a] for a in "zyx"), indexing="ij")
    share = 1 / (1 + np.exp(-((x - 16) + 3 * np.sin(y / 5)) / 3))
    domain = Domain(place.mask, place.spacing, affine, {"adipose": 1 - share, "fibroglandular": share})
    away = (y - 13) ** 2 + (x - 15) ** 2 + ((z - 12) ** 2 if dimensions == 3 else 0)
    model = bm.ReactionDiffusion(bm.Logistic(), StressDamped(mechanics=Elastic(edge=edge)))
    return model, domain, 0.8 * np.exp(-away / 30)


def without_rigid_motion(w, domain):
    """The part of a displacement (3, z, y, x) that deforms; what holds nothing may move as a whole."""
    z, y, x = (torch.tensor(a - a.mean()) for a in np.meshgrid(*(domain.coords[k] for k in "zyx"), indexing="ij"))
    motions = [torch.stack([torch.full_like(x, float(a == c)) for c in range(3)]) for a in range(3)]
    zero = torch.zeros_like(x)
    motions += [torch.stack(m) for m in ((-y, x, zero), (-z, zero, x), (zero, -z, y))]
    basis = torch.stack(motions).reshape(6, -1)
    basis = torch.linalg.qr(basis[basis.norm(dim=1) > 0].T)[0]
    flat = w.reshape(-1)
    return (flat - basis @ (basis.T @ flat)).reshape(w.shape)


def beside_torch(n, dimensions, edge, degree=2):
    """Relative differences of displacement and von Mises stress, FEniCS to torch."""
    model, domain, u = breast(n, dimensions, edge)
    theirs = bm.TorchSolver(linear_rtol=1e-9).build(model, domain, Schedule()).stress({}, u)
    solver = bm.FenicsSolver(displacement_degree=degree, stress_rtol=1e-9)
    ours = solver.build(model, domain, Schedule()).stress({}, u)
    moved = [w[0] if isinstance(edge, Clamped) else without_rigid_motion(w[0], domain) for w in (ours[1], theirs[1])]
    return gap(*moved), gap(ours[0], theirs[0])


@pytest.mark.parametrize("edge", [Clamped(), TractionFree()], ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("degree", [1, 2])
def test_difference_to_torch_falls_with_second_order(degree, edge):
    found = np.array([beside_torch(n, 2, edge, degree) for n in (1, 2, 4, 8)])
    order = np.log2(found[:-1] / found[1:])
    for k, what in enumerate(("displacement", "von Mises stress")):
        print(f"plane strain, {type(edge).__name__}, P{degree}, {what}: {found[:, k]}, orders {order[:, k]}")
    assert (np.diff(found, axis=0) < 0).all()
    if degree == 2:
        assert found[0, 0] < 0.02 and found[0, 1] < 0.05


def test_solvers_as_they_are_agree_on_voxels_of_two_millimetres():
    model, domain, u = breast(1, 3, Clamped())
    (theirs, theirs_w), (ours, ours_w) = (
        solver.build(model, domain, Schedule()).stress({}, u) for solver in (bm.TorchSolver(), bm.FenicsSolver())
    )
    displacement, stress = gap(ours_w, theirs_w), gap(ours, theirs)
    print(f"3D, 2 mm, default settings: displacement {displacement:.4f}, von Mises stress {stress:.4f}")
    assert displacement < 0.02 and stress < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("edge", [Clamped(), TractionFree()], ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("degree", [1, 2])
def test_difference_to_torch_in_three_dimensions(degree, edge):
    found = np.array([beside_torch(n, 3, edge, degree) for n in (1, 2)])
    print(f"3D, {type(edge).__name__}, P{degree}: displacement {found[:, 0]}, von Mises stress {found[:, 1]}")
    assert (np.diff(found, axis=0) < 0).all()
    if degree == 2:
        assert found[0, 0] < 0.02 and found[0, 1] < 0.05
