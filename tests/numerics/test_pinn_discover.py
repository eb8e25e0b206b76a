"""Laws that are learned: terms that every solver evaluates alike, the training's derivatives, and a small discovery."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import biomodel as bm
import pinn
from biomodel.errors import CalibrationError, ModelError
from biomodel.tape import record
from biomodel.testing import check_term
from fenics_here import require_fenics
from gompertz import DAYS, SPREAD, D, Tumour, law, misses
from pinn.discovery.found import Discovered
from pinn.discovery.laws import Allee, Power, Richards, at, spread_over
from pinn.discovery.training import Learning, State

TERMS = (pinn.NetworkGrowth(), pinn.TableGrowth(), Richards(), Allee(), Power())
QUICK = pinn.Discovery(hidden=(8, 8), points=500, iterations=40)
U = np.linspace(0.02, 0.98, 60)


def learned(term, covariance=1e-4, visited=(0.04, 0.8)):
    """A discovery without training: the law is that of the term's typical values."""
    model = bm.ReactionDiffusion(term, bm.Isotropic(SPREAD))
    values = {n: p.typical for n, p in model.parameters.items()}
    z = np.array([model.parameters[n].prior.location for n in model.free])
    return Discovered(model, values, z, covariance * np.eye(len(z)), visited, 0.0, 1.0)


@pytest.fixture(scope="module")
def small():
    return Tumour(16, 3.0, 4)


@pytest.mark.parametrize("term", TERMS, ids=lambda t: type(t).__name__)
def test_terms_are_sound_and_cross_to_other_processes(term):
    check_term(term)
    values = {p.name: p.typical * 1.1 for p in term.parameters}
    tape = record(term.rate, list(values))
    for u in (0.0, 1e-4, 0.3, 0.9, 1.0, -1e-3):
        (found,) = tape({"u": u, **{f"p.{n}": v for n, v in values.items()}})
        assert found == pytest.approx(float(at(term, values, [u])[0]), rel=1e-12, abs=1e-15)


def test_a_table_holds_its_values_and_is_smooth_between():
    term = pinn.TableGrowth()
    s = np.array([0.3, 0.25, 0.2, 0.12, 0.08, 0.06])
    values = {f"s{j}": v for j, v in enumerate(s)}
    u = np.array(term.knots[1:-1])
    np.testing.assert_allclose(at(term, values, u) / (u * (1 - u)), s[1:-1], rtol=1e-12)
    for knot in term.knots[1:-1]:
        near = at(term, values, knot + np.array([-2e-7, -1e-7, 1e-7, 2e-7]))
        assert near[1] - near[0] == pytest.approx(near[3] - near[2], rel=1e-3)


def test_a_network_at_its_priors_is_logistic():
    np.testing.assert_allclose(learned(pinn.NetworkGrowth()).growth(U), 0.05 * U * (1 - U), rtol=1e-12)


def test_a_law_becomes_a_table_with_its_uncertainty():
    found = learned(pinn.NetworkGrowth())
    table = found.tabulated()
    values = table.of(table.growth, {n: p.typical for n, p in table.parameters.items()})
    np.testing.assert_allclose(at(table.growth, values, U), found.growth(U), rtol=2e-2)
    assert table.joint.names[-1] == "diffusion.D"
    low, high = found.band(np.array(table.growth.knots[2:3]))
    sd = np.sqrt(table.joint.covariance[2, 2])
    assert np.log(high / low)[0] == pytest.approx(2 * 1.6449 * sd, rel=1e-2)


@pytest.mark.parametrize("term", [Richards(q=bm.LogNormal(0.3, 1.0)), Allee(a=bm.LogNormal(0.3, 1.0))],
                         ids=lambda t: type(t).__name__)  # fmt: skip
def test_the_formula_behind_a_law_is_found(term):
    found = learned(term)
    best, *others = found.formulas()
    assert type(best.term) is type(term) and best.departure < 1e-3
    assert best.criterion < others[0].criterion
    np.testing.assert_allclose(at(best.term, best.values, U), found.growth(U), rtol=1e-2)
    with pytest.raises(ModelError, match="library is empty"):
        found.formulas([])


def test_gompertz_is_told_from_its_neighbours():
    found = learned(bm.Gompertz())
    assert type(found.formulas()[0].term) is bm.Gompertz


