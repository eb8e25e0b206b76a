"""`PinnSolver` in an organ with tissues and a drug map, against the classical solver on the same model object."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

import biomodel as bm
from biomodel.errors import SolverError
from biomodel.parameters import Parameter
from biomodel.schedule import Dose, Fraction
from biomodel.terms import Growth, NoDiffusion, NoGrowth
from pinn import PinnSolver, TrainingWarning

SCHEDULE = bm.Schedule(
    doses=[Dose(4.0, "paclitaxel", 80.0, "mg/m^2"), Dose(11.0, "paclitaxel", 80.0, "mg/m^2")],
)
DAYS = [8.0, 20.0]


@dataclass(frozen=True)
class Fed(Growth):
    """Growth in proportion to a field."""

    @property
    def parameters(self):
        return (Parameter("k", "1/day", bm.LogNormal(0.1, 0.5), (1e-6, 2.0), "", "growth rate"),)

    @property
    def fields(self):
        return ("oxygen",)

    def rate(self, u, p, c, ops):
        return p["k"] * c.oxygen * u * (1 - u)


class Slice:
    """An ellipse with two tissues; the tumour touches its edge."""

    def __init__(self, n=36, spacing=4 / 3):
        y, x = np.meshgrid(*[(np.arange(n) - (n - 1) / 2) * spacing] * 2, indexing="ij")
        mask = ((y / 20) ** 2 + (x / 16) ** 2 < 1)[None]
        fat = 1 / (1 + np.exp(-(x + 3 * np.sin(y / 6)) / 2))[None]
        tissues = {"adipose": fat * mask, "fibroglandular": (1 - fat) * mask}
        self.domain = bm.Domain.box((1, n, n), (1.0, spacing, spacing), mask, tissues)
        self.fields = {"drug_map": (0.5 + 0.5 * np.exp(-((y - 5) ** 2 + (x + 4) ** 2) / 200))[None]}
        self.fields["oxygen"] = (1 + x / 40)[None]
        self.u0 = torch.tensor((0.6 * np.exp(-((y + 8) ** 2 + (x - 9) ** 2) / 30))[None, None] * mask)


@pytest.fixture(scope="module")
def organ():
    return Slice()


MODELS = {
    "fed": (bm.ReactionDiffusion(Fed(), bm.Isotropic()), bm.Schedule(), {"growth.k": 0.12, "diffusion.D": 0.3}),
    "mask": (bm.ReactionDiffusion(), bm.Schedule(), {"growth.k": 0.12, "diffusion.D": 0.5}),
    "everything": (
        bm.ReactionDiffusion(bm.Logistic(), bm.TissueDiffusion(), [bm.Chemotherapy("paclitaxel", map="drug_map")]),
        SCHEDULE,
        {"growth.k": 0.12, "diffusion.D_adipose": 0.2, "diffusion.D_fibroglandular": 0.8, "paclitaxel.efficacy": 0.2},
    ),
}
SMALL = PinnSolver(hidden=(12, 12), frequencies=4, points=2000)


@pytest.fixture(scope="module", params=sorted(MODELS))
def both(request, organ):
    model, schedule, values = MODELS[request.param]
    fields = {n: organ.fields[n] for n in model.fields if n in organ.fields}
    simulations = [s.build(model, organ.domain, schedule, fields) for s in (SMALL, bm.TorchSolver(rtol=1e-5))]
    names = list(values)
    return [s.sensitivities(values, organ.u0, DAYS, names) for s in simulations], simulations, values, names


def test_states_agree_with_the_classical_solver(both, organ):
    ((u, _), (expected, _)), (network, _), _, _ = both
    outside = torch.tensor(~organ.domain.mask)
    assert float(u[:, :, outside].abs().max()) == 0
    for ours, theirs in zip(u[0], expected[0], strict=True):
        error = float((ours - theirs).norm() / theirs.norm())
        print("relative L2", error, "held out", network.held_out)
        assert error < 0.02
    assert network.held_out < 0.03


def test_sensitivities_agree_with_the_classical_solver(both):
    ((_, du), (_, expected)), _, _, names = both
    for name, ours, theirs in zip(names, du, expected, strict=True):
        error = float((ours - theirs).norm() / theirs.norm())
        print(name, error)
        assert error < 0.07


def test_a_start_may_change_and_days_may_be_added(both, organ):
    _, (network, classical), values, _ = both
    before = network.iterations
    u = network(values, organ.u0, [4.0, *DAYS])
    assert network.iterations == before and u.shape[1] == 3  # the same network, shown at another day
    moved = torch.roll(organ.u0, 1, -2) * torch.tensor(organ.domain.mask)
    u, expected = (s(values, moved, DAYS) for s in (network, classical))
    assert float((u - expected).norm() / expected.norm()) < 0.02



EARLY = bm.Schedule(
    doses=[Dose(3.0, "paclitaxel", 80.0, "mg/m^2"), Dose(13.0, "paclitaxel", 80.0, "mg/m^2")],
    fractions=[Fraction(5.0, 2.0), Fraction(10.0, 2.0), Fraction(16.0, 2.0)],
)


@pytest.mark.parametrize("organ_", [True, False], ids=["organ", "box"])
def test_treatment_before_on_and_after_the_first_day(organ, organ_):
    """What was given before day 10 has already acted; a fraction on that day is still to come."""
    therapies = [
        bm.Chemotherapy("paclitaxel", map="drug_map" if organ_ else None, resistant=bm.LogitNormal(0.2, 1.0)),
        bm.Radiotherapy(),
    ]
    domain = organ.domain if organ_ else bm.Domain.box(organ.domain.shape, organ.domain.spacing)
    model = bm.ReactionDiffusion(bm.Logistic(), bm.Isotropic(), therapies)
    fields = {"drug_map": organ.fields["drug_map"]} if organ_ else {}
    values = {"growth.k": 0.12, "diffusion.D": 0.4, "paclitaxel.efficacy": 0.3, "radiotherapy.alpha": 0.1}
    names = list(values)
    both = [s.build(model, domain, EARLY, fields, start=10.0).sensitivities(values, organ.u0, [12.0, 20.0], names)
            for s in (SMALL, bm.TorchSolver(rtol=1e-5))]  # fmt: skip
    (u, du), (expected, slopes) = both
    assert float((u - expected).norm() / expected.norm()) < 0.02
    for name, ours, theirs in zip(names, du, slopes, strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < 0.07, name


@pytest.mark.parametrize(
    "model",
    [
        bm.ReactionDiffusion(bm.Gompertz(), bm.Isotropic()),
        bm.ReactionDiffusion(NoGrowth(), bm.Isotropic()),
        bm.ReactionDiffusion(bm.Logistic(), NoDiffusion()),
    ],
    ids=["gompertz", "no growth", "no diffusion"],
)
def test_other_laws_in_an_organ(organ, model):
    values = {n: {"growth.k": 0.05, "diffusion.D": 0.4}[n] for n in model.free}
    u, expected = (s.build(model, organ.domain, bm.Schedule())(values, organ.u0, DAYS)
                   for s in (SMALL, bm.TorchSolver(rtol=1e-5)))  # fmt: skip
    assert float((u - expected).norm() / expected.norm()) < 0.02


def test_one_and_three_dimensions():
    for shape in ((1, 1, 40), (12, 16, 14)):
        place = np.meshgrid(*(np.arange(n) - (n - 1) / 2 for n in shape), indexing="ij")
        mask = sum(p**2 for p in place) < (min(n for n in shape if n > 1) / 2 - 0.5) ** 2
        domain = bm.Domain.box(shape, (2.0, 1.0, 1.0), mask)
        u0 = torch.tensor(0.5 * np.exp(-sum(p**2 for p in place) / 12) * mask)[None]
        model = bm.ReactionDiffusion()
        u, expected = (s.build(model, domain, bm.Schedule())({"growth.k": 0.1, "diffusion.D": 0.2}, u0, [10.0])
                       for s in (SMALL, bm.TorchSolver(rtol=1e-5)))  # fmt: skip
        assert float((u - expected).norm() / expected.norm()) < 0.02, shape


def test_a_call_that_fails_leaves_nothing_behind(organ, monkeypatch):
    model, schedule, values = MODELS["mask"]
    simulation = SMALL.build(model, organ.domain, schedule)
    before = simulation(values, organ.u0, DAYS)

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pinn.solver.train", stop)
        with pytest.raises(KeyboardInterrupt):
            simulation(values, organ.u0 / 2, DAYS)
    assert np.isnan(simulation.held_out)
    after = simulation(values, organ.u0, DAYS)
    assert float((after - before).norm() / before.norm()) < 0.01


def test_a_batch_is_its_rows_and_nothing_grows_from_nothing(organ):
    model, schedule, values = MODELS["mask"]
    starts = torch.cat((organ.u0, torch.zeros_like(organ.u0), 0.5 * organ.u0))
    simulation = SMALL.build(model, organ.domain, schedule)
    u = simulation(values, starts.numpy(), DAYS)
    expected = bm.TorchSolver(rtol=1e-5).build(model, organ.domain, schedule)(values, starts, DAYS)
    assert float(u[1].abs().max()) == 0
    for row in (0, 2):
        assert float((u[row] - expected[row]).norm() / expected[row].norm()) < 0.02
    _, du = simulation.sensitivities(values, starts[1:2], DAYS, [None], du0=organ.u0[None])
    assert float(du.abs().max()) > 0.1


def test_readings_that_may_not_be_changed_and_values_outside(organ):
    model, schedule, values = MODELS["mask"]
    u0 = np.where(organ.domain.mask, organ.u0[0].numpy(), np.nan).astype(np.float32)
    u0.flags.writeable = False
    u = SMALL.build(model, organ.domain, schedule)(values, u0, DAYS)
    assert u.dtype == torch.float64 and bool(torch.isfinite(u).all())


def test_bad_calls_say_what_to_mend(organ):
    model, schedule, values = MODELS["mask"]
    simulation = SMALL.build(model, organ.domain, schedule)
    with pytest.raises(SolverError, match="'growth.x'; expected some of growth.k"):
        simulation.sensitivities(values, organ.u0, DAYS, ["growth.x"])
    with pytest.raises(SolverError, match="batch of 2.*each"):
        simulation.sensitivities(values, organ.u0.expand(2, -1, -1, -1), DAYS, ["growth.k"])
    with pytest.raises(SolverError, match="expected finite days"):
        simulation(values, organ.u0, [])
    with pytest.raises(SolverError, match="initial state 2, growth.k 3"):
        simulation({**values, "growth.k": torch.tensor([0.1, 0.1, 0.1])}, organ.u0.expand(2, -1, -1, -1), DAYS)
    for wrong in ({"points": 0}, {"iterations": 0}, {"restarts": -1}, {"seed": -1}):
        with pytest.raises(SolverError, match=f"{next(iter(wrong))} is"):
            PinnSolver(**wrong)
    exploding = SMALL.build(bm.ReactionDiffusion(bm.Exponential(), bm.Isotropic()), organ.domain, schedule)
    with pytest.raises(SolverError, match="growth.k 1.8.*TorchSolver"):
        exploding({"growth.k": 1.8, "diffusion.D": 0.1}, organ.u0, [40.0])


def test_a_tumour_in_a_thin_part_is_warned_about():
    y, x = np.meshgrid(*[np.arange(30) - 14.5] * 2, indexing="ij")
    mask = y**2 + x**2 < 49
    mask[15, 20:29] = True
    domain = bm.Domain.box((1, 30, 30), (1.0,) * 3, mask[None])
    u0 = 0.5 * np.exp(-((y - 0.5) ** 2 + (x - 11) ** 2) / 6) * mask
    with pytest.warns(TrainingWarning, match="of the tumour lies in parts .* thinner .*TorchSolver"):
        PinnSolver(hidden=(6,), points=400, iterations=5, restarts=0, rtol=0.1).build(
            bm.ReactionDiffusion(), domain, bm.Schedule()
        )({}, u0[None], [5.0])
