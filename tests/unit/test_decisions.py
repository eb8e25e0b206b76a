"""Decisions: the same draws under every regimen, ties split, drugs never given named; limits of a schedule."""

import dataclasses

import numpy as np
import pytest
import xarray as xr

import biomodel as bm
from biomodel.calibration.calibrate import MAP, Laplace
from biomodel.decisions import NOT_ADVICE, Decision, decide, model_for, untried
from biomodel.defaults import no_further_treatment
from biomodel.errors import InputError, ModelError
from biomodel.figure_decisions import regimens
from biomodel.limits import DrugLimits, Limits, marrow_load
from biomodel.schedule import Dose
from biomodel.virtual import small_patient

VISITS, END = (0.0, 19.0, 60.0), 60.0


def weekly(agent, start, n, amount, units="mg/m^2", every=7.0):
    return bm.Schedule.weekly(agent, start, n, amount, units, every=every, status="planned")


PLANNED = weekly("paclitaxel", 1.4, 8, 80.0)
SO_FAR = no_further_treatment(PLANNED, 19.0)
PLANS = {
    "as planned": PLANNED,
    "nothing more": SO_FAR,
    "doxorubicin": SO_FAR + weekly("doxorubicin", 22.4, 3, 60.0, every=14.0),
}


@pytest.fixture(scope="module")
def known():
    return small_patient(7, regimen=PLANNED, visit_days=VISITS).patient.until(2)


@pytest.fixture(scope="module")
def fit(known):
    return bm.calibrate(model_for(known, PLANS), known, method=Laplace(MAP(starts=1)))


@pytest.fixture(scope="module")
def decision(fit):
    return decide(fit, PLANS, END, draws=40, seed=3)


def made(fit, volumes, cells=None):
    """A decision with given draws."""
    labels = list(volumes)
    data = {"volume": (("regimen", "draw"), np.array(list(volumes.values()), float), {"units": "cm^3"})}
    if cells is not None:
        data["cells"] = (("regimen", "draw"), np.array(list(cells.values()), float), {"units": "1"})
    return Decision(xr.Dataset(data, {"regimen": labels}), END, fit, {label: PLANNED for label in labels}, 0)


def test_the_model_has_a_term_for_every_drug(fit):
    assert [t.name for t in fit.model.treatments] == ["doxorubicin", "paclitaxel"]


def test_draws_are_those_of_the_forecast_and_the_same_in_every_regimen(fit, decision):
    same = decide(fit, {"one": PLANNED, "two": PLANNED}, END, draws=40, seed=3)
    pair = same.pair("one", "two")
    assert (pair.tie, pair.probability, pair.difference, pair.ratio) == (1.0, 0.5, 0.0, 1.0)
    forecast = bm.forecast(fit, until=END, times=[END], draws=40, seed=3, curve_step=np.inf)
    np.testing.assert_array_equal(same.values("one", "volume"), forecast["volume"].sel(time=END))
    np.testing.assert_array_equal(decision.values("as planned"), same.values("one"))
    visible = float(forecast["cells"].sel(time=END).max())
    assert decision.values("as planned").max() > visible  # cells that are too sparse to be seen count as well


def test_more_treatment_leaves_less_in_every_draw(decision):
    """The spread between draws is far wider than the effect, but each draw is compared with itself."""
    pair = decision.pair("as planned", "nothing more")
    assert pair.less == 1.0 and pair.probability == 1.0 and 0 < pair.error < 0.1 and pair.ratio_high < 1
    low, high = np.quantile(decision.values("nothing more"), [0.1, 0.9])
    assert high - low > abs(np.median(decision.values("as planned")) - np.median(decision.values("nothing more"))) / 4
    back = decision.pair("nothing more", "as planned")
    assert back.probability == 0.0 and back.difference == pytest.approx(-pair.difference)


