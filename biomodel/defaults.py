"""The model and the what-if plans that a forecast uses when none are given."""

from __future__ import annotations

from statistics import median

from biomodel.models import ReactionDiffusion
from biomodel.patient import Patient
from biomodel.schedule import Schedule
from biomodel.terms import Isotropic, Logistic, NoDiffusion
from biomodel.treatments import REFERENCE_DOSES, Chemotherapy, Radiotherapy, Systemic, Treatment

__all__ = ["default_model", "no_further_treatment", "without_further"]


def default_model(patient: Patient) -> ReactionDiffusion:
    """Return logistic growth and uniform diffusion, with one term for each treatment in the patient's schedule.

    A drug dosed singly becomes a :class:`~biomodel.treatments.Chemotherapy`, scaled in space where a visit has a drug
    map; a therapy known only by its start a :class:`~biomodel.treatments.Systemic`; fractions a
    :class:`~biomodel.treatments.Radiotherapy`. A patient without images has no diffusion.

    Parameters
    ----------
    patient
        What the calibration may know, usually ``patient.until(visit=k)``: a treatment that only the later record tells
        of must not shape the model.

    Returns
    -------
    ReactionDiffusion

    Examples
    --------
    >>> plan = Schedule.weekly("paclitaxel", start=1, n=12, amount=80, units="mg/m^2")
    >>> default_model(Patient.from_volumes("P1", [0, 21], [12.0, 7.5], plan)).label
    'Logistic × NoDiffusion × paclitaxel'
    """
    mixed = patient.domain.well_mixed
    mapped = not mixed and any(visit.drug_map is not None for visit in patient.visits)
    treatments: list[Treatment] = [_term(agent, patient.schedule, mapped) for agent in patient.schedule.agents]
    if patient.schedule.fractions:
        treatments.append(Radiotherapy())
    return ReactionDiffusion(Logistic(), NoDiffusion() if mixed else Isotropic(), treatments)


def _term(agent: str, schedule: Schedule, mapped: bool) -> Treatment:
    doses = schedule.of(agent)
    if not doses:
        return Systemic(agent)
    units = doses[0].units
    known = REFERENCE_DOSES.get(agent)
    # For a drug without a usual dose, or one dosed in other units, the patient's own dose counts as 1.
    reference = known if known and known[1] == units else (median(dose.amount for dose in doses), units)
    return Chemotherapy(agent, map="drug_map" if mapped else None, reference_dose=reference)


def no_further_treatment(schedule: Schedule, day: float) -> Schedule:
    """Return what of a schedule lies on `day` or before: the plan of a patient whose treatment stops there.

    A therapy known only by its start (:class:`~biomodel.schedule.Ongoing`) has no end in the record; one that began
    goes on.
    """
    return Schedule(
        doses=tuple(dose for dose in schedule.doses if dose.day <= day),
        fractions=tuple(one for one in schedule.fractions if one.day <= day),
        ongoing=tuple(one for one in schedule.ongoing if one.start_day <= day),
    )


def without_further(schedule: Schedule, agent: str, day: float) -> Schedule:
    """Return a schedule without the doses of `agent` after `day`; ``"radiotherapy"`` stands for all fractions.

    Raises
    ------
    InputError
        If nothing of that name is in the schedule.
    """
    dropped = schedule.without(agent)
    kept = no_further_treatment(schedule, day)
    return Schedule(
        doses=dropped.doses + tuple(dose for dose in kept.doses if dose.agent == agent),
        fractions=dropped.fractions if agent != "radiotherapy" else kept.fractions,
        ongoing=dropped.ongoing + tuple(one for one in kept.ongoing if one.agent == agent),
    )