def test_derivatives_of_the_training(small):
    images, sds = small.images(0.05, 3)
    learning = Learning(bm.ReactionDiffusion(pinn.NetworkGrowth(units=2), bm.Isotropic(SPREAD)), small.domain,
                        np.array(DAYS), images, sds, QUICK)  # fmt: skip
    state, inputs = learning.first(), learning._inputs(0)
    rng = np.random.default_rng(0)
    dw, dz = torch.tensor(rng.standard_normal(len(state.w))), rng.standard_normal(len(state.z))
    r, jacobian, gradient, _ = learning.normal(state, inputs, 0.1)
    h = 1e-6
    ends = [State(state.w + s * h * dw, state.z + s * h * dz) for s in (1, -1)]
    misfits = [learning.misfits(one, inputs, 0.1) for one in ends]
    along = torch.cat((dw, torch.tensor(dz)))
    torch.testing.assert_close((misfits[0] - misfits[1]) / (2 * h), jacobian @ along, rtol=1e-5, atol=1e-3)
    values = [learning.objective(m, s) for m, s in zip(misfits, ends, strict=True)]
    assert (values[0] - values[1]) / (2 * h) == pytest.approx(float(gradient @ along), rel=1e-5)


@pytest.mark.slow
def test_a_law_that_is_in_no_family_is_discovered():
    tumour, told = Tumour(), []
    images, sds = tumour.images(0.05, 2)
    model = bm.ReactionDiffusion(pinn.NetworkGrowth(), bm.Isotropic(SPREAD))
    found = pinn.discover(model, tumour.domain, DAYS, images, sds, progress=told.append)
    of_largest, own = misses(found.growth, *found.visited)
    print(of_largest, own, found.values["diffusion.D"], found.equation, found.images)
    logistic = at(bm.Logistic(), {"k": 0.06}, U)
    assert of_largest < 0.05 < np.abs(logistic - law(U)).max() / law(U).max()
    assert found.images < 1.1 and len(told) == len(pinn.Discovery().stages)
    assert found.values["diffusion.D"] == pytest.approx(D, rel=0.5)
    assert type(found.formulas()[0].term) is bm.Gompertz


def test_finite_elements_and_finite_volumes_agree_on_a_table():
    require_fenics()
    u = np.array(pinn.TableGrowth().knots).clip(1e-4, 1 - 1e-4)
    values = {f"growth.s{j}": v for j, v in enumerate(law(u) / (u * (1 - u)))} | {"diffusion.D": D}
    model = bm.ReactionDiffusion(pinn.TableGrowth(), bm.Isotropic())
    fine = bm.Domain.box((1, 24, 24), (2.0,) * 3)
    y, x = np.meshgrid(*(fine.coords[a] - fine.coords[a].mean() for a in "yx"), indexing="ij")
    u0 = torch.tensor(0.3 * np.exp(-(x**2 + y**2) / (2 * 6.0**2))[None])
    both = [s.build(model, fine, bm.Schedule())(values, u0, [20.0])[0, 0].detach().numpy()
            for s in (bm.TorchSolver(), bm.FenicsSolver())]  # fmt: skip
    assert np.linalg.norm(both[0] - both[1]) < 0.01 * np.linalg.norm(both[0])


def test_what_cannot_be_learned_from_is_named(small):
    images, sds = small.images(0.05, 3)
    model = bm.ReactionDiffusion(pinn.NetworkGrowth(), bm.Isotropic())

    def fails(message, model=model, domain=small.domain, days=DAYS, images=images, sd=sds):
        with pytest.raises(CalibrationError, match=message):
            pinn.discover(model, domain, days, images, sd)

    fails("model is a str", model="logistic")
    fails("has treatments", model=replace(model, treatments=[bm.Radiotherapy()]))
    fails("no free parameter", model=replace(model, growth=bm.Logistic()).fix({"growth.k": 0.1}))
    fails("expected two or more that increase", days=[0.0, 12.0, 12.0, 40.0])
    fails("images of shape", images=images[:3])
    fails("sd", sd=[0.1, 0.1])
    fails("no measured voxel", images=np.where(np.arange(4)[:, None, None, None] == 2, np.nan, images))
    with pytest.raises(CalibrationError, match="stages"):
        pinn.Discovery(stages=(0.1, 0.0))
    with pytest.raises(ModelError, match="knots"):
        pinn.TableGrowth((0.0, 0.5, 1.0))
    with pytest.raises(ModelError, match="units"):
        pinn.NetworkGrowth(units=0)
    assert spread_over(0.1, 0.5, 3)[1] == pytest.approx(np.sqrt(0.101 * 0.501) - 0.001)
