"""A patient's record as a joint problem."""

import dataclasses

import numpy as np
import pytest

import biomodel as bm
from biomodel.errors import CalibrationError
from biomodel.patient import CellularitySettings, Patient, Visit
from biomodel.truth import Hazard, average, integrate
from pinn import Foci, infer_joint, joint_problem
from pinn.joint.posterior import ROUGH

SETTINGS = CellularitySettings(3.0e-3, 0.6e-3, repeatability_cv=0.02, voxel_cv=0.03, visible_fraction=0.15)
MODEL = bm.ReactionDiffusion(bm.Logistic(bm.LogNormal(0.06, 0.5)), bm.Isotropic(bm.LogNormal(0.2, 0.7)))
DAYS = (3.0, 15.0, 28.0)


@pytest.fixture(scope="module")
def patient():
    """Two maps and an outline between them, along a line of 1.5 mm voxels; day 3 is the first visit."""
    rng, fine = np.random.default_rng(0), 4
    x = (np.arange(60 * fine) + 0.5) * 1.5 / fine
    u0 = 0.5 * np.exp(-((x - 42.0) ** 2) / (2 * 5.0**2))
    run = integrate(u0[None, None, None], np.ones((1, 1, 60 * fine), bool), np.full((1, 1, 60 * fine), 0.25),
                    (1.5, 1.5, 1.5 / fine), 0.07, Hazard.none(), DAYS)  # fmt: skip
    visits = []
    for number, (day, state) in enumerate(zip(DAYS, run, strict=True), 1):
        u = average(state, (1, 1, fine))[0]
        adc = (3.0e-3 - 2.4e-3 * u) * (1 + 0.03 * rng.standard_normal(u.shape))
        visits.append(Visit(number, day, adc=None if number == 2 else adc, region=u >= 0.15))
    return Patient("virtual", "brain", bm.Domain.box((1, 1, 60), (1.5,) * 3), tuple(visits), bm.Schedule(),
                   cellularity=SETTINGS)  # fmt: skip


def test_maps_and_outlines_are_read(patient):
    posed = joint_problem(patient, MODEL, Foci(1), start_day=0.0, solver=ROUGH)
    kinds = [(o.day, o.modality.name) for o in posed.observations]
    assert kinds == [(3.0, "cells"), (3.0, "outline"), (15.0, "outline"), (28.0, "cells"), (28.0, "outline")]
    assert posed.domain.shape[2] < 60  # the computing box
    found = infer_joint(posed)
    place = posed.names.index("focus1.x")
    # Positions are the patient's, whatever the box; the first voxel's centre lies at the origin.
    assert abs(found.z[place] - (42.0 - 0.75)) < 1.0
    low, high = found.interval(0.99)["growth.k"]
    assert low < 0.07 < high


def test_what_is_refused(patient):
    assert joint_problem(patient, MODEL, Foci(1), solver=ROUGH).start_day == 3.0
    with pytest.raises(CalibrationError, match="before the start of day 10"):
        joint_problem(patient, MODEL, Foci(1), start_day=10.0, solver=ROUGH)
    with pytest.raises(CalibrationError, match="no images"):
        joint_problem(patient.without_images(), MODEL, Foci(1))
    first = dataclasses.replace(patient.visits[0], adc=None, region=None, volume=0.4)
    later = dataclasses.replace(patient, visits=(first, *patient.visits[1:]))
    with pytest.raises(CalibrationError, match="visit 1 .day 3. lies before the first image .day 15."):
        joint_problem(later, MODEL, Foci(1), solver=ROUGH)
    assert joint_problem(later, MODEL, Foci(1), start_day=0.0, solver=ROUGH).days == [15.0, 28.0]
    empty = tuple(dataclasses.replace(v, adc=None, region=None, volume=0.0) for v in patient.visits)
    with pytest.raises(CalibrationError, match="no visit has a region with tumour"):
        joint_problem(dataclasses.replace(patient, visits=empty), MODEL, Foci(1), solver=ROUGH)
