"""Pages of the uncertainty report say what their objects hold, in plain words, and fit into the report."""

from dataclasses import replace

import numpy as np
import pytest

import biomodel as bm
from biomodel.cohort_study import CohortStudy
from biomodel.diagnostics import posterior_predictive_check
from biomodel.errors import InputError
from biomodel.report import Page
from biomodel.report_blocks import Picture, Table, Text
from biomodel.triage import NOT_USABLE, Finding, Triage, triage
from biomodel.uncertainty import decision_page, map_page, posterior_page, stages_page, triage_page, uncertainty_pages
from biomodel.virtual import small_patient

TITLES = ("How far to trust this forecast", "What the images taught the model", "Where the uncertainty comes from",
          "Do intervals like these hold?", "Which regimen?")  # fmt: skip


@pytest.fixture(scope="module")
def known():
    return small_patient(3).patient.until(2)


@pytest.fixture(scope="module")
def fit(known):
    return bm.calibrate(bm.default_model(known), known)


@pytest.fixture(scope="module")
def forecast(fit):
    return bm.forecast(fit, times=[19.0, 41.0], draws=40, seed=0)


@pytest.fixture(scope="module")
def check(fit):
    return posterior_predictive_check(fit, draws=20)


@pytest.fixture(scope="module")
def stages(fit):
    return bm.stages(fit, until=41.0, draws=20, seed=0)


@pytest.fixture(scope="module")
def decision(fit, known):
    return bm.decide(fit, {"plan": known.schedule, "half <b>": known.schedule}, 41.0, draws=20)


def study(fit, n=60, virtual=True, **other) -> CohortStudy:
    """Forecasts far too sure."""
    rng = np.random.default_rng(0)
    draws = 30 + 0.5 * rng.standard_normal((n, 60))
    told = tuple({"a": x} for x in rng.standard_normal(n))
    seen = 30 + 5 * rng.standard_normal(n)
    names = tuple(f"P{i}" for i in range(n))
    found = CohortStudy("made up", virtual, repr(fit.model), fit.method, "volume", names, np.full(n, 22.0), draws, seen,
                        told, {"Q": "lost"})  # fmt: skip
    return replace(found, **other)


def texts(page) -> str:
    return " ".join(b.text for b in page.blocks if isinstance(b, Text))


def tables(page) -> list[Table]:
    return [b for b in page.blocks if isinstance(b, Table)]


def test_all_pages_stand_in_the_report_in_order(fit, forecast, check, stages, decision, tmp_path):
    verdict = triage(forecast, check)
    pages = uncertainty_pages(forecast, check=check, triage=verdict, stages=stages, study=study(fit), decision=decision)
    assert tuple(p.title for p in pages) == TITLES
    assert all(isinstance(p, Page) for p in pages)
    report = bm.report(forecast, pages=pages)
    titles = [s.title for s in report.sections]
    start = titles.index(TITLES[0])
    assert titles[start : start + 5] == list(TITLES)
    assert titles[-2:] == ["Limits of use", "Provenance"]
    report.save(tmp_path / "r.html")
    html = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "half &lt;b&gt;" in html
    assert "half <b>" not in html
    report.save(tmp_path / "r.pdf")
    assert (tmp_path / "r.pdf").read_bytes().startswith(b"%PDF")


def test_pages_of_what_is_not_given_are_left_out(forecast, known):
    assert [p.title for p in uncertainty_pages(forecast)] == [TITLES[1]]
    point = bm.calibrate(bm.default_model(known), known, method=bm.MAP(starts=1, iterations=3))
    assert uncertainty_pages(bm.forecast(point, until=41.0, draws=1)) == ()


def test_the_verdict_comes_first_with_its_reasons():
    found = Triage(
        (Finding("A?", "usable", "Yes."), Finding("B?", NOT_USABLE, "Worst."), Finding("C?", "review", "Bad."))
    )
    page = triage_page(found)
    assert texts(page).startswith("Not usable. This forecast should not be read")
    assert page.blocks[1].items == ("Worst.", "Bad.")
    assert len(tables(page)[0].rows) == 3


def test_the_posterior_names_what_was_not_learned_and_what_is_confounded(fit, check):
    page = posterior_page(fit, check)
    told = texts(page)
    for name in fit.identified:
        if not name.startswith(("adc_shift", "grid", "initial")):
            assert name in told
    assert "carboplatin.efficacy and paclitaxel.efficacy (correlation −0" in told
    assert sum(isinstance(b, Picture) for b in page.blocks) == 2
    rows = tables(page)[-1].rows
    assert [r[0] for r in rows] == list(check.names)


def test_the_stages_sum_and_the_largest_is_named(stages):
    page = stages_page(stages)
    rows = {r.label: r.contribution for r in stages.table()}
    largest = max(rows, key=rows.get)
    assert largest in texts(page)
    assert [r[0] for r in tables(page)[0].rows] == list(rows)
    assert f"{100 * stages.sum()[0]:.0f} %" in texts(page)


