"""Preparation of series: grids, shading, intensity scales, times from the bolus."""

import sys

import numpy as np
import pytest
from scipy import ndimage
from scipy.spatial.transform import Rotation

from biomodel.errors import GeometryError, InputError
from biomodel.imaging.preprocess import (
    bias_field,
    correct_bias,
    from_bolus,
    isotropic,
    resample,
    resample_series,
)
from biomodel.imaging.preprocess_intensity import Nyul, ZScore
from biomodel.imaging.series import Grid, Kind, Series
from biomodel.imaging.transforms import voxel_centres

GRID = Grid((12, 40, 36), (4.0, 1.5, 1.5))


def oblique(shape: tuple[int, int, int], spacing: tuple[float, float, float], *, mirrored: bool = False) -> Grid:
    """A rotated grid around the middle of GRID; mirrored: of the other handedness."""
    turn = Rotation.from_euler("xyz", (10, -20, 35), degrees=True).as_matrix()
    if mirrored:
        turn = turn @ np.diag([1, 1, -1])
    affine = np.eye(4)
    affine[:3, :3] = turn * spacing[::-1]
    middle = voxel_centres(GRID).reshape(-1, 3).mean(0)
    affine[:3, 3] = middle - affine[:3, :3] @ ((np.array(shape[::-1]) - 1) / 2)
    return Grid(shape, spacing, affine)


def ramp(grid: Grid) -> np.ndarray:
    return voxel_centres(grid) @ [1.0, 2.0, -0.5] + 7


@pytest.mark.parametrize("mirrored", [False, True])
def test_a_ramp_stays_a_ramp_on_any_grid(mirrored: bool) -> None:
    """A linear function of the place survives linear interpolation, whatever the handedness and the angles."""
    target = oblique((9, 11, 10), (1.5, 1.5, 1.5), mirrored=mirrored)
    np.testing.assert_allclose(resample(ramp(GRID), GRID, target), ramp(target), atol=2e-4)
    # And from there back: a grid of the other handedness as source.
    inner = Grid((2, 3, 3), (1.0, 1.0, 1.0), np.array([[1, 0, 0, 25.0], [0, 1, 0, 28], [0, 0, 1, 21], [0, 0, 0, 1]]))
    np.testing.assert_allclose(resample(ramp(target), target, inner), ramp(inner), atol=2e-4)


def test_beyond_the_source_is_unknown() -> None:
    wide = Grid((3, 3, 3), (30.0, 30.0, 30.0), np.diag([30.0, 30, 30, 1]))
    found = resample(np.ones(GRID.shape), GRID, wide)
    assert found[0, 0, 0] == 1 and np.isnan(found[2, 2, 2])
    mask = resample(np.ones(GRID.shape, bool), GRID, wide)
    assert mask.dtype == bool and mask[0, 0, 0] and not mask[2, 2, 2]
    labels = resample(np.full(GRID.shape, 3, np.int16), GRID, wide, nearest=True)
    assert labels.dtype == np.int16 and labels[0, 0, 0] == 3 and labels[2, 2, 2] == 0


def test_unknown_voxels_do_not_spread() -> None:
    values = ramp(GRID)
    values[5, 20, 18] = np.nan
    found = resample(values, GRID, isotropic(GRID, 1.5))
    known = ramp(isotropic(GRID, 1.5))
    lost = np.isnan(found)
    # The hole is one voxel of 4 x 1.5 x 1.5 mm: three of 1.5 mm, at most one more.
    assert 1 <= lost.sum() <= 4
    far = ndimage.distance_transform_edt(~lost) > 3
    edge = np.ones(found.shape, bool)
    edge[2:-2, 1:-1, 1:-1] = False
    np.testing.assert_allclose(found[far & ~edge], known[far & ~edge], atol=2e-4)


def test_isotropic_keeps_the_box_and_the_volume_of_masks() -> None:
    grid = isotropic(GRID)
    assert grid.spacing == (1.5, 1.5, 1.5) and grid.shape == (32, 40, 36)
    assert isotropic(GRID, 3.0).shape == (16, 20, 18)
    assert isotropic(Grid((10, 10, 10), (0.3, 0.3, 0.3)), 0.1).shape == (30, 30, 30)
    points = voxel_centres(GRID) - voxel_centres(GRID).reshape(-1, 3).mean(0)
    ball = np.linalg.norm(points, axis=-1) < 18
    for side in (1.0, 1.5, 2.5):
        finer = isotropic(GRID, side)
        found = resample(ball, GRID, finer).sum() * finer.voxel_volume
        assert found == pytest.approx(ball.sum() * GRID.voxel_volume, rel=0.03)


