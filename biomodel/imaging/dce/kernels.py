"""Fit of models with one exponential and a plasma part that share one input, compiled.

C = K b(k) + v c is linear in K and v, so only the rate k is searched for: at each k the best K and v between their
bounds are known in closed form (variable projection; Golub and Pereyra 1973, SIAM J Numer Anal 10:413,
doi:10.1137/0710036). The search starts at the best of a grid of rates, whose scalar products with the data are one
matrix product for many voxels, and is a safeguarded secant in log k between the grid's neighbours, so that it ends in
the best minimum that the grid sees.

Rates are per second here, K is per second.
"""

from __future__ import annotations

import math

import numba
import numpy as np

_jit = numba.njit(fastmath={"contract", "nsz", "arcp", "reassoc"}, cache=True, nogil=True, error_model="numpy")

FITTED, AT_BOUND, NOT_CONVERGED = 0, 5, 6


@_jit
def _phi(x):
    # exp(-x), phi1, phi2, phi3; see biomodel.imaging.dce.convolution
    if x < 1.0:
        nested = 1.0  # 1 - x/4 (1 - x/5 (1 - ...)) = 6 phi3
        for n in range(18, 3, -1):
            nested = 1.0 - x * nested / n
        p3 = nested / 6.0
        p2 = 0.5 - x * p3
        p1 = 1.0 - x * p2
        return 1.0 - x * p1, p1, p2, p3
    e = math.exp(-x)
    p1 = (1.0 - e) / x
    p2 = (1.0 - p1) / x
    return e, p1, p2, (0.5 - p2) / x


@_jit
def basis(k, steps, c, b, d):
    # b = ∫ c exp(-k (t - s)) ds on the knots, d = db/dk
    last = -1.0
    e = lo = hi = dlo = dhi = he = 0.0
    bv = dv = 0.0
    b[0] = 0.0
    d[0] = 0.0
    for i in range(steps.size):
        h = steps[i]
        if h != last:
            x = k * h
            e, p1, p2, p3 = _phi(x)
            q2 = (2.0 + x) * p3 - 0.5
            q1 = p2 * (1.0 + x) - 1.0
            lo, hi = h * (p1 - p2), h * p2
            dlo, dhi = h * h * (q1 - q2), h * h * q2
            he = h * e
            last = h
        dv = e * dv - he * bv + dlo * c[i] + dhi * c[i + 1]
        bv = e * bv + lo * c[i] + hi * c[i + 1]
        b[i + 1] = bv
        d[i + 1] = dv


@_jit
def _best(bb, bc, cc, by, cy, kmax, vmax):
    # K in [0, kmax] and v in [0, vmax] that lower |y - K b - v c|² most; a gain, to be as large as possible
    det = bb * cc - bc * bc
    if vmax > 0.0 and det > 1e-13 * bb * cc:
        t, v = (by * cc - cy * bc) / det, (cy * bb - by * bc) / det
        if 0.0 <= t <= kmax and 0.0 <= v <= vmax:
            return t, v, t * by + v * cy
    top, at, av = -1.0, 0.0, 0.0
    for side in range(4):
        if side < 2:
            v = 0.0 if side == 0 else vmax
            t = min(max((by - v * bc) / bb, 0.0), kmax) if bb > 0.0 else 0.0
        else:
            t = 0.0 if side == 2 else kmax
            v = min(max((cy - t * bc) / cc, 0.0), vmax) if cc > 0.0 else 0.0
        gain = 2.0 * (t * by + v * cy) - (t * t * bb + 2.0 * t * v * bc + v * v * cc)
        if gain > top:
            top, at, av = gain, t, v
    return at, av, top


@_jit
def _slope(k, t, v, kmax, vmax, vemax, bb, bc, cc, by, bd, cd, dd, dy):
    # derivative of |residual|²/2 by log k at the best K and v, and its Gauss-Newton curvature
    held = vemax if t >= vemax * k * (1 - 1e-12) and vemax * k <= kmax else 0.0
    g = -(t * (dy - t * bd - v * cd) + held * (by - t * bb - v * bc)) * k
    jj = t * t * dd + 2.0 * t * held * bd + held * held * bb
    jb, jc = t * bd + held * bb, t * cd + held * bc
    free_t, free_v = 0.0 < t < min(kmax, vemax * k) and held == 0.0, 0.0 < v < vmax
    if free_t and free_v:
        det = bb * cc - bc * bc
        if det > 1e-13 * bb * cc:
            jj -= (jb * jb * cc - 2.0 * jb * jc * bc + jc * jc * bb) / det
    elif free_t and bb > 0.0:
        jj -= jb * jb / bb
    elif free_v and cc > 0.0:
        jj -= jc * jc / cc
    return g, max(jj, 0.0) * k * k


