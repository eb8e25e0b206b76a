"""Motion within a series of changing contrast, and series of one visit brought onto each other."""

import numpy as np
import pytest
from scipy import ndimage
from scipy.spatial.transform import Rotation

from biomodel.errors import GeometryError, InputError
from biomodel.imaging.motion import Corrected, align, correct_motion
from biomodel.imaging.registration import BSpline, JointHistogram
from biomodel.imaging.series import Grid, Kind, Series
from biomodel.imaging.transforms import voxel_centres

GRID = Grid((16, 32, 32), (3.0, 2.5, 2.5))
POINTS = voxel_centres(GRID)
MIDDLE = POINTS.reshape(-1, 3).mean(0)
SAMPLES = 9
RISE = np.clip((np.arange(SAMPLES) - 2) / 3, 0, 1)
BODY = np.linalg.norm((POINTS - MIDDLE) / [36, 32, 23], axis=-1) < 1
_TEXTURE = ndimage.gaussian_filter(np.random.default_rng(7).normal(size=(50, 64, 64)), 2.0)
_TEXTURE /= _TEXTURE.std()


def scene(points: np.ndarray, rise: float) -> np.ndarray:
    """A body whose gland brightens by half and whose tumour more than doubles."""
    offset = points - MIDDLE
    inside = 1 / (1 + np.exp((np.linalg.norm(offset / [36, 32, 23], axis=-1) - 1) * 20))
    index = np.moveaxis((offset + [62, 62, 48])[..., ::-1] / 2.0, -1, 0)
    rough = ndimage.map_coordinates(_TEXTURE, index, order=1, mode="wrap")
    gland = rough > 0.3
    tumour = np.linalg.norm(offset - [9, -6, 2], axis=-1) < 9
    return inside * (100 + 35 * rough + 60 * gland * (1 + 0.5 * rise) + 160 * tumour * rise)