def test_ties_are_stated_and_split(fit):
    two = made(fit, {"A": [0.0, 0.0, 1.0, 3.0], "B": [0.0, 2.0, 1.0, 2.0]})
    pair = two.pair("A", "B", "volume")
    assert (pair.less, pair.tie, pair.probability) == (0.25, 0.5, 0.5)
    assert pair.difference == pytest.approx(-0.25) and np.isnan(pair.ratio)
    assert two.least("volume") == {"A": (0.5 + 1 + 0.5 + 0) / 4, "B": (0.5 + 0 + 0.5 + 1) / 4}
    assert two.gone() == {"A": 0.5, "B": 0.25}


def test_cells_decide_where_nothing_can_be_seen(fit):
    two = made(fit, {"A": [0.0, 0.0], "B": [0.0, 0.0]}, {"A": [10.0, 20.0], "B": [30.0, 60.0]})
    assert two.quantity == "cells" and two.pair("A", "B").less == 1.0 and two.pair("A", "B", "volume").tie == 1.0
    assert two.pair("A", "B").ratio == pytest.approx(1 / 3)


def test_the_error_of_a_sure_probability_is_not_nothing(fit):
    sure = made(fit, {"A": np.ones(100), "B": np.full(100, 2.0)}).pair("A", "B")
    assert sure.probability == 1.0 and sure.error == pytest.approx(0.01, rel=0.05)


def test_totals_and_table(decision):
    (paclitaxel, doxorubicin) = decision.totals("doxorubicin")
    assert (paclitaxel.doses, paclitaxel.amount, paclitaxel.whole) == (0, 0, 240.0)
    assert (doxorubicin.doses, doxorubicin.amount, doxorubicin.largest) == (3, 180.0, 60.0)
    rows = decision.table()
    assert [r["regimen"] for r in rows] == list(PLANS)
    assert sum(r["least"] for r in rows) == pytest.approx(1.0)
    assert rows[1]["cells_low"] < rows[1]["cells"] < rows[1]["cells_high"]
    html = decision._repr_html_()
    assert "3 × doxorubicin, 180 mg/m^2" in html and "none" in html and NOT_ADVICE.split(",")[0] in html
    assert len(decision.pairs()) == 3


def test_drugs_never_given_are_named_with_what_they_rest_on(fit, decision):
    notes = [n for n in decision.notes if "rests on priors alone" in n]
    assert len(notes) == 1 and notes[0].startswith("doxorubicin had not been given")
    assert "doxorubicin.efficacy (shrinkage 1.00)" in notes[0]
    assert NOT_ADVICE in decision.notes
    (found,) = untried(fit, ["paclitaxel", "doxorubicin"]).items()
    assert found[0] == "doxorubicin" and found[1]["doxorubicin.efficacy"] == pytest.approx(1.0, abs=1e-6)


def test_much_doxorubicin_and_doses_that_do_not_count_are_noted(fit):
    plans = {"much": SO_FAR + weekly("doxorubicin", 22.4, 7, 60.0), "nothing": SO_FAR}
    notes = " ".join(decide(fit, plans, 40.0, draws=2).notes)
    assert "420 mg/m^2 of doxorubicin" in notes and "much: 4 doses on day 40 or later do not count" in notes


def test_a_visit_without_tumour_that_draws_do_not_know_is_noted(fit):
    """Such a visit only bounds what the treatment did; a Gaussian posterior may pass the bound."""
    patient = fit.patient
    gone = dataclasses.replace(patient.visits[1], region=None, volume=0.0)
    told = dataclasses.replace(fit, patient=dataclasses.replace(patient, visits=(patient.visits[0], gone)))
    notes = " ".join(decide(told, {"a": PLANNED, "b": SO_FAR}, END, draws=4).notes)
    assert "No tumour was seen at visit 2, but 100% of the draws show some" in notes


