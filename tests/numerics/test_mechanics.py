"""Elastic equilibrium on voxels: patch tests, exact solutions, order in space, both kernels, adjoint and tangent."""

import itertools

import numpy as np
import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from scipy.ndimage import gaussian_filter

from biomodel.errors import SolverError
from biomodel.solvers.elastic import Body, conjugate_gradients, forward_mode
from biomodel.solvers.elastic_kernels import Element, NumbaElastic, TorchElastic, lame
from biomodel.solvers.multigrid import to_coarse, to_fine


def rough_mask(seed: int = 0, shape=(7, 9, 11)) -> torch.Tensor:
    mask = torch.ones(shape, dtype=torch.bool)
    mask[3, 4, 5] = mask[0, :3] = mask[-1, -1, -4:] = False
    return mask


def corners(body: Body) -> list[torch.Tensor]:
    """Places (x, y, z) of the padded grid's corners, mm."""
    steps = [torch.arange(n, dtype=torch.float64) * h for n, h in zip(body.free.shape[1:], body.spacing, strict=True)]
    z, y, x = torch.meshgrid(*steps, indexing="ij")
    return [x, y, z]


def test_element_matrix_is_that_of_gauss_quadrature():
    """Of trilinear displacements with bubbles 1 - x², 1 - y², 1 - z² for each component, which are eliminated."""
    spacing, poisson = (3.0, 1.5, 1.2), 0.45
    mu, lam = lame(1.0, poisson)
    law = np.diag([2 * mu] * 3 + [mu] * 3)
    law[:3, :3] += lam
    h, root, whole = spacing[::-1], 1 / np.sqrt(3), np.zeros((33, 33))
    for point in itertools.product((-root, root), repeat=3):
        slopes = np.zeros((11, 3))
        for corner in range(8):
            sign = [2 * (corner >> d & 1) - 1 for d in range(3)]
            slopes[corner] = [sign[d] / (4 * h[d]) * np.prod([1 + sign[e] * point[e] for e in range(3) if e != d])
                              for d in range(3)]  # fmt: skip
        for d in range(3):
            slopes[8 + d, d] = -4 * point[d] / h[d]
        b = np.zeros((6, 33))
        for c in range(3):
            where = [*range(8 * c, 8 * c + 8), *range(24 + 3 * c, 27 + 3 * c)]
            b[c, where] = slopes[:, c]
            for row, pair in enumerate(((0, 1), (0, 2), (1, 2))):
                if c in pair:
                    b[3 + row, where] = slopes[:, sum(pair) - c]
        whole += b.T @ law @ b * np.prod(h) / 8
    corners, beside, bubbles = whole[:24, :24], whole[:24, 24:], whole[24:, 24:]
    expected = corners - beside @ np.linalg.solve(bubbles, beside.T)
    np.testing.assert_allclose(Element.of(spacing, poisson).matrix(), expected, atol=1e-14)


def test_both_kernels_agree_also_over_several_slabs_and_threads():
    rng, element = np.random.default_rng(0), Element.of((2.0, 1.5, 1.0), 0.4)
    w = torch.tensor(rng.standard_normal((2, 3, 12, 50, 40)))
    for rows in (1, 2):
        young = torch.tensor(1 + rng.random((rows, 11, 49, 39)))
        plain = TorchElastic.apply(w, young, element)
        threads, found = torch.get_num_threads(), []
        try:
            for n in (1, 2):
                torch.set_num_threads(n)
                found.append(NumbaElastic.apply(w, young, element))
        finally:
            torch.set_num_threads(threads)
        assert torch.equal(*found)
        np.testing.assert_allclose(found[0].numpy(), plain.numpy(), atol=1e-12)
        energy = TorchElastic.energy(w, w, element)
        np.testing.assert_allclose((energy * young).sum().numpy(), (w * plain).sum().numpy(), rtol=1e-12)


