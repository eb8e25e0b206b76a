"""Mechanics as data: descriptions, their pointwise functions, and what is refused."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

import biomodel as bm
from biomodel.domain import Domain
from biomodel.errors import ModelError, NotFiniteError, SolverError
from biomodel.mechanics import Clamped, Elastic, StressDamped, TractionFree
from biomodel.parameters import NumpyOps
from biomodel.solvers.base import Context
from biomodel.solvers.elastic import Body
from biomodel.terms import Auxiliary, Equation
from biomodel.testing import check_term

SHAPE = (6, 7, 8)


def test_the_model_knows_the_parameters_and_fields_of_its_equations():
    model = bm.ReactionDiffusion(bm.Logistic(), StressDamped(bm.TissueDiffusion(), bm.LogNormal(0.3, 0.5)))
    assert model.free == ("growth.k", "diffusion.D_adipose", "diffusion.D_fibroglandular", "diffusion.gamma")
    assert {"mechanics.E_adipose", "mechanics.E_tumour", "mechanics.coupling"} < set(model.parameters)
    assert model.fields == ("adipose", "fibroglandular")
    assert [a.equation for a in model.auxiliaries] == [Elastic()]
    assert model.parameters["mechanics.E_adipose"].units == "kPa"
    assert "mechanics.E_adipose" in model.with_priors({"mechanics.E_adipose": bm.LogNormal(2.0, 0.3)}).free


def test_damped_diffusion_passes_the_checks_of_terms():
    check_term(StressDamped())
    check_term(StressDamped(bm.TissueDiffusion()), fields={"adipose": 0.3, "fibroglandular": 0.6})


def test_stiffness_is_the_mean_over_tissues_and_turns_into_the_tumours():
    elastic, p = Elastic(), {"E_adipose": 2.0, "E_fibroglandular": 4.0, "E_tumour": 20.0, "coupling": 1.5}
    c = Context(adipose=np.array([1.0, 0.25, 0.0, 0.0]), fibroglandular=np.array([0.0, 0.25, 0.5, 0.0]))
    np.testing.assert_allclose(elastic.young(np.zeros(4), p, c, NumpyOps), [2, 3, 4, 3])
    np.testing.assert_allclose(elastic.young(np.full(4, 0.5), p, c, NumpyOps), [11, 11.5, 12, 11.5])
    np.testing.assert_allclose(elastic.pressure(np.array([0.0, 0.5]), p, c, NumpyOps), [0, 0.75])
    plain = Elastic(tumour=None)
    np.testing.assert_allclose(plain.young(np.full(4, 0.5), p, c, NumpyOps), [2, 3, 4, 3])
    assert "E_tumour" not in [q.name for q in plain.parameters]


def test_descriptions_are_data():
    assert Elastic() == Elastic() and hash(Elastic()) == hash(Elastic())
    assert Elastic(edge=TractionFree()) != Elastic(edge=Clamped())
    brain = Elastic.brain()
    assert brain.fields == ("white", "grey", "ventricles")
    assert all("doi:" in q.source for q in (*brain.parameters, *Elastic().parameters))


@pytest.mark.parametrize("make,message", [
    (lambda: Elastic(tissues=("adipose",)), "1 tissues .* but 2 moduli"),
    (lambda: Elastic(tissues=("a", "a")), "each once"),
    (lambda: Elastic(poisson=0.5), "Poisson's ratio is 0.5; expected a number between 0 and 0.5"),
    (lambda: Elastic(poisson=0.0), "Poisson's ratio is 0.0"),
    (lambda: Elastic(poisson=float("nan")), "Poisson's ratio is nan"),
    (lambda: Elastic(moduli=(bm.Fixed(2.0), bm.Fixed(-4.0))), "E_fibroglandular is -4 kPa; expected a positive"),
    (lambda: Elastic(tumour=bm.Fixed(0.0)), "E_tumour is 0 kPa"),
    (lambda: Elastic(coupling=bm.Fixed(-1.0)), "coupling is -1 kPa"),
    (lambda: Elastic(edge="clamped"), r"edge is 'clamped'; expected Clamped\(\) or TractionFree\(\)"),
    (lambda: StressDamped(bm.NoDiffusion()), "the base is NoDiffusion; expected a scalar diffusivity"),
    (lambda: StressDamped(StressDamped()), "the base is StressDamped"),
    (lambda: bm.ReactionDiffusion(bm.Logistic(), StressDamped()).complete({"mechanics.E_tumour": -3.0}),
     "mechanics.E_tumour = -3.0 kPa lies outside its bounds"),
])  # fmt: skip
def test_wrong_descriptions_are_refused(make, message):
    with pytest.raises(ModelError, match=message):
        make()


def test_bodies_that_cannot_be_solved_are_refused():
    mask = torch.zeros(SHAPE, dtype=torch.bool)
    mask[1:3, 1:3, 1:3] = mask[3:5, 3:5, 3:5] = True
    with pytest.raises(SolverError, match="2 that share no face; keep the largest"):
        Body(mask, (1.0, 1.0, 1.0), 0.45, False)
    thin = torch.zeros(SHAPE, dtype=torch.bool)
    thin[2] = True
    with pytest.raises(SolverError, match="nowhere two voxels thick"):
        Body(thin, (1.0, 1.0, 1.0), 0.45, True)
    body = Body(torch.ones(SHAPE, dtype=torch.bool), (1.0, 1.0, 1.0), 0.45, True)
    ones = torch.ones(1, *SHAPE, dtype=torch.float64)
    with pytest.raises(SolverError, match="Young's modulus falls to -1 kPa"):
        body.equilibrium(-ones, ones, 1e-8)
    with pytest.raises(NotFiniteError, match="modulus is not finite"):
        body.equilibrium(ones * torch.nan, ones, 1e-8)
    with pytest.raises(NotFiniteError, match="forces are not finite"):
        body.equilibrium(ones, ones * torch.inf, 1e-8)


def domain(*names):
    return Domain.box(SHAPE, (2.0, 2.0, 2.0), tissues={n: np.full(SHAPE, 1 / len(names)) for n in names})


def damped(**terms):
    return bm.ReactionDiffusion(diffusion=StressDamped(), **terms)


@dataclass(frozen=True)
class Crowded(bm.Logistic):
    """Growth that would read the stress."""

    @property
    def auxiliaries(self):
        return (Auxiliary(Elastic()),)


@dataclass(frozen=True)
class Chemistry(Equation):
    """An equation that no solver knows."""

    name = "chemistry"
    gives = "von_mises"


@dataclass(frozen=True)
class Strange(StressDamped):
    @property
    def auxiliaries(self):
        return (Auxiliary(Chemistry()),)


def test_simulations_that_cannot_be_built_say_why():
    solver, breast = bm.TorchSolver(), domain("adipose", "fibroglandular")
    with pytest.raises(SolverError, match="needs the field fibroglandular, but the domain has adipose"):
        solver.build(damped(), domain("adipose"), bm.Schedule())
    with pytest.raises(SolverError, match="simulated patient by patient"):
        solver.build(damped(), [breast, breast], bm.Schedule())
    with pytest.raises(SolverError, match="growth reads an auxiliary field; only diffusion may"):
        solver.build(damped(growth=Crowded()), breast, bm.Schedule())
    with pytest.raises(SolverError, match="cannot solve Chemistry; it solves Elastic"):
        solver.build(bm.ReactionDiffusion(diffusion=Strange()), breast, bm.Schedule())
    with pytest.raises(SolverError, match="linear_rtol is 0.0; expected"):
        bm.TorchSolver(linear_rtol=0.0)
    simulation = solver.build(damped(), breast, bm.Schedule())
    u0 = torch.full(SHAPE, 0.1, dtype=torch.float64)
    with pytest.raises(SolverError, match="growth rate that is a field cannot be linearised with mechanics"):
        simulation.linearise({}, u0, [5.0], rate=True)
    with pytest.raises(SolverError, match="'growth.kk' is not a scalar parameter"):
        simulation.sensitivities({}, u0, [5.0], ["growth.kk"])
    with pytest.raises(SolverError, match="times must increase"):
        simulation({}, u0, [5.0, 2.0], plan=simulation.fixed_plan([5.0, 2.0], [1, 1]))
    with pytest.raises(SolverError, match="Young's modulus falls to"):
        simulation({}, -u0 - 2.0, [5.0])


def test_states_at_the_start_and_repeated_times():
    simulation = bm.TorchSolver().build(damped(), domain("adipose", "fibroglandular"), bm.Schedule())
    u0 = torch.zeros(SHAPE, dtype=torch.float64)
    u0[2:4, 2:5, 3:6] = 0.6
    u = simulation({}, u0, [0.0, 5.0, 5.0])[0]
    assert torch.equal(u[0], u0) and torch.equal(u[1], u[2]) and bool((u[1] != u0).any())


def test_a_solve_that_does_not_converge_says_so(monkeypatch):
    monkeypatch.setattr("biomodel.solvers.elastic.ITERATIONS", 2)
    body = Body(torch.ones(SHAPE, dtype=torch.bool), (1.0, 1.0, 1.0), 0.45, True)
    rng = np.random.default_rng(0)
    young, pressure = (torch.tensor(1 + rng.random((1, *SHAPE))) for _ in range(2))
    with pytest.raises(SolverError, match="left a relative residual of .* after 2 iterations, asked for 1e-10"):
        body.equilibrium(young, pressure, 1e-10)
