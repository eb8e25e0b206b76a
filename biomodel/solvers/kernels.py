"""The stages of the diffusion step and the closed-form reaction, on CPU (numba) and anywhere else (eager torch).

Arrays are padded by one voxel on each side and laid out (batch, z, y, x). Face conductances carry the lower face of
each voxel (`fx[..., i]` couples voxels i - 1 and i), already divided by the squared spacing and zero wherever a voxel
of the pair lies outside the mask, so that the mask's boundary has exactly zero flux and the operator

    (L u)_i = sum over faces f_(i,i+1) (u_(i+1) - u_i) - f_(i-1,i) (u_i - u_(i-1))

is symmetric. Padding voxels are never written.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numba
import numpy as np
import torch

# Compiled without numba's own threading, which takes several times longer to compile: each kernel works on a range of
# rows (batch member, z slab) and releases the interpreter lock, so plain threads share the rows.
_jit = numba.njit(fastmath={"contract", "nsz", "arcp", "reassoc"}, cache=True, nogil=True, error_model="numpy")
#: Fewest voxels for which a second thread pays.
THREADED = 60_000


@lru_cache(maxsize=4)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="tumorcast-kernel")


def _rows(kernel, count: int, size: int, *arguments) -> None:
    """Run a kernel over `count` rows, on several threads where the arrays are large."""
    threads = min(torch.get_num_threads(), count) if size >= THREADED else 1
    if threads == 1:
        kernel(0, count, *arguments)
        return
    cuts = [count * t // threads for t in range(threads + 1)]
    jobs = [_pool(threads - 1).submit(kernel, a, b, *arguments) for a, b in zip(cuts[1:-1], cuts[2:], strict=True)]
    kernel(cuts[0], cuts[1], *arguments)
    for job in jobs:
        job.result()


@_jit
def _stage(begin, end, out, y, first, second, older, p, q, r, s, c, fz, fy, fx, kind):
    # kind 0: out = r y + c L y; kind 1: p first is added; kind 2: q second and s older too.
    # Faces repeat over the batch.
    nb, nz, ny, nx = y.shape
    nf = fz.shape[0]
    for row in range(begin, end):
        b = row // (nz - 2)
        k = row % (nz - 2) + 1
        f = b % nf
        cb = c[b]
        for j in range(1, ny - 1):
            mid, south, north, below, above = y[b, k, j], y[b, k, j - 1], y[b, k, j + 1], y[b, k - 1, j], y[b, k + 1, j]
            ax, ay, ayn, az, azn = fx[f, k, j], fy[f, k, j], fy[f, k, j + 1], fz[f, k, j], fz[f, k + 1, j]
            o = out[b, k, j]
            if kind == 0:
                for i in range(1, nx - 1):
                    v = mid[i]
                    o[i] = r * v + cb * (
                        ax[i + 1] * (mid[i + 1] - v) - ax[i] * (v - mid[i - 1])
                        + ayn[i] * (north[i] - v) - ay[i] * (v - south[i])
                        + azn[i] * (above[i] - v) - az[i] * (v - below[i])
                    )
            elif kind == 1:
                y0 = first[b, k, j]
                for i in range(1, nx - 1):
                    v = mid[i]
                    o[i] = p * y0[i] + r * v + cb * (
                        ax[i + 1] * (mid[i + 1] - v) - ax[i] * (v - mid[i - 1])
                        + ayn[i] * (north[i] - v) - ay[i] * (v - south[i])
                        + azn[i] * (above[i] - v) - az[i] * (v - below[i])
                    )
            else:
                y0, y1, y2 = first[b, k, j], second[b, k, j], older[b, k, j]
                for i in range(1, nx - 1):
                    v = mid[i]
                    o[i] = p * y0[i] + q * y1[i] + r * v + s * y2[i] + cb * (
                        ax[i + 1] * (mid[i + 1] - v) - ax[i] * (v - mid[i - 1])
                        + ayn[i] * (north[i] - v) - ay[i] * (v - south[i])
                        + azn[i] * (above[i] - v) - az[i] * (v - below[i])
                    )


@_jit
def _add_operator(begin, end, out, y, c, fz, fy, fx):
    # out += c L y
    nb, nz, ny, nx = y.shape
    nf = fz.shape[0]
    for row in range(begin, end):
        b = row // (nz - 2)
        k = row % (nz - 2) + 1
        f = b % nf
        cb = c[b]
        if cb != 0:
            for j in range(1, ny - 1):
                for i in range(1, nx - 1):
                    v = y[b, k, j, i]
                    out[b, k, j, i] += cb * (
                        fx[f, k, j, i + 1] * (y[b, k, j, i + 1] - v) - fx[f, k, j, i] * (v - y[b, k, j, i - 1])
                        + fy[f, k, j + 1, i] * (y[b, k, j + 1, i] - v) - fy[f, k, j, i] * (v - y[b, k, j - 1, i])
                        + fz[f, k + 1, j, i] * (y[b, k + 1, j, i] - v) - fz[f, k, j, i] * (v - y[b, k - 1, j, i])
                    )


@_jit
def _energy(begin, end, partial, y, z, fz, fy, fx):
    # partial[b, k] = <L y, z> over slab k, accumulated in float64 (by slab, so independent of the thread count)
    nb, nz, ny, nx = y.shape
    nf = fz.shape[0]
    for row in range(begin, end):
        b = row // (nz - 2)
        k = row % (nz - 2) + 1
        f = b % nf
        total = 0.0
        for j in range(1, ny - 1):
            line = 0.0
            for i in range(1, nx - 1):
                v = y[b, k, j, i]
                line += z[b, k, j, i] * (
                    fx[f, k, j, i + 1] * (y[b, k, j, i + 1] - v) - fx[f, k, j, i] * (v - y[b, k, j, i - 1])
                    + fy[f, k, j + 1, i] * (y[b, k, j + 1, i] - v) - fy[f, k, j, i] * (v - y[b, k, j - 1, i])
                    + fz[f, k + 1, j, i] * (y[b, k + 1, j, i] - v) - fz[f, k, j, i] * (v - y[b, k - 1, j, i])
                )
            total += line
        partial[b, k] = total


@_jit
def _stage_and_energy(begin, end, out, partial, y, first, other, p, r, c, fz, fy, fx):
    # out = p first + r y + c L y and partial[b, k] = <L y, other> in one pass: the adjoint of a two-stage step
    nb, nz, ny, nx = y.shape
    nf = fz.shape[0]
    for row in range(begin, end):
        b = row // (nz - 2)
        k = row % (nz - 2) + 1
        f = b % nf
        cb = c[b]
        total = 0.0
        for j in range(1, ny - 1):
            mid, south, north, below, above = y[b, k, j], y[b, k, j - 1], y[b, k, j + 1], y[b, k - 1, j], y[b, k + 1, j]
            ax, ay, ayn, az, azn = fx[f, k, j], fy[f, k, j], fy[f, k, j + 1], fz[f, k, j], fz[f, k + 1, j]
            o, y0, w = out[b, k, j], first[b, k, j], other[b, k, j]
            line = 0.0
            for i in range(1, nx - 1):
                v = mid[i]
                change = (
                    ax[i + 1] * (mid[i + 1] - v) - ax[i] * (v - mid[i - 1])
                    + ayn[i] * (north[i] - v) - ay[i] * (v - south[i])
                    + azn[i] * (above[i] - v) - az[i] * (v - below[i])
                )
                o[i] = p * y0[i] + r * v + cb * change
                line += w[i] * change
            total += line
        partial[b, k] = total


@_jit
def _face_products(begin, end, gz, gy, gx, y, z, c):
    # derivative of c <L y, z> by the faces, added to g
    nb, nz, ny, nx = y.shape
    nf = gz.shape[0]
    for k in range(begin + 1, end + 1):
        for b in range(nb):
            f = b % nf
            cb = c[b]
            for j in range(1, ny):
                for i in range(1, nx):
                    v, w = y[b, k, j, i], z[b, k, j, i]
                    gx[f, k, j, i] -= cb * (v - y[b, k, j, i - 1]) * (w - z[b, k, j, i - 1])
                    gy[f, k, j, i] -= cb * (v - y[b, k, j - 1, i]) * (w - z[b, k, j - 1, i])
                    gz[f, k, j, i] -= cb * (v - y[b, k - 1, j, i]) * (w - z[b, k - 1, j, i])


@_jit
def _bernoulli(begin, end, out, u, a, b):
    nb, nz, ny, nx = u.shape
    for row in range(begin, end):
        n = row // (nz - 2)
        k = row % (nz - 2) + 1
        an, bn = a[n], b[n]
        for j in range(1, ny - 1):
            for i in range(1, nx - 1):
                v = u[n, k, j, i]
                out[n, k, j, i] = v * an / (1 + bn * v)


@_jit
def _bernoulli_adjoint(begin, end, lam, partial, u, a, b):
    # lam <- d out/d u * lam; partial[n, k] = sums of lam * (d out/d a, d out/d b)
    nb, nz, ny, nx = u.shape
    for row in range(begin, end):
        n = row // (nz - 2)
        k = row % (nz - 2) + 1
        an, bn = a[n], b[n]
        ga, gb = 0.0, 0.0
        for j in range(1, ny - 1):
            la, lb = 0.0, 0.0
            for i in range(1, nx - 1):
                v = u[n, k, j, i]
                d = 1 / (1 + bn * v)
                w = lam[n, k, j, i] * d
                la += w * v
                w = w * d
                lb -= w * v * v
                lam[n, k, j, i] = w * an
            ga += la
            gb += lb * an
        partial[n, k, 0] = ga
        partial[n, k, 1] = gb


@_jit
def _bernoulli_tangent(begin, end, tan, u, a, b, da, db):
    # tan (directions, batch, ...) <- d out/d u tan + d out/d a da + d out/d b db
    nd, nb, nz, ny, nx = tan.shape
    for row in range(begin, end):
        n = row // (nz - 2)
        k = row % (nz - 2) + 1
        an, bn = a[n], b[n]
        for e in range(nd):
            dan, dbn = da[e, n], db[e, n]
            for j in range(1, ny - 1):
                for i in range(1, nx - 1):
                    v = u[n, k, j, i]
                    d = 1 / (1 + bn * v)
                    tan[e, n, k, j, i] = d * (an * d * tan[e, n, k, j, i] + v * (dan - an * v * d * dbn))


def rkc_coefficients(stages: int) -> list[tuple[float, float, float, float, float]]:
    """Coefficients (p, q, r, s, c) of the second-order Runge-Kutta-Chebyshev step with `stages` >= 2 stages.

    Stage j of Y_j = p Y_0 + q Y_1 + r Y_(j-1) + s Y_(j-2) + c h A Y_(j-1); the first entry is (0, 0, 1, 0, c).
    For a linear operator h A Y_0 = (Y_1 - Y_0) / c_1, which removes the method's second operator.
    Sommeijer, Shampine and Verwer 1998, J Comput Appl Math 88:315, doi:10.1016/S0377-0427(97)00219-7.
    """
    w0 = 1 + (2 / 13) / stages**2
    t, dt, ddt = [1.0, w0], [0.0, 1.0], [0.0, 0.0]
    for _ in range(2, stages + 1):
        t.append(2 * w0 * t[-1] - t[-2])
        dt.append(2 * w0 * dt[-1] - dt[-2] + 2 * t[-2])
        ddt.append(2 * w0 * ddt[-1] - ddt[-2] + 4 * dt[-2])
    w1 = dt[stages] / ddt[stages]
    b = [ddt[j] / dt[j] ** 2 if j >= 2 else 0.0 for j in range(stages + 1)]
    b[0] = b[1] = b[2]
    a = [1 - b[j] * t[j] for j in range(stages + 1)]
    first = b[1] * w1
    found = [(0.0, 0.0, 1.0, 0.0, first)]
    for j in range(2, stages + 1):
        mu, nu = 2 * b[j] * w0 / b[j - 1], -b[j] / b[j - 2]
        c = 2 * b[j] * w1 / b[j - 1]
        gamma = -a[j - 1] * c
        found.append((1 - mu - nu - gamma / first, gamma / first, mu, nu, c))
    return found


def rkc_bound(stages: int) -> float:
    """Largest stable product of step and spectral radius for `stages` stages (same source, with damping)."""
    return 2 / 3 * (stages**2 - 1) * (1 - 2 / 15 * (2 / 13))


def rkc_stages(radius: float) -> int:
    """Fewest stages that are stable for step times spectral radius = `radius`."""
    stages = max(2, math.ceil(math.sqrt(1.5 * radius / (1 - 2 / 15 * (2 / 13)) + 1)))
    return stages if rkc_bound(stages) >= radius else stages + 1


def _count(y: np.ndarray) -> int:
    return y.shape[0] * (y.shape[1] - 2)


class NumbaKernels:
    """Fused kernels on CPU arrays (numpy views of torch tensors)."""

    @staticmethod
    def stage(out, y, first, second, older, coefficients, c, faces):
        p, q, r, s = (y.dtype.type(v) for v in coefficients)
        kind = 0 if first is None else (1 if older is None else 2)
        _rows(_stage, _count(y), y.size, out, y, y if first is None else first, y if second is None else second,
              y if older is None else older, p, q, r, s, c, *faces, kind)  # fmt: skip

    @staticmethod
    def array(tensor: torch.Tensor) -> np.ndarray:
        """The array these kernels work on, without a copy."""
        return tensor.detach().numpy()

    tensor = staticmethod(torch.from_numpy)

    @staticmethod
    def add_operator(out, y, c, faces):
        _rows(_add_operator, _count(y), y.size, out, y, c, *faces)

    @staticmethod
    def face_products(grad, y, z, c):
        _rows(_face_products, y.shape[1] - 1, y.size, *grad, y, z, c)

    @staticmethod
    def bernoulli(out, u, a, b):
        _rows(_bernoulli, _count(u), u.size, out, u, a, b)

    @staticmethod
    def bernoulli_tangent(tan, u, a, b, da, db):
        _rows(_bernoulli_tangent, _count(u), tan.size, tan, u, a, b, da, db)

    @staticmethod
    def energy(y, z, faces):
        """<L y, z> for each of the batch, in float64."""
        partial = np.zeros(y.shape[:2])
        _rows(_energy, _count(y), y.size, partial, y, z, *faces)
        return partial.sum(1)

    @staticmethod
    def stage_and_energy(out, y, first, other, coefficients, c, faces):
        """A stage of at most two terms, and <L y, other> for each of the batch."""
        p, r = (y.dtype.type(v) for v in coefficients)
        partial = np.zeros(y.shape[:2])
        first = y if first is None else first
        _rows(_stage_and_energy, _count(y), y.size, out, partial, y, first, other, p, r, c, *faces)
        return partial.sum(1)

    @staticmethod
    def bernoulli_adjoint(lam, u, a, b):
        partial = np.zeros((*u.shape[:2], 2))
        _rows(_bernoulli_adjoint, _count(u), u.size, lam, partial, u, a, b)
        return partial.sum(1)


def _inner(y):
    return y[..., 1:-1, 1:-1, 1:-1]


def _operator(y, faces):
    """L y on the interior, by slices."""
    if faces[0].shape[0] not in (1, y.shape[0]):  # tangents: (directions * batch), faces repeat over the batch
        faces = [f.repeat(y.shape[0] // f.shape[0], 1, 1, 1) for f in faces]
    total = 0.0
    for axis, face in zip((-3, -2, -1), faces, strict=True):
        others = [a for a in (-3, -2, -1) if a != axis]
        jump = y.narrow(axis, 1, y.shape[axis] - 1) - y.narrow(axis, 0, y.shape[axis] - 1)
        flux = face.narrow(axis, 1, face.shape[axis] - 1) * jump
        for other in others:
            flux = flux.narrow(other, 1, flux.shape[other] - 2)
        total = total + flux.narrow(axis, 1, flux.shape[axis] - 1) - flux.narrow(axis, 0, flux.shape[axis] - 1)
    return total


def _column(c):
    return c[..., None, None, None]


class TorchKernels:
    """The same operations by eager torch, for GPUs."""

    array = staticmethod(torch.Tensor.detach)
    tensor = staticmethod(lambda array: array)

    @staticmethod
    def stage(out, y, first, second, older, coefficients, c, faces):
        p, q, r, s = coefficients
        value = _column(c) * _operator(y, faces) + r * _inner(y)
        for weight, other in ((p, first), (q, second), (s, older)):
            if other is not None:
                value += weight * _inner(other)
        _inner(out).copy_(value)

    @staticmethod
    def add_operator(out, y, c, faces):
        _inner(out).add_(_column(c) * _operator(y, faces))

    @staticmethod
    def energy(y, z, faces):
        return (_inner(z) * _operator(y, faces)).to(torch.float64).sum((1, 2, 3))

    @staticmethod
    def stage_and_energy(out, y, first, other, coefficients, c, faces):
        p, r = coefficients
        change = _operator(y, faces)
        value = _column(c) * change + r * _inner(y)
        if first is not None:
            value += p * _inner(first)
        _inner(out).copy_(value)
        return (_inner(other) * change).to(torch.float64).sum((1, 2, 3))

    @staticmethod
    def face_products(grad, y, z, c):
        for axis, g in zip((-3, -2, -1), grad, strict=True):
            n = y.shape[axis]
            product = (y.narrow(axis, 1, n - 1) - y.narrow(axis, 0, n - 1)) * (
                z.narrow(axis, 1, n - 1) - z.narrow(axis, 0, n - 1)
            )
            product = _column(c) * product
            target = g.narrow(axis, 1, n - 1)
            target.sub_(product if g.shape[0] > 1 else product.sum(0, keepdim=True))

    @staticmethod
    def bernoulli(out, u, a, b):
        out.copy_(u * _column(a) / (1 + _column(b) * u))

    @staticmethod
    def bernoulli_adjoint(lam, u, a, b):
        d = 1 / (1 + _column(b) * u)
        w = lam * d
        ga = (w * u).to(torch.float64).sum((1, 2, 3))
        w = w * d
        gb = -(w * u * u * _column(a)).to(torch.float64).sum((1, 2, 3))
        lam.copy_(w * _column(a))
        return torch.stack((ga, gb), -1)

    @staticmethod
    def bernoulli_tangent(tan, u, a, b, da, db):
        d = 1 / (1 + _column(b) * u)
        tan.copy_(d * (_column(a) * d * tan + u * (_column(da) - _column(a) * u * d * _column(db))))