def test_patch_linear_displacements_are_reproduced():
    """On any body, displacements that are linear at the edge are linear inside, to machine precision."""
    body = Body(rough_mask(), (3.0, 1.5, 1.0), 0.45, True)
    slope = torch.tensor(np.random.default_rng(1).standard_normal((3, 3)) * 0.01)
    place = corners(body)
    linear = torch.stack([sum(slope[c, d] * place[d] for d in range(3)) for c in range(3)])[None]
    young = body.pad(torch.full((1, *body.mask.shape), 3.0, dtype=torch.float64))
    levels = body.multigrid(young)
    w = linear * (1 - body.free)
    w = w + conjugate_gradients(body, young, -levels.apply(0, w), 1e-14, ())
    used = body.free.any(0)
    assert float((w - linear)[:, :, used].abs().max()) < 1e-13 * float(linear.abs().max())


@pytest.mark.parametrize("shape", [(7, 9, 11), (1, 9, 11)])
def test_patch_uniform_pressure_without_support_expands_evenly(shape):
    mask = rough_mask()[: shape[0]] if shape[0] > 1 else rough_mask()[3:4]
    body = Body(mask, (3.0, 1.5, 1.0), 0.45, False)
    young, pressure = (torch.full((1, *shape), v, dtype=torch.float64) for v in (3.0, 0.5))
    _, w = body.equilibrium(young, pressure, 1e-14)
    mu, lam = lame(3.0, 0.45)
    dimensions = sum(n > 1 for n in shape)
    expansion = 0.5 / (2 * mu + dimensions * lam)
    for (i, j), e in body.strain(w).items():
        exact = expansion if i == j and shape[2 - i] > 1 else 0.0
        assert float((e[0][mask] - exact).abs().max()) < 1e-13
    # Rigid motion is left out.
    assert float((w.reshape(-1) @ body.rigid.T).abs().max()) < 1e-12


def test_layers_in_a_clamped_bar_are_exact():
    """One dimension: stress minus pressure is constant, whatever the moduli of the voxels."""
    rng, n, h = np.random.default_rng(2), 13, 1.5
    young, pressure = 1 + 9 * rng.random(n), rng.random(n)
    mu, lam = lame(young, 0.45)
    modulus = 2 * mu + lam
    constant = -(pressure / modulus).sum() / (1 / modulus).sum()
    strain = (pressure + constant) / modulus
    body = Body(torch.ones(1, 1, n, dtype=torch.bool), (h, h, h), 0.45, True)
    vm, w = body.equilibrium(torch.tensor(young)[None, None, None], torch.tensor(pressure)[None, None, None], 1e-14)
    np.testing.assert_allclose(body.strain(w)[0, 0][0, 0, 0].numpy(), strain, atol=1e-14)
    np.testing.assert_allclose(vm[0, 0, 0].numpy(), 2 * mu * np.abs(strain), atol=2e-6)


def potential(n: int, poisson: float):
    """Exact averages over n³ voxels of a clamped unit cube: w = grad phi, phi = prod (1 - cos 2 pi x_i).

    The pressure (2 mu + lame) laplace(phi) keeps it in equilibrium, whatever Poisson's ratio.
    """
    h, a = 1 / n, 2 * np.pi
    middle, edge, mean = (np.arange(n) + 0.5) * h, np.arange(n + 1) * h, np.sinc(h)
    flat, wave, slope = 1 - np.cos(a * middle) * mean, a * a * np.cos(a * middle) * mean, a * np.sin(a * middle) * mean

    def product(x, y, z):
        return z[:, None, None] * y[None, :, None] * x[None, None, :]

    hessian = {}
    for i in range(3):
        for j in range(i, 3):
            factors = [flat, flat, flat]
            if i == j:
                factors[i] = wave
            else:
                factors[i] = factors[j] = slope
            hessian[i, j] = product(*factors)
    at = [[1 - np.cos(a * edge)] * 3 for _ in range(3)]
    for c in range(3):
        at[c][c] = a * np.sin(a * edge)
    w = np.stack([product(*at[c]) for c in range(3)])
    mu, lam = lame(1.0, poisson)
    mean_strain = sum(hessian[i, i] for i in range(3)) / 3
    square = sum((hessian[i, i] - mean_strain) ** 2 for i in range(3))
    square = square + 2 * sum(hessian[p] ** 2 for p in ((0, 1), (0, 2), (1, 2)))
    return w, 2 * mu * np.sqrt(1.5 * square), (2 * mu + lam) * 3 * mean_strain


