"""Domains: checked when they are made, unchangeable afterwards, at the same place after a crop."""

import numpy as np
import pytest

from biomodel.domain import Domain
from biomodel.errors import GeometryError, InputError


def oblique(spacing=(3.0, 1.5, 0.7)):
    """Affine of a grid turned by 20 degrees about z."""
    angle = np.deg2rad(20)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = turn * np.array(spacing[::-1])
    affine[:3, 3] = (-40.0, 12.0, 7.0)
    return affine


def test_box():
    domain = Domain.box((2, 3, 4), spacing=(3.0, 1.5, 0.5))
    assert domain.shape == (2, 3, 4)
    assert domain.voxel_volume == pytest.approx(2.25)
    assert domain.mask.all() and domain.mask.dtype == bool
    assert not domain.well_mixed
    np.testing.assert_array_equal(domain.coords["z"], [0.0, 3.0])
    np.testing.assert_array_equal(domain.coords["x"], [0.0, 0.5, 1.0, 1.5])
    np.testing.assert_array_equal(domain.affine, np.diag([0.5, 1.5, 3.0, 1.0]))


def test_point():
    point = Domain.point()
    assert point.well_mixed and point.shape == (1, 1, 1) and point.voxel_volume == 1.0


def test_coords_are_patient_coordinates():
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    affine[:3, 3] = (-10.0, 20.0, 30.0)
    domain = Domain(np.ones((1, 1, 2), bool), (2.0, 2.0, 2.0), affine)
    np.testing.assert_array_equal(domain.coords["x"], [-10.0, -8.0])
    np.testing.assert_array_equal(domain.coords["y"], [20.0])
    np.testing.assert_array_equal(domain.coords["z"], [30.0])


def test_arrays_cannot_be_changed_from_outside_or_inside():
    mask = np.ones((2, 2, 2), bool)
    fat = np.full((2, 2, 2), 0.5)
    domain = Domain.box((2, 2, 2), mask=mask, tissues={"adipose": fat})
    mask[0, 0, 0] = False
    fat[:] = 9
    assert domain.mask.all()
    assert domain.tissues["adipose"].max() == 0.5
    with pytest.raises(ValueError, match="read-only"):
        domain.mask[0, 0, 0] = False
    with pytest.raises(TypeError):
        domain.tissues["glandular"] = fat
    with pytest.raises(AttributeError):
        domain.spacing = (1, 1, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mask": np.zeros((2, 2, 2), bool)}, "mask is empty"),
        ({"mask": np.ones((2, 2), bool)}, "2 axes; expected 3"),
        ({"mask": np.full((2, 2, 2), 2)}, "other than 0 and 1"),
        ({"spacing": (1.0, -1.0, 1.0)}, "three positive numbers"),
        ({"spacing": (1.0, np.nan, 1.0)}, "three positive numbers"),
        ({"spacing": (1.0, 1.0)}, "three positive numbers"),
        ({"affine": np.eye(3)}, "4 × 4"),
        ({"affine": np.diag([2.0, 1.0, 1.0, 1.0])}, "differs from the spacing"),
        ({"tissues": {"adipose": np.zeros((2, 2, 3))}}, "tissue 'adipose' has shape"),
        ({"well_mixed": True}, "one point"),
    ],
)
def test_refused(arguments, message):
    given = {"mask": np.ones((2, 2, 2), bool), "spacing": (1.0, 1.0, 1.0), **arguments}
    with pytest.raises(GeometryError, match=message):
        Domain(**given)


@pytest.mark.parametrize("value", [1.5, -0.2, np.nan])
def test_tissue_is_a_fraction(value):
    fat = np.full((2, 2, 2), 0.5)
    fat[0, 0, 0] = value
    with pytest.raises(InputError, match="fractions from 0 to 1"):
        Domain.box((2, 2, 2), tissues={"adipose": fat})


def test_tissue_outside_the_mask_is_not_read():
    mask = np.ones((2, 2, 2), bool)
    mask[0, 0, 0] = False
    fat = np.full((2, 2, 2), 0.5)
    fat[0, 0, 0] = np.nan
    Domain.box((2, 2, 2), mask=mask, tissues={"adipose": fat})


def test_bounding_box_and_crop_keep_the_place():
    mask = np.zeros((4, 6, 8), bool)
    mask[1:4, 2:5, 3:7] = True
    domain = Domain(mask, (3.0, 1.5, 0.7), oblique(), {"adipose": np.arange(192).reshape(4, 6, 8) / 200})
    inside = np.zeros_like(mask)
    inside[2, 3, 4:6] = True
    assert domain.bounding_box(inside) == (slice(2, 3), slice(3, 4), slice(4, 6))
    # 1.5 mm are a part of a voxel in z, one in y, three in x
    assert domain.bounding_box(inside, 1.5) == (slice(1, 4), slice(2, 5), slice(1, 8))
    assert domain.bounding_box(inside, 1000.0) == (slice(0, 4), slice(0, 6), slice(0, 8))
    box = domain.bounding_box(inside, 1.5)
    part = domain.crop(box)
    assert part.shape == (3, 3, 7)
    np.testing.assert_array_equal(part.tissues["adipose"], domain.tissues["adipose"][box])
    np.testing.assert_allclose(part.affine @ [0, 0, 0, 1], domain.affine @ [1, 2, 1, 1])
    np.testing.assert_allclose(part.affine @ [2, 1, 1, 1], domain.affine @ [3, 3, 2, 1])


def test_bounding_box_refuses_nothing_and_other_grids():
    domain = Domain.box((2, 2, 2))
    with pytest.raises(GeometryError, match="no voxel is inside"):
        domain.bounding_box(np.zeros((2, 2, 2), bool))
    with pytest.raises(GeometryError, match="expected the domain's"):
        domain.bounding_box(np.ones((2, 2, 3), bool))


def test_crop_refuses_steps():
    with pytest.raises(GeometryError, match="step"):
        Domain.box((4, 4, 4)).crop((slice(None, None, 2), slice(None), slice(None)))
