"""Series and grids: what is kept, and what is refused with which words."""

from dataclasses import replace

import numpy as np
import pytest

from biomodel.domain import Domain
from biomodel.errors import GeometryError, InputError, UnitError
from biomodel.findings import Finding
from biomodel.imaging.series import Grid, Intake, Kind, Series, join
from biomodel.imaging.series_grid import canonical_array, canonical_axis

GRID = Grid((3, 4, 5), (4.0, 1.5, 1.2))
RNG = np.random.default_rng(0)


def values(n: int) -> np.ndarray:
    return RNG.uniform(0, 100, (n, 3, 4, 5)).astype(np.float32)


def dce(n: int = 4, **fields) -> Series:
    known = {"times": 10.0 * np.arange(n), "flip_angles": 10.0, "tr": 0.005, "te": 0.002}
    return Series(Kind.DCE, values(n), GRID, **(known | fields))


def dwi(b=(0.0, 100.0, 800.0), **fields) -> Series:
    return Series(Kind.DWI, values(len(b)), GRID, b_values=b, **fields)


def vfa(flips=(2.0, 5.0, 12.0), **fields) -> Series:
    return Series(Kind.VFA, values(len(flips)), GRID, **({"flip_angles": flips, "tr": 0.005, "te": 0.002} | fields))


def test_a_series_keeps_its_voxels_without_a_copy_and_cannot_be_changed() -> None:
    data = values(4)
    series = Series(Kind.DCE, data, GRID, times=np.arange(4.0), flip_angles=10, tr=0.005)
    assert np.shares_memory(series.data, data) and data.flags.writeable
    assert series.samples == 4 and series.flip_angle == 10.0 and series.flip_angles.shape == (4,)
    for array in (series.data, series.times, series.flip_angles):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
    assert Series(Kind.ANATOMY, np.ones((1, 3, 4, 5), np.int16), GRID).data.dtype == np.float32


def test_signal_and_blocks_are_voxels_by_samples() -> None:
    series, inside = dce(), RNG.uniform(size=GRID.shape) < 0.5
    whole = series.signal(inside)
    np.testing.assert_array_equal(whole, series.data[:, inside].T)
    parts = list(series.blocks(inside, voxels=7))
    np.testing.assert_array_equal(np.concatenate([part for _, part in parts]), whole)
    np.testing.assert_array_equal(whole[parts[1][0]], parts[1][1])
    with pytest.raises(GeometryError, match="mask of shape"):
        series.signal(inside[1:])
    with pytest.raises(GeometryError, match="mask of shape"):
        next(series.blocks(inside[1:]))


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: Series(Kind.DWI, values(3), GRID), InputError, "b-values missing.*bval"),
        (lambda: dwi((0.0, np.nan, 800.0)), InputError, "b_values: missing or infinite for sample 2"),
        (lambda: dwi((800.0, 800.0, 803.0)), InputError, r"a single b-value \(800 s/mm²\)"),
        (lambda: dwi((0.0, 0.1, 0.8)), UnitError, "largest b-value 0.8.*never guessed"),
        (lambda: dwi((0.0, 1e8, 8e8)), UnitError, "largest b-value 8e\\+08"),
        (lambda: dwi((0.0, -5.0, 800.0)), InputError, "b-value -5"),
        (lambda: Series(Kind.DWI, values(3), GRID, b_values=[0, 800]), InputError, "2 values for 3 samples"),
        (lambda: dwi(directions=np.zeros((2, 3))), InputError, r"expected \(3, 3\)"),
        (lambda: dwi(directions=2 * np.eye(3)), InputError, "direction of length 2"),
        (lambda: dce(flip_angles=None), InputError, "flip angle missing; a dynamic"),
        (lambda: dce(tr=None), InputError, "repetition time missing"),
        (lambda: dce(times=None), InputError, "time of each sample missing"),
        (lambda: dce(tr=5.4), UnitError, "repetition time 5.4.*ms"),
        (lambda: dce(times=[0.0, 10.0, 10.0, 20.0]), InputError, "times do not rise at sample 3"),
        (lambda: dce(times=[0.0, 10.0, np.inf, 20.0]), InputError, "times: missing or infinite for sample 3"),
        (lambda: dce(flip_angles=[10, 10, 10, 12]), InputError, "same for all samples"),
        (lambda: dce(1), InputError, "a single sample"),
        (lambda: dce(te=2.0), UnitError, "te: 2; expected seconds"),
        (lambda: dce(tr=-1.0), InputError, "expected seconds above 0"),
        (lambda: dce(field_strength=15000.0), UnitError, "tesla"),
        (lambda: dce(phase_encoding="j"), InputError, "'z', 'y' or 'x'"),
        (lambda: dce(times=["a"] * 4), InputError, "expected numbers, s"),
        (lambda: vfa((5.0, 5.0)), InputError, "a single flip angle"),
        (lambda: vfa(tr=None), InputError, "repetition time missing"),
        (lambda: vfa(flip_angles=None), InputError, "flip angle missing"),
        (lambda: vfa((0.03, 0.09, 0.2)), UnitError, "radians"),
        (lambda: vfa((0.0, 5.0)), InputError, "degrees above 0"),
        (lambda: Series(Kind.INVERSION, values(2), GRID), InputError, "inversion time missing"),
        (lambda: Series(Kind.INVERSION, values(1), GRID, inversion_times=600.0), UnitError, "ms to s"),
        (lambda: Series(Kind.INVERSION, values(1), GRID, inversion_times=-0.1), InputError, "0 or more"),
        (lambda: Series(Kind.B1, 100 + values(1), GRID), UnitError, "per cent"),
        (lambda: Series(Kind.B1, values(2) / 100, GRID), InputError, "2 maps"),
        (lambda: Series(Kind.ANATOMY, values(1)[0], GRID), GeometryError, r"data of shape \(3, 4, 5\)"),
        (lambda: Series(Kind.ANATOMY, values(1)[:, :2], GRID), GeometryError, "expected \\(samples, 3, 4, 5\\)"),
        (lambda: Series(Kind.ANATOMY, values(1) * 1j, GRID), InputError, "complex"),
    ],
)
def test_what_is_missing_or_impossible_is_refused(make, error, words) -> None:
    with pytest.raises(error, match=words) as caught:
        make()
    assert type(caught.value) is error
    assert str(caught.value).count(". ") >= 1 or "expected" in str(caught.value)  # what, and how to mend it


