"""Matérn prior by cosine transforms, and the low-rank posterior against dense linear algebra."""

import numpy as np
import pytest
from scipy.special import gamma, kv

from biomodel.calibration.field_prior import FieldPrior, Matern
from biomodel.calibration.lowrank import conjugate_gradients, leading, remainder
from biomodel.errors import CalibrationError


def matern(distance, smoothness, kappa):
    x = np.maximum(kappa * distance, 1e-12)
    return 2 ** (1 - smoothness) / gamma(smoothness) * x**smoothness * kv(smoothness, x)


@pytest.mark.parametrize(("shape", "smoothness"), [((1, 1, 200), 1.5), ((1, 80, 80), 1.0), ((40, 40, 40), 0.5)])
def test_covariance_is_that_of_a_matern_field(shape, smoothness):
    prior = FieldPrior(Matern(length=12.0, sd=0.7), shape, (1.0, 1.0, 1.0))
    centre = tuple(n // 2 for n in shape)
    point = np.zeros((1, *shape))
    point[(0, *centre)] = 1.0
    found = prior.covariance(point)[0][centre[0], centre[1], centre[2] :]
    distance = np.arange(len(found))[:25]
    expected = matern(distance, smoothness, np.sqrt(8 * smoothness) / 12.0)
    np.testing.assert_allclose(found[:25] / found[0], expected, atol=0.04)
    assert found[0] == pytest.approx(0.49, rel=0.03)
    assert found[12] / found[0] == pytest.approx(0.14, abs=0.04)


def test_variance_is_even_up_to_the_border():
    prior = FieldPrior(Matern(length=8.0, sd=0.5), (12, 12, 12), (2.0, 2.0, 2.0))
    for place in ((0, 0, 0), (0, 6, 6), (6, 6, 6)):
        point = np.zeros((1, 12, 12, 12))
        point[(0, *place)] = 1.0
        assert prior.covariance(point)[(0, *place)] == pytest.approx(0.25, rel=0.12)


def test_root_and_its_transpose():
    prior = FieldPrior(Matern(), (6, 7, 8), (2.0, 2.0, 3.0))
    rng = np.random.default_rng(0)
    white, field = rng.standard_normal((3, prior.size)), rng.standard_normal((3, 6, 7, 8))
    forth, back = (prior.root(white) * field).sum(), (white * prior.transpose(field)).sum()
    assert forth == pytest.approx(back, rel=1e-12)


@pytest.mark.parametrize("values", [{"length": 0.0}, {"sd": -1.0}])
def test_prior_needs_positive_numbers(values):
    with pytest.raises(CalibrationError, match="expected positive numbers"):
        Matern(**values)


@pytest.fixture(scope="module")
def problem():
    """A linear-Gaussian problem: a few observations of many unknowns."""
    rng = np.random.default_rng(1)
    matrix = rng.standard_normal((12, 300)) * np.geomspace(10, 0.01, 12)[:, None]
    return matrix, rng.standard_normal(12)


def test_posterior_equals_the_analytic_one(problem):
    matrix, data = problem
    found = leading(lambda x: matrix.T @ (matrix @ x), 300, floor=1e-12)
    exact = np.linalg.inv(np.eye(300) + matrix.T @ matrix)
    np.testing.assert_allclose(found.covariance(np.eye(300)), exact, atol=1e-8)
    root = found.root(np.eye(300))
    np.testing.assert_allclose(root @ root.T, exact, atol=1e-8)
    mean, _ = conjugate_gradients(lambda x: matrix.T @ (matrix @ x), matrix.T @ data, 1e-12)
    np.testing.assert_allclose(mean, exact @ matrix.T @ data, atol=1e-8)
    expected = 0.5 * np.linalg.slogdet(np.eye(12) + matrix @ matrix.T)[1]
    assert found.information == pytest.approx(expected, rel=1e-8)


def test_all_pairs_above_the_floor_are_found(problem):
    matrix, _ = problem
    exact = np.sort(np.linalg.eigvalsh(matrix @ matrix.T))[::-1]
    found = leading(lambda x: matrix.T @ (matrix @ x), 300, floor=1.0)
    np.testing.assert_allclose(found.values, exact[exact >= 1.0], rtol=1e-3)
    assert found.next_value < 1.0


def test_a_cut_off_is_seen(problem):
    matrix, _ = problem
    found = leading(lambda x: matrix.T @ (matrix @ x), 300, floor=1e-9, most=5)
    assert found.products == 5


def test_what_the_rank_leaves_out_is_estimated(problem):
    matrix, _ = problem

    def product(x):
        return matrix.T @ (matrix @ x)

    known = leading(product, 300, floor=1.0)
    rest = remainder(product, known, 300, probes=60, steps=12)
    exact = 0.5 * np.linalg.slogdet(np.eye(12) + matrix @ matrix.T)[1]
    assert 0 < exact - known.information
    assert known.information + rest == pytest.approx(exact, abs=0.15)


def test_known_pairs_precondition(problem):
    matrix, data = problem

    def product(x):
        return matrix.T @ (matrix @ x)

    plain, many = conjugate_gradients(product, matrix.T @ data, 1e-8)
    known = leading(product, 300, floor=1.0)
    found, few = conjugate_gradients(product, matrix.T @ data, 1e-8, known=known)
    np.testing.assert_allclose(found, plain, atol=1e-6)
    assert few < many


@pytest.mark.parametrize(
    ("length", "shape", "words"), [(1.0, (1, 6, 6), "shorter than a voxel"), (9.0, (1, 1, 1), "a single voxel")]
)
def test_prior_needs_voxels_that_inform_each_other(length, shape, words):
    with pytest.raises(CalibrationError, match=words):
        FieldPrior(Matern(length, 0.3), shape, (2.0, 2.0, 2.0))
