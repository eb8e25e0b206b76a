"""Misaligned images and edges drawn askew: operators, derivatives, and what a calibration makes of them."""

from dataclasses import replace

import numpy as np
import pytest

import biomodel as bm
from biomodel.calibration.images import ImageProblem
from biomodel.calibration.initial_state import InitialState
from biomodel.calibration.placement import Placement, signed_distance
from biomodel.errors import InputError
from biomodel.observation import Seen, observe
from biomodel.virtual import small_patient

SPACING = (2.0, 1.5, 1.0)
ALL = {"edge_sd_mm": 1.0, "region_shift_sd_mm": 0.8, "misalignment_sd_mm": 0.7, "noise_length_mm": 3.0}


def ball(shape, centre, radius, spacing=SPACING):
    grid = np.meshgrid(*(np.arange(n) * s for n, s in zip(shape, spacing, strict=True)), indexing="ij")
    return np.sqrt(sum((g - c * s) ** 2 for g, c, s in zip(grid, centre, spacing, strict=True))) < radius


def settings(**stated):
    return replace(small_patient(1).patient.cellularity, **stated)


def stated(patient, **stated):
    return replace(patient, cellularity=replace(patient.cellularity, **stated))


@pytest.fixture(scope="module")
def virtual():
    return small_patient(3)


@pytest.fixture
def placement():
    shape, rng = (9, 10, 11), np.random.default_rng(0)
    region = ball(shape, (4, 5, 5), 5.0)
    later = [Seen(10.0, 2, region), Seen(20.0, 3, np.zeros(shape, bool))]
    return Placement(later, SPACING, rng.random((2, *shape)) < 0.7, settings(**ALL))


def unknowns(placement, rng):
    return {p.name: float(p.prior.scale * rng.standard_normal()) for p in placement.unknowns}


def test_signed_distance_is_half_a_voxel_beside_the_edge():
    region = np.zeros((1, 1, 8), bool)
    region[..., 2:6] = True
    found = signed_distance(region, (1.0, 1.0, 2.0))[0, 0]
    assert found.tolist() == [3.0, 1.0, -1.0, -3.0, -3.0, -1.0, 1.0, 3.0]


def test_a_whole_voxel_is_moved_exactly(placement):
    rng = np.random.default_rng(1)
    u = np.zeros((2, 9, 10, 11))
    u[:, 2:7, 2:7, 2:7] = rng.random((2, 5, 5, 5))
    values = {p.name: 0.0 for p in placement.unknowns} | {"misalignment.visit2.y": 1.5, "misalignment.visit3.x": -1.0}
    seen = placement.seen(u, values)
    assert np.allclose(seen[0], np.roll(u[0], -1, 1), atol=1e-14)
    assert np.allclose(seen[1], np.roll(u[1], 1, 2), atol=1e-14)


def test_back_is_the_transpose(placement):
    rng = np.random.default_rng(2)
    values = unknowns(placement, rng)
    u, r = rng.standard_normal((2, 2, 9, 10, 11))
    assert np.vdot(placement.seen(u, values), r) == pytest.approx(np.vdot(u, placement.back(r, values)), rel=1e-12)


def test_derivatives_are_those_of_the_placed_maps(placement):
    rng = np.random.default_rng(3)
    values, u, h = unknowns(placement, rng), rng.standard_normal((2, 9, 10, 11)), 1e-5
    found = placement.derivatives(u, values)
    # A visit where nothing was seen has no outline.
    assert set(found) == {f"misalignment.visit{v}.{a}" for v in (2, 3) for a in "zyx"} | {
        "edge.visit2", *(f"region_shift.visit2.{a}" for a in "zyx")}  # fmt: skip
    for name, derivative in found.items():
        plus, minus = (placement.seen(u, values | {name: values[name] + s}) for s in (h, -h))
        assert np.allclose((plus - minus) / (2 * h), derivative, atol=1e-8), name


def test_an_offset_compares_a_drawn_edge_with_the_tumour_beyond_it():
    """The tumour ends 1 mm beyond the drawn edge: seen through that offset, the visible level lies on the drawn one."""
    shape, spacing = (1, 1, 41), (1.0, 1.0, 1.0)
    x = np.arange(41.0)
    u = np.clip(0.15 - 0.05 * (np.abs(x - 20) - 9.5), 0, 1)[None, None, None]  # visible up to 9.5 mm from the middle
    region = (np.abs(x - 20) < 8.5)[None, None]
    placement = Placement([Seen(1.0, 2, region)], spacing, np.ones((1, *shape), bool), settings(edge_sd_mm=1.0))
    seen = placement.seen(u, {"edge.visit2": 1.0})[0, 0, 0]
    assert (seen[region[0, 0]] >= 0.15).all() and (seen[~region[0, 0]] < 0.15).all()
    assert (u[0, 0, 0][~region[0, 0]] >= 0.15).any()


def test_without_stated_errors_nothing_changes(virtual):
    known = virtual.patient.until(2)
    problem = ImageProblem(bm.default_model(known), known, bm.TorchSolver())
    assert problem.plain and not any(n.startswith(("edge", "region_shift", "misalignment")) for n in problem.names)