def test_flip_angle_needs_one() -> None:
    with pytest.raises(InputError, match="flip angle missing"):
        dwi().flip_angle  # noqa: B018
    with pytest.raises(InputError, match="from 2 to 12"):
        vfa().flip_angle  # noqa: B018


def test_directions_are_of_length_one_or_none() -> None:
    series = dwi(directions=[[0, 0, 0], [0.999, 0, 0], [0, 0.6, 0.8]])
    np.testing.assert_allclose(np.linalg.norm(series.directions, axis=1), [0, 1, 1])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Grid((3, 4), (1, 1, 1)), "three positive numbers"),
        (lambda: Grid((3, 4, 5), (1, 0, 1)), "three positive numbers"),
        (lambda: Grid((3, 4, 5), (1, 1, 1), np.eye(3)), "4 × 4"),
        (lambda: Grid((3, 4, 5), (1, 1, 2), np.eye(4)), "differs from the spacing"),
        (lambda: Grid.at((3, 4, 5), np.eye(4) + np.eye(4, k=1)), "perpendicular"),
        (lambda: Grid.at((3, 4, 5), np.full((4, 4), np.nan)), "4 × 4 finite"),
    ],
)  # fmt: skip
def test_grids_that_are_none(make, words) -> None:
    with pytest.raises(GeometryError, match=words):
        make()


def test_grids_are_compared_by_place() -> None:
    moved = GRID.affine.copy()
    moved[0, 3] += 0.005
    assert GRID.same_as(Grid.at(GRID.shape, moved))
    moved[0, 3] += 0.05
    assert not GRID.same_as(Grid.at(GRID.shape, moved))
    assert GRID.distance(Grid.at(GRID.shape, moved)) == pytest.approx(0.055)
    assert not GRID.same_as(Grid((3, 4, 6), GRID.spacing))
    assert GRID.voxel_volume == pytest.approx(7.2)
    domain = GRID.domain()
    assert isinstance(domain, Domain) and Grid.of(domain).same_as(GRID) and domain.spacing == GRID.spacing


