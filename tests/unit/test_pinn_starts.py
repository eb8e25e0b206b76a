"""Starts and modalities of the joint inference: derivatives, averages, likelihoods, and what is refused."""

import numpy as np
import pytest

import biomodel as bm
from biomodel.errors import CalibrationError, InputError
from pinn import Cells, Foci, FreeStart, Observation, Outline, Uptake

PLANE = bm.Domain.box((1, 16, 20), (2.0, 2.0, 1.5))


def slopes(bound, z, step=1e-5):
    return np.array([(bound.states(z + e) - bound.states(z - e))[0] / (2 * step) for e in step * np.eye(len(z))])


@pytest.mark.parametrize("start", [Foci(1), Foci(3), FreeStart(length=8.0)])
def test_derivatives(start):
    bound = start.on(PLANE)
    z = bound.prior.mean + 0.5 * bound.prior.sd * np.random.default_rng(0).standard_normal(len(bound.names))
    u, by = bound.linear(z)
    assert u.shape == PLANE.shape and by.shape == (len(bound.names), *PLANE.shape)
    assert 0 <= u.min() and u.max() < 1
    assert np.allclose(by, slopes(bound, z), atol=1e-7 * max(1, np.abs(by).max()))


def test_a_focus_is_averaged_exactly_over_voxels():
    bound = Foci(1).on(PLANE)
    z = np.array([14.0, 11.0, 0.3, np.log(2.5)])
    n = 40  # points along a voxel's side
    y, x = (((np.arange(m * n) + 0.5) / n - 0.5) * s for m, s in ((16, 2.0), (20, 1.5)))
    bell = np.exp(-((y[:, None] - 14.0) ** 2 + (x - 11.0) ** 2) / (2 * 2.5**2)) / (1 + np.exp(-0.3))
    assert np.allclose(bound.states(z)[0, 0], bell.reshape(16, n, 20, n).mean((1, 3)), atol=2e-5)
    assert bound.values(z) == pytest.approx(
        {"focus1.y": 14.0, "focus1.x": 11.0, "focus1.peak": 1 / (1 + np.exp(-0.3)), "focus1.width": 2.5}
    )


def test_finer_voxels_show_the_same_foci():
    fine = bm.Domain.box((1, 32, 40), (2.0, 1.0, 0.75))
    shift = np.array([0.5, 0.375])  # the finer grid's origin is its own first centre
    z = np.array([14.0, 11.0, 0.3, np.log(2.5)])
    coarse = Foci(1).on(PLANE).states(z)[0, 0]
    moved = z.copy()
    moved[:2] += shift
    averages = Foci(1).on(fine).states(moved)[0, 0].reshape(16, 2, 20, 2).mean((1, 3))
    assert np.allclose(averages, coarse, atol=1e-12)


def test_a_mask_cuts_the_start():
    mask = np.ones((1, 16, 20), bool)
    mask[0, :, :6] = False
    domain = bm.Domain.box((1, 16, 20), (2.0, 2.0, 1.5), mask=mask)
    for start in (Foci(1), FreeStart(length=8.0)):
        bound = start.on(domain)
        u, by = bound.linear(bound.prior.mean)
        assert not u[~mask].any() and not by[:, ~mask].any() and u[mask].all()


def test_the_free_field_has_the_covariance_that_was_asked_for():
    bound = FreeStart(length=9.0, sd=2.0).on(bm.Domain.box((1, 24, 24), (2.5, 2.5, 2.5)))
    covariance = np.einsum("kyx,k->yx", bound.modes[:, 0], bound.modes[:, 0, 12, 12])
    far = 2.5 * np.arange(-8, 9)
    # Voxel averages are a little smoother than points.
    assert np.allclose(covariance[12, 4:21], 4.0 * np.exp(-0.5 * (far / 9.0) ** 2), atol=0.06)
    assert np.allclose(covariance[4:21, 12], covariance[12, 4:21])


