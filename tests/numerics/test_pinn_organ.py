"""`PinnSolver` in an organ with tissues and a drug map, against the classical solver on the same model object."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

import biomodel as bm
from biomodel.parameters import Parameter
from biomodel.schedule import Dose
from biomodel.terms import Growth
from pinn import PinnSolver

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
        assert error < 0.1


def test_a_start_may_change_and_days_may_be_added(both, organ):
    _, (network, classical), values, _ = both
    before = network.iterations
    u = network(values, organ.u0, [4.0, *DAYS])
    assert network.iterations == before and u.shape[1] == 3  # the same network, shown at another day
    moved = torch.roll(organ.u0, 1, -2) * torch.tensor(organ.domain.mask)
    u, expected = (s(values, moved, DAYS) for s in (network, classical))
    assert float((u - expected).norm() / expected.norm()) < 0.02

