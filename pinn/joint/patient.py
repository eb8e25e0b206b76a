"""A patient's record as a `JointProblem`: maps of cell fraction and outlines of the visits that have them."""

from __future__ import annotations

import numpy as np

from biomodel.calibration.images import field_maps
from biomodel.errors import CalibrationError
from biomodel.models import ReactionDiffusion
from biomodel.observation import observe
from biomodel.parameters import LogitNormal
from biomodel.patient import Patient
from biomodel.solvers.base import Solver
from pinn.joint.observed import Cells, Observation, Outline
from pinn.joint.problem import SMALL, JointProblem
from pinn.joint.starts import Start

#: Room around all regions in which cells may be, mm.
MARGIN = 15.0


def joint_problem(patient: Patient, model: ReactionDiffusion, start: Start, start_day: float | None = None,
                  solver: Solver = SMALL, margin: float = MARGIN) -> JointProblem:  # fmt: skip
    """The inference of an unknown start from all visits of a patient that have images.

    A visit with a region gives an outline, one with an ADC map also cell fractions inside the region. Their noise and
    the outline's level are inferred, from the record's visible fraction as the median of the level's prior; visits
    without either are left out.

    Parameters
    ----------
    patient : Patient
        Cut it by `patient.until` before a forecast is scored.
    model : ReactionDiffusion
    start : Foci or FreeStart
    start_day : float, optional
        That of the first image if not given.
    margin : float
        Room around all regions, mm; the computing box.

    Raises
    ------
    CalibrationError
        If no visit has an image, or visits without images lie before the first one that has: the start would be later
        than they, and they be ignored silently.
    """
    if patient.domain.well_mixed:
        raise CalibrationError(f"patient {patient.id} has no images, so a start has no place; use bm.Laplace().")
    seen = [s for s in (observe(patient, v) for v in patient.visits) if s is not None]
    shown = [s for s in seen if s.region.any()]
    if not shown:
        raise CalibrationError(f"patient {patient.id}: no visit has a region with tumour to infer from.")
    first = shown[0].day
    begin = first if start_day is None else float(start_day)
    early = [v for v in patient.visits if v.day < first]
    if early and begin > early[0].day:
        raise CalibrationError(
            f"patient {patient.id}: visit {early[0].number} (day {early[0].day:g}) lies before the first image (day "
            f"{first:g}) and has none; a start on day {begin:g} cannot be held against it. Give a start_day of at most "
            f"{early[0].day:g}, or a record without that visit."
        )
    box = patient.domain.bounding_box(np.any([s.region for s in shown], 0), margin)
    visible = 0.15 if patient.cellularity is None else patient.cellularity.visible_fraction
    cells, outline = Cells(), Outline(threshold=LogitNormal(visible, 0.5))
    found = []
    for one in seen:
        part = one.crop(box)
        found.append(Observation(one.day, np.asarray(part.region, float), outline))
        if part.fraction is not None and part.region.any():
            found.append(Observation(one.day, np.where(part.region, part.fraction, np.nan), cells))
    fields = {n: np.asarray(v)[box] for n, v in field_maps(model, patient).items()}
    return JointProblem(model, patient.domain.crop(box), patient.schedule, start, begin, found, solver, fields)