@pytest.mark.parametrize("virtual", [True, False])
def test_evidence_says_how_often_and_from_whom(fit, forecast, virtual):
    found = study(fit, virtual=virtual)
    page = next(p for p in uncertainty_pages(forecast, study=found) if p.title == TITLES[3])
    held = np.mean([np.quantile(d, 0.05) <= o <= np.quantile(d, 0.95)
                    for d, o in zip(found.draws, found.observed, strict=True)])  # fmt: skip
    assert f"held {100 * held:.0f} %" in texts(page)
    assert ("virtual" in texts(page)) is virtual
    assert "1 further patients" in texts(page)
    adjusted = next(t for t in tables(page) if t.columns[0] == "day")
    assert {r[0] for r in adjusted.rows} == {"41"}
    low, high = found.adjustment().interval(forecast["volume"].values[:, 1], 0.9)
    # The middle half: the wider interval is cut off at no tumour at all, by how much depends on the processor.
    inner = np.ptp(found.adjustment().interval(forecast["volume"].values[:, 1], 0.5))
    assert low == 0 and inner > 3 * np.ptp(np.quantile(forecast["volume"].values[:, 1], [0.25, 0.75]))
    assert any(f"{high:.3g}"[:3] in r[3] for r in adjusted.rows)


def test_evidence_of_few_patients_says_so(fit, forecast):
    page = next(p for p in uncertainty_pages(forecast, study=study(fit, 2)) if p.title == TITLES[3])
    assert "2 patients are too few to adjust an interval by; 19 allow one of 90 %." in texts(page)


def test_a_study_of_another_model_or_farther_ahead_is_no_evidence(fit, forecast):
    with pytest.raises(InputError, match="calibrated Other by Laplace, this forecast"):
        uncertainty_pages(forecast, study=study(fit, model="Other"))
    page = next(
        p for p in uncertainty_pages(forecast, study=study(fit, ahead=np.full(60, 60.0))) if p.title == TITLES[3]
    )
    assert "forecast 60 to 60 days ahead, and this patient not" in texts(page)
    few = next(p for p in uncertainty_pages(bm.forecast(fit, until=41.0, draws=10), study=study(fit))
               if p.title == TITLES[3])  # fmt: skip
    assert "10 draws are too few to adjust" in texts(few)


def test_a_vanished_tumour_is_counted_in_cells(stages):
    gone = replace(
        stages, **{n: np.array(getattr(stages, n)) for n in ("first_set", "second_set", "crossed")}, off=None
    )
    for values in (gone.first_set, gone.second_set, gone.crossed):
        values[..., 0] = 0.0
    page = stages_page(gone)
    assert "the forecast's log of all cells has" in texts(page)
    assert "all cells are counted" in texts(page)
    assert "log of all cells" in gone._repr_html_()


def test_checks_and_verdicts_of_other_data_are_refused(forecast, check):
    other = replace(check, patient="another")
    with pytest.raises(InputError, match="predictive check is of another patient"):
        triage(forecast, other)
    with pytest.raises(InputError, match="check is of another patient"):
        uncertainty_pages(forecast, check=other)
    with pytest.raises(InputError, match="triage is of another patient"):
        uncertainty_pages(forecast, triage=replace(triage(forecast, check), patient="another"))


def test_regimens_that_tie_are_called_ties(decision):
    page = decision_page(decision)
    assert "with probability 50 %" in texts(page)
    assert "not advice" in texts(page)
    pairs = tables(page)[1].rows
    assert pairs[0][1] == "50 %"


def test_another_patients_objects_are_refused(forecast, stages):
    patient = small_patient(4).patient.until(2)
    other = replace(stages, fits=(bm.calibrate(bm.default_model(patient), patient),))
    with pytest.raises(InputError, match="stages is of patient"):
        uncertainty_pages(forecast, stages=other)


def test_a_fit_without_a_map_has_no_page_of_it(fit):
    with pytest.raises(InputError, match="no map of the rate"):
        map_page(fit)


@pytest.mark.slow
def test_a_map_has_a_page(known, forecast):
    mapped = bm.calibrate(bm.default_model(known), known, method=bm.FieldLaplace())
    page = next(p for p in uncertainty_pages(forecast, rate_map=mapped) if p.title == "Map of the growth rate")
    assert f"{len(mapped.rate_map.lowrank.values)} independent patterns" in texts(page)
    assert sum(isinstance(b, Picture) for b in page.blocks) == 1


@pytest.mark.slow
def test_chains_are_told_and_volumes_are_no_images():
    patient = bm.Patient.from_volumes("V", [0, 20, 40], [9.0, 12.0, 17.0])
    model = bm.ReactionDiffusion(bm.Exponential(), bm.NoDiffusion())
    fit = bm.calibrate(model, patient, method=bm.NUTS(chains=2, draws=300, tune=200, seed=0))
    page = posterior_page(fit)
    table = next(t for t in tables(page) if "2 Markov chains of 300 draws" in t.caption)
    assert {r[0] for r in table.rows} <= set(fit.names) and "growth.k" in {r[0] for r in table.rows}
    assert page.title == "What the volumes taught the model" and "image" not in texts(page)