def test_larger_voxels_average() -> None:
    """Noise falls as by averaging; picking single voxels would keep it."""
    fine = Grid((40, 40, 40), (1.0, 1.0, 1.0))
    noise = np.random.default_rng(0).normal(size=fine.shape)
    found = resample(noise, fine, isotropic(fine, 4.0))[2:-2, 2:-2, 2:-2]
    assert found.std() < 0.25
    assert found.mean() == pytest.approx(0, abs=0.05)


def test_series_resample_sample_by_sample() -> None:
    series = dynamic(np.stack([ramp(GRID), 2 * ramp(GRID), 3 * ramp(GRID)]), phase_encoding="y")
    same = resample_series(series, isotropic(GRID, 2.0))
    assert same.phase_encoding == "y" and same.samples == 3 and "resampled" in same.notes[-1]
    np.testing.assert_allclose(same.data[2], 3 * same.data[0], rtol=1e-5, equal_nan=True)
    assert resample_series(series, oblique((8, 8, 8), (2.0, 2.0, 2.0))).phase_encoding is None


def test_grids_that_cannot_be() -> None:
    elsewhere = GRID.affine.copy()
    elsewhere[2, 3] = 500
    with pytest.raises(GeometryError, match="share nothing"):
        resample(ramp(GRID), GRID, Grid(GRID.shape, GRID.spacing, elsewhere))
    with pytest.raises(GeometryError, match="shape"):
        resample(ramp(GRID)[1:], GRID, isotropic(GRID))
    for spacing in (0.0, -1.0, np.nan, 0.001):
        with pytest.raises(GeometryError, match="spacing"):
            isotropic(GRID, spacing)


def test_missing_simpleitk_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    with pytest.raises(InputError, match=r"pip install 'tumorcast\[imaging\]'"):
        resample(ramp(GRID), GRID, isotropic(GRID))


def dynamic(data: np.ndarray, grid: Grid = GRID, **fields) -> Series:
    given = {"times": 10.0 * np.arange(len(data)), "flip_angles": 10.0, "tr": 0.005, "name": "dce"} | fields
    return Series(Kind.DCE, data, grid, **given)


def shaded() -> tuple[np.ndarray, np.ndarray, np.ndarray, Grid]:
    grid = Grid((12, 24, 24), (5.0, 5.0, 5.0))
    points = (voxel_centres(grid) - voxel_centres(grid).reshape(-1, 3).mean(0)) / 60
    body = (points**2).sum(-1) < 0.9
    rng = np.random.default_rng(1)
    gland = ndimage.gaussian_filter(rng.normal(size=grid.shape), 1.0) > 0
    field = np.exp(0.35 * points[..., 0] - 0.3 * points[..., 1] ** 2)
    image = np.where(body, np.where(gland, 200.0, 100.0), 0) * field + np.abs(rng.normal(0, 3, grid.shape))
    return image, body, field, grid


def test_shading_is_found() -> None:
    image, body, field, grid = shaded()
    found = bias_field(image, grid, body)
    ratio = field / found.values
    before, after = (np.std(values[body]) / np.mean(values[body]) for values in (field, ratio))
    assert after < 0.25 * before
    assert np.log(found.values[body]).mean() == pytest.approx(0, abs=1e-4)
    # Without a mask, and with unknown voxels.
    image[6, 12, 12:14] = np.nan
    again = bias_field(image, grid)
    assert np.isfinite(again.values).all()
    ratio = field / again.values
    assert np.std(ratio[body]) / np.mean(ratio[body]) < 0.35 * before


def test_one_shading_for_all_samples() -> None:
    image, body, _, grid = shaded()
    series = dynamic(np.stack([image, image, 1.7 * image, 1.5 * image]), grid)
    found, field = correct_bias(series, body)
    np.testing.assert_allclose(found.data[2][body] / found.data[0][body], 1.7, rtol=1e-4)
    np.testing.assert_allclose(found.data[0] * field.values, series.data[0], rtol=1e-5)
    assert "bias" in found.notes[-1]


def test_shading_of_nothing_is_refused() -> None:
    image, body, _, grid = shaded()
    for values, mask in ((np.full(grid.shape, 5.0), body), (np.zeros(grid.shape), None), (image, body & False)):
        with pytest.raises(InputError, match="expected tissue"):
            bias_field(values, grid, mask)
    with pytest.raises(GeometryError, match="mask of shape"):
        bias_field(image, grid, body[1:])


