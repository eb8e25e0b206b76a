"""Registration across visits: known motion is found, the tumour keeps its volume, bad input is refused."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage
from scipy.spatial.transform import Rotation

from biomodel.errors import GeometryError, InputError, OutputError
from biomodel.imaging.registration import (
    Affine,
    BSpline,
    Image,
    JointHistogram,
    Registration,
    Rigid,
    VolumeChange,
    register,
)
from biomodel.imaging.registration_bending import Spline
from biomodel.imaging.registration_tumour import rigid_inside
from biomodel.imaging.series import Grid
from biomodel.imaging.transforms import Transform, voxel_centres

GRID = Grid((22, 34, 34), (3.0, 2.2, 2.2))
MIDDLE = voxel_centres(GRID).reshape(-1, 3).mean(0)
TUMOUR = MIDDLE + [8.0, -6.0, 3.0]
_RNG = np.random.default_rng(3)
_TEXTURE = ndimage.gaussian_filter(_RNG.normal(size=(56, 56, 56)), 1.6)
_TEXTURE /= _TEXTURE.std()


def scene(points: np.ndarray, radius: float) -> np.ndarray:
    """A textured body with a bright tumour, at points in mm (..., 3)."""
    offset = points - MIDDLE
    inside = 1 / (1 + np.exp((np.linalg.norm(offset / [30, 30, 27], axis=-1) - 1) * 20))
    index = np.moveaxis((offset + 55)[..., ::-1] / 2.0, -1, 0)
    rough = ndimage.map_coordinates(_TEXTURE, index, order=1, mode="wrap")
    tumour = np.linalg.norm(points - TUMOUR, axis=-1) < radius
    return inside * np.where(tumour, 280.0, 100 * np.exp(0.35 * rough))


def motion() -> np.ndarray:
    """From the later visit's points to the first one's: rigid, mm RAS+."""
    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.from_euler("xyz", (2, -3, 3), degrees=True).as_matrix()
    matrix[:3, 3] = MIDDLE - matrix[:3, :3] @ MIDDLE + [4.0, -3.0, 2.0]
    return matrix


def carry(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    return points @ matrix[:3, :3].T + matrix[:3, 3]


def bend(points: np.ndarray) -> np.ndarray:
    """A smooth bending of up to 4 mm."""
    return (
        4 * np.stack([np.sin(points[..., 1] / 14), np.sin(points[..., 2] / 15), np.cos(points[..., 0] / 16)], -1) / 1.5
    )


def noisy(image: np.ndarray, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.hypot(image + rng.normal(0, 4, image.shape), rng.normal(0, 4, image.shape))


def later(grid: Grid, radius: float, *, bent: bool) -> tuple[np.ndarray, np.ndarray]:
    """The later visit's image, of other contrast, and its tumour."""
    points = carry(motion(), voxel_centres(grid))
    if bent:
        points = points + bend(points)
    image = noisy(scene(points, radius), 1)
    return 3 * image**0.85 + 20, np.linalg.norm(points - TUMOUR, axis=-1) < radius


def true_displacement(*, bent: bool) -> np.ndarray:
    points = voxel_centres(GRID)
    before = points.copy()
    if bent:
        for _ in range(60):
            before = points - bend(before)
    return carry(np.linalg.inv(motion()), before) - points


POINTS = voxel_centres(GRID)
BODY = np.linalg.norm((POINTS - MIDDLE) / [30, 30, 27], axis=-1) < 1
LOOK = ndimage.binary_dilation(BODY, iterations=2)
FIRST = Image(noisy(scene(POINTS, 11.0), 0), GRID, LOOK, "visit 1")
DRAWN = np.linalg.norm(POINTS - TUMOUR, axis=-1) < 11.0


def error(found: Registration, *, bent: bool) -> np.ndarray:
    return np.linalg.norm(found.displacement() - true_displacement(bent=bent), axis=-1)