def test_without_images_volumes_decide():
    plan = weekly("paclitaxel", 1.0, 12, 80.0)
    patient = bm.Patient.from_volumes("P1", [0, 21, 42], [12.0, 9.0, 7.5], plan).until(2)
    fit = bm.calibrate(bm.default_model(patient), patient)
    decision = decide(fit, {"plan": plan, "stop": no_further_treatment(plan, 21.0)}, 80.0, draws=50)
    assert decision.quantity == "volume" and decision.pair("plan", "stop").less == 1.0
    assert decision.gone()["plan"] >= decision.gone()["stop"]
    assert regimens(decision).axes


@pytest.mark.parametrize(
    ("plans", "day", "words"),
    [
        ({}, END, "0 regimens"),
        ({"only": PLANNED}, END, "at least two"),
        ({"a": PLANNED, "b": SO_FAR}, 19.0, "after the last calibrated visit, day 19"),
        ({"a": PLANNED, "b": SO_FAR}, np.nan, "day nan"),
        ({"a": PLANNED, "b": PLANNED.shift(1.0)}, END, "'b'.*paclitaxel 80 mg/m\\^2 on day 1.4 is only in the pat"),
        ({"a": PLANNED, "b": SO_FAR + weekly("doxorubicin", 5.0, 1, 60.0)}, END, "doxorubicin.*only in the regimen"),
        ({"a": PLANNED, "b": bm.Schedule()}, END, "'b'.*differs"),
    ],
)  # fmt: skip
def test_bad_regimens(fit, plans, day, words):
    with pytest.raises(InputError, match=words):
        decide(fit, plans, day)


def test_bad_drugs_methods_and_names(fit, decision):
    with pytest.raises(ModelError, match="regimen 'new'.*docetaxel"):
        decide(fit, {"old": PLANNED, "new": SO_FAR + weekly("docetaxel", 22.0, 1, 75.0)}, END)
    with pytest.raises(InputError, match="MAP fit has no posterior"):
        decide(dataclasses.replace(fit, covariance=np.zeros_like(fit.covariance)), PLANS, END)
    with pytest.raises(InputError, match="no regimen 'other'; there are as planned"):
        decision.pair("other", "as planned")
    with pytest.raises(InputError, match="no quantity 'mass'"):
        decision.pair("nothing more", "as planned", "mass")


def test_a_mark_of_given_or_planned_is_no_difference(fit):
    given = bm.Schedule(tuple(dataclasses.replace(d, status="given") for d in SO_FAR.doses))
    assert decide(fit, {"planned": SO_FAR, "given": given}, END, draws=2).pair("planned", "given").tie == 1.0


def test_the_figure_shows_every_comparison(decision):
    figure = regimens(decision)
    words = {t.get_text() for axes in figure.axes for t in (*axes.texts, *axes.get_yticklabels())}
    assert {"A: as planned", "B: nothing more", "C: doxorubicin", "A", "100 %", "0 %"} <= words


def test_regimens_that_share_a_history_share_the_scans():
    """What the benchmark rests on: the same virtual patient until the regimens part."""
    one, two = (small_patient(11, regimen=PLANS[n], visit_days=VISITS) for n in ("as planned", "doxorubicin"))
    for a, b in zip(one.patient.visits[:2], two.patient.visits[:2], strict=True):
        np.testing.assert_array_equal(a.adc, b.adc)
        np.testing.assert_array_equal(a.region, b.region)
    assert one.parameters == two.parameters
    assert float(one.truth["cells"][-1]) != float(two.truth["cells"][-1])


# Limits ---------------------------------------------------------------------------------------------------------------

TWO = weekly("paclitaxel", 1.0, 6, 80.0) + weekly("doxorubicin", 8.0, 2, 60.0, every=14.0)