def test_z_score() -> None:
    image, body, _, _ = shaded()
    image[body.nonzero()[0][0], body.nonzero()[1][0], body.nonzero()[2][0]] = np.nan
    found = ZScore().apply(image, body)
    inside = found[body & np.isfinite(found)]
    assert inside.mean() == pytest.approx(0, abs=1e-9) and inside.std() == pytest.approx(1)
    # Gain and offset of the scanner are gone.
    np.testing.assert_allclose(ZScore().apply(3 * image + 40, body), found, atol=1e-9)
    with pytest.raises(InputError, match="constant"):
        ZScore().apply(np.full(body.shape, 4.0), body)
    with pytest.raises(GeometryError, match="mask of"):
        ZScore().apply(image, body[1:])
    with pytest.raises(InputError, match="0 voxels"):
        ZScore().apply(image, body & False)


def test_nyul_undoes_gain_and_contrast() -> None:
    rng = np.random.default_rng(0)
    tissue = np.concatenate([rng.normal(100, 12, 4000), rng.normal(220, 25, 2500), rng.normal(330, 15, 500)])
    mask = np.ones((7, 20, 50), bool)
    images = [
        gain * (rng.permutation(tissue).reshape(mask.shape) / 300) ** power + offset
        for gain, power, offset in ((1000, 1.0, 0.0), (300, 0.8, 40.0), (50, 1.2, 5.0), (700, 0.9, 0.0))
    ]
    scale = Nyul().fit(images[:3], [mask] * 3)
    assert scale.landmarks[0] == 0 and scale.landmarks[-1] == pytest.approx(100)
    found = scale.apply(images[3], mask)
    # An image that took no part in learning has its landmarks where the scale has them, and keeps its order.
    np.testing.assert_allclose(np.percentile(found, scale.percentiles), scale.landmarks, atol=0.3)
    order = np.argsort(images[3].ravel())
    assert (np.diff(found.ravel()[order]) >= -1e-9).all()
    assert found.max() > 100 and found.min() < 0


def test_nyul_refuses_what_has_no_contrast() -> None:
    mask = np.ones((5, 10, 10), bool)
    good = np.random.default_rng(0).normal(size=mask.shape)
    flat = np.ones(mask.shape)
    half = np.where(np.arange(500).reshape(mask.shape) < 300, 1.0, good)
    for images in ([flat], [good, flat], [half]):
        with pytest.raises(InputError, match=f"training image {len(images)}.*contrast"):
            Nyul().fit(images, [mask] * len(images))
    with pytest.raises(InputError, match="contrast"):
        Nyul().fit([good], [mask]).apply(flat, mask)
    with pytest.raises(InputError, match="0 images"):
        Nyul().fit([], [])
    with pytest.raises(InputError, match="rising"):
        Nyul(percentiles=(50.0, 10.0))
    found = Nyul().fit([good], [mask]).apply(np.where(good > 2, np.nan, good), mask)
    assert np.isnan(found[good > 2]).all() and np.isfinite(found[good <= 2]).all()


def bolus(arrival: float = 47.0) -> tuple[Series, np.ndarray]:
    times = 6.0 * np.arange(25)
    rise = np.where(times > arrival, 1 - np.exp(-(times - arrival) / 20), 0)
    grid = Grid((6, 20, 20), (3.0, 2.0, 2.0))
    artery = np.zeros(grid.shape, bool)
    artery[2:4, 5:8, 5:8] = True
    rng = np.random.default_rng(0)
    data = 100 + 2 * rng.normal(size=(25, *grid.shape)) + 150 * rise[:, None, None, None] * artery
    return dynamic(data, grid, times=times), artery


def test_times_from_the_bolus() -> None:
    series, artery = bolus()
    for region in (artery, None):
        found, arrival = from_bolus(series, region)
        assert arrival == pytest.approx(47, abs=3)
        np.testing.assert_allclose(found.times, series.times - arrival)
        assert found.data is not series.data or (found.data == series.data).all()


def test_no_bolus_no_times() -> None:
    series, artery = bolus()
    with pytest.raises(InputError, match="no arrival"):
        from_bolus(series, np.roll(artery, 10, axis=2))
    with pytest.raises(InputError, match="no arrival"):
        from_bolus(dynamic(series.data[10:], series.grid), artery)
    with pytest.raises(InputError, match="no voxel"):
        from_bolus(series, artery & False)
    with pytest.raises(GeometryError, match="mask of shape"):
        from_bolus(series, artery[1:])
    with pytest.raises(InputError, match="expected a dynamic series"):
        from_bolus(Series(Kind.ANATOMY, series.data, series.grid), artery)