@pytest.mark.parametrize("count", [1, 2])
def test_guesses_are_near(count):
    bound = Foci(count).on(PLANE)
    z = np.array([[10.0, 9.0, 0.0, np.log(3.0)], [22.0, 21.0, -0.5, np.log(2.5)]])[:count].reshape(-1)
    guesses = bound.guesses(bound.states(z)[0])
    places = [np.sort(g.reshape(count, 4)[:, :2], 0) for g in guesses]
    assert min(np.abs(p - z.reshape(count, 4)[:, :2]).max() for p in places) < 2.0
    assert all((g >= bound.limits[0]).all() and (g <= bound.limits[1]).all() for g in guesses)


def test_starts_that_are_refused():
    with pytest.raises(CalibrationError, match="at least one focus"):
        Foci(0)
    with pytest.raises(CalibrationError, match="one voxel"):
        Foci().on(bm.Domain.point())
    with pytest.raises(CalibrationError, match="below 1"):
        FreeStart(level=1.0)
    with pytest.raises(CalibrationError, match="cosines are needed .*longer length"):
        FreeStart(length=2.0).on(bm.Domain.box((1, 64, 64), (2.0, 2.0, 2.0)))


KINDS = {
    "cells": (Cells(), lambda u, p, rng: u + p["noise"] * rng.standard_normal(u.shape)),
    "outline": (
        Outline(weight=0.4), lambda u, p, rng: (u + p["edge"] * rng.standard_normal(u.shape) > p["threshold"]) * 1.0,
    ),
    "pet": (Uptake(weight=0.4), lambda u, p, rng: p["scale"] * u + p["noise"] * rng.standard_normal(u.shape)),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_likelihoods(kind):
    """Gradient against differences; the score's covariance is the Fisher information (times the weight)."""
    modality, simulate = KINDS[kind]
    rng = np.random.default_rng(1)
    u = rng.uniform(0, 0.8, 30)
    p = {q.name: 1.1 * q.typical for q in modality.parameters}
    seen, h = simulate(u, p, rng), 1e-6
    local = modality.local(u, seen, p)
    many = {n: np.full(2, v) for n, v in p.items()}
    assert np.allclose(modality.loss(np.stack((u, u)), seen, many), local.value)
    by = [(modality.loss(u + e, seen, p) - modality.loss(u - e, seen, p)) / (2 * h) for e in h * np.eye(30)]
    assert np.allclose(by, local.by_cells, atol=1e-5 * np.abs(local.by_cells).max())
    for i, n in enumerate(p):
        up, down = (modality.loss(u, seen, p | {n: p[n] + s * h}) for s in (1, -1))
        assert (up - down) / (2 * h) == pytest.approx(local.by_unknowns[i], rel=1e-4)
    scores = []
    for _ in range(3000):
        one = modality.local(u, simulate(u, p, rng), p)
        scores.append([one.by_cells.sum(), *one.by_unknowns])
    sampled = np.cov(np.array(scores).T) / getattr(modality, "weight", 1.0)
    # A change of all cell fractions at once is one direction: rows add up voxel by voxel.
    rows = [np.concatenate((a[None], b)) for a, b in local.rows]
    information = sum(r @ r.T for r in rows)
    sd = np.sqrt(np.diag(information))
    assert np.allclose(sampled / np.outer(sd, sd), information / np.outer(sd, sd), atol=0.12)


def test_observations_that_are_refused():
    values = np.zeros((1, 4, 4))
    with pytest.raises(InputError, match="no value was measured"):
        Observation(3.0, np.full((1, 4, 4), np.nan))
    with pytest.raises(InputError, match="cells of day 3: values from .*expected cell fractions"):
        Observation(3.0, values + 1500.0)
    with pytest.raises(InputError, match="other than 0 and 1"):
        Observation(3.0, values + 0.5, Outline())
    with pytest.raises(InputError, match="infinite"):
        Observation(3.0, np.where(np.arange(4) == 2, np.inf, values), Uptake())
    with pytest.raises(InputError, match="weight"):
        Outline(weight=0.0)
