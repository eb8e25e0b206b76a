"""NIfTI in and out: every order and direction of the axes, damaged files, other grids."""

import gzip
from itertools import permutations, product

import nibabel as nib
import numpy as np
import pytest

from biomodel.domain import Domain
from biomodel.errors import GeometryError, InputError, OutputError
from biomodel.imaging.nifti import read_image, resample, write_image

SHAPE = (4, 5, 6)  # x, y, z
STEPS = (0.7, 1.5, 3.0)


def canonical_affine():
    affine = np.diag([*STEPS, 1.0])
    affine[:3, 3] = (-100.1, 20.3, 5.0)
    return affine


def turned(affine, degrees=(8.0, -5.0, 12.0)):
    """The same grid, oblique to the patient."""
    turn = np.eye(3)
    for axis, angle in enumerate(np.deg2rad(degrees)):
        i, j = [k for k in range(3) if k != axis]
        part = np.eye(3)
        part[i, i] = part[j, j] = np.cos(angle)
        part[i, j], part[j, i] = -np.sin(angle), np.sin(angle)
        turn = turn @ part
    result = affine.copy()
    result[:3, :3] = turn @ affine[:3, :3]
    return result


def reordered(values, affine, order, flips):
    """Store (x, y, z) `values` with other axes first and some backwards; the positions in the patient stay."""
    stored = values.transpose(order)
    to_old = np.zeros((4, 4))
    to_old[3, 3] = 1
    for new, old in enumerate(order):
        to_old[old, new] = 1
    for axis, flip in enumerate(flips):
        if flip:
            stored = np.flip(stored, axis)
            back = np.eye(4)
            back[axis, axis] = -1
            back[axis, 3] = stored.shape[axis] - 1
            to_old = to_old @ back
    return stored, affine @ to_old


@pytest.fixture
def values():
    return np.random.default_rng(3).normal(size=SHAPE)


@pytest.mark.parametrize("oblique", [False, True])
@pytest.mark.parametrize("order", list(permutations(range(3))))
@pytest.mark.parametrize("flips", list(product([False, True], repeat=3)))
def test_any_order_and_direction_of_axes(tmp_path, values, order, flips, oblique):
    affine = turned(canonical_affine()) if oblique else canonical_affine()
    stored, stored_affine = reordered(values, affine, order, flips)
    # the reordering itself is right: the voxel that was at `place` is where its position says
    place = np.array([1, 2, 4, 1])
    there = np.round(np.linalg.solve(stored_affine, affine @ place)).astype(int)
    assert stored[tuple(there[:3])] == values[1, 2, 4]

    path = tmp_path / "image.nii.gz"
    nib.save(nib.Nifti1Image(stored, stored_affine), path)
    image = read_image(path)
    np.testing.assert_array_equal(image.values, values.transpose(2, 1, 0))
    np.testing.assert_allclose(image.affine, affine, atol=2e-5)
    np.testing.assert_allclose(image.spacing, STEPS[::-1], rtol=1e-6)


def test_round_trip_is_exact(tmp_path, values):
    write_image(tmp_path / "a.nii.gz", values.transpose(2, 1, 0), canonical_affine())
    image = read_image(tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(image.values, values.transpose(2, 1, 0))
    np.testing.assert_array_equal(image.affine, canonical_affine())
    assert image.spacing == STEPS[::-1]
    assert image.length_units == "mm" and image.oriented


def test_same_values_give_the_same_file(tmp_path, values):
    write_image(tmp_path / "a.nii.gz", values, canonical_affine())
    write_image(tmp_path / "b.nii.gz", values, canonical_affine())
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()


def test_floats_are_kept_in_single_precision_only_if_nothing_is_lost(tmp_path):
    exact = np.full((2, 2, 2), 0.5)
    write_image(tmp_path / "a.nii", exact, np.eye(4))
    assert nib.load(tmp_path / "a.nii").get_data_dtype() == np.float32
    write_image(tmp_path / "b.nii", exact + 1e-12, np.eye(4))
    assert nib.load(tmp_path / "b.nii").get_data_dtype() == np.float64
    write_image(tmp_path / "c.nii", exact > 0, np.eye(4))
    assert nib.load(tmp_path / "c.nii").get_data_dtype() == np.uint8


def test_scaled_integers(tmp_path):
    image = nib.Nifti1Image(np.arange(8, dtype=np.int16).reshape(2, 2, 2), np.eye(4))
    image.header.set_slope_inter(2.0, 10.0)
    nib.save(image, tmp_path / "a.nii")
    expected = nib.load(tmp_path / "a.nii").get_fdata().transpose(2, 1, 0)
    np.testing.assert_array_equal(read_image(tmp_path / "a.nii").values, expected)


@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 1), (4, 5, 1, 1), (4,)])
def test_fewer_dimensions(tmp_path, shape):
    nib.save(nib.Nifti1Image(np.zeros(shape), np.eye(4)), tmp_path / "a.nii")
    assert read_image(tmp_path / "a.nii").values.shape == ((1, 5, 4) if len(shape) > 1 else (1, 1, 4))


