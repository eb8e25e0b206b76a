"""Derivatives by days and amounts of doses, and schedules optimised with them under limits."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import biomodel as bm
from biomodel.calibration.calibrate import MAP, Laplace
from biomodel.dosing import DoseResponse, Expected, Quantile, _Space, optimise
from biomodel.errors import InputError
from biomodel.limits import DrugLimits, Limits, marrow_load
from biomodel.movable import with_movable
from biomodel.schedule import Dose
from biomodel.virtual import small_patient

AGENTS = ("paclitaxel", "doxorubicin")


def weekly(agent, start, n, amount, units="mg/m^2", every=7.0):
    return bm.Schedule.weekly(agent, start, n, amount, units, every=every, status="planned")


STANDARD = weekly("paclitaxel", 1.4, 6, 80.0) + weekly("doxorubicin", 25.3, 2, 60.0, every=14.0)
FIXED = bm.Schedule(tuple(d for d in STANDARD.doses if d.day < 19))
MOVING = tuple(d for d in STANDARD.doses if d.day > 19)
DAYS, AMOUNTS = np.array([d.day for d in MOVING]), np.array([1.0, 0.8, 0.0, 0.9, 1.2])
MODELS = {
    "logistic": bm.ReactionDiffusion(bm.Logistic(), bm.Isotropic(), [bm.Chemotherapy(a) for a in AGENTS]),
    "resistant": bm.ReactionDiffusion(bm.Gompertz(), bm.Isotropic(), [bm.Combination(AGENTS)]),
}


@pytest.fixture(scope="module")
def known():
    return small_patient(7, regimen=STANDARD, visit_days=(0.0, 19.0, 60.0)).patient.until(2)


@pytest.fixture(scope="module", params=list(MODELS))
def response(request, known):
    fit = bm.calibrate(MODELS[request.param], known, method=Laplace(MAP(starts=1)))
    return DoseResponse(fit, FIXED, MOVING, [40.0, 55.0], 4, 0)


@pytest.mark.parametrize("objective", [Expected(), Quantile(0.8)])
def test_derivatives_by_amounts_and_days(response, objective):
    """Against central differences, also for an amount of 0, from which a dose must be able to come back."""
    _, by_amount, by_day = response.gradient(objective, AMOUNTS, DAYS)
    step = 1e-4
    for n in range(len(MOVING)):
        e = np.where(np.arange(len(MOVING)) == n, step, 0.0)
        amount = response.value(objective, AMOUNTS + e, DAYS) - response.value(objective, AMOUNTS - e, DAYS)
        day = response.value(objective, AMOUNTS, DAYS + e) - response.value(objective, AMOUNTS, DAYS - e)
        assert by_amount[n] == pytest.approx(amount / (2 * step), rel=1e-5)
        assert by_day[n] == pytest.approx(day / (2 * step), rel=1e-5, abs=1e-9)
    assert (by_amount < 0).all() and by_day[2] == 0.0


def test_the_response_is_that_of_a_forecast(response):
    """With the standard's own amounts: the same draws, the same doses, within the solver's tolerance."""
    amounts = np.ones(len(MOVING))
    found = response(torch.tensor(amounts), DAYS).numpy()
    forecast = bm.forecast(response.fit, times=[40.0, 55.0], draws=4, seed=0, schedule=STANDARD)
    cells = forecast["cell_fraction"].sum(("z", "y", "x"), dtype=float) * forecast.data.attrs["theta"]
    np.testing.assert_allclose(found, np.log10(cells).mean("time"), atol=2e-3)


def test_a_movable_dose_is_the_dose(known):
    """Exactly the same states as without it, in a model with a drug map, and the same after it is moved for good."""
    drug = np.linspace(0.5, 1.5, 512).reshape(8, 8, 8)
    model = bm.ReactionDiffusion(
        bm.Logistic(), bm.Isotropic(), [bm.Chemotherapy("paclitaxel", map="drug_map"), bm.Chemotherapy("doxorubicin")]
    )
    movable, schedule, names = with_movable(model, FIXED, MOVING)
    domain, u0 = bm.Domain.box((8, 8, 8), (2.0, 2.0, 2.0)), torch.zeros(8, 8, 8, dtype=torch.float64)
    u0[2:6, 2:6, 2:6] = 0.5
    fields = {"drug_map": drug}
    plain = bm.TorchSolver().build(model, domain, STANDARD, fields)
    moved = bm.TorchSolver().build(movable, domain, schedule, fields)
    amounts = {n.format("amount"): torch.tensor(1.0, dtype=torch.float64, requires_grad=True) for n in names}
    u = moved(amounts, u0, [55.0], plan=moved.fixed_plan([55.0], [12]))
    expected = plain({}, u0, [55.0], plan=plain.fixed_plan([55.0], [12]))
    np.testing.assert_allclose(u.detach(), expected, rtol=1e-12)
    gradient = torch.autograd.grad(u.sum(), list(amounts.values()))
    tangents = moved.sensitivities(amounts, u0, [55.0], list(amounts), plan=moved.fixed_plan([55.0], [12]))[1]
    np.testing.assert_allclose([float(g) for g in gradient], tangents.sum((1, 2, 3, 4, 5)), rtol=1e-9)


@pytest.fixture(scope="module")
def volumes():
    """A patient without images whose tumour grows exponentially: there the best schedule is known."""
    plan = weekly("paclitaxel", 1.0, 8, 60.0)
    patient = bm.Patient.from_volumes("P1", [0, 14], [12.0, 9.0], plan)
    model = bm.ReactionDiffusion(bm.Exponential(), bm.NoDiffusion(), [bm.Chemotherapy("paclitaxel")])
    return bm.calibrate(model, patient), plan


def test_derivatives_without_images(volumes):
    fit, plan = volumes
    moving = [d for d in plan.doses if d.day > 14]
    response = DoseResponse(fit, bm.Schedule(tuple(d for d in plan.doses if d.day < 14)), moving, [52.0], 8, 0)
    amounts, days = np.full(len(moving), 0.75), np.array([d.day for d in moving])
    _, by_amount, by_day = response.gradient(Expected(), amounts, days)
    # log10 V falls by efficacy times exposure, (1 - exp(-decay t)) / decay, for each dose.
    efficacy, decay, left = fit.draw(8, 0)["paclitaxel.efficacy"].mean(), 0.35, 52.0 - days
    np.testing.assert_allclose(by_amount, -efficacy * (1 - np.exp(-decay * left)) / decay / np.log(10), rtol=1e-9)
    np.testing.assert_allclose(by_day, efficacy * 0.75 * np.exp(-decay * left) / np.log(10), rtol=1e-9)
    found = 10 ** response(torch.tensor(amounts), days).numpy()
    forecast = bm.forecast(fit, until=52.0, times=[52.0], draws=8, seed=0)
    np.testing.assert_allclose(found, forecast["volume"].sel(time=52.0), rtol=1e-9)


def test_the_known_best_schedule_is_found(volumes):
    """Exponential growth, one drug: as early as the interval allows, and the whole total in the largest doses first."""
    fit, plan = volumes
    limits = Limits((DrugLimits("paclitaxel", "mg/m^2", 120 + 200.0, 80.0, 5.0),), 16.0, 52.0)
    found = optimise(fit, plan, [53.0], limits, draws=8)
    doses = [d for d in found.schedule.doses if d.day > 14]
    assert limits.violations(found.schedule, 1e-12) == ()
    assert sum(d.amount for d in doses) == pytest.approx(200.0)

    def value(days, amounts):
        left = 53.0 - np.asarray(days)
        return float(np.sum(np.asarray(amounts) * (1 - np.exp(-0.35 * left))))

    best = value([16.0, 21.0, 26.0], [80.0, 80.0, 40.0])
    # What is left of the best is less than the tolerance on the objective buys.
    assert value([d.day for d in doses], [d.amount for d in doses]) == pytest.approx(best, rel=1e-3)


def test_a_shared_load_goes_to_the_stronger_drug():
    """Two drugs that share a limit on the load: where one kills twice as much for its load, it takes all of it."""
    plan = weekly("paclitaxel", 1.0, 2, 80.0) + weekly("doxorubicin", 8.0, 1, 60.0)
    later = weekly("paclitaxel", 20.0, 1, 40.0) + weekly("doxorubicin", 20.0, 1, 30.0)
    patient = bm.Patient.from_volumes("P1", [0, 14], [12.0, 9.0], plan + later)
    drugs = [bm.Chemotherapy("paclitaxel", efficacy=bm.LogNormal(0.2, 0.05)),
             bm.Chemotherapy("doxorubicin", efficacy=bm.LogNormal(0.1, 0.05))]  # fmt: skip
    fit = bm.calibrate(bm.ReactionDiffusion(bm.Exponential(), bm.NoDiffusion(), drugs), patient)
    limits = Limits((DrugLimits("paclitaxel", "mg/m^2", 1e3, 160.0, 0.0, 1 / 80),
                     DrugLimits("doxorubicin", "mg/m^2", 1e3, 120.0, 0.0, 1 / 60)), 20.0, 20.0, peak=2.4)  # fmt: skip
    found = optimise(fit, plan + later, [40.0], limits, draws=8)
    late = [d for d in found.schedule.doses if d.day >= 20]
    assert [d.agent for d in late] == ["paclitaxel"]
    assert marrow_load(found.schedule, limits).max() == pytest.approx(2.4, rel=1e-9)
    assert limits.violations(found.schedule, 1e-12) == ()


@pytest.fixture(scope="module")
def space():
    limits = Limits.of(STANDARD, 20.0, 50.0)
    return _Space(FIXED, MOVING, limits, np.array([80.0 if d.agent == "paclitaxel" else 60.0 for d in MOVING]))


def test_the_load_and_its_derivatives(space):
    rng = np.random.default_rng(0)
    x = np.concatenate((AMOUNTS, rng.uniform(0.5, 4.0, len(MOVING))))
    value, jacobian = space.load(x)
    amounts, days = space.unpack(x)
    doses = tuple(replace(d, amount=a, day=t) for d, a, t in zip(MOVING, amounts + 1e-12, days, strict=True))
    np.testing.assert_allclose(np.sort(value), np.sort(marrow_load(bm.Schedule(doses) + FIXED, space.limits)))
    steps = 1e-6 * np.eye(len(x))
    expected = np.stack([(space.load(x + e)[0] - space.load(x - e)[0]) / 2e-6 for e in steps], 1)
    np.testing.assert_allclose(jacobian, expected, atol=1e-7)


@pytest.mark.parametrize("seed", range(20))
def test_any_point_is_put_inside_the_limits(space, seed):
    rng = np.random.default_rng(seed)
    n = len(MOVING)
    x = np.concatenate((rng.uniform(-0.5, 3.0, n), np.sort(rng.uniform(-2.0, 6.0, n))))
    inside = space.inside(x)
    schedule = bm.Schedule(space.doses(inside)) + FIXED
    assert space.limits.violations(schedule, 1e-12) == ()
    assert all(20.0 <= d.day <= 50.0 for d in space.doses(inside))
    np.testing.assert_allclose(space.inside(inside), inside, rtol=1e-12, atol=1e-12)


def test_on_a_patient_the_limits_hold_and_fewer_cells_are_left(known):
    fit = bm.calibrate(MODELS["logistic"], known, method=Laplace(MAP(starts=1)))
    found = optimise(fit, STANDARD, [55.0], draws=6, iterations=8)
    assert found.limits.first == 20.0 and found.limits.last == 55.0
    assert found.limits.violations(found.schedule, 1e-12) == ()
    assert found.after < found.before
    assert [d for d in found.schedule.doses if d.day < 19] == list(FIXED.doses)
    decision = found.decide(draws=40)
    pair = decision.pair("optimised", "standard")
    assert pair.probability > 0.5 and decision.seed == found.seed + 1
    again = optimise(fit, STANDARD, [55.0], draws=6, iterations=8)
    assert again.schedule == found.schedule
    with pytest.raises(InputError, match="seed 0 is that of the search"):
        found.decide(seed=0)


def test_another_start_counts_where_it_ends_lower(volumes):
    fit, plan = volumes
    worse = bm.Schedule(tuple(d if d.day < 14 else replace(d, amount=30.0) for d in plan.doses))
    limits = Limits.of(plan, 16.0, 44.0)
    alone = optimise(fit, worse, [46.0], limits, draws=8, iterations=1)
    both = optimise(fit, worse, [46.0], limits, starts=[plan], draws=8, iterations=1)
    assert both.after < alone.after and both.before == alone.before


def limited(agent="paclitaxel", interval=7.0, first=16.0):
    return Limits((DrugLimits(agent, "mg/m^2", 480.0, 80.0, interval),), first, 44.0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"limits": limited(interval=9.0)}, "4 doses at least 9 days apart.*from day 24 to day 41"),
        ({"limits": limited(first=9.0)}, "before the last"),
        ({"limits": limited(agent="docetaxel")}, "nothing to move"),
        ({"days": [10.0], "limits": limited()}, "after day 14"),
        ({"standard": weekly("paclitaxel", 1.0, 2, 60.0)}, "no dose after day 14"),
        ({"standard": weekly("paclitaxel", 2.0, 8, 60.0)}, "'standard'.*differs"),
        ({"starts": [weekly("paclitaxel", 2.0, 8, 60.0)]}, "'start 1'.*differs"),
        ({"draws": 0}, "0 draws"),
    ],
)
def test_bad_input(volumes, change, words):
    fit, plan = volumes
    with pytest.raises(InputError, match=words):
        optimise(**{"fit": fit, "standard": plan, "days": [46.0], "draws": 2, **change})


def test_bad_objective_solver_and_dose(volumes):
    fit, plan = volumes
    with pytest.raises(InputError, match="level is 1.0"):
        Quantile(1.0)
    with pytest.raises(InputError, match="FenicsSolver; expected a TorchSolver"):
        DoseResponse(replace(fit, solver=bm.FenicsSolver()), plan, [], [46.0], 2, 0)
    with pytest.raises(InputError, match="no term for docetaxel"):
        DoseResponse(fit, plan, [Dose(20.0, "docetaxel", 75.0, "mg/m^2")], [46.0], 2, 0)
