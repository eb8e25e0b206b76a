"""FEniCS beside torch: one model object, the same numbers to discretisation error; conservation and the flat limit."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

import biomodel as bm
from biomodel.domain import Domain
from biomodel.errors import SolverError
from biomodel.fenics.mesh import BoxMesh
from biomodel.parameters import Parameter
from biomodel.schedule import Dose, Fraction, Schedule
from biomodel.terms import Diffusion, Growth, NoGrowth, TensorDiffusion
from fenics_here import require_fenics


@pytest.fixture(autouse=True)
def fenics():
    require_fenics()


@dataclass(frozen=True)
class Allee(Growth):
    """A law that is not in the package: sparse cells divide more slowly, and better near a place."""

    k: bm.LogNormal = bm.LogNormal(0.1, 0.4)

    @property
    def parameters(self):
        return (Parameter("k", "1/day", self.k, (1e-6, 2.0)),)

    @property
    def fields(self):
        return ("x", "y")

    def rate(self, u, p, c, ops):
        near = ops.exp(-((c.x - 20.0) ** 2 + (c.y - 10.0) ** 2) / 200.0)
        return p["k"] * u * (1 - u) * u / (u + 0.1) * (0.5 + ops.where(u > 2, 0.0, near))


@dataclass(frozen=True)
class Uneven(Diffusion):
    """A diffusivity that varies smoothly with the place."""

    D: bm.LogNormal = bm.LogNormal(0.3, 0.5)

    @property
    def parameters(self):
        return (Parameter("D", "mm^2/day", self.D, (1e-6, 20.0)),)

    @property
    def fields(self):
        return ("x", "y")

    def coefficient(self, u, p, c, ops):
        return p["D"] * (1 + 0.5 * ops.exp(-c.x / 20) - 0.01 * c.y)


SCHEDULE = Schedule.weekly("paclitaxel", 3.3, 4, 80, "mg/m^2") + Schedule(
    fractions=(Fraction(5.6, 2.0), Fraction(10.0, 2.0))
)
MODELS = {
    "logistic": bm.ReactionDiffusion(
        bm.Logistic(), bm.Isotropic(bm.Fixed(0.3)), [bm.Chemotherapy("paclitaxel"), bm.Radiotherapy()]
    ),
    "defined here": bm.ReactionDiffusion(Allee(), Uneven(), [bm.Chemotherapy("paclitaxel"), bm.Radiotherapy()]),
    "drug map": bm.ReactionDiffusion(
        bm.Gompertz(), bm.Isotropic(bm.Fixed(0.3)),
        [bm.Chemotherapy("paclitaxel", map="drug_map", resistant=bm.LogitNormal(0.2, 0.5)), bm.Radiotherapy()],
    ),
}  # fmt: skip
TIMES = [10.0, 30.0]


def refined(n, dim=2):
    """A box of 24 × 30 (× 18) mm with voxels of 3 / n mm and a smooth tumour in it, with a smooth drug map."""
    shape, spacing = (1 if dim == 2 else 6 * n, 8 * n, 10 * n), (3 / n, 3 / n, 3 / n)
    affine = np.diag([3 / n] * 3 + [1.0])
    affine[:3, 3] = 1.5 / n
    domain = Domain(np.ones(shape, bool), spacing, affine)
    z, y, x = np.meshgrid(*(domain.coords[a] for a in "zyx"), indexing="ij")
    away = (y - 12) ** 2 + (x - 15) ** 2 + ((z - 9) ** 2 if dim == 3 else 0)
    return domain, 0.02 + 0.7 * np.exp(-away / 25), {"drug_map": 0.6 + 0.4 * np.cos(x / 8) * np.cos(y / 10)}


def gap(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("degree", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", MODELS)
def test_difference_to_torch_falls_with_second_order(name, degree):
    model, found = MODELS[name], []
    for n in (1, 2, 4):
        domain, u0, fields = refined(n)
        fields = {k: v for k, v in fields.items() if k in model.fields}
        theirs = bm.TorchSolver(rtol=1e-6).build(model, domain, SCHEDULE, fields)({}, u0, TIMES)
        ours = bm.FenicsSolver(degree=degree).build(model, domain, SCHEDULE, fields)
        u = ours({}, u0, TIMES, plan=ours.fixed_plan(TIMES, [25 * n, 50 * n]))
        assert u.shape == theirs.shape
        found.append(gap(u, theirs))
    order = np.log2(np.array(found[:-1]) / np.array(found[1:]))
    print(f"{name}, P{degree}: difference to torch {found}, orders {order}")
    assert order[-1] > 1.9 and found[-1] < 5e-3


@pytest.mark.slow
def test_difference_to_torch_falls_in_three_dimensions():
    model, found = MODELS["defined here"], []
    for n in (1, 2, 4):
        domain, u0, _ = refined(n, 3)
        theirs = bm.TorchSolver(rtol=1e-5).build(model, domain, SCHEDULE)({}, u0, TIMES)
        ours = bm.FenicsSolver().build(model, domain, SCHEDULE)
        found.append(gap(ours({}, u0, TIMES, plan=ours.fixed_plan(TIMES, [20 * n, 40 * n])), theirs))
    order = np.log2(np.array(found[:-1]) / np.array(found[1:]))
    print("3D: difference to torch", found, "orders", order)
    assert order[-1] > 1.9


def test_rough_mask_with_tissue_jumps_falls_at_every_refinement():
    """Re-entrant corners and jumps of the diffusivity lower the order for both solvers."""
    rng = np.random.default_rng(0)
    coarse = rng.random((12, 14)) < 0.85
    coarse[4:9, 4:10] = True
    tissue = (rng.random(coarse.shape) < 0.5).astype(float)
    diffusion = bm.TissueDiffusion(("a", "b"), (bm.Fixed(1.0), bm.Fixed(0.1)))
    model, found = bm.ReactionDiffusion(bm.Logistic(), diffusion), []
    for n in (1, 2, 4, 8):
        mask, a = (np.kron(v, np.ones((n, n)))[None] for v in (coarse, tissue))
        domain = Domain.box(mask.shape, (1.0, 2 / n, 2 / n), mask=mask > 0, tissues={"a": a, "b": 1 - a})
        y, x = np.meshgrid(*(domain.coords[k] - domain.coords[k].mean() for k in "yx"), indexing="ij")
        u0 = (0.6 * np.exp(-((y + 1) ** 2 + x**2) / 12))[None] * mask
        theirs = bm.TorchSolver(rtol=1e-5).build(model, domain, Schedule())({"growth.k": 0.1}, u0, [10.0])
        u = bm.FenicsSolver(rtol=1e-4).build(model, domain, Schedule())({"growth.k": 0.1}, u0, [10.0])
        assert not u.numpy()[..., ~domain.mask].any()
        found.append(gap(u, theirs))
    print("rough mask with jumps: difference to torch", found, "orders", np.log2(np.array(found[:-1]) / found[1:]))
    assert all(b < a for a, b in zip(found[:-1], found[1:], strict=True))


@pytest.mark.parametrize("degree", [1, 2])
def test_mass_is_conserved_without_reaction(degree):
    rng = np.random.default_rng(1)
    mask = rng.random((6, 8, 9)) < 0.8
    domain = Domain.box(mask.shape, (2.5, 1.5, 1.0), mask=mask)
    model = bm.ReactionDiffusion(NoGrowth(), bm.Isotropic())
    simulation = bm.FenicsSolver(degree=degree, linear_rtol=1e-13).build(model, domain, Schedule())
    u0 = rng.random(mask.shape) * mask
    u = simulation({"diffusion.D": 0.7}, u0, [100.0], plan=simulation.fixed_plan([100.0], [200]))[0, 0]
    assert abs(float(u.sum()) / u0.sum() - 1) < 1e-10


@pytest.mark.parametrize("growth", [bm.Logistic(), bm.Gompertz(), bm.Exponential()], ids=lambda g: type(g).__name__)
def test_flat_state_is_the_ordinary_differential_equation(growth):
    """Torch advances these laws by their exact flow across doses; a dose lies on a requested day."""
    doses = tuple(Dose(d, "paclitaxel", 80, "mg/m^2", "given") for d in (0.0, 2.71, 9.3))
    schedule = Schedule(doses, (Fraction(4.4, 2.0), Fraction(9.3, 3.0)))
    model = bm.ReactionDiffusion(growth, bm.Isotropic(), [bm.Chemotherapy("paclitaxel"), bm.Radiotherapy()])
    domain, u0, times = Domain.box((1, 3, 4)), np.full((1, 3, 4), 0.3), [4.4, 9.3, 20.0]
    simulation = bm.FenicsSolver(linear_rtol=1e-13).build(model, domain, schedule)
    u = simulation({}, u0, times, plan=simulation.fixed_plan(times, [6, 6, 12]))[0]
    assert float((u - u[:, :1, :1, :1]).abs().max()) < 1e-10
    exact = bm.TorchSolver().build(model, domain, schedule)({}, u0, times)[0]
    np.testing.assert_allclose(u[:, 0, 0, 0], exact[:, 0, 0, 0], rtol=2e-6)


def test_chosen_steps_reach_the_tolerance():
    domain, u0, _ = refined(2)
    for rtol in (1e-2, 1e-4):
        for k, d in ((0.02, 0.05), (0.3, 2.0)):
            params = {"growth.k": k, "diffusion.D": d}
            model = bm.ReactionDiffusion(bm.Logistic(), bm.Isotropic(), MODELS["logistic"].treatments)
            simulation = bm.FenicsSolver(rtol=rtol).build(model, domain, SCHEDULE)
            plan = simulation.plan(params, u0, TIMES)
            reference = simulation(params, u0, TIMES, plan=simulation.fixed_plan(TIMES, [300, 600]))
            assert gap(simulation(params, u0, TIMES, plan=plan), reference) < rtol
            assert plan.error <= rtol


def test_a_tensor_along_the_axes_is_a_scalar_along_each():
    """With D only along x, rows of voxels do not see each other; with the unit tensor the scalar is found again."""
    domain, u0, _ = refined(2)
    one, none = np.ones(domain.shape), np.zeros(domain.shape)
    entries = {f"tensor_{pair}": none for pair in ("xx", "yy", "zz", "xy", "xz", "yz")}

    def run(diffusion, fields):
        simulation = bm.FenicsSolver(linear_rtol=1e-13).build(
            bm.ReactionDiffusion(bm.Logistic(), diffusion), domain, Schedule(), fields
        )
        return simulation({"diffusion.D": 0.5}, u0, [10.0], plan=simulation.fixed_plan([10.0], [40]))

    scalar = run(bm.Isotropic(), {})
    unit = run(TensorDiffusion(), {**entries, "tensor_xx": one, "tensor_yy": one, "tensor_zz": one})
    assert gap(unit, scalar) < 1e-11
    along = run(TensorDiffusion(), {**entries, "tensor_xx": one})
    mean = np.log(along[0, 0, 0].numpy().mean(1))
    still = bm.ReactionDiffusion(bm.Logistic(), bm.NoDiffusion())
    alone = bm.FenicsSolver().build(still, domain, Schedule())({}, u0, [10.0])[0, 0, 0].numpy().mean(1)
    assert np.abs(mean - np.log(alone)).max() < 0.05 and gap(along, scalar) > 0.02
    with pytest.raises(SolverError, match="negative eigenvalue"):
        run(TensorDiffusion(), {**entries, "tensor_xx": one, "tensor_xy": one})
    with pytest.raises(SolverError, match="FenicsSolver"):
        bm.TorchSolver().build(bm.ReactionDiffusion(bm.Logistic(), TensorDiffusion()), domain, Schedule(), entries)


def test_finer_meshes_of_the_same_voxels_agree():
    domain, u0, _ = refined(2)
    model = MODELS["logistic"]
    found = []
    for refine in (1, 2, 4):
        simulation = bm.FenicsSolver(mesh=BoxMesh(refine)).build(model, domain, SCHEDULE)
        found.append(simulation({}, u0, TIMES, plan=simulation.fixed_plan(TIMES, [20, 40])))
    assert gap(found[1], found[2]) < 0.3 * gap(found[0], found[2])


def test_a_batch_is_its_members():
    domain, u0, _ = refined(1)
    simulation = bm.FenicsSolver().build(MODELS["logistic"], domain, SCHEDULE)
    plan = simulation.fixed_plan(TIMES, [4, 8])
    k = torch.tensor([0.03, 0.2], dtype=torch.float64)
    together = simulation({"growth.k": k}, np.stack([u0, u0 / 2]), TIMES, plan=plan)
    for i in range(2):
        alone = simulation({"growth.k": float(k[i])}, u0 / (i + 1), TIMES, plan=plan)[0]
        assert float((together[i] - alone).abs().max()) < 1e-12