@pytest.mark.parametrize(("units", "scale"), [("micron", 1e-3), ("meter", 1e3), ("mm", 1.0), ("unknown", 1.0)])
def test_units_of_length_in_the_header(tmp_path, units, scale):
    image = nib.Nifti1Image(np.zeros((2, 2, 2)), np.diag([2.0, 2.0, 2.0, 1.0]))
    image.header.set_xyzt_units(units)
    nib.save(image, tmp_path / "a.nii")
    found = read_image(tmp_path / "a.nii")
    assert found.spacing == pytest.approx((2 * scale,) * 3)
    assert found.length_units == units


def test_missing(tmp_path):
    with pytest.raises(InputError, match=r"visit 1, adc: file .*no\.nii does not exist; expected a NIfTI file.*Check"):
        read_image(tmp_path / "no.nii", "visit 1, adc")
    with pytest.raises(InputError, match="is a folder"):
        read_image(tmp_path, "visit 1, adc")


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("part", [0.0, 0.05, 0.5, 0.95])
def test_truncated(tmp_path, values, name, part):
    path = tmp_path / name
    write_image(path, values, canonical_affine())
    whole = path.read_bytes()
    path.write_bytes(whole[: int(part * len(whole))])
    with pytest.raises(InputError, match=r"a\.nii.*(truncated|empty).*expected") as caught:
        read_image(path)
    assert str(tmp_path) not in str(caught.value).replace(f"file {path}", "")


def test_damaged_gzip(tmp_path, values):
    path = tmp_path / "a.nii.gz"
    write_image(path, values, canonical_affine())
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(InputError, match="damaged"):
        read_image(path)


def test_not_nifti(tmp_path):
    (tmp_path / "a.nii").write_text("hello " * 100)
    (tmp_path / "b.nii.gz").write_bytes(gzip.compress(b"hello " * 100))
    (tmp_path / "c.txt").write_text("hello")
    for name in ("a.nii", "b.nii.gz", "c.txt"):
        with pytest.raises(InputError, match=f"{name}.*expected"):
            read_image(tmp_path / name)