@pytest.mark.parametrize("poisson", [0.3, 0.45, 0.49])
def test_second_order_in_space(poisson):
    errors = []
    for n in (8, 16, 32):
        exact_w, exact_vm, pressure = potential(n, poisson)
        body = Body(torch.ones(n, n, n, dtype=torch.bool), (1 / n,) * 3, poisson, True)
        vm, w = body.equilibrium(torch.ones(1, n, n, n, dtype=torch.float64), torch.tensor(pressure)[None], 1e-10)
        errors.append([np.linalg.norm(a[0].numpy() - b) / np.linalg.norm(b) for a, b in ((w, exact_w), (vm, exact_vm))])
    found = np.log2(np.array(errors)[:-1] / np.array(errors)[1:])
    for what, e, order in zip(("displacement", "von Mises stress"), np.array(errors).T, found.T, strict=True):
        print(f"elasticity, Poisson {poisson}, {what}: errors {e}, orders {order}")
    assert (found > 1.9).all()


@pytest.mark.parametrize("poisson", [0.3, 0.45, 0.49])
def test_locking_of_shear_in_a_nearly_incompressible_body(poisson):
    """A divergence-free displacement held by body forces: elements that lock make it too small on coarse grids.

    Those without bubbles are off by 8 % on the coarsest one with 0.49.
    """
    a, errors = 2 * np.pi, []
    for n in (20, 40, 80):
        y, x = np.meshgrid(np.arange(n + 1) / n, np.arange(n + 1) / n, indexing="ij")
        # w = curl psi with psi = (1 - cos 2 pi x)(1 - cos 2 pi y); -div sigma = -mu laplace(w).
        flow = a * np.stack([(1 - np.cos(a * x)) * np.sin(a * y), -(1 - np.cos(a * y)) * np.sin(a * x), 0 * x])
        laplace = a**3 * np.stack([np.sin(a * y) * (2 * np.cos(a * x) - 1), np.sin(a * x) * (1 - 2 * np.cos(a * y)),
                                   0 * x])  # fmt: skip
        body = Body(torch.ones(1, n, n, dtype=torch.bool), (1.0, 1 / n, 1 / n), poisson, True)
        # Each of the two planes of corners carries half of a voxel's volume.
        load = -lame(1.0, poisson)[0] * torch.tensor(np.repeat(laplace[:, None], 2, 1))[None] / (2 * n**2)
        w = body.solve(torch.ones(1, 1, n, n, dtype=torch.float64), load * body.free, 1e-10)
        errors.append(np.linalg.norm(w[0, :, 0].numpy() - flow) / np.linalg.norm(flow))
    found = np.log2(np.array(errors[:-1]) / np.array(errors[1:]))
    print(f"divergence-free displacement, Poisson {poisson}: errors {np.array(errors)}, orders {found}")
    assert (found > 1.9).all() and errors[0] < 0.02


@pytest.mark.parametrize("clamped", [True, False])
@pytest.mark.parametrize("shape", [(6, 7, 8), (1, 9, 8)])
def test_adjoint_and_tangent_match_finite_differences(clamped, shape):
    rng = np.random.default_rng(3)
    mask = torch.tensor(rng.random(shape) < 0.95) if clamped else torch.ones(shape, dtype=torch.bool)
    body = Body(mask, (2.0, 1.5, 1.0), 0.45, clamped)
    weight = torch.tensor(rng.standard_normal((2, *shape))) * mask

    def objective(young, pressure):
        return (body.equilibrium(young, pressure, 1e-13)[0] * weight).sum()

    for rows in (1, 2):
        start = [torch.tensor(2 + 5 * rng.random((rows, *shape))), torch.tensor(rng.random((2, *shape)))]
        leaves = [x.clone().requires_grad_() for x in start]
        objective(*leaves).backward()
        for k, leaf in enumerate(leaves):
            # Along the gradient itself nothing cancels, so that the relative difference means something.
            direction, step = leaf.grad / leaf.grad.abs().max(), 1e-3

            def at(s, k=k, direction=direction, start=start):
                return float(objective(*(x + (s * direction if i == k else 0) for i, x in enumerate(start))))

            difference = (at(-2 * step) - 8 * at(-step) + 8 * at(step) - at(2 * step)) / (12 * step)
            adjoint = float((leaf.grad * direction).sum())
            with forward_mode():
                dual = [forward_ad.make_dual(x, direction) if i == k else x for i, x in enumerate(start)]
                tangent = float(forward_ad.unpack_dual(objective(*dual)).tangent)
            assert abs(adjoint - difference) < 1e-6 * abs(difference)
            assert abs(adjoint - tangent) < 1e-9 * abs(difference)