def test_canonical_array_puts_each_voxel_where_its_affine_says() -> None:
    # Columns to the left, rows upwards, slices to the front: every axis turned or exchanged.
    affine = np.array([[0, 0, 0, 5.0], [-2.0, 0, 0, 7.0], [0, 0, -3.0, 9.0], [0, 0, 0, 1]])
    affine[0, 1] = 1.5
    data, view, grid = canonical_array((4, 5, 6), affine, 2)
    assert view.shape == (4, 5, 6, 2) and data.shape == (2, 6, 4, 5) and grid.spacing == (3.0, 2.0, 1.5)
    assert (np.diag(grid.affine)[:3] > 0).all() and canonical_axis(affine, 0) == "y"
    index = np.indices((4, 5, 6)).reshape(3, -1)
    places = affine[:3, :3] @ index + affine[:3, 3:]
    view[..., 1] = np.arange(120).reshape(4, 5, 6)
    x, y, z = np.rint(np.linalg.solve(grid.affine[:3, :3], places - grid.affine[:3, 3:])).astype(int)
    np.testing.assert_array_equal(data[1, z, y, x], np.arange(120))


def test_scratch_holds_the_voxels(tmp_path) -> None:
    data, view, _ = canonical_array((4, 5, 6), np.eye(4), 2, str(tmp_path / "a.f32"))
    view[:] = 3
    assert isinstance(data, np.memmap) and (tmp_path / "a.f32").stat().st_size == 4 * 240
    series = Series(Kind.ANATOMY, data[:1], Grid.at((6, 5, 4), np.eye(4)))
    assert np.shares_memory(series.data, data)


def single(flip: float = 5.0, **fields) -> Series:
    known = {"flip_angles": flip, "tr": 0.005, "te": 0.002, "name": f"flip {flip:g}", "ceiling": 4095.0}
    return Series(Kind.ANATOMY, values(1), GRID, **(known | fields))


def test_join_puts_samples_together() -> None:
    parts = [single(2.0, notes=("a",)), single(5.0), single(12.0, contrast_agent="gadobutrol", notes=("a", "b"))]
    whole = join(parts, Kind.VFA, name="whole")
    assert whole.kind is Kind.VFA and whole.flip_angles.tolist() == [2.0, 5.0, 12.0] and whole.name == "whole"
    assert whole.contrast_agent == "gadobutrol" and whole.notes == ("a", "b") and whole.ceiling.tolist() == [4095.0] * 3
    np.testing.assert_array_equal(whole.data[1], parts[1].data[0])
    dynamic = join([single(), single(), single()], Kind.DCE, times=[0.0, 60.0, 120.0])
    assert dynamic.times.tolist() == [0.0, 60.0, 120.0]


def test_join_refuses_what_does_not_belong_together() -> None:
    away = GRID.affine.copy()
    away[2, 3] = 1.0
    elsewhere = replace(single(5.0), grid=Grid.at(GRID.shape, away))
    with pytest.raises(GeometryError, match="another geometry"):
        join([single(2.0), elsewhere], Kind.VFA)
    with pytest.raises(InputError, match="repetition time 0.006 s in flip 5, 0.005 s in flip 2"):
        join([single(2.0), single(5.0, tr=0.006)], Kind.VFA)
    with pytest.raises(InputError, match="echo time missing"):
        join([single(2.0), single(5.0, te=None)], Kind.VFA)
    with pytest.raises(InputError, match="no series"):
        join([], Kind.VFA)


def test_an_intake_gives_the_one_series_of_a_kind_or_says_why_not() -> None:
    refused = Finding("error", "schema", "series 2", "series 2: b-values missing.", "Give a .bval file.")
    intake = Intake((dce(name="a"), dce(name="b"), vfa()), (refused,))
    assert intake.one(Kind.VFA).kind is Kind.VFA and len(intake.of(Kind.DCE)) == 2
    with pytest.raises(InputError, match=r"2 series are each a dynamic.*\(a, b\)"):
        intake.one(Kind.DCE)
    with pytest.raises(InputError, match="no diffusion-weighted series was found. series 2: b-values missing. Give"):
        intake.one(Kind.DWI)