@pytest.fixture(scope="module")
def bent() -> Registration:
    """The usual case: moved, bent, and the tumour shrunken."""
    image, tumour = later(GRID, 8.0, bent=True)
    return register(
        FIRST, Image(image, GRID, None, "visit 2"), BSpline(), tumour=DRAWN, moving_tumour=tumour, visit=2, seeds=(0, 1)
    )


def other_grid(*, mirrored: bool) -> Grid:
    """Oblique, with other voxels; mirrored: of the other handedness."""
    turn = Rotation.from_euler("zyx", (25, 15, -10), degrees=True).as_matrix()
    if mirrored:
        turn = turn @ np.diag([-1, 1, 1])
    spacing, shape = (2.5, 2.5, 2.5), (34, 36, 36)
    affine = np.eye(4)
    affine[:3, :3] = turn * 2.5
    affine[:3, 3] = MIDDLE - affine[:3, :3] @ ((np.array(shape[::-1]) - 1) / 2)
    return Grid(shape, spacing, affine)


@pytest.mark.parametrize("mirrored", [False, True])
def test_rigid_motion_between_oblique_grids_of_either_handedness(mirrored: bool) -> None:
    grid = other_grid(mirrored=mirrored)
    image, tumour = later(grid, 8.0, bent=False)
    found = register(FIRST, Image(image, grid), Rigid(), tumour=DRAWN, moving_tumour=tumour)
    assert np.median(np.linalg.norm(true_displacement(bent=False), axis=-1)[BODY]) > 5
    assert error(found, bent=False)[BODY].max() < 1.0
    assert found.tumour is not None and abs(found.tumour.percent) < 1
    np.testing.assert_allclose(found.jacobian(), 1, atol=1e-9)
    drawn = found.apply(tumour)
    assert drawn.shape == GRID.shape and drawn.dtype == bool
    assert drawn.sum() * GRID.voxel_volume == pytest.approx(tumour.sum() * grid.voxel_volume, rel=0.01)
    assert np.linalg.norm(POINTS[drawn].mean(0) - TUMOUR) < 0.7


def test_bending_is_found_and_the_tumour_keeps_its_volume(bent: Registration) -> None:
    before = np.linalg.norm(true_displacement(bent=True), axis=-1)
    off = error(bent, bent=True)
    assert np.median(before[BODY]) > 5
    assert np.median(off[BODY]) < 0.8 and np.median(off[DRAWN]) < 1.5
    assert bent.tumour is not None and bent.unguarded is not None
    assert abs(bent.tumour.percent) < 1 < abs(bent.unguarded.percent)
    assert bent.alike[1] > bent.alike[0] + 0.2
    # Where the reference's tumour lies nothing is stretched.
    np.testing.assert_allclose(bent.jacobian()[ndimage.binary_erosion(DRAWN)], 1, atol=0.01)
    assert bent.jacobian().min() > 0


def test_the_reference_and_the_arguments_stay_as_they_are(bent: Registration) -> None:
    assert bent.visit == 2 and bent.grid is GRID
    with pytest.raises(ValueError, match="read-only"):
        bent.displacement()[0, 0, 0, 0] = 1.0
    # The reference registered to itself lies where it was.
    same = register(FIRST, FIRST, BSpline(), tumour=DRAWN, moving_tumour=DRAWN)
    assert np.linalg.norm(same.displacement()[BODY], axis=-1).max() < 0.3


def test_spread_of_repetitions(bent: Registration) -> None:
    assert bent.spread is not None and bent.spread.shape == GRID.shape
    inside = bent.spread[BODY]
    assert 0.02 < np.median(inside) < 1.5
    # Far outside of the body nothing tells where points lie.
    assert np.median(bent.spread[~LOOK]) > np.median(inside)