def test_a_cycle_is_a_symmetric_operator_and_levels_are_transposes():
    rng = np.random.default_rng(4)
    body = Body(rough_mask(), (3.0, 1.5, 1.0), 0.45, True)
    levels = body.multigrid(body.pad(torch.tensor(1 + 9 * rng.random((1, *body.mask.shape)))))
    a, b = (torch.tensor(rng.standard_normal((1, *body.free.shape))) * body.free for _ in range(2))
    left, right = float((a * levels.cycle(b.clone())).sum()), float((b * levels.cycle(a.clone())).sum())
    assert abs(left - right) < 1e-12 * abs(left)
    assert float((a * levels.cycle(a.clone())).sum()) > 0
    halved = (True, False, True)
    fine, coarse = torch.tensor(rng.standard_normal((3, 9, 6, 7))), torch.tensor(rng.standard_normal((3, 5, 6, 4)))
    np.testing.assert_allclose((fine * to_fine(coarse, halved)).sum(), (to_coarse(fine, halved) * coarse).sum())


def test_iterations_hardly_grow_with_the_grid(monkeypatch):
    """Moduli that differ by a factor of ten on a ball: multigrid must not need more than a few tens of iterations."""
    monkeypatch.setattr("biomodel.solvers.elastic.ITERATIONS", 30)
    rng = np.random.default_rng(5)
    for n in (12, 24, 33):
        z, y, x = np.meshgrid(*[np.linspace(-1, 1, n)] * 3, indexing="ij")
        mask = torch.tensor(z**2 + y**2 + x**2 < 0.95)
        young = np.where(gaussian_filter(rng.standard_normal((n, n, n)), 2) > 0, 4.0, 2.0)
        young[(z - 0.2) ** 2 + y**2 + x**2 < 0.1] = 20.0
        u = np.exp(-((z - 0.2) ** 2 + y**2 + x**2) / 0.1)
        body = Body(mask, (1.0, 1.0, 1.0), 0.45, True)
        body.equilibrium(torch.tensor(young)[None], torch.tensor(u)[None], 1e-8)


def test_recycled_displacements_save_iterations_and_change_nothing(monkeypatch):
    rng = np.random.default_rng(6)
    body = Body(rough_mask(), (3.0, 1.5, 1.0), 0.45, True)
    young, pressure = (torch.tensor(1 + rng.random((2, *body.mask.shape))) for _ in range(2))
    first = body.equilibrium(young, pressure, 1e-12)[1]
    second = body.equilibrium(young, pressure**2, 1e-12)[1]
    mixed = pressure * torch.tensor([0.3, 0.7]).reshape(2, 1, 1, 1) - 0.2 * pressure**2
    cold = body.equilibrium(young, mixed, 1e-10)[1]
    monkeypatch.setattr("biomodel.solvers.elastic.ITERATIONS", 1)
    warm = body.equilibrium(young, mixed, 1e-8, (first, second))[1]
    assert float((warm - cold).norm() / cold.norm()) < 1e-7
    with pytest.raises(SolverError, match="relative residual"):
        body.equilibrium(young, mixed, 1e-8)


def test_no_pressure_is_no_stress():
    body = Body(rough_mask(), (3.0, 1.5, 1.0), 0.45, True)
    young = torch.full((1, *body.mask.shape), 3.0, dtype=torch.float64)
    pressure = torch.zeros_like(young, requires_grad=True)
    vm, w = body.equilibrium(young, pressure, 1e-10)
    vm.sum().backward()
    assert not vm.any() and not w.any() and bool(torch.isfinite(pressure.grad).all())
