"""Organ, tissue and tumour regions on practice exams of virtual patients, and on what cannot be used."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage

from biomodel.errors import GeometryError, InputError
from biomodel.imaging.regions import (
    BRAIN,
    Exam,
    Thresholds,
    body_mask,
    breast_mask,
    find_tumour,
    fuzzy_c_means,
    given_mask,
    score_region,
    tissues,
)
from biomodel.imaging.regions.practice import FAMILIAR, UNSEEN, practice_exam
from biomodel.virtual import Mismatched, virtual_patient

pytest.importorskip("SimpleITK")


@pytest.fixture(scope="module")
def patient():
    return virtual_patient(41, Mismatched(), visit_days=(0.0,))


@pytest.fixture(scope="module")
def practice(patient):
    return practice_exam(patient, 1, UNSEEN[0], 41)


@pytest.fixture(scope="module")
def breast(practice):
    exam = practice.exam
    return breast_mask(exam.before + exam.early + exam.late, exam.spacing)


def test_practice_exams_repeat_and_differ_between_sites(patient, practice):
    again = practice_exam(patient, 1, UNSEEN[0], 41)
    np.testing.assert_array_equal(again.exam.early, practice.exam.early)
    np.testing.assert_array_equal(again.region, practice.region)
    other = practice_exam(patient, 1, FAMILIAR[0], 41)
    np.testing.assert_array_equal(other.region, practice.region)
    assert not np.allclose(other.exam.before, practice.exam.before)
    gain = (practice.exam.early - practice.exam.before) / practice.exam.before
    healthy = practice.organ & ~practice.region & (practice.fibroglandular > 0.8)
    assert np.median(gain[practice.region]) > 2 * np.median(gain[healthy])
    with pytest.raises(InputError, match="visit 2; the patient has 1"):
        practice_exam(patient, 2, UNSEEN[0], 41)


# --- exam ------------------------------------------------------------------------------------------------------------


def test_exam_takes_its_images_out_of_a_series():
    times = np.arange(0, 601, 60.0)
    data = np.arange(len(times), dtype=float)[:, None, None, None] * np.ones((3, 4, 5)) + 1
    exam = Exam.of_series(data, times, [0, 1], (2.0, 1.0, 1.0), early=120.0)
    assert (exam.before[0, 0, 0], exam.early[0, 0, 0]) == (1.5, 4.0)
    assert exam.late[0, 0, 0] in (9.0, 10.0)  # 510 s lies between two images
    with pytest.raises(InputError, match="no baseline"):
        Exam.of_series(data, times, [], (2.0, 1.0, 1.0))
    with pytest.raises(InputError, match="the series ends 340 s after"):
        Exam.of_series(data[:7], times[:7], [0], (2.0, 1.0, 1.0), arrival=20.0)
    with pytest.raises(InputError, match="too coarse"):
        Exam.of_series(data[::5], times[::5], [0], (2.0, 1.0, 1.0), early=100.0)


def test_a_sample_that_shows_nothing_is_left_out_of_the_baseline():
    times = np.arange(40) * 15.0
    data = np.ones((40, 3, 4, 5)) * np.arange(1, 41)[:, None, None, None]
    data[1, 0, 0, 0], data[:3, 1, 1, 1] = np.nan, np.nan
    before = Exam.of_series(data, times, [0, 1, 2], (2.0, 1.0, 1.0)).before
    assert before[0, 0, 0] == 2 and np.isnan(before[1, 1, 1]) and before[2, 2, 2] == 2


def test_exam_refuses_images_that_do_not_fit():
    image = np.ones((3, 4, 5))
    with pytest.raises(GeometryError, match="one shape"):
        Exam(image, image, image[:2], (1.0, 1.0, 1.0))
    with pytest.raises(GeometryError, match="spacing"):
        Exam(image, image, image, (1.0, 0.0, 1.0))
    with pytest.raises(InputError, match="'late' has no positive signal"):
        Exam(image, image, np.full_like(image, np.nan), (1.0, 1.0, 1.0))
    exam = Exam(image, image, image, (1.0, 1.0, 1.0))
    with pytest.raises(GeometryError, match="mask of shape"):
        exam.mask(np.ones((2, 2, 2)), "here")
    with pytest.raises(InputError, match="no voxel with signal"):
        exam.mask(np.zeros((3, 4, 5)), "here")


# --- organ -----------------------------------------------------------------------------------------------------------


def test_body_and_breast_are_found(practice, breast):
    exam = practice.exam
    body = body_mask(exam.before + exam.early + exam.late, exam.spacing)
    assert body.plausible, body.doubts
    assert score_region(body.mask, practice.body, exam.spacing).dice > 0.95
    assert breast.plausible, breast.doubts
    score = score_region(breast.mask, practice.organ, exam.spacing)
    assert score.dice > 0.94
    assert score.hd95 <= 4.0
    assert breast.volume == pytest.approx(score.found)


def test_a_known_chest_wall_is_used(practice, breast):
    exam = practice.exam
    wall = np.full((exam.shape[0], exam.shape[2]), 20.0)
    found = breast_mask(exam.before + exam.early + exam.late, exam.spacing, wall=wall)
    assert not found.mask[:, :20].any() and found.volume < breast.volume
    with pytest.raises(GeometryError, match="wall of shape"):
        breast_mask(exam.before, exam.spacing, wall=wall[:3])


def test_what_is_not_plausible_is_said(practice):
    exam = practice.exam
    # The same picture with voxels of a tenth: units that were mixed up.
    tiny = body_mask(exam.early, tuple(10 * s for s in exam.spacing))
    assert not tiny.plausible and "cm³" in tiny.doubts[0]
    ball = np.zeros((40, 40, 40), bool)
    z, y, x = np.ogrid[:40, :40, :40]
    ball |= (z - 20) ** 2 + (y - 20) ** 2 + (x - 20) ** 2 < 17**2
    assert given_mask(ball, (4.0, 4.0, 4.0), BRAIN).plausible
    hollow = ball & ((z - 20) ** 2 + (y - 20) ** 2 + (x - 20) ** 2 > 10**2)
    assert any("holes" in doubt for doubt in given_mask(hollow, (4.0, 4.0, 4.0), BRAIN).doubts)
    two = ball.copy()
    two[19:22] = False
    assert any("2 separate parts" in doubt for doubt in given_mask(two, (4.0, 4.0, 4.0), BRAIN).doubts)
    with pytest.raises(InputError, match="empty"):
        given_mask(np.zeros_like(ball), (4.0, 4.0, 4.0), BRAIN)
    with pytest.raises(InputError, match="organ's label"):
        given_mask(3 * ball, (4.0, 4.0, 4.0), BRAIN)
    with pytest.raises(InputError, match="same value everywhere"):
        body_mask(np.ones((5, 5, 5)), (1.0, 1.0, 1.0))
    with pytest.raises(GeometryError, match="three sides"):
        body_mask(np.ones((5, 5)), (1.0, 1.0, 1.0))


# --- tissue ----------------------------------------------------------------------------------------------------------


def test_fuzzy_c_means_minimises_its_objective():
    rng = np.random.default_rng(0)
    samples = np.concatenate([rng.normal(1, 0.2, (300, 2)), rng.normal(4, 0.5, (100, 2))])
    found = fuzzy_c_means(samples, 2, tolerance=1e-9)
    assert found.converged and found.centres == pytest.approx(np.array([[1, 1], [4, 4]]), abs=0.1)
    np.testing.assert_allclose(found.members.sum(1), 1)
    spread = samples.std(0)

    def objective(centres):
        distance = (((samples[:, None] - centres[None]) / spread) ** 2).sum(-1)
        members = 1 / distance / (1 / distance).sum(1, keepdims=True)
        return (members**2 * distance).sum()

    best = objective(found.centres)
    for move in 0.01 * rng.standard_normal((20, 2, 2)):
        assert objective(found.centres + move) > best
    same = fuzzy_c_means(samples, 2, tolerance=1e-9)
    np.testing.assert_array_equal(same.members, found.members)
    turned = fuzzy_c_means(samples[::-1], 2, tolerance=1e-9)
    np.testing.assert_allclose(turned.members[::-1], found.members, atol=1e-6)


def test_tissue_fractions_follow_the_truth_in_spite_of_a_bias(patient):
    easy = practice_exam(patient, 1, replace(FAMILIAR[0], bias=0.05), 41)
    image, spacing, organ = easy.exam.before, easy.exam.spacing, easy.organ
    _, y, x = (
        np.linspace(-1, 1, n).reshape(w) for n, w in zip(image.shape, ((-1, 1, 1), (1, -1, 1), (1, 1, -1)), strict=True)
    )
    biased = image * np.exp(0.5 * y - 0.3 * x**2)
    healthy = organ & ~easy.region
    truth = easy.fibroglandular[healthy]

    def error(tissue):
        return np.abs(tissue.fibroglandular[healthy] - truth).mean()

    clean = tissues(image, organ, spacing, fat_suppressed=True)
    found = tissues(biased, organ, spacing, fat_suppressed=True)
    raw = tissues(biased, organ, spacing, fat_suppressed=True, correct_bias=False)
    assert error(clean) < 0.06
    harm = error(raw) - error(clean)
    assert harm > 0.01
    assert error(found) - error(clean) < 0.25 * harm
    assert found.share == pytest.approx(truth.mean(), abs=0.05)
    np.testing.assert_allclose((found.fibroglandular + found.adipose)[organ], 1)
    assert (found.fibroglandular[~organ] == 0).all()
    assert np.exp(np.log(found.bias[organ]).mean()) == pytest.approx(1, abs=0.02)


def test_fat_may_be_the_brighter_tissue():
    rng = np.random.default_rng(1)
    gland = ndimage.gaussian_filter(rng.standard_normal((10, 20, 20)), 2) > 0
    image = np.where(gland, 100.0, 300.0) + rng.normal(0, 5, gland.shape)
    organ = np.ones(gland.shape, bool)
    spacing = (2.0, 2.0, 2.0)
    bright = tissues(image, organ, spacing, fat_suppressed=False, correct_bias=False)
    assert ((bright.fibroglandular > 0.5) == gland).mean() > 0.99
    other = tissues(image, organ, spacing, fat_suppressed=True, correct_bias=False)
    np.testing.assert_allclose(other.fibroglandular, bright.adipose, atol=1e-12)


def test_tissue_of_nothing_is_refused_and_doubt_is_said():
    image, organ = np.ones((6, 6, 6)), np.ones((6, 6, 6), bool)
    with pytest.raises(InputError, match="same value everywhere"):
        tissues(image, organ, (1.0, 1.0, 1.0), fat_suppressed=True, correct_bias=False)
    with pytest.raises(InputError, match="expected at least 100"):
        tissues(image, organ & (np.arange(6) < 1), (1.0, 1.0, 1.0), fat_suppressed=True)
    with pytest.raises(GeometryError, match="one shape"):
        tissues(image, organ[:3], (1.0, 1.0, 1.0), fat_suppressed=True)
    noise = 100 + np.random.default_rng(0).standard_normal(image.shape)
    noise[0, 0, 0] = np.nan
    found = tissues(noise, organ, (1.0, 1.0, 1.0), fat_suppressed=True, correct_bias=False)
    assert any("differ little" in note for note in found.notes)
    assert np.isnan(found.fibroglandular[0, 0, 0]) and np.isfinite(found.fibroglandular).sum() == 215
    with pytest.raises(InputError, match="NaN"):
        fuzzy_c_means(noise.ravel())


# --- tumour ----------------------------------------------------------------------------------------------------------


def test_tumour_is_found_at_a_hard_site(practice, breast):
    exam = practice.exam
    tissue = tissues(exam.before, breast.mask, exam.spacing, fat_suppressed=True)
    found = find_tumour(exam, breast.mask, tissue=tissue)
    assert score_region(found.mask, practice.region, exam.spacing).dice > 0.85
    assert not (found.mask & ~breast.mask).any()
    assert found.volume == pytest.approx(found.mask.sum() * exam.voxel_volume / 1000)
    assert any("Background parenchyma" in step for step in found.steps)
    again = find_tumour(exam, breast.mask, tissue=tissue)
    np.testing.assert_array_equal(again.mask, found.mask)
    # The unit of the signal has no part in it.
    scaled = Exam(0.01 * exam.before, 0.01 * exam.early, 0.01 * exam.late, exam.spacing)
    assert score_region(find_tumour(scaled, breast.mask, tissue=tissue).mask, found.mask, exam.spacing).dice > 0.999


def scene() -> tuple[Exam, np.ndarray, np.ndarray, np.ndarray]:
    """Two balls that enhance, a vessel, gland that enhances little, and noise."""
    rng = np.random.default_rng(2)
    shape, spacing = (24, 40, 40), (2.0, 1.5, 1.5)
    z, y, x = np.ogrid[:24, :40, :40]

    def ball(a, b, c, radius):
        return ((z - a) * 2.0) ** 2 + ((y - b) * 1.5) ** 2 + ((x - c) * 1.5) ** 2 <= radius**2

    large, small = ball(12, 14, 14, 9.0), ball(12, 28, 30, 6.0)
    vessel = (np.abs(y - 33) < 1) & (np.abs(z - 12) < 1) & (x >= 0)
    gland = rng.random(shape) * 0 + (y > 5)
    before = 100.0 * np.where(gland, 1.0, 0.4) + rng.normal(0, 3, shape)
    early = before * np.where(large | small | vessel, 2.8, 1.15)
    late = before * np.where(large | small | vessel, 2.5, 1.25)
    return Exam(before, early, late, spacing), np.ones(shape, bool), large, small


def test_foci_seeds_boxes_and_vessels():
    exam, organ, large, small = scene()
    found = find_tumour(exam, organ)
    assert found.foci == 2 and score_region(found.mask, large | small, exam.spacing).dice > 0.95
    assert not found.mask[12, 33, :20].any()  # the vessel
    one = find_tumour(exam, organ, seeds=[(12, 28, 30)])
    assert one.foci == 1 and score_region(one.mask, small, exam.spacing).dice > 0.9
    boxed = find_tumour(exam, organ, box=np.broadcast_to(np.arange(40) < 22, exam.shape))
    assert score_region(boxed.mask, large, exam.spacing).dice > 0.95
    alone = find_tumour(exam, organ, Thresholds(satellite=0.6))
    assert alone.foci == 1 and not (alone.mask & small).any()
    nothing = find_tumour(exam, organ, seeds=[(2, 10, 35)])
    assert not nothing.mask.any() and nothing.volume == 0 and "no tumour was found" in nothing.steps[-1]


def test_parenchyma_that_enhances_strongly_is_no_tumour():
    exam, organ, large, small = scene()
    early = np.where(large | small, exam.early, 1.8 * exam.before)
    late = np.where(large | small, exam.late, 2.0 * exam.before)
    bright = Exam(exam.before, early, late, exam.spacing)
    found = find_tumour(bright, organ)
    assert score_region(found.mask, large | small, exam.spacing).dice > 0.95
    quiet = Exam(exam.before, 1.1 * exam.before, 1.2 * exam.before, exam.spacing)
    assert not find_tumour(quiet, organ).mask.any()


def test_adc_leaves_fluid_out_and_holes_in_signal_do_no_harm():
    exam, organ, large, small = scene()
    adc = np.full(exam.shape, 1.0e-3)
    adc[small] = 2.6e-3
    with_adc = replace(exam, adc=adc)
    assert (find_tumour(with_adc, organ).mask & small).any()
    dry = find_tumour(with_adc, organ, Thresholds(largest_adc=2.2e-3))
    assert not (dry.mask & small).any() and any("ADC above" in step for step in dry.steps)
    with pytest.raises(InputError, match="no ADC map"):
        find_tumour(exam, organ, Thresholds(largest_adc=2.2e-3))
    early = exam.early.copy()
    early[12, 14, 14] = np.nan
    holed = find_tumour(replace(exam, early=early), organ)
    assert not holed.mask[12, 14, 14] and score_region(holed.mask, large | small, exam.spacing).dice > 0.95


def test_settings_and_seeds_that_mean_nothing_are_refused():
    exam, organ, *_ = scene()
    with pytest.raises(InputError, match="seed"):
        find_tumour(exam, organ, seeds=[(1, 2, 99)])
    with pytest.raises(InputError, match="edge 1.5"):
        Thresholds(edge=1.5)
    with pytest.raises(InputError, match="mm²/s"):
        Thresholds(largest_adc=1.5)
    with pytest.raises(InputError, match="in common"):
        find_tumour(exam, organ & (np.arange(40) < 20), box=np.broadcast_to(np.arange(40) > 25, exam.shape))
    with pytest.raises(GeometryError, match="organ"):
        find_tumour(exam, organ[:3])