def test_same_seeds_same_result() -> None:
    image, _ = later(GRID, 8.0, bent=False)
    one, two = (register(FIRST, Image(image, GRID), Rigid(), seeds=(4, 5)) for _ in range(2))
    # Up to the last digit of sums that SimpleITK makes in its own order.
    np.testing.assert_allclose(one.displacement(), two.displacement(), atol=1e-6)
    np.testing.assert_allclose(one.spread, two.spread, atol=1e-6)
    assert one.spread is not None and one.spread.max() > 0


def test_written_and_read_again(bent: Registration, tmp_path: Path) -> None:
    bent.write(tmp_path / "registration")
    again = Registration.read(tmp_path / "registration")
    np.testing.assert_allclose(again.displacement(), bent.displacement(), atol=1e-5)
    np.testing.assert_allclose(again.spread, bent.spread, atol=1e-6)
    assert again.grid.same_as(bent.grid) and again.moving_grid.same_as(bent.moving_grid)
    assert (again.visit, again.tumour, again.unguarded, again.alike) == (2, bent.tumour, bent.unguarded, bent.alike)
    assert again.settings == bent.settings
    image, _ = later(GRID, 8.0, bent=True)
    np.testing.assert_allclose(again.apply(image), bent.apply(image), atol=1e-2)
    with pytest.raises(OutputError, match="exists already"):
        bent.write(tmp_path / "registration")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "precious.txt").write_text("x")
    with pytest.raises(OutputError, match="not replaced"):
        bent.write(tmp_path / "other", overwrite=True)


def test_spread_and_transform_survive_axes_of_any_direction(tmp_path: Path) -> None:
    grid = other_grid(mirrored=True)
    rng = np.random.default_rng(0)
    field = rng.normal(size=(*grid.shape, 3)).astype(np.float32)
    spread = rng.uniform(size=grid.shape)
    made = Registration(Transform(grid, motion(), field), GRID, (0.1, 0.2), 3, spread=spread)
    made.write(tmp_path / "r")
    again = Registration.read(tmp_path / "r")
    np.testing.assert_allclose(again.displacement(), field, atol=1e-6)
    np.testing.assert_allclose(again.spread, spread, atol=1e-6)