def test_the_start_is_measured_inside_and_ends_with_the_visible_fraction_at_the_edge(virtual):
    patient = virtual.patient
    seen = observe(patient, patient.visits[0])
    plain = InitialState.of(seen, 0.1, 0.05, patient.domain)
    edged = InitialState.of(seen, 0.1, 0.05, patient.domain, settings(edge_sd_mm=1.0, region_shift_sd_mm=1.0))
    values = {"initial.halo": np.array([0.7]), "adc_shift.visit1": np.array([0.4])}
    zero = {p.name: np.zeros(1) for p in edged.outline.unknowns}
    at, reach = edged.outline.distance, edged.outline.reach
    assert reach == pytest.approx(np.hypot(1.0, 1.0))
    for offset in (0.0, 1.0, -1.0):
        change = (edged.state(values | zero | {"edge.visit1": np.array([offset])}) - plain.state(values))[0]
        assert np.abs(change[at < -reach]).max() < 1e-12  # what is read stays, whatever the edge
        state = edged.state(values | zero | {"edge.visit1": np.array([offset])})[0]
        band = patient.domain.mask & (np.abs(at - offset) < 1e-9)  # voxel centres that the edge hits
        assert band.any() == (abs(offset) == 1.0) and np.allclose(state[band], 0.1)
        beyond = patient.domain.mask & (at > offset)
        assert np.allclose(state[beyond], 0.1 * np.exp(-(at[beyond] - offset) / 0.7))


def test_derivatives_of_the_initial_state(virtual):
    patient = virtual.patient
    seen, h = observe(patient, patient.visits[0]), 1e-6
    initial = InitialState.of(seen, 0.1, 0.05, patient.domain, settings(edge_sd_mm=1.0, region_shift_sd_mm=1.0))
    values = dict(zip(initial.names, (0.7, 0.4, 0.3137, 0.211, -0.173, 0.127), strict=True))
    for name, derivative in zip(initial.names, initial.derivatives(values), strict=True):
        plus, minus = (initial.state({n: np.array([v + s * (n == name)]) for n, v in values.items()})[0]
                       for s in (h, -h))  # fmt: skip
        assert np.allclose((plus - minus) / (2 * h), derivative, atol=1e-7), name


def test_the_jacobian_with_everything_unknown_is_that_of_the_residual(virtual):
    known = stated(virtual.patient.until(2), **ALL)
    problem = ImageProblem(bm.default_model(known), known, bm.TorchSolver(rtol=1e-5))
    rng = np.random.default_rng(4)
    z = np.array([p.prior.location + 0.3 * p.prior.scale * rng.standard_normal() for p in problem.parameters.values()])
    linear = problem.linearise(z, True)
    active, h = linear.weights.active, 1e-5
    for i, name in enumerate(problem.names):
        step = h * (np.arange(len(z)) == i)
        slope = -(problem.residual(z + step) - problem.residual(z - step))[active] / (2 * h)
        scale = np.abs(slope).max()
        assert np.abs(slope - linear.jacobian[i]).max() <= 2e-4 * max(scale, 1e-3), name
    # The covariance of the rows is symmetric, with the noise of the first map carried through all of it.
    a, b = rng.standard_normal((2, 1, len(active)))
    assert (linear.weights.covariance(a) * b).sum() == pytest.approx((linear.weights.covariance(b) * a).sum(), rel=1e-9)


def test_a_misalignment_is_found(virtual):
    """The second visit's images and region moved by a voxel: the shift is recovered, and stated with its error."""
    patient = virtual.patient.until(2)
    second = patient.visits[1]
    moved = replace(second, adc=np.roll(second.adc, 1, 2), region=np.roll(second.region, 1, 2) & patient.domain.mask)
    shifted = replace(patient, visits=(patient.visits[0], moved))
    fit = bm.calibrate(bm.default_model(shifted), stated(shifted, misalignment_sd_mm=2.0))
    at = fit.names.index("misalignment.visit2.x")
    assert abs(fit.z[at] - (-2.0)) < max(3 * fit.sd[at], 0.3) and fit.sd[at] < 0.5
    for axis in "zy":
        at = fit.names.index(f"misalignment.visit2.{axis}")
        assert abs(fit.z[at]) < max(3 * fit.sd[at], 0.3)


def test_forecasts_of_a_drawn_edge_are_less_sure(virtual):
    known = virtual.patient.until(2)
    spread = []
    for sd in (0.0, 1.5):
        patient = stated(known, edge_sd_mm=sd)
        fit = bm.calibrate(bm.default_model(patient), patient)
        spread.append(np.log(bm.forecast(fit, times=[known.visits[-1].day], draws=60, seed=0)["cells"].values).std())
    assert spread[1] > 1.3 * spread[0]


@pytest.mark.parametrize("name", ["noise_length_mm", "edge_sd_mm", "region_shift_sd_mm", "misalignment_sd_mm"])
@pytest.mark.parametrize("value", [-1.0, 30.0, float("nan"), "2"])
def test_absurd_settings_are_refused(name, value):
    with pytest.raises(InputError, match=name.removesuffix("_mm")):
        settings(**{name: value})


def test_settings_are_written_and_read(virtual, tmp_path):
    patient = stated(virtual.patient.until(2), edge_sd_mm=1.25, misalignment_sd_mm=0.5)
    patient.write(tmp_path / "p")
    assert bm.Patient.read(tmp_path / "p").cellularity == patient.cellularity
    text = (tmp_path / "p" / "patient.json").read_text()
    assert "edge_sd" in text and "noise_length" not in text


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 1])
def test_a_region_drawn_beside_its_tumour_is_found(virtual, which):
    """A region moved by a voxel, its images not: the shift is found at that visit, with its error, in either visit."""
    patient = virtual.patient.until(2)
    visits = list(patient.visits)
    visits[which] = replace(visits[which], region=np.roll(visits[which].region, 1, 2) & patient.domain.mask)
    moved = stated(replace(patient, visits=tuple(visits)), region_shift_sd_mm=1.5)
    fit = bm.calibrate(bm.default_model(moved), moved)
    for visit in (0, 1):
        at = fit.names.index(f"region_shift.visit{visit + 1}.x")
        true = -2.0 if visit == which else 0.0
        assert abs(fit.z[at] - true) < 3 * fit.sd[at] and fit.sd[at] < 0.9