@_jit
def _products(b, d, c, y, pick, n):
    bb = bc = by = bd = cd = dd = dy = 0.0
    if pick.size == 0:
        for i in range(n):
            u, w, z, s = b[i], d[i], c[i], y[i]
            bb += u * u
            bc += u * z
            by += u * s
            bd += u * w
            cd += z * w
            dd += w * w
            dy += w * s
    else:
        for i in range(n):
            j = pick[i]
            u, w, z, s = b[j], d[j], c[j], y[i]
            bb += u * u
            bc += u * z
            by += u * s
            bd += u * w
            cd += z * w
            dd += w * w
            dy += w * s
    return bb, bc, by, bd, cd, dd, dy


@_jit
def search(begin, end, data, products, plasma_products, grid, grid_bb, grid_bc, cc, steps, c, pick, kmax, vemax, vmax,
           free_rate, values, normal, rss, state):  # fmt: skip
    # data (v, n); products (v, g) with the grid's curves; c on the knots; pick: knots that are sample times
    # values (v, 3): K, ve or nothing, v; normal (v, 3, 3) in the same order
    n, m, knots = data.shape[1], grid.size, c.size
    b, d = np.empty(knots), np.empty(knots)
    for voxel in range(begin, end):
        y, cy = data[voxel], plasma_products[voxel]
        at, top = 0, -1.0
        for i in range(m):
            limit = min(kmax, vemax * grid[i]) if free_rate else kmax
            _, _, gain = _best(grid_bb[i], grid_bc[i], cc, products[voxel, i], cy, limit, vmax)
            if gain > top:
                at, top = i, gain
        k, code = grid[at], FITTED
        t = v = 0.0
        bb = bc = by = bd = cd = dd = dy = 0.0
        if not free_rate:
            basis(k, steps, c, b, d)
            bb, bc, by, bd, cd, dd, dy = _products(b, d, c, y, pick, n)
            t, v, top = _best(bb, bc, cc, by, cy, kmax, vmax)
        else:
            low, high = math.log(grid[max(at - 1, 0)]), math.log(grid[min(at + 1, m - 1)])
            x, before, g_before = math.log(k), 0.0, 0.0
            done = False
            for turn in range(40):
                k = math.exp(x)
                basis(k, steps, c, b, d)
                bb, bc, by, bd, cd, dd, dy = _products(b, d, c, y, pick, n)
                t, v, top = _best(bb, bc, cc, by, cy, min(kmax, vemax * k), vmax)
                g, h = _slope(k, t, v, kmax, vmax, vemax, bb, bc, cc, by, bd, cd, dd, dy)
                if done or t == 0.0:
                    done = True
                    break
                if g > 0.0:
                    high = x
                else:
                    low = x
                if turn > 0 and x != before:
                    secant = (g - g_before) / (x - before)
                    if 0.1 * h < secant < 10.0 * h:
                        h = secant
                step = -g / h if h > 0.0 else 0.0
                new = x + step
                if not low < new < high:
                    new = 0.5 * (low + high)
                before, g_before = x, g
                # The last turn only renews the products at the end point.
                if abs(new - x) < 1e-7 or high - low < 1e-9:
                    done = True
                x = new
            if not done:
                code = NOT_CONVERGED
            if x < math.log(grid[0]) + 1e-6 or x > math.log(grid[m - 1]) - 1e-6:
                code = AT_BOUND
            if t >= min(kmax, vemax * k) * (1 - 1e-12):
                code = AT_BOUND
        if t <= 0.0 or t >= kmax or (vmax > 0.0 and (v <= 0.0 or v >= vmax)):
            code = AT_BOUND
        total = 0.0
        for i in range(n):
            j = i if pick.size == 0 else pick[i]
            r = y[i] - t * b[j] - v * c[j]
            total += r * r
        rss[voxel] = total
        state[voxel] = code
        values[voxel, 0], values[voxel, 1], values[voxel, 2] = t, t / k if free_rate else 0.0, v
        # columns: by K at fixed ve, by ve at fixed K, by v
        if free_rate:
            normal[voxel, 0, 0] = bb + 2.0 * k * bd + k * k * dd
            normal[voxel, 0, 1] = normal[voxel, 1, 0] = -k * k * (bd + k * dd)
            normal[voxel, 1, 1] = k * k * k * k * dd
            normal[voxel, 1, 2] = normal[voxel, 2, 1] = -k * k * cd
            normal[voxel, 0, 2] = normal[voxel, 2, 0] = bc + k * cd
        else:
            normal[voxel, 0, 0] = bb
            normal[voxel, 1, 1] = 1.0
            normal[voxel, 0, 1] = normal[voxel, 1, 0] = normal[voxel, 1, 2] = normal[voxel, 2, 1] = 0.0
            normal[voxel, 0, 2] = normal[voxel, 2, 0] = bc
        normal[voxel, 2, 2] = cc
