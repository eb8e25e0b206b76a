"""The default model and the plans it is compared under."""

import numpy as np
import pytest

from biomodel.defaults import default_model, no_further_treatment, without_further
from biomodel.domain import Domain
from biomodel.errors import InputError
from biomodel.patient import Patient, Visit
from biomodel.schedule import Dose, Fraction, Ongoing, Schedule
from biomodel.terms import Isotropic, Logistic, NoDiffusion
from biomodel.treatments import Chemotherapy, Radiotherapy, Systemic

PLAN = (
    Schedule.weekly("paclitaxel", 1, 3, 80, "mg/m^2")
    + Schedule.weekly("olaparib", 1, 3, 300, "mg", status="planned")
    + Schedule(fractions=(Fraction(2.0, 2.0), Fraction(30.0, 2.0)))
    + Schedule(ongoing=(Ongoing(0.0, "letrozole"), Ongoing(20.0, "trastuzumab")))
)


def imaged(schedule=PLAN, drug_map=None):
    region = np.zeros((1, 6, 6), bool)
    region[0, 2:4, 2:4] = True
    visits = tuple(Visit(n, day, region=region, drug_map=drug_map) for n, day in ((1, 0.0), (2, 14.0)))
    return Patient("P1", "breast", Domain.box((1, 6, 6)), visits, schedule)


def test_one_term_for_each_treatment():
    model = default_model(imaged())
    assert isinstance(model.growth, Logistic) and isinstance(model.diffusion, Isotropic)
    assert {term.name: type(term) for term in model.treatments} == {
        "letrozole": Systemic,
        "olaparib": Chemotherapy,
        "paclitaxel": Chemotherapy,
        "radiotherapy": Radiotherapy,
        "trastuzumab": Systemic,
    }
    model.check_schedule(PLAN)


def test_reference_doses():
    terms = {term.name: term for term in default_model(imaged()).treatments}
    assert terms["paclitaxel"].reference_dose == (80.0, "mg/m^2")  # the usual one
    assert terms["olaparib"].reference_dose == (300.0, "mg")  # the patient's own
    other = Schedule(doses=(Dose(1, "paclitaxel", 140, "mg"), Dose(8, "paclitaxel", 120, "mg")))
    (term,) = default_model(imaged(other)).treatments
    assert term.reference_dose == (130.0, "mg")


def test_drug_maps_are_used_where_there_are_any():
    assert "drug_map" not in default_model(imaged()).fields
    assert "drug_map" in default_model(imaged(drug_map=np.ones((1, 6, 6)))).fields


def test_a_patient_without_images_has_no_diffusion():
    patient = Patient.from_volumes("P1", [0, 14], [3.0, 2.0], PLAN)
    assert isinstance(default_model(patient).diffusion, NoDiffusion)


def test_later_treatments_do_not_shape_the_model():
    """What was given later, beside a plan, is unknown at the second visit."""
    plan = Schedule.weekly("paclitaxel", 1, 3, 80, "mg/m^2", status="planned")
    patient = imaged(plan + Schedule.weekly("carboplatin", 20, 1, 2, "AUC", status="given"))
    assert default_model(patient.until(visit=2)).label.endswith("paclitaxel")


def test_no_further_treatment_keeps_what_was_given():
    kept = no_further_treatment(PLAN, 8.0)
    assert [dose.day for dose in kept.of("paclitaxel")] == [1, 8]
    assert [one.day for one in kept.fractions] == [2.0]
    assert [one.agent for one in kept.ongoing] == ["letrozole"]


def test_without_further_drops_the_later_doses_of_one_agent():
    plan = without_further(PLAN, "paclitaxel", 8.0)
    assert [dose.day for dose in plan.of("paclitaxel")] == [1, 8]
    assert plan.of("olaparib") == PLAN.of("olaparib")
    assert plan.fractions == PLAN.fractions and plan.ongoing == PLAN.ongoing
    assert without_further(PLAN, "radiotherapy", 8.0).fractions == PLAN.fractions[:1]
    assert without_further(PLAN, "trastuzumab", 8.0).ongoing == PLAN.ongoing[:1]
    with pytest.raises(InputError, match="aspirin"):
        without_further(PLAN, "aspirin", 8.0)
