"""Levenberg-Marquardt by torch.func: against exact solutions, without the matrix, and when memory runs out."""

import numpy as np
import pytest
import torch

from pinn.dde.secondorder import Dense, MatrixFree, Rows, marginal, minimise
from pinn.memory import Chunks, OutOfMemoryWarning, on_cpu_when_full

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(60, 5, generator=GENERATOR, dtype=torch.float64)
TARGET = torch.randn(60, generator=GENERATOR, dtype=torch.float64)


def linear(v, x):
    return x @ v


def curved(v, x):
    return torch.tanh(x @ v[:5]) * torch.exp(v[5])


@pytest.mark.parametrize("algebra", [Dense(), MatrixFree(tolerance=1e-8)])
def test_linear_least_squares_and_its_covariance(algebra):
    rows = [Rows(linear, X, 2.0, TARGET)]
    found = minimise(rows, torch.zeros(5, dtype=torch.float64), algebra, gain=1e-12)
    best = torch.linalg.lstsq(X, TARGET[:, None]).solution[:, 0]
    assert found.settled and torch.allclose(found.v, best, atol=1e-6)
    covariance = torch.linalg.inv(4 * X.T @ X)
    assert torch.allclose(marginal(found.linear, 2), covariance[3:, 3:], rtol=1e-5)


def test_without_the_matrix_the_same_minimum_is_found():
    rows = [Rows(curved, X, 1.0, 0.3 * TARGET), Rows(linear, torch.eye(6, dtype=torch.float64), 0.5)]
    start = 0.1 * torch.ones(6, dtype=torch.float64)
    dense = minimise(rows, start, Dense(), 200, 1e-12)
    free = minimise(rows, start, MatrixFree(tolerance=1e-6), 200, 1e-12)
    assert dense.objective < 0.95 * sum(0.5 * float(r.value(start).square().sum()) for r in rows)
    assert free.objective == pytest.approx(dense.objective, rel=1e-9)
    assert torch.allclose(free.v, dense.v, atol=1e-4)
    assert torch.allclose(marginal(free.linear, 3), marginal(dense.linear, 3), rtol=1e-3, atol=1e-9)


def test_rows_average_their_groups():
    rows = Rows(curved, X, torch.linspace(1, 2, 20, dtype=torch.float64), TARGET[:20], group=3)
    v = torch.linspace(-0.5, 0.5, 6, dtype=torch.float64)
    r, j = rows.linear(v)
    expected = rows.weight * (curved(v, X).reshape(20, 3).mean(1) - TARGET[:20])
    assert torch.allclose(r, expected) and torch.allclose(r, rows.value(v)) and torch.allclose(r, rows.traced(v))
    step = 1e-6 * torch.ones(6, dtype=torch.float64)
    assert torch.allclose(j @ step, (rows.value(v + step) - rows.value(v - step)) / 2, atol=1e-11)


def test_smaller_chunks_when_memory_runs_out():
    """The device refuses more than 20 points at once; the result is the same, and it is said."""
    rows = Rows(curved, X, 1.0, TARGET, chunks=Chunks(40))
    v = torch.linspace(-0.5, 0.5, 6, dtype=torch.float64)
    whole = Rows(curved, X, 1.0, TARGET).linear(v)
    held, refused = rows.chunks.over, []

    def small(function, points):
        def checked(x):
            if len(x) > 35:
                refused.append(len(x))
                raise torch.OutOfMemoryError("CUDA out of memory")
            return function(x)

        return held(checked, points)

    rows.chunks.over = small
    with pytest.warns(OutOfMemoryWarning, match="going on with 32 points"):
        found = rows.linear(v)
    assert refused == [40] and rows.chunks.size == 32
    assert all(torch.equal(a, b) for a, b in zip(found, whole, strict=True))
    rows.value(v)
    assert refused == [40]


def test_then_on_the_cpu_and_then_the_error():
    tried = []

    def work(device):
        tried.append(device.type)
        if device.type != "cpu":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 7

    with pytest.warns(OutOfMemoryWarning, match="starting again on the CPU"):
        assert on_cpu_when_full(work, torch.device("cuda")) == 7
    assert tried == ["cuda", "cpu"]

    def full(x):
        raise torch.OutOfMemoryError("out of memory")

    with pytest.warns(OutOfMemoryWarning), pytest.raises(torch.OutOfMemoryError):
        Chunks(64).over(full, X)
    with pytest.raises(torch.OutOfMemoryError):
        on_cpu_when_full(lambda device: full(X), torch.device("cpu"))


def test_nothing_is_wasted_at_the_minimum():
    """Where no step lowers the objective the search ends and says so."""
    best = torch.linalg.lstsq(X, TARGET[:, None]).solution[:, 0]
    found = minimise([Rows(linear, X, 1.0, TARGET)], best, iterations=50)
    assert found.settled and found.iterations <= 4 and np.isfinite(found.objective)