def test_limits_of_a_standard_are_just_met_by_it():
    limits = Limits.of(TWO, 7.0, 40.0, loads={"paclitaxel": 0.5}, intervals={"doxorubicin": 10.0})
    assert limits.violations(TWO, 1e-12) == ()
    doxorubicin, paclitaxel = limits.drugs  # by the day of the first dose that may move
    assert (paclitaxel.total, paclitaxel.largest, paclitaxel.interval) == (480.0, 80.0, 7.0)
    assert doxorubicin.interval == 10.0 and doxorubicin.load == pytest.approx(1 / 60)
    assert paclitaxel.load == pytest.approx(0.5 / 80)
    assert limits.peak == pytest.approx(marrow_load(TWO, limits).max())


def test_the_load_on_the_marrow_by_hand():
    limits = Limits((DrugLimits("a", "mg", 10, 10, 0.0, 1.0), DrugLimits("b", "mg", 10, 10, 0.0, 2.0)), 0.0, 9.0,
                    recovery=5.0)  # fmt: skip
    schedule = bm.Schedule((Dose(0.0, "a", 3.0, "mg"), Dose(5.0, "b", 1.0, "mg"), Dose(5.0, "a", 1.0, "mg"),
                            Dose(6.0, "c", 9.0, "mg")))  # fmt: skip
    # Both doses of day 5 count after either; a drug without limits does not.
    np.testing.assert_allclose(marrow_load(schedule, limits), [3.0, 3 / np.e + 3, 3 / np.e + 3])


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (TWO + weekly("paclitaxel", 50.0, 1, 10.0), "paclitaxel: total 490 mg/m"),
        (weekly("paclitaxel", 1.0, 2, 90.0), "paclitaxel: a dose of 90 mg/m"),
        (weekly("doxorubicin", 1.0, 2, 60.0, every=13.0), "doxorubicin: two doses 13 days apart"),
        (weekly("doxorubicin", 1.0, 2, 100.0, "mg", every=14.0), "doxorubicin: doses in mg, limits in"),
        (weekly("paclitaxel", 1.0, 6, 80.0) + weekly("doxorubicin", 22.0, 2, 60.0, every=14.0), "load on the marrow"),
    ],
)
def test_what_is_beyond_the_limits_is_named(other, words):
    (found,) = Limits.of(TWO, 7.0, 40.0).violations(other)
    assert found.startswith(words)


def drug(**changes):
    return DrugLimits(**{"agent": "paclitaxel", "units": "mg/m^2", "total": 480.0, "largest": 80.0, "interval": 7.0,
                         "load": 0.01, **changes})  # fmt: skip


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        (Limits((drug(agent="docetaxel"),), 8.0, 40.0), "none for paclitaxel"),
        (Limits((drug(units="mg"),), 8.0, 40.0), "in mg, but its doses are in mg/m"),
        (Limits((drug(total=80.0),), 8.0, 40.0), "total of 80 mg/m.*80 stand"),
        (Limits((drug(interval=9.0),), 8.0, 40.0), "5 doses at least 9 days apart need 36 days.*from day 10 to day 40"),
        (Limits((drug(),), 8.0, 40.0, peak=0.5), "load on the marrow may be 0.5.*reach 0.8"),
    ],
)
def test_limits_that_cannot_be_met_are_named(limits, words):
    fixed, moving = weekly("paclitaxel", 1.0, 1, 80.0), weekly("paclitaxel", 8.0, 5, 80.0).doses
    with pytest.raises(InputError, match=words):
        limits.check(fixed, moving)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: drug(total=0.0), "total is 0.0"),
        (lambda: drug(interval=-1.0), "interval is -1.0"),
        (lambda: drug(load=np.nan), "load is nan"),
        (lambda: Limits((drug(), drug()), 1.0, 2.0), "named twice"),
        (lambda: Limits((drug(),), 3.0, 2.0), "rising days"),
        (lambda: Limits((drug(),), 1.0, 2.0, peak=0.0), "peak"),
        (lambda: Limits((drug(),), 1.0, 2.0, recovery=np.inf), "recovery"),
    ],
)
def test_limits_without_meaning(make, words):
    with pytest.raises(InputError, match=words):
        make()