def test_damaged_folders_are_named(bent: Registration, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no registration"):
        Registration.read(tmp_path)
    bent.write(tmp_path / "r")
    (tmp_path / "r" / "displacement.nii.gz").write_bytes(b"nothing")
    with pytest.raises(InputError, match="displacement.nii.gz"):
        Registration.read(tmp_path / "r")
    bent.write(tmp_path / "r", overwrite=True)
    marker = tmp_path / "r" / "registration.json"
    found = json.loads(marker.read_text())
    found["visit"] = 1
    marker.write_text(json.dumps(found))
    with pytest.raises(InputError, match="first visit is the reference"):
        Registration.read(tmp_path / "r")
    marker.write_text("{}")
    with pytest.raises(InputError, match="no registration"):
        Registration.read(tmp_path / "r")


def test_affine_scales_the_body_not_the_tumour() -> None:
    scale = np.diag([1.06, 0.97, 1.05, 1.0])
    scale[:3, 3] = MIDDLE - scale[:3, :3] @ MIDDLE
    points = carry(scale, POINTS)
    image = noisy(scene(points, 8.0), 1)
    tumour = np.linalg.norm(points - TUMOUR, axis=-1) < 8.0
    found = register(FIRST, Image(image, GRID), Affine(), tumour=DRAWN, moving_tumour=tumour)
    free = register(FIRST, Image(image, GRID), Affine())
    true = carry(np.linalg.inv(scale), POINTS) - POINTS
    off = np.linalg.norm(found.displacement() - true, axis=-1)
    far = BODY & (np.linalg.norm(POINTS - TUMOUR, axis=-1) > 30)
    assert np.median(off[far]) < 0.5
    assert found.tumour is not None and abs(found.tumour.percent) < 1
    assert found.tumour.before == pytest.approx(tumour.sum() * GRID.voxel_volume)
    assert abs(free.volume_change(tumour).percent) > 4 and free.tumour is None


def test_a_fold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    image, _ = later(GRID, 8.0, bent=False)

    def folded(*_: object, **__: object) -> np.ndarray:
        found = np.zeros((*GRID.shape, 3))
        found[..., 0] = 12 * np.sin(POINTS[..., 0] / 5)
        return found

    monkeypatch.setattr("biomodel.imaging.registration.bend", folded)
    with pytest.raises(GeometryError, match=r"folds in \d+ voxels.*BSpline\(knots=37.5"):
        register(FIRST, Image(image, GRID))


def test_distortion_along_one_axis_only() -> None:
    """Points move along the axis of the moving image that was named, and nowhere else."""
    shifted = POINTS.copy()
    shifted[..., 1] += 4 * np.sin((POINTS[..., 2] - MIDDLE[2]) / 12) * np.cos((POINTS[..., 0] - MIDDLE[0]) / 14)
    image = 500 - noisy(scene(shifted, 11.0), 2)  # what is bright in one is dark in the other
    found = register(FIRST, Image(image, GRID), BSpline(knots=30, along="y"))
    moved = found.displacement()
    rigid = carry(found.transform.matrix, POINTS) - POINTS
    np.testing.assert_allclose((moved - rigid)[..., [0, 2]], 0, atol=1e-4)
    before = np.abs(shifted - POINTS)[..., 1]
    # Displacements along y of a shift that changes with x and z alone: the other way round.
    off = np.abs(moved[..., 1] + (shifted - POINTS)[..., 1])
    assert np.median(off[BODY]) < 0.35 * np.median(before[BODY])


def test_two_foci_each_keep_their_volume() -> None:
    zone = (np.linalg.norm(POINTS - TUMOUR, axis=-1) < 6) | (np.linalg.norm(POINTS - MIDDLE + [16, -4, 4], axis=-1) < 5)
    field = bend(POINTS) + 0.06 * (POINTS - MIDDLE)
    kept = Transform(GRID, np.eye(4), rigid_inside(field, GRID, zone, 12.0))
    core = ndimage.binary_erosion(zone)
    np.testing.assert_allclose(kept.jacobian()[core], 1, atol=5e-3)
    assert np.abs(Transform(GRID, np.eye(4), field).jacobian()[core] - 1).max() > 0.1
    far = ndimage.distance_transform_edt(~zone, GRID.spacing) > 12 + 3.1
    np.testing.assert_allclose(kept.displacement()[far], field[far], atol=1e-5)
    assert rigid_inside(field, GRID, zone & False, 12.0) is field


def test_jacobian_of_a_known_field_on_an_oblique_grid() -> None:
    grid = other_grid(mirrored=True)
    change = np.array([[0.1, 0.05, 0.0], [-0.02, -0.1, 0.03], [0.04, 0.0, 0.2]])
    made = Transform(grid, np.eye(4), voxel_centres(grid) @ change.T)
    np.testing.assert_allclose(made.jacobian(), np.linalg.det(np.eye(3) + change), rtol=1e-4)


def test_bending_energy_of_a_known_field() -> None:
    """The spline of a quadratic is that quadratic, whose second derivatives are known."""
    spline = Spline(GRID, 12.0, np.zeros(3))
    knots = [12.0 * (np.arange(n) - 1) for n in spline.count]
    z, y, x = np.meshgrid(*knots, indexing="ij")
    coefficients = torch.as_tensor((0.01 * x**2 + 0.02 * x * y - 0.005 * z**2)[None], dtype=torch.float32)
    expected = 0.02**2 + 0.01**2 + 2 * 0.02**2
    assert float(spline.energy(coefficients)) == pytest.approx(expected, rel=1e-4)


def test_mutual_information_of_known_histograms() -> None:
    """Two independent images share nothing; two that tell each other's bin share its entropy."""
    rng = np.random.default_rng(0)
    one, two = (torch.as_tensor(rng.integers(0, 4, (30, 40, 40)), dtype=torch.float32) for _ in range(2))
    weight = torch.ones(one.shape)
    measure = JointHistogram(bins=32)
    assert float(measure(one, two, weight, GRID.spacing)) == pytest.approx(0, abs=2e-3)
    assert float(measure(one, 5 - one**2, weight, GRID.spacing)) == pytest.approx(np.log(4), rel=0.01)
    # Voxels without weight do not count.
    weight[15:] = 0
    mixed = torch.cat([one[:15], two[15:]])
    assert float(measure(one, mixed, weight, GRID.spacing)) == pytest.approx(np.log(4), rel=0.01)


def test_unknown_voxels() -> None:
    image, tumour = later(GRID, 8.0, bent=False)
    image = image.copy()
    image[:3] = np.nan
    image[10, 12:14, 12:14] = np.inf
    first = FIRST.values.copy()
    first[5, 20:24, 20:24] = np.nan
    found = register(Image(first, GRID, LOOK), Image(image, GRID), Rigid(), tumour=DRAWN, moving_tumour=tumour)
    assert error(found, bent=False)[BODY].max() < 1.5
    assert np.isnan(found.apply(image)).any() and np.isfinite(found.displacement()).all()
    with pytest.raises(InputError, match="NaN or infinite"):
        register(FIRST, Image(np.full(GRID.shape, np.nan), GRID))


def test_nothing_left_of_the_tumour() -> None:
    image, tumour = later(GRID, 8.0, bent=True)
    found = register(FIRST, Image(image, GRID), BSpline(), tumour=DRAWN, moving_tumour=tumour & False)
    assert found.tumour is None
    np.testing.assert_allclose(found.jacobian()[ndimage.binary_erosion(DRAWN)], 1, atol=0.01)
    assert np.isnan(VolumeChange(0.0, 0.0).percent)


def test_bad_input_is_refused() -> None:
    good = Image(later(GRID, 8.0, bent=False)[0], GRID, None, "visit 2")
    half = np.zeros((11, 34, 34), bool)
    cases = (
        (InputError, "tumour is empty", {"tumour": DRAWN & False}),
        (GeometryError, "reference visit's tumour has shape", {"tumour": half}),
        (GeometryError, "later visit's tumour has shape", {"moving_tumour": half}),
        (InputError, "expected a mask", {"tumour": DRAWN * 3}),
        (InputError, "fills most", {"tumour": LOOK}),
        (InputError, "two or more", {"seeds": (1,)}),
        (InputError, "different", {"seeds": (1, 1)}),
        (InputError, "first visit is the reference", {"visit": 1}),
    )
    for kind, words, given in cases:
        with pytest.raises(kind, match=words):
            register(FIRST, good, Rigid(), **given)
    elsewhere = GRID.affine.copy()
    elsewhere[0, 3] += 70
    images = (
        (InputError, "moving image: constant", Image(np.full(GRID.shape, 3.0), GRID)),
        (GeometryError, "mask of shape", Image(good.values, GRID, half)),
        (GeometryError, "values of shape", Image(good.values[1:], GRID)),
        (InputError, "mask is empty", Image(good.values, GRID, BODY & False)),
        (InputError, "real numbers", Image(good.values * 1j, GRID)),
        (
            GeometryError,
            "0 % of the fixed image's region",
            Image(good.values, Grid(GRID.shape, GRID.spacing, elsewhere)),
        ),
        (GeometryError, "at least 4 voxels", Image(good.values[:3], Grid((3, 34, 34), GRID.spacing))),
    )
    for kind, words, image in images:
        with pytest.raises(kind, match=words):
            register(FIRST, image, Rigid())
    with pytest.raises(InputError, match="knots"):
        BSpline(knots=0)
    with pytest.raises(GeometryError, match="does not mirror"):
        Transform(GRID, np.diag([-1.0, 1, 1, 1]))


def test_missing_simpleitk_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    with pytest.raises(InputError, match=r"pip install 'tumorcast\[imaging\]'"):
        register(FIRST, FIRST, Rigid())
