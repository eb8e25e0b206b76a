"""The self-scaled Broyden update and its descent."""

import numpy as np
import torch
from scipy.optimize import rosen, rosen_der

from pinn.dde.selfscaled import descend, updated


def rosenbrock(x):
    return float(rosen(x.numpy())), torch.tensor(rosen_der(x.numpy()))


def test_update_satisfies_the_secant_equation_and_stays_positive():
    rng = np.random.default_rng(0)
    for _ in range(20):
        root = rng.standard_normal((6, 6))
        h = torch.tensor(root @ root.T + 0.1 * np.eye(6))
        s, y = torch.tensor(rng.standard_normal(6)), torch.tensor(rng.standard_normal(6))
        y = y if float(y @ s) > 0 else -y
        new = updated(h, s, y, torch.linalg.solve(h, s))
        assert torch.allclose(new @ y, s, atol=1e-10)
        assert torch.allclose(new, new.T)
        assert float(torch.linalg.eigvalsh(new).min()) > 0


def test_exact_curvature_is_left_alone():
    """With H the inverse Hessian of a quadratic, step and change of gradient say nothing new."""
    root = np.random.default_rng(1).standard_normal((5, 5))
    hessian = torch.tensor(root @ root.T + np.eye(5))
    s = torch.arange(1.0, 6, dtype=torch.float64)
    h = torch.linalg.inv(hessian)
    assert torch.allclose(updated(h, s, hessian @ s, hessian @ s), h, atol=1e-9)


def test_descends_along_a_bent_valley():
    found = descend(rosenbrock, torch.full((10,), -1.0, dtype=torch.float64), 500)
    assert found.value < 1e-16 and found.reason == "the gradient vanishes"
    assert torch.allclose(found.x, torch.ones(10, dtype=torch.float64), atol=1e-7)
    print("iterations, evaluations:", found.iterations, found.evaluations)
    assert found.iterations < 200


def test_stops_where_asked_and_where_nothing_is_to_be_gained():
    asked = descend(rosenbrock, torch.zeros(4, dtype=torch.float64), watch=lambda i, x: i == 3)
    assert asked.iterations == 3 and asked.reason == "asked to stop"
    flat = descend(lambda x: (float(x.abs().sum()), torch.sign(x)), torch.tensor([0.3, -0.2]).double(), 100)
    assert flat.iterations < 100 and flat.reason == "no step lowers the value any more"
