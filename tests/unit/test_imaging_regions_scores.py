"""Scores of regions: MONAI's metrics on the same masks, known shapes, empty regions and intervals."""

import numpy as np
import pytest
import torch

from biomodel.errors import GeometryError, InputError
from biomodel.imaging.regions import bootstrap, score_region, surface_distances

SPACING = (2.5, 1.5, 0.8)


def blob(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    z, y, x = np.ogrid[:14, :24, :26]
    middle, radius = np.array([7, 12, 13]) + rng.uniform(-1.5, 1.5, 3), rng.uniform(3, 6)
    ball = ((z - middle[0]) * 1.5) ** 2 + (y - middle[1]) ** 2 + (x - middle[2]) ** 2 < radius**2
    return ball | (rng.random((14, 24, 26)) > 0.998)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_scores_agree_with_monai():
    metrics = pytest.importorskip("monai.metrics")
    for seed in range(6):
        a, b = blob(seed), blob(seed + 100)
        one, two = (torch.from_numpy(region)[None, None].float() for region in (a, b))
        ours = score_region(a, b, SPACING)
        given = {"include_background": True, "spacing": SPACING}
        assert ours.dice == pytest.approx(float(metrics.compute_dice(one, two, include_background=True)))
        assert ours.hd95 == pytest.approx(float(metrics.compute_hausdorff_distance(one, two, percentile=95, **given)))
        assert ours.surface == pytest.approx(
            float(metrics.compute_average_surface_distance(one, two, symmetric=True, **given))
        )
        there, _ = surface_distances(a, b, SPACING)
        directed = metrics.compute_average_surface_distance(one, two, symmetric=False, **given)
        assert there.mean() == pytest.approx(float(directed))


def test_a_shift_is_found_in_mm_along_each_axis():
    box = np.zeros((12, 12, 12), bool)
    box[3:8, 3:8, 3:8] = True
    for axis, step in enumerate(SPACING):
        score = score_region(np.roll(box, 2, axis), box, SPACING)
        assert score.hd95 == pytest.approx(2 * step)
        assert score.dice == pytest.approx(3 / 5)
        assert score.volume_error == 0
    larger = np.zeros_like(box)
    larger[2:9, 3:8, 3:8] = True
    assert score_region(larger, box, SPACING).volume_error == pytest.approx(0.4)
    assert score_region(larger, box, SPACING).found == pytest.approx(175 * np.prod(SPACING) / 1000)


def test_a_region_at_the_edge_of_the_image_has_a_surface_there():
    whole = np.ones((4, 5, 6), bool)
    there, back = surface_distances(whole, whole, SPACING)
    assert len(there) == len(back) == 4 * 5 * 6 - 2 * 3 * 4
    assert (there == 0).all()


def test_empty_regions():
    none, some = np.zeros((5, 5, 5), bool), np.zeros((5, 5, 5), bool)
    some[2, 2, 2] = True
    both = score_region(none, none, SPACING)
    assert (both.dice, both.hd95, both.surface, both.volume_error) == (1, 0, 0, 0)
    missed, made_up = score_region(none, some, SPACING), score_region(some, none, SPACING)
    assert (missed.dice, missed.volume_error, made_up.dice, made_up.volume_error) == (0, -1, 0, np.inf)
    assert missed.hd95 == made_up.hd95 == missed.surface == np.inf
    there, back = surface_distances(some, none, SPACING)
    assert (there == np.inf).all() and len(there) == 1 and len(back) == 0


def test_what_is_no_pair_of_masks_is_refused():
    mask = np.ones((3, 3, 3), bool)
    with pytest.raises(GeometryError, match="one grid"):
        score_region(mask, mask[:2], SPACING)
    with pytest.raises(GeometryError, match="3 positive voxel sides"):
        score_region(mask, mask, (1.0, 1.0))
    with pytest.raises(InputError, match="Threshold probabilities"):
        score_region(mask * 0.4, mask, SPACING)


def test_bootstrap_draws_patients_and_covers():
    rng = np.random.default_rng(5)
    hits = 0
    for trial in range(100):
        sample = rng.normal(0, 1, 30)
        # Three visits of a patient that are alike hold no more than one.
        found = bootstrap(np.repeat(sample, 3), np.repeat(np.arange(30), 3), statistic=np.mean, draws=400, seed=trial)
        alone = bootstrap(sample, range(30), statistic=np.mean, draws=400, seed=trial)
        assert (found.low, found.high) == pytest.approx((alone.low, alone.high))
        hits += found.low <= 0 <= found.high
    assert 86 <= hits <= 99
    again = bootstrap(sample, range(30), seed=3), bootstrap(sample, range(30), seed=3)
    assert again[0] == again[1]
    assert bootstrap([1.0, 2.0, np.inf], "abc").high == np.inf


def test_bootstrap_refuses_what_has_no_score():
    with pytest.raises(InputError, match="NaN"):
        bootstrap([0.5, np.nan], ["a", "b"])
    with pytest.raises(InputError, match="a patient for each"):
        bootstrap([0.5, 0.6], ["a"])
    with pytest.raises(InputError, match="a patient for each"):
        bootstrap([], [])
