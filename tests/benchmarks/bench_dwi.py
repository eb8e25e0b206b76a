"""Speed of the diffusion fits beside their peers, one thread: one table, ratios from the same run.

Run: python tests/benchmarks/bench_dwi.py
Peers: numpy's least squares on log S, without weights or errors; scipy's curve_fit, voxel by voxel; dipy where it is
installed (weighted log-linear tensor fit, which also needs directions, and its IVIM).
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import time

import numpy as np
import torch
from scipy.optimize import curve_fit

from biomodel.imaging.dwi import Rician, fit_adc, fit_ivim, fit_kurtosis

torch.set_num_threads(1)
B4 = np.array([0.0, 100.0, 400.0, 800.0])
B18 = np.array([0, 1, 2, 5, 10, 20, 30, 50, 75, 100, 150, 250, 350, 400, 550, 700, 850, 1000], float)


def rate(function, voxels: int, repeats: int = 3) -> float:
    """Voxels per CPU-second, the best of several runs after one to warm up."""
    function()
    times = []
    for _ in range(repeats):
        began = time.process_time()
        function()
        times.append(time.process_time() - began)
    return voxels / min(times)


def row(name: str, speed: float, ours: float, error: float, bar: str = "") -> None:
    print(f"{name:48s}{speed:14,.0f}{ours / speed:12.1f}{error:14.2e}  {bar}")


def adc() -> None:
    """10⁶ voxels, four b-values, S0 / σ = 50."""
    rng = np.random.default_rng(0)
    truth = rng.uniform(0.5e-3, 2.5e-3, 1_000_000)
    clean = 1000 * np.exp(-B4 * truth[:, None])
    signal = np.abs(clean + 20 * rng.standard_normal(clean.shape))

    def error(found, count):
        return float(np.median(np.abs(found - truth[:count])))

    ours = rate(lambda: fit_adc(signal, B4), len(signal))
    row("tumorcast, weighted log-linear, with errors", ours, ours, error(fit_adc(signal, B4)["ADC"], None), "bar 3e6")
    some = signal[:100_000]
    speed = rate(lambda: fit_adc(some, B4, noise=Rician(20.0)), len(some))
    row(
        "tumorcast, Rician likelihood, with errors",
        speed,
        ours,
        error(fit_adc(some, B4, noise=Rician(20.0))["ADC"], 100_000),
    )
    design = np.stack([np.ones(4), -B4], 1)

    def lstsq():
        return np.linalg.lstsq(design, np.log(signal).T)[0][1]

    row("numpy lstsq on log S, no weights, no errors", rate(lstsq, len(signal)), ours, error(lstsq(), None))

    def curves(count=1000):
        found = np.empty(count)
        for i in range(count):
            p, _ = curve_fit(lambda b, s0, d: s0 * np.exp(-b * d), B4, signal[i], (signal[i, 0], 1e-3))
            found[i] = p[1]
        return found

    row("scipy curve_fit, voxel by voxel, with errors", rate(curves, 1000, 1), ours, error(curves(), 1000))
    try:
        from dipy.core.gradients import gradient_table
        from dipy.reconst.dti import TensorModel
    except ImportError:
        print("dipy is not installed: its rows are left out")
        return
    # A tensor needs six directions; an isotropic one of the same b-values, so 1 + 3 × 6 images.
    axes = np.array([[1, 1, 0], [1, -1, 0], [1, 0, 1], [1, 0, -1], [0, 1, 1], [0, 1, -1]]) / np.sqrt(2)
    b = np.concatenate([[0.0], np.repeat(B4[1:], 6)])
    table = gradient_table(b, bvecs=np.vstack([np.zeros(3), axes, axes, axes]))
    count = 50_000
    clean = 1000 * np.exp(-b * truth[:count, None])
    many = np.abs(clean + 20 * rng.standard_normal(clean.shape))
    ours19 = rate(lambda: fit_adc(many, b), count)
    row("  19 images: tumorcast, weighted log-linear", ours19, ours19, error(fit_adc(many, b)["ADC"], count))
    model = TensorModel(table, fit_method="WLS")
    speed = rate(lambda: model.fit(many), count, 1)
    row("  19 images: dipy, tensor WLS (mean diffusivity)", speed, ours19, error(model.fit(many).md, count))


def ivim() -> None:
    """18 b-values, S0 / σ = 100, pancreas."""
    rng = np.random.default_rng(1)
    d, f, d_star = 1.3e-3, 0.15, 10e-3
    count = 20_000
    clean = (1 - f) * np.exp(-B18 * d) + f * np.exp(-B18 * d_star)
    signal = np.abs(clean + 0.002 * rng.standard_normal((count, len(B18))))
    ours = rate(lambda: fit_ivim(signal, B18), count)
    row("IVIM: tumorcast, with errors", ours, ours, float(np.median(np.abs(fit_ivim(signal, B18)["D*"] - d_star))))

    def model(b, s0, d, f, d_star):
        return s0 * ((1 - f) * np.exp(-b * d) + f * np.exp(-b * d_star))

    def curves(count=300):
        found = np.empty(count)
        for i in range(count):
            start, bounds = (signal[i, 0], 1e-3, 0.1, 2e-2), ([0, 0, 0, 4e-3], [10, 4e-3, 1, 0.5])
            found[i] = curve_fit(model, B18, signal[i], start, bounds=bounds, x_scale=start)[0][3]
        return found

    row("IVIM: scipy curve_fit, bounded", rate(curves, 300, 1), ours, float(np.median(np.abs(curves() - d_star))))
    try:
        from dipy.core.gradients import gradient_table
        from dipy.reconst.ivim import IvimModel
    except ImportError:
        return
    axes = np.zeros((len(B18), 3))
    axes[1:, 0] = 1
    peer = IvimModel(gradient_table(B18, bvecs=axes, b0_threshold=0), fit_method="trr")

    def dipy(count=200):
        return peer.fit(signal[:count]).D_star

    row("IVIM: dipy, trust region", rate(dipy, 200, 1), ours, float(np.median(np.abs(dipy() - d_star))))


def kurtosis() -> None:
    """Nine images up to b = 2000, S0 / σ = 50."""
    rng = np.random.default_rng(2)
    b, d, k = np.array([0, 0, 100, 300, 600, 900, 1200, 1600, 2000.0]), 1e-3, 0.9
    signal = np.abs(np.exp(-b * d + (b * d) ** 2 * k / 6) + 0.02 * rng.standard_normal((50_000, len(b))))
    ours = rate(lambda: fit_kurtosis(signal, b), len(signal))
    row("kurtosis: tumorcast, with errors", ours, ours, float(np.median(np.abs(fit_kurtosis(signal, b)["K"] - k))))


if __name__ == "__main__":
    print("diffusion fits, one thread, CPU time; median absolute error of ADC (mm²/s), of D* (mm²/s), of K\n")
    print(f"{'':48s}{'voxels/s':>14s}{'ours faster':>12s}{'median error':>14s}")
    adc()
    ivim()
    kurtosis()
