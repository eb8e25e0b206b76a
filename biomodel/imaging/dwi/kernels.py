"""Compiled loops over voxels: weighted log-linear fit, start values, and a bounded search by Fisher scoring.

Inside, b is in ms/µm² and diffusion in µm²/ms, so that all parameters are of order one; models are 0 monoexponential
(S0, D), 1 kurtosis (S0, D, K), 2 IVIM (S0, D, f, D*).
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import torch

from biomodel.imaging.dwi.noise import FISHER_STEP
from biomodel.imaging.voxelfit import Code

# Values that are not finite must stay so: no "nnan", no "ninf".
_jit = numba.njit(fastmath={"contract", "nsz", "arcp", "reassoc"}, cache=True, nogil=True, error_model="numpy")

MONOEXPONENTIAL, KURTOSIS, IVIM = 0, 1, 2
#: Fewest voxels for which a second thread pays.
THREADED = 20_000

_FITTED, _NOT_FINITE, _NO_SIGNAL, _SATURATED, _AT_BOUND, _NOT_CONVERGED, _OUTSIDE = (
    int(c)
    for c in (
        Code.FITTED,
        Code.NOT_FINITE,
        Code.NO_SIGNAL,
        Code.SATURATED,
        Code.AT_BOUND,
        Code.NOT_CONVERGED,
        Code.OUTSIDE,
    )
)


def over_voxels(kernel, voxels: int, *arguments) -> None:
    """Run a kernel over all voxels, on torch's number of threads where there are many."""
    threads = min(torch.get_num_threads(), voxels) if voxels >= THREADED else 1
    if threads == 1:
        kernel(0, voxels, *arguments)
        return
    cuts = [voxels * t // threads for t in range(threads + 1)]
    with ThreadPoolExecutor(threads) as pool:
        for job in [pool.submit(kernel, a, b, *arguments) for a, b in zip(cuts, cuts[1:], strict=False)]:
            job.result()


@_jit
def classify(begin, end, signal, ceiling, code):
    """Mark voxels that have no usable signal."""
    for v in range(begin, end):
        if code[v] == _OUTSIDE:
            continue
        c = _FITTED
        for i in range(signal.shape[1]):
            s = signal[v, i]
            if not math.isfinite(s):
                c = _NOT_FINITE
                break
            if s <= 0:
                c = _NO_SIGNAL
            elif s >= ceiling and c == _FITTED:
                c = _SATURATED
        code[v] = c


@_jit
def log_linear(begin, end, signal, b, counts, sigma, known, most, tolerance, values, covariance, rss, code):
    """S0 and D of log S = log S0 - b D, weighted by the squared fitted signal until D rests."""
    n = len(b)
    y = np.empty(n)
    w = np.empty(n)
    span = b.max() - b.min()
    for v in range(begin, end):
        if code[v] != _FITTED:
            for i in range(2):
                values[v, i] = np.nan
                for j in range(2):
                    covariance[v, i, j] = np.nan
            rss[v] = np.nan
            continue
        sw = sx = sy = sxx = sxy = 0.0
        largest = 0.0
        for i in range(n):
            largest = max(largest, signal[v, i])
        for i in range(n):
            s = signal[v, i] / largest
            y[i] = math.log(s)
            wi = counts[i] * s * s
            w[i] = wi
            wx = wi * b[i]
            sw += wi
            sx += wx
            sy += wi * y[i]
            sxx += wx * b[i]
            sxy += wx * y[i]
        determinant = sw * sxx - sx * sx
        d = (sx * sy - sw * sxy) / determinant
        done = False
        before = 0.0
        for turn in range(most):
            sw = sx = sy = sxx = sxy = 0.0
            for i in range(n):
                # Only ratios of weights matter, so S0 is not needed here.
                wi = counts[i] * math.exp(-2 * d * b[i])
                w[i] = wi
                wx = wi * b[i]
                sw += wi
                sx += wx
                sy += wi * y[i]
                sxx += wx * b[i]
                sxy += wx * y[i]
            determinant = sw * sxx - sx * sx
            new = (sx * sy - sw * sxy) / determinant
            step = new - d
            done = abs(step) * span < tolerance
            d = new
            # With little signal the steps shrink slowly, by a constant ratio: every third goes to their limit (Aitken).
            if turn % 3 == 2 and turn > 3 and abs(step) < 0.99 * abs(before):
                d += step * step / (before - step)
            before = step
            if done:
                break
        if not (math.isfinite(d) and determinant > 0):
            # Samples that are zero for all that a number can hold (a ratio of 1e-150 to the largest).
            code[v] = _NO_SIGNAL
            for i in range(2):
                values[v, i] = np.nan
                for j in range(2):
                    covariance[v, i, j] = np.nan
            rss[v] = np.nan
            continue
        if not done:
            code[v] = _NOT_CONVERGED
        relative = math.exp((sy + d * sx) / sw)  # S0 over the largest signal
        total = 0.0
        for i in range(n):
            r = signal[v, i] / largest - relative * math.exp(-d * b[i])
            total += counts[i] * r * r
        # Variance of one image relative to S0: the weights above are those of a signal with S0 = 1.
        if known:
            variance = (sigma[v] / (largest * relative)) ** 2
        elif n > 2:
            variance = total / ((n - 2) * relative * relative)
        else:
            variance = np.nan
        s0 = relative * largest
        values[v, 0] = s0
        values[v, 1] = d
        covariance[v, 0, 0] = variance * sxx / determinant * s0 * s0
        covariance[v, 1, 1] = variance * sw / determinant
        cross = variance * sx / determinant * s0
        covariance[v, 0, 1] = cross
        covariance[v, 1, 0] = cross
        rss[v] = total * largest * largest


@_jit
def log_quadratic(begin, end, signal, b, counts, start, code):
    """Start values S0, D, K from the log signal, quadratic in b, weighted by the squared signal."""
    n = len(b)
    a = np.empty((3, 3))
    r = np.empty(3)
    for v in range(begin, end):
        if code[v] != _FITTED:
            continue
        largest = 0.0
        for i in range(n):
            largest = max(largest, signal[v, i])
        a[:] = 0.0
        r[:] = 0.0
        for i in range(n):
            s = signal[v, i] / largest
            w = counts[i] * s * s
            y = math.log(s)
            x1 = b[i]
            x2 = b[i] * b[i]
            a[0, 0] += w
            a[1, 0] += w * x1
            a[1, 1] += w * x2
            a[2, 1] += w * x1 * x2
            a[2, 2] += w * x2 * x2
            r[0] += w * y
            r[1] += w * y * x1
            r[2] += w * y * x2
        a[2, 0] = a[1, 1]
        if not _cholesky(a, 3):
            start[v, 0], start[v, 1], start[v, 2] = 1.0, 1.0, 0.0
            continue
        _substitute(a, r, 3)
        d = max(-r[1], 0.05)
        start[v, 0] = math.exp(min(max(r[0], -2.0), 2.0))
        start[v, 1] = d
        start[v, 2] = min(max(6 * r[2] / (d * d), -1.0), 3.0)


@_jit
def two_exponentials(begin, end, signal, counts, slow, fast, slow_d, fast_d, gram, start, code):
    """Start values of IVIM: on a grid of (D, D*) the pair of non-negative amplitudes that leaves least."""
    n = signal.shape[1]
    ns, nf = len(slow_d), len(fast_d)
    ps = np.empty(ns)
    pf = np.empty(nf)
    for v in range(begin, end):
        if code[v] != _FITTED:
            continue
        largest = 0.0
        for i in range(n):
            largest = max(largest, signal[v, i])
        for j in range(ns):
            total = 0.0
            for i in range(n):
                total += counts[i] * slow[j, i] * signal[v, i]
            ps[j] = total / largest
        for k in range(nf):
            total = 0.0
            for i in range(n):
                total += counts[i] * fast[k, i] * signal[v, i]
            pf[k] = total / largest
        best = -1.0
        for j in range(ns):
            for k in range(nf):
                if fast_d[k] < 2 * slow_d[j]:
                    continue
                ss, sf, ff = gram[j, k, 0], gram[j, k, 1], gram[j, k, 2]
                determinant = ss * ff - sf * sf
                one = (ff * ps[j] - sf * pf[k]) / determinant
                two = (ss * pf[k] - sf * ps[j]) / determinant
                if one <= 0 or two <= 0:
                    # One amplitude is zero: the other is fitted alone.
                    if two <= 0:
                        one, two = ps[j] / ss, 0.0
                    else:
                        one, two = 0.0, pf[k] / ff
                gain = one * ps[j] + two * pf[k]  # what the fit takes off the sum of squares
                if gain > best:
                    best = gain
                    start[v, 0] = one + two
                    start[v, 1] = slow_d[j]
                    # Inside the bounds, so that a search along f can leave them.
                    start[v, 2] = min(max(two / (one + two), 0.01), 0.99)
                    start[v, 3] = fast_d[k]


@_jit
def _signal(model, b, p, j):
    # Signal at b and its derivatives by the parameters, into j.
    if model == 0:
        e = math.exp(-b * p[1])
        j[0] = e
        j[1] = -b * p[0] * e
        return p[0] * e
    if model == 1:
        bd = b * p[1]
        e = math.exp(-bd + bd * bd * p[2] / 6)
        j[0] = e
        j[1] = p[0] * e * (-b + b * bd * p[2] / 3)
        j[2] = p[0] * e * bd * bd / 6
        return p[0] * e
    slow = math.exp(-b * p[1])
    fast = math.exp(-b * p[3])
    j[0] = (1 - p[2]) * slow + p[2] * fast
    j[1] = -b * p[0] * (1 - p[2]) * slow
    j[2] = p[0] * (fast - slow)
    j[3] = -b * p[0] * p[2] * fast
    return p[0] * j[0]


@_jit
def _bessel(x):
    # log I0(x) - x and I1(x) / I0(x) to 2e-7 (Abramowitz and Stegun 9.8.1 to 9.8.4).
    if x < 3.75:
        t = (x / 3.75) ** 2
        i0 = 1 + t * (3.5156229 + t * (3.0899424 + t * (1.2067492 + t * (0.2659732 + t * (0.0360768 + t * 0.0045813)))))
        i1 = x * (
            0.5
            + t
            * (0.87890594 + t * (0.51498869 + t * (0.15084934 + t * (0.02658733 + t * (0.00301532 + t * 0.00032411)))))
        )
        return math.log(i0) - x, i1 / i0
    t = 3.75 / x
    i0 = 0.39894228 + t * (
        0.01328592
        + t
        * (
            0.00225319
            + t
            * (
                -0.00157565
                + t * (0.00916281 + t * (-0.02057706 + t * (0.02635537 + t * (-0.01647633 + t * 0.00392377))))
            )
        )
    )
    i1 = 0.39894228 + t * (
        -0.03988024
        + t
        * (
            -0.00362018
            + t
            * (
                0.00163801
                + t * (-0.01031555 + t * (0.02282967 + t * (-0.02895312 + t * (0.01787654 - t * 0.00420059))))
            )
        )
    )
    return math.log(i0) - 0.5 * math.log(x), i1 / i0


@_jit
def _information(nu, table):
    # Information of a Rician magnitude relative to Gaussian noise, interpolated.
    place = nu / FISHER_STEP
    i = int(place)
    if i >= len(table) - 1:
        return 1 - 0.5 / (nu * nu)
    return table[i] + (place - i) * (table[i + 1] - table[i])


@_jit
def _cost(model, s, b, counts, p, sigma, rician, j):
    # Minus the log likelihood, up to a constant; for Gaussian noise half the weighted sum of squares.
    total = 0.0
    for i in range(len(b)):
        a = _signal(model, b[i], p, j)
        r = s[i] - a
        if rician:
            scaled, _ = _bessel(s[i] * a / (sigma * sigma))
            total += 0.5 * (r / sigma) ** 2 - scaled
        else:
            total += 0.5 * counts[i] * r * r
    return total


@_jit
def _normal(model, s, b, counts, p, sigma, rician, table, j, gradient, hessian, n):
    # Gradient of the cost and its expected curvature (Fisher information).
    gradient[:] = 0.0
    hessian[:] = 0.0
    for i in range(len(b)):
        a = _signal(model, b[i], p, j)
        if rician:
            precision = 1 / (sigma * sigma)
            _, ratio = _bessel(s[i] * a * precision)
            slope = (a - s[i] * ratio) * precision
            # A floor, so that voxels of mere noise still give a step of finite length.
            curvature = max(_information(a / sigma, table), 1e-3) * precision
        else:
            slope = counts[i] * (a - s[i])
            curvature = counts[i]
        for k in range(n):
            gradient[k] += slope * j[k]
            for m in range(k + 1):
                hessian[k, m] += curvature * j[k] * j[m]


@_jit
def _cholesky(a, n):
    # Lower factor in place; False unless positive definite.
    for i in range(n):
        for k in range(i + 1):
            total = a[i, k]
            for m in range(k):
                total -= a[i, m] * a[k, m]
            if i == k:
                if not total > 0:
                    return False
                a[i, i] = math.sqrt(total)
            else:
                a[i, k] = total / a[k, k]
    return True


@_jit
def _substitute(a, r, n):
    for i in range(n):
        for m in range(i):
            r[i] -= a[i, m] * r[m]
        r[i] /= a[i, i]
    for i in range(n - 1, -1, -1):
        for m in range(i + 1, n):
            r[i] -= a[m, i] * r[m]
        r[i] /= a[i, i]


@_jit
def search(
    begin,
    end,
    model,
    signal,
    b,
    counts,
    sigma,
    known,
    rician,
    lower,
    upper,
    table,
    most,
    start,
    values,
    covariance,
    rss,
    code,
):
    """Bounded Levenberg-Marquardt search with the expected curvature, from `start`, voxel by voxel.

    A parameter on a bound is held there as long as the cost falls beyond it; the others move. The covariance is that of
    the free parameters; one that stays on its bound has no error bar (NaN).
    """
    n = start.shape[1]
    samples = len(b)
    s = np.empty(samples)
    j = np.empty(n)
    p = np.empty(n)
    trial = np.empty(n)
    gradient = np.empty(n)
    hessian = np.empty((n, n))
    factor = np.empty((n, n))
    step = np.empty(n)
    free = np.empty(n, np.int64)
    for v in range(begin, end):
        if code[v] != _FITTED:
            for i in range(n):
                values[v, i] = np.nan
                for k in range(n):
                    covariance[v, i, k] = np.nan
            rss[v] = np.nan
            continue
        largest = 0.0
        for i in range(samples):
            largest = max(largest, signal[v, i])
        for i in range(samples):
            s[i] = signal[v, i] / largest
        noise = sigma[v] / largest
        for k in range(n):
            p[k] = min(max(start[v, k], lower[k]), upper[k])
        cost = _cost(model, s, b, counts, p, noise, rician, j)
        damping = 1e-3
        done = False
        for _ in range(most):
            _normal(model, s, b, counts, p, noise, rician, table, j, gradient, hessian, n)
            moving = 0
            for k in range(n):
                held = (p[k] <= lower[k] and gradient[k] > 0) or (p[k] >= upper[k] and gradient[k] < 0)
                if not held:
                    free[moving] = k
                    moving += 1
            if moving == 0:
                done = True
                break
            accepted = False
            for _inner in range(25):
                for i in range(moving):
                    for k in range(i + 1):
                        factor[i, k] = hessian[free[i], free[k]] if free[i] >= free[k] else hessian[free[k], free[i]]
                    factor[i, i] += damping * factor[i, i] + 1e-14
                    step[i] = -gradient[free[i]]
                if _cholesky(factor, moving):
                    _substitute(factor, step, moving)
                    trial[:] = p
                    change = 0.0
                    for i in range(moving):
                        k = free[i]
                        trial[k] = min(max(p[k] + step[i], lower[k]), upper[k])
                        change = max(change, abs(trial[k] - p[k]) / (abs(p[k]) + 1e-6))
                    if change < 1e-9:
                        done = True
                        break
                    new = _cost(model, s, b, counts, trial, noise, rician, j)
                    if new <= cost:
                        accepted = True
                        p[:] = trial
                        cost = new
                        damping = max(damping * 0.1, 1e-12)
                        # Far below the statistical error of the parameters.
                        done = change < 1e-7
                        break
                damping = min(damping * 10, 1e10)
            if done or not accepted:
                done = True
                break
        if not done:
            code[v] = _NOT_CONVERGED
        _normal(model, s, b, counts, p, noise, rician, table, j, gradient, hessian, n)
        moving = 0
        for k in range(n):
            if p[k] <= lower[k] or p[k] >= upper[k]:
                code[v] = _AT_BOUND
            elif hessian[k, k] > 1e-16:  # not where the signal does not know of it, as D* of a fraction of 0
                free[moving] = k
                moving += 1
        total = 0.0
        for i in range(samples):
            r = s[i] - _signal(model, b[i], p, j)
            total += counts[i] * r * r
        if rician:
            variance = 1.0
        elif known:
            variance = noise * noise
        elif samples > n:
            variance = total / (samples - n)
        else:
            variance = np.nan
        for i in range(n):
            for k in range(n):
                covariance[v, i, k] = np.nan
        for i in range(moving):
            for k in range(i + 1):
                factor[i, k] = hessian[free[i], free[k]] if free[i] >= free[k] else hessian[free[k], free[i]]
        if _cholesky(factor, moving):
            for m in range(moving):
                step[:moving] = 0.0
                step[m] = variance
                _substitute(factor, step, moving)
                for i in range(moving):
                    unit = (largest if free[i] == 0 else 1.0) * (largest if free[m] == 0 else 1.0)
                    covariance[v, free[i], free[m]] = step[i] * unit
        for k in range(n):
            values[v, k] = p[k]
        values[v, 0] *= largest
        rss[v] = total * largest * largest
