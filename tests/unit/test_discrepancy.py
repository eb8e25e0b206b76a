"""Outliers, noisy edges and shared errors lower the weight of images; right noise leaves it alone."""

import numpy as np
import pytest

from biomodel.calibration.discrepancy import OUTLIER, blocks_of, edge_groups, inflation, weights


def test_right_noise_keeps_its_weight():
    rng = np.random.default_rng(0)
    variance = rng.uniform(0.5, 2, 4000)
    found = weights(rng.standard_normal(4000) * np.sqrt(variance), variance, np.repeat([0, 1], 2000))
    assert np.median(found) > 0.94 and np.mean(found < 0.9) < 0.01


def test_an_outlier_pulls_with_a_bounded_force():
    residual = np.concatenate((np.random.default_rng(1).standard_normal(500), [50.0]))
    found = weights(residual, np.ones(501), np.zeros(501, int))
    scale = (20 + np.sum(residual**2)) / (20 + 501)
    assert abs(found[-1] * 50 - OUTLIER / np.sqrt(scale)) < 1e-9


def test_each_group_has_its_own_scale():
    rng = np.random.default_rng(2)
    residual = np.concatenate((rng.standard_normal(3000), 5 * rng.standard_normal(3000)))
    found = weights(residual, np.ones(6000), np.repeat([0, 1], 3000))
    assert np.median(found[:3000]) > 0.94
    assert np.median(found[3000:]) == pytest.approx(1 / 25, rel=0.1)


def test_edges_are_one_voxel_wide_on_both_sides():
    region = np.zeros((1, 1, 12), bool)
    region[..., 3:9] = True
    empty = np.zeros_like(region)
    rows = np.ones((2, 1, 1, 12), bool)
    found = edge_groups(rows, [region, region, empty], (2.0, 2.0, 2.0)).reshape(2, 12)
    assert found[0].tolist() == [2, 2, 1, 1, 0, 0, 0, 0, 1, 1, 2, 2]
    # The first region's edge stays an edge where nothing is seen any more.
    assert found[1].tolist() == [2, 2, 1, 1, 2, 2, 2, 2, 1, 1, 2, 2]


@pytest.mark.parametrize("shared, low, high", [(0.0, 0.99, 1.3), (0.5, 8.0, 40.0)])
def test_errors_shared_within_blocks_inflate(shared, low, high):
    rng = np.random.default_rng(3)
    rows = np.ones((1, 16, 16, 16), bool)
    blocks = blocks_of(rows, (2.0, 2.0, 2.0))
    assert blocks.max() == 63 and np.bincount(blocks).tolist() == [64] * 64
    jacobian = rng.standard_normal((2, 1)) + 0.3 * rng.standard_normal((2, 4096))
    error = rng.standard_normal(4096) + shared * rng.standard_normal(64)[blocks]
    found = inflation(jacobian * error, blocks, jacobian @ jacobian.T, np.eye(2))
    assert low < found < high  # never below 1


def test_nothing_to_judge_by_leaves_the_weight_alone():
    assert inflation(np.zeros((2, 50)), np.zeros(50, int), np.zeros((2, 2)), np.eye(2)) == 1.0
    assert inflation(np.ones((1, 50)), np.zeros(50, int), np.eye(1), np.eye(1)) == 1.0
