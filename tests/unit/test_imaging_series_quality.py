"""The check of raw series: each flaw is found where it is, and not where it is not."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage

from biomodel.findings import Finding
from biomodel.imaging.series import Grid, Intake, Kind, Series
from biomodel.imaging.series_quality import LARGEST_GHOST, check_intake, check_series
from biomodel.imaging.series_signal import body, ghost_ratio, noise_level, shift

SHAPE, SPACING = (10, 96, 96), (4.0, 1.5, 1.5)
GRID = Grid(SHAPE, SPACING)
SIGMA = 10.0


def radius(stretch: float = 1.0) -> np.ndarray:
    z, y, x = np.meshgrid(*[np.arange(n) - (n - 1) / 2 for n in SHAPE], indexing="ij")
    return np.sqrt((y / 30) ** 2 + (x / 26) ** 2) / stretch + 0.002 * z**2


def phantom(fat: float = 80.0) -> np.ndarray:
    """Skin, 9 mm of fat and gland with structure, before noise; outside 0."""
    r = radius()
    rng = np.random.default_rng(5)
    texture = ndimage.gaussian_filter(rng.normal(size=SHAPE), (1, 2.5, 2.5))
    gland = 400 * (1 + 0.25 * texture / texture.std())
    image = np.where(r < 0.8, gland, fat)
    image = np.where((r > 0.95) & (r <= 1), 350.0, image)
    return np.where(r <= 1, image, 0.0)


def noisy(image: np.ndarray, seed: int, sigma: float = SIGMA) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.hypot(image + rng.normal(0, sigma, image.shape), rng.normal(0, sigma, image.shape)).astype(np.float32)


def enhancing(n: int = 6) -> list[np.ndarray]:
    """Samples over time: a tumour and the whole gland brighten, nothing moves."""
    base, r = phantom(), radius()
    z, y, x = np.meshgrid(*[np.arange(k) for k in SHAPE], indexing="ij")
    tumour = ((z - 5) * 4) ** 2 + ((y - 55) * 1.5) ** 2 + ((x - 40) * 1.5) ** 2 < 12**2
    rise = np.clip(np.arange(n) - 1, 0, None) / max(n - 2, 1)
    return [base * (1 + 0.3 * (r < 0.8) * part + 1.5 * tumour * part) for part in rise]


def dynamic(images: list[np.ndarray], sigma: float = SIGMA, **fields) -> Series:
    data = np.stack([noisy(image, number, sigma) for number, image in enumerate(images)])
    known = {"flip_angles": 10.0, "tr": 0.005, "te": 0.002, "field_strength": 3.0, "contrast_agent": "gadobutrol",
             "phase_encoding": "y", "fat_saturated": True, "times": 8.0 * np.arange(len(images)),
             "name": "dce"}  # fmt: skip
    return Series(Kind.DCE, data, GRID, **(known | fields))


def weighted(b_values=(0.0, 100.0, 800.0), sigma: float = 4.0, fat: float = 0.0, adc: float = 1.5e-3) -> Series:
    base, r = phantom(fat=0.0), radius()
    rim = (r >= 0.8) & (r <= 0.95)
    images = [base * np.exp(-b * adc) + fat * rim for b in b_values]
    data = np.stack([noisy(image, 50 + number, sigma) for number, image in enumerate(images)])
    return Series(Kind.DWI, data, GRID, b_values=np.array(b_values), phase_encoding="y", name="dwi")


def warnings_of(series: Series) -> list[Finding]:
    return [item for item in check_series(series) if item.severity in ("warning", "error")]


def only(series: Series, words: str, step: str = "plausibility") -> Finding:
    found = warnings_of(series)
    assert len(found) == 1, [item.message for item in found]
    assert words in found[0].message and found[0].step == step and found[0].remedy
    return found[0]


def test_good_series_have_no_warning() -> None:
    assert warnings_of(dynamic(enhancing())) == []
    assert warnings_of(weighted()) == []
    assert warnings_of(dynamic(enhancing(), phase_encoding=None)) == []


def test_noise_is_measured_whatever_the_structure() -> None:
    flat = np.random.default_rng(2).normal(100.0, 7.0, SHAPE)
    assert noise_level(flat, np.ones(SHAPE, bool), (1, 2)) == pytest.approx(7.0, rel=0.03)
    image = phantom()
    inside = body(noisy(image, 1))
    for sigma in (5.0, 10.0, 20.0, 50.0):  # full of edges, which add a little
        assert 0.95 * sigma < noise_level(noisy(image, 1, sigma), inside, (1, 2)) < 1.25 * sigma


def test_the_body_is_found_with_its_dark_fat() -> None:
    truth = radius() <= 1
    found = body(noisy(phantom(), 1))
    assert 2 * (found & truth).sum() / (found.sum() + truth.sum()) > 0.97
    assert not body(np.zeros(SHAPE)).any()


def test_low_signal_over_noise() -> None:
    found = warnings_of(dynamic(enhancing(), sigma=200.0))
    assert any("under 3 magnitudes are biased" in item.message for item in found)
    assert any("to which all others are compared" in item.message for item in found)
    only(weighted(b_values=(0.0, 100.0, 2500.0)), "under 3 magnitudes are biased")


@pytest.mark.parametrize("true", [(0.0, 0.4, -0.3), (0.0, -2.0, 1.3), (0.6, 0.0, 5.0)])
def test_shift_between_samples_is_measured_though_contrast_changes(true: tuple[float, float, float]) -> None:
    images = enhancing()
    moved = ndimage.shift(images[-1], true, order=3)
    found = shift(noisy(images[0], 1), noisy(np.clip(moved, 0, None), 2))
    np.testing.assert_allclose(found, true, atol=0.2)


def test_motion() -> None:
    images = enhancing()
    images[3] = np.clip(ndimage.shift(images[3], (0, 2.0, 0), order=1), 0, None)
    found = only(dynamic(images), "1 of 6 samples lie more than 0.5 voxels")
    assert "sample 4" in found.message and "along y" in found.message


def ghosted(image: np.ndarray, part: float, axis: int) -> np.ndarray:
    return image + part * np.roll(image, image.shape[axis] // 2, axis)


def test_ghosts_along_the_phase_encoded_axis() -> None:
    images = [ghosted(image, 0.15, 1) for image in enhancing()]
    assert "along y" in only(dynamic(images), "ghosts of").message
    assert "along y" in only(dynamic(images, phase_encoding=None), "ghosts of").message
    sideways = [ghosted(image, 0.15, 2) for image in enhancing()]
    assert warnings_of(dynamic(sideways)) == []  # not along the axis on which ghosts can be
    weak = [ghosted(image, 0.02, 1) for image in enhancing()]
    assert warnings_of(dynamic(weak)) == []


def test_ghost_ratio_is_that_of_the_acr() -> None:
    # A uniform body, and a uniform 8 % of it in the air above and below: half of that by definition.
    image, inside = np.zeros((4, 80, 80)), np.zeros((4, 80, 80), bool)
    inside[:, 25:55, 25:55] = True
    image[:, :, 25:55] = 8.0
    image[inside] = 100.0
    image += 1e-6
    assert ghost_ratio(image, inside, 1, 2) == pytest.approx(0.04, rel=1e-4)
    assert LARGEST_GHOST < 0.04
    assert np.isnan(ghost_ratio(np.where(inside, 100.0, 0.0), inside, 1, 2))


def test_masked_air_is_told() -> None:
    series = dynamic(enhancing())
    masked = np.where(radius() <= 1, series.data, 0)
    items = check_series(replace(series, data=masked))
    assert any("ghosts could not be measured" in item.message for item in items)
    assert not [item for item in items if item.severity == "warning"]


def test_fat_suppression_that_failed_on_one_side_or_everywhere() -> None:
    x = np.arange(SHAPE[2]) - (SHAPE[2] - 1) / 2
    r = radius()
    rim = (r >= 0.8) & (r <= 0.95)
    side = [np.where(rim & (x > 10), 1000.0, image) for image in enhancing()]
    only(dynamic(side), "suppression failed there")
    everywhere = [np.where(rim, 1000.0, image) for image in enhancing()]
    only(dynamic(everywhere), "all around, though it was to be suppressed")
    assert warnings_of(dynamic(everywhere, fat_saturated=None)) == []  # nobody said that it was to be dark


def test_a_coil_that_is_stronger_on_one_side_is_no_fat() -> None:
    y = np.arange(SHAPE[1])[None, :, None] / SHAPE[1]
    images = [image * (1.5 - y) for image in enhancing()]  # a factor of 2.6 from end to end of the body
    assert warnings_of(dynamic(images)) == []


def test_fat_in_diffusion_weighted_series() -> None:
    only(weighted(fat=300.0), "loses no signal up to b = 800")
    assert warnings_of(weighted(adc=0.6e-3)) == []  # a very dense tumour is no fat


def test_values_at_the_limit_of_the_storage() -> None:
    series = dynamic(enhancing())
    limit = float(np.quantile(series.data, 0.999))
    cut = np.minimum(series.data, limit)
    only(replace(series, data=cut, ceiling=np.full(6, limit)), "largest value that could be stored")
    only(replace(series, data=cut), "largest value that could be stored")
    assert warnings_of(replace(series, ceiling=np.full(6, series.data.max()))) == []


def test_empty_and_repeated_samples_and_slices() -> None:
    series = dynamic(enhancing())
    data = series.data.copy()
    data[2] = 0
    assert "sample 3 is empty" in only(replace(series, data=data), "empty", "schema").message
    data = series.data.copy()
    data[4, 7] = 0
    assert "sample 5: slice 8" in only(replace(series, data=data), "empty", "schema").message
    data = series.data.copy()
    data[5] = data[1]
    assert "samples 2 and 6 are the same" in only(replace(series, data=data), "same", "schema").message
    data = series.data.copy()
    data[0, 0, 0, :3] = np.nan
    only(replace(series, data=data), "3 voxels are NaN", "schema")


def test_what_a_dynamic_series_should_have() -> None:
    only(dynamic(enhancing(), field_strength=None), "field strength missing", "schema")
    only(dynamic(enhancing(), contrast_agent=None), "contrast agent missing", "schema")
    only(dynamic(enhancing(), notes=("times are odd",)), "times are odd", "schema")


def test_a_gap_in_time_and_odd_voxels() -> None:
    only(dynamic(enhancing(), times=[0.0, 8.0, 16.0, 40.0, 48.0, 56.0]), "24 s between samples 3 and 4", "geometry")
    slow = check_series(dynamic(enhancing(), times=20.0 * np.arange(6)))
    assert [item.severity for item in slow if "first pass" in item.message] == ["info"]
    metres = replace(dynamic(enhancing()), grid=Grid(SHAPE, (0.004, 0.0015, 0.0015)), fat_saturated=None)
    only(metres, "voxel size 0.004", "geometry")


def test_series_of_one_visit_lie_in_one_place() -> None:
    dce, dwi = dynamic(enhancing()), weighted()
    good = check_intake(Intake((dce, dwi)), "visit")
    assert good.ok and not good.of("warning") and "visit" in good.summary()
    away = np.diag([1.5, 1.5, 4.0, 1.0])
    away[0, 3] = 120.0
    far = check_intake(Intake((dce, replace(dwi, grid=Grid.at(SHAPE, away)))), "visit")
    assert [item.message for item in far.of("warning")] == ["dce: shows only 17% of its place in dwi."]
    assert not check_intake(Intake((dce, replace(dwi, grid=Grid.at(SHAPE, away), day=21.0))), "visit").of("warning")


def test_images_that_cannot_be_judged_are_told() -> None:
    small = Series(Kind.ANATOMY, np.ones((1, 2, 8, 8), np.float32), Grid((2, 8, 8), (1, 1, 1)))
    items = check_series(small)
    assert [item.severity for item in items] == ["info"] and "not checked" in items[0].message