def test_other_kinds_of_values(tmp_path):
    colour = np.zeros((2, 2, 2), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    nib.save(nib.Nifti1Image(colour, np.eye(4)), tmp_path / "rgb.nii")
    nib.save(nib.Nifti1Image(np.zeros((2, 2, 2), complex), np.eye(4)), tmp_path / "complex.nii")
    for name in ("rgb.nii", "complex.nii"):
        with pytest.raises(InputError, match="expected real numbers"):
            read_image(tmp_path / name)


def test_several_volumes(tmp_path):
    nib.save(nib.Nifti1Image(np.zeros((2, 2, 2, 3)), np.eye(4)), tmp_path / "a.nii")
    with pytest.raises(GeometryError, match="4 dimensions"):
        read_image(tmp_path / "a.nii")


def test_sheared_axes(tmp_path):
    affine = np.eye(4)
    affine[0, 1] = 0.3
    nib.save(nib.Nifti1Image(np.zeros((2, 2, 2)), affine), tmp_path / "a.nii")
    with pytest.raises(GeometryError, match="not perpendicular"):
        read_image(tmp_path / "a.nii")


def test_same_grid(tmp_path, values):
    write_image(tmp_path / "a.nii.gz", values, canonical_affine())
    mask = Domain(np.ones(values.shape, bool), STEPS[::-1], canonical_affine())
    read_image(tmp_path / "a.nii.gz", like=mask)
    # differences of a registration tool's digits are no other grid
    nudged = canonical_affine()
    nudged[0, 3] += 1e-4
    read_image(tmp_path / "a.nii.gz", like=Domain(mask.mask, mask.spacing, nudged))


@pytest.mark.parametrize("change", ["shape", "shift", "spacing", "turn"])
def test_other_grid_offers_the_command(tmp_path, values, change):
    affine, shape, steps = canonical_affine(), values.shape, STEPS
    if change == "shape":
        shape = (shape[0], shape[1], shape[2] + 1)
    elif change == "shift":
        affine[2, 3] += 1.5
    elif change == "spacing":
        steps = (0.8, 1.5, 3.0)
        affine[0, 0] = 0.8
    else:
        affine = turned(affine)
    write_image(tmp_path / "adc.nii.gz", values, canonical_affine())
    mask = Domain(np.ones(shape, bool), steps[::-1], affine)
    command = r"tumorcast resample adc\.nii\.gz --like mask\.nii\.gz --out resampled_adc\.nii\.gz"
    with pytest.raises(GeometryError, match=f"visit 2, adc: .*expected.*{command}"):
        read_image(tmp_path / "adc.nii.gz", "visit 2, adc", mask, "mask.nii.gz")


def test_resample_brings_a_map_to_the_same_places(tmp_path):
    """A field that is linear in the position is interpolated exactly, on any grid."""

    def field(affine, shape):
        index = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij")).reshape(3, -1)
        places = affine[:3, :3] @ index + affine[:3, 3:]
        return (np.array([0.3, -0.2, 0.1]) @ places + 5).reshape(shape)

    fine = np.diag([1.0, 1.0, 1.0, 1.0])
    fine[:3, 3] = -10
    stored, stored_affine = reordered(field(fine, (30, 30, 30)), fine, (2, 0, 1), (True, False, True))
    nib.save(nib.Nifti1Image(stored, stored_affine), tmp_path / "map.nii")
    coarse = turned(np.diag([1.3, 1.7, 2.1, 1.0]))
    write_image(tmp_path / "mask.nii", np.ones((5, 6, 7)), coarse)
    resample(tmp_path / "map.nii", tmp_path / "mask.nii", tmp_path / "out.nii.gz")
    out = read_image(tmp_path / "out.nii.gz", like=read_image(tmp_path / "mask.nii"))
    np.testing.assert_allclose(out.values, field(coarse, (7, 6, 5)).transpose(2, 1, 0), atol=1e-4)


def test_resample_of_masks_and_beyond_the_image(tmp_path):
    mask = np.zeros((4, 4, 4), bool)
    mask[1:3, 1:3, 1:3] = True
    write_image(tmp_path / "region.nii", mask, np.eye(4))
    write_image(tmp_path / "map.nii", mask + 0.5, np.eye(4))
    wide = np.eye(4)
    wide[:3, 3] = -2
    write_image(tmp_path / "like.nii", np.zeros((8, 8, 8)), wide)
    resample(tmp_path / "region.nii", tmp_path / "like.nii", tmp_path / "r.nii")
    region = read_image(tmp_path / "r.nii").values
    assert region.sum() == mask.sum()
    np.testing.assert_array_equal(region[2:6, 2:6, 2:6], mask)
    resample(tmp_path / "map.nii", tmp_path / "like.nii", tmp_path / "m.nii")
    values = read_image(tmp_path / "m.nii").values
    np.testing.assert_array_equal(values[2:6, 2:6, 2:6], mask + 0.5)
    assert np.isnan(values[0]).all() and np.isfinite(values).sum() == 64


def test_write_leaves_nothing_half_written(tmp_path, values, monkeypatch):
    path = tmp_path / "a.nii.gz"
    write_image(path, values, canonical_affine())
    before = path.read_bytes()

    def full(image, target):
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(nib, "save", full)
    with pytest.raises(
        OutputError, match=r"a\.nii\.gz: cannot be written \(No space left on device\)\. The disk is full"
    ):
        write_image(path, values + 1, canonical_affine())
    assert path.read_bytes() == before
    assert [item.name for item in tmp_path.iterdir()] == ["a.nii.gz"]


def test_write_interrupted(tmp_path, values, monkeypatch):
    def stop(image, target):
        target.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(nib, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        write_image(tmp_path / "a.nii.gz", values, canonical_affine())
    assert list(tmp_path.iterdir()) == []
