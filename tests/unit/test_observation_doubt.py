"""Outlines are doubted where images and model disagree, and only there."""

import numpy as np
import pytest

import biomodel as bm
from biomodel.calibration.doubt import calibrate_in_doubt, in_doubt
from biomodel.errors import CalibrationError
from biomodel.virtual import Matched, Mismatched, small_patient


def model_of(patient):
    drugs = [bm.Chemotherapy(a) for a in patient.schedule.agents]
    return bm.ReactionDiffusion(bm.Logistic(), bm.Isotropic(), drugs).with_priors(Matched().priors())


def test_right_outlines_are_left_alone():
    known = small_patient(11).patient.until(2)
    fit, plain = calibrate_in_doubt(model_of(known), known), bm.calibrate(model_of(known), known)
    assert fit.names == plain.names and np.array_equal(fit.z, plain.z) and fit.patient is known


def test_outlines_drawn_askew_are_doubted_and_a_note_says_so():
    known = small_patient(11, Mismatched()).patient.until(2)
    plain = bm.calibrate(model_of(known), known)
    fit = calibrate_in_doubt(model_of(known), known)
    assert plain.inflation > 2 and fit.inflation < plain.inflation
    assert fit.patient.cellularity.edge_sd_mm == pytest.approx(1.5)  # three quarters of a voxel of 2 mm
    assert {"edge.visit1", "edge.visit2"} <= set(fit.names)
    assert any("outlines" in note and "doubt" in note for note in fit.notes)
    # What was stated stays as it was stated.
    stated = in_doubt(known, 0.6)
    assert calibrate_in_doubt(model_of(known), stated).patient.cellularity.edge_sd_mm == 0.6


def test_a_patient_without_images_has_no_outlines_to_doubt():
    patient = bm.Patient.from_volumes("P", [0, 20], [5.0, 6.0])
    with pytest.raises(CalibrationError, match="no cellularity"):
        in_doubt(patient)
    model = bm.ReactionDiffusion(bm.Logistic(), bm.NoDiffusion())
    assert calibrate_in_doubt(model, patient).patient is patient