def noisy(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.hypot(image + rng.normal(0, 5, image.shape), rng.normal(0, 5, image.shape))


def truth() -> tuple[np.ndarray, np.ndarray]:
    """A drift and one jump: shifts of the middle, mm, and rotations, degrees; the first sample lies at rest."""
    rng = np.random.default_rng(0)
    shifts = np.cumsum(0.5 * rng.normal(size=(SAMPLES, 3)), axis=0)
    shifts[5:] += [1.5, -2.5, 1.0]
    angles = 0.7 * rng.normal(size=(SAMPLES, 3))
    return shifts - shifts[0], angles - angles[0]


def dynamic(shifts: np.ndarray, angles: np.ndarray, rise: np.ndarray = RISE) -> Series:
    rng = np.random.default_rng(1)
    data = []
    for way, turn, part in zip(shifts, angles, rise, strict=True):
        rotation = Rotation.from_rotvec(turn, degrees=True).as_matrix()
        # What lay at p lies at R (p - middle) + middle + way.
        data.append(noisy(scene((POINTS - MIDDLE - way) @ rotation + MIDDLE, part), rng))
    return Series(Kind.DCE, np.array(data), GRID, times=8.0 * np.arange(len(data)), flip_angles=10.0, tr=0.005)


@pytest.fixture(scope="module")
def corrected() -> Corrected:
    return correct_motion(dynamic(*truth()), BODY)


def test_motion_is_found_through_the_uptake(corrected: Corrected) -> None:
    shifts, angles = truth()
    assert np.linalg.norm(shifts, axis=1).max() > 3
    assert np.linalg.norm(corrected.shifts - shifts, axis=1).max() < 0.3
    assert np.abs(corrected.angles - angles).max() < 0.6
    assert not corrected.shifts[0].any() and not corrected.angles[0].any()


def test_the_correction_is_measured_and_the_uptake_stays(corrected: Corrected) -> None:
    rms = [np.sqrt(np.mean(values**2)) for values in (corrected.before, corrected.after)]
    assert rms[1] < 0.25 * rms[0]
    assert "mm before" in str(corrected) and "motion corrected" in corrected.series.notes[-1]
    # Each sample against the same sample had nothing moved.
    still = dynamic(np.zeros((SAMPLES, 3)), np.zeros((SAMPLES, 3))).data
    inner = ndimage.binary_erosion(BODY, iterations=2)
    moved = dynamic(*truth()).data
    before, after = (np.sqrt(np.mean((data[1:] - still[1:])[:, inner] ** 2)) for data in (moved, corrected.series.data))
    assert after < 0.5 * before
    tumour = np.linalg.norm(POINTS - MIDDLE - [9, -6, 2], axis=-1) < 6
    curve, expected = (data[:, tumour].mean(1) for data in (corrected.series.data, still))
    np.testing.assert_allclose(curve, expected, rtol=0.02)
    np.testing.assert_array_equal(corrected.series.data[0], moved[0])


def test_uptake_alone_is_no_motion() -> None:
    series = dynamic(np.zeros((SAMPLES, 3)), np.zeros((SAMPLES, 3)))
    found = correct_motion(series, BODY)
    assert np.linalg.norm(found.shifts, axis=1).max() < 0.15
    # Samples that did not move are not drawn anew, which would smooth their noise.
    assert (found.series.data == series.data).all(axis=(1, 2, 3)).mean() > 0.5


def test_a_patient_who_drifts_out_of_view() -> None:
    """Of the last samples a sixth is not in the image; the rim must not draw the others to itself."""
    shifts = np.linspace(0, 1, SAMPLES)[:, None] * [11.0, -7.0, 6.0]
    found = correct_motion(dynamic(shifts, np.zeros((SAMPLES, 3))))
    assert np.linalg.norm(found.shifts - shifts, axis=1).max() < 0.35
    assert np.linalg.norm(found.angles, axis=1).max() < 0.6


def test_series_that_cannot_be_corrected() -> None:
    shifts, angles = truth()
    series = dynamic(shifts, angles)
    with pytest.raises(InputError, match="four or more"):
        correct_motion(dynamic(shifts[:3], angles[:3], RISE[:3]))
    with pytest.raises(GeometryError, match="sample 1: mask of shape"):
        correct_motion(series, BODY[1:])
    with pytest.raises(InputError, match="mask is empty"):
        correct_motion(series, BODY & False)
    data = np.array(series.data)
    data[4] = np.nan
    with pytest.raises(InputError, match="sample 5: 100 % of the voxels are NaN"):
        correct_motion(Series(Kind.DCE, data, GRID, times=series.times, flip_angles=10.0, tr=0.005))
    data[4] = 7.0
    with pytest.raises(InputError, match="sample 5: constant"):
        correct_motion(Series(Kind.DCE, data, GRID, times=series.times, flip_angles=10.0, tr=0.005))
    with pytest.raises(InputError, match="passes"):
        correct_motion(series, passes=0)
    thin = Series(Kind.DCE, series.data[:, :3], Grid((3, 32, 32), GRID.spacing), times=series.times,
                  flip_angles=10.0, tr=0.005)  # fmt: skip
    with pytest.raises(GeometryError, match="at least 4 voxels"):
        correct_motion(thin)


def weighted(grid: Grid, points: np.ndarray) -> Series:
    """Diffusion images of other voxels and contrast: gland bright, tumour brightest at high b."""
    rng = np.random.default_rng(5)
    base = 300 - 0.9 * scene(points, 0.0)
    inside = np.linalg.norm((points - MIDDLE) / [36, 32, 23], axis=-1) < 1
    data = [noisy(np.where(inside, base * np.exp(-b * 1.4e-3), 0), rng) for b in (0.0, 400.0, 800.0)]
    return Series(Kind.DWI, np.array(data), grid, b_values=np.array([0.0, 400.0, 800.0]), phase_encoding="y",
                  name="dwi")  # fmt: skip


def test_diffusion_series_onto_the_dynamic_one() -> None:
    still = dynamic(np.zeros((4, 3)), np.zeros((4, 3)), RISE[:4])
    grid = Grid((14, 28, 28), (3.5, 3.0, 3.0))
    away = np.array([3.0, -4.0, 2.0])
    points = voxel_centres(grid) - away
    found, registration = align(weighted(grid, points), still, mask=ndimage.binary_dilation(BODY))
    assert found.grid is still.grid and found.samples == 3 and found.phase_encoding is None
    np.testing.assert_array_equal(found.b_values, [0, 400, 800])
    moved = registration.displacement()[BODY]
    assert np.linalg.norm(moved - away, axis=-1).max() < 0.8
    assert registration.visit is None and "aligned with" in found.notes[-1]


def test_distorted_diffusion_series() -> None:
    """Echo-planar images are shifted along their phase encoding, by amounts that vary smoothly."""
    still = dynamic(np.zeros((4, 3)), np.zeros((4, 3)), RISE[:4])
    grid = Grid((14, 28, 28), (3.5, 3.0, 3.0))
    points = voxel_centres(grid)
    way = 5 * np.exp(-(((points[..., 0] - MIDDLE[0]) / 25) ** 2)) * np.cos((points[..., 2] - MIDDLE[2]) / 20)
    points[..., 1] -= way
    series = weighted(grid, points)
    true = 5 * np.exp(-(((POINTS[..., 0] - MIDDLE[0]) / 25) ** 2)) * np.cos((POINTS[..., 2] - MIDDLE[2]) / 20)
    look = ndimage.binary_dilation(BODY)
    _, plain = align(series, still, mask=look)
    _, bent = align(series, still, BSpline(knots=40, likeness=JointHistogram(), along=series.phase_encoding), mask=look)

    def off(registration) -> float:
        rest = registration.displacement().astype(float)
        rest[..., 1] -= true
        return float(np.median(np.linalg.norm(rest, axis=-1)[BODY]))

    assert off(bent) < 0.5 * off(plain) and off(bent) < 0.6
