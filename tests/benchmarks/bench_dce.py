"""Speed, error and memory of DCE fits beside their peers: one table each, ratios from the same run.

Run: OMP_NUM_THREADS=1 python tests/benchmarks/bench_dce.py [speed] [models] [memory]

Peers are used where they are installed (`pip install osipy dcmri`; osipy needs Python 3.12) and named as missing
otherwise. Rates are per CPU-second, whatever the threads.
"""

import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from biomodel.imaging.aif import InputFunction, Parker
from biomodel.imaging.concentration import Relaxivity, concentration, to_signal
from biomodel.imaging.dce import (
    ExtendedTofts,
    Patlak,
    Tofts,
    TwoCompartmentExchange,
    TwoCompartmentUptake,
    fit,
    fit_volume,
)
from biomodel.imaging.t1 import SpoiledGradientEcho

VOXELS, SAMPLES, STEP, NOISE, HAEMATOCRIT = 10_000, 100, 3.0, 0.01, 0.42
T10, ECHO, AGENT = 1.4, SpoiledGradientEcho(15.0, 0.005), Relaxivity(5.0)


def case(voxels: int, noise: float):
    """Times, input, true parameters and curves. The truth is made with an input known every 0.05 s, not with the
    coarse one that the fits are given."""
    rng = np.random.default_rng(0)
    times = STEP * np.arange(SAMPLES)
    fine = np.arange(0, times[-1] + 0.01, 0.05)
    blood = Parker(arrival=20).blood
    truth = np.column_stack(
        [rng.uniform(0.03, 0.4, voxels), rng.uniform(0.1, 0.5, voxels), rng.uniform(0.01, 0.1, voxels)]
    )
    curves = ExtendedTofts()(truth, times, InputFunction.from_blood(fine, blood(fine), HAEMATOCRIT))
    curves += noise * rng.standard_normal(curves.shape)
    return times, InputFunction.from_blood(times, blood(times), HAEMATOCRIT), truth, curves


def ours(times, aif, curves):
    return fit(curves, times, aif, ExtendedTofts()).values


def osipy(times, aif, curves):
    from osipy.dce import fit_model

    maps = fit_model("extended_tofts", curves[:, None, None], aif.plasma, times).parameter_maps
    return np.stack([np.asarray(maps[n].values).ravel() for n in ("Ktrans", "ve", "vp")], 1)


def dcmri(times, aif, curves):
    # Fits signals: given those of the same curves, whose noise is then not the same at all samples, as it assumes.
    import dcmri

    shape = torch.full((len(curves),), T10), torch.ones(len(curves))
    signals = to_signal(torch.as_tensor(curves), shape[0].double(), shape[1].double(), ECHO, AGENT).numpy()
    found = []
    for signal in signals:
        tissue = dcmri.Tissue(
            kinetics="HF", sequence="SS", ca=aif.plasma * (1 - HAEMATOCRIT) * 1e-3, t=times, dt=STEP, H=HAEMATOCRIT,
            r1=AGENT.r1 * 1e3, TR=ECHO.tr, FA=ECHO.flip_angle, R10=1 / T10, n0=6,
        )  # fmt: skip
        tissue.train(times, signal)
        values = tissue.export_params()
        found.append([60 * values["PS"][1], values["vi"][1], values["vp"][1]])
    return np.array(found, dtype=float)


def speed() -> None:
    """Extended Tofts, 10^4 voxels of 100 samples."""
    print(f"\nextended Tofts, {SAMPLES} samples every {STEP:g} s, one thread, CPU time, compilation excluded;")
    print("errors on the first 100 voxels, the same for all")
    print(f"{'program':12s}{'voxels':>8s}{'noise mM':>10s}{'voxels/s':>11s}{'ours faster by':>16s}"
          f"{'MAE Ktrans':>12s}{'ve':>10s}{'vp':>10s}{'worst Ktrans':>14s}")  # fmt: skip
    for noise in (0.0, NOISE):
        times, aif, truth, curves = case(VOXELS, noise)
        rate = None
        for name, run, count in (("tumorcast", ours, VOXELS), ("osipy", osipy, 2000), ("dcmri", dcmri, 100)):
            try:
                run(times, aif, curves[:2])
            except ImportError:
                print(f"{name:12s} not installed")
                continue
            began = time.process_time()
            found = run(times, aif, curves[:count])
            here = count / (time.process_time() - began)
            rate = rate or here
            off = np.abs(found - truth[:count])[:100]
            mean, worst = off.mean(0), off[:, 0].max()
            print(f"{name:12s}{count:8d}{noise:10.3f}{here:11.0f}{rate / here:16.1f}"
                  f"{mean[0]:12.2e}{mean[1]:10.2e}{mean[2]:10.2e}{worst:14.2e}")  # fmt: skip


def models() -> None:
    """All models and the general search, beside each other."""
    print(f"\nall models, {SAMPLES} samples, noise {NOISE:g} mM, one thread")
    print(f"{'model':28s}{'voxels':>8s}{'voxels/s':>11s}{'converged %':>13s}")
    times, aif, *_ = case(1, 0.0)
    rng = np.random.default_rng(1)
    rows = (
        (Tofts(), (0.03, 0.1), (0.4, 0.5), None, 10_000),
        (ExtendedTofts(), (0.03, 0.1, 0.01), (0.4, 0.5, 0.1), None, 10_000),
        (Patlak(), (0.005, 0.01), (0.1, 0.1), None, 10_000),
        (TwoCompartmentUptake(), (0.1, 0.01, 0.02), (1.0, 0.2, 0.2), None, 2000),
        (TwoCompartmentExchange(), (0.1, 0.01, 0.1, 0.02), (1.0, 0.2, 0.5, 0.2), None, 2000),
        (ExtendedTofts(), (0.03, 0.1, 0.01), (0.4, 0.5, 0.1), (-6.0, 6.0), 2000),
    )
    for model, low, high, delay, count in rows:
        curves = model(rng.uniform(low, high, (count, len(low))), times, aif)
        curves = curves + NOISE * rng.standard_normal(curves.shape)
        fit(curves[:2], times, aif, model, delay=delay)
        began = time.process_time()
        found = fit(curves, times, aif, model, delay=delay)
        took = time.process_time() - began
        name = type(model).__name__ + ("" if delay is None else " + delay")
        print(f"{name:28s}{count:8d}{count / took:11.0f}{100 * np.isin(found.code, (0, 5)).mean():13.2f}")


def memory() -> None:
    """256×256×60 voxels, 60 phases: signals from a memory-mapped file to maps with covariance."""
    shape = (60, 60, 256, 256)
    times = 5.0 * np.arange(60)
    aif = InputFunction.from_blood(times, Parker(arrival=20).blood(times), HAEMATOCRIT)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "dce.dat"
        file = np.memmap(path, dtype=np.float32, mode="w+", shape=shape)
        slab = shape[2] * shape[3]
        for z in range(shape[1]):
            truth = np.column_stack(
                [rng.uniform(0.03, 0.4, slab), rng.uniform(0.1, 0.5, slab), rng.uniform(0.01, 0.1, slab)]
            )
            curves = torch.as_tensor(ExtendedTofts()(truth, times, aif))
            signal = to_signal(
                curves, torch.full((slab,), T10).double(), torch.full((slab,), 1e4).double(), ECHO, AGENT
            )
            file[:, z] = (signal.numpy().T + 2 * rng.standard_normal((shape[0], slab))).reshape(shape[0], *shape[2:])
        file.flush()
        del file
        made = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        data = np.memmap(path, dtype=np.float32, mode="r", shape=shape)

        def convert(signal, voxels):
            found = concentration(signal, T10, ECHO, AGENT, baseline=range(4))
            return found.values, found.code

        began, clock = time.perf_counter(), time.process_time()
        found = fit_volume(data, times, aif, ExtendedTofts(), convert=convert)
        took, cpu = time.perf_counter() - began, time.process_time() - clock
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        size = np.prod(shape) * 4 / 1e9
        print(f"\n{shape[3]}×{shape[2]}×{shape[1]} voxels, {shape[0]} phases, float32 file of {size:.2f} GB")
        print("signal to concentration to extended Tofts with covariance:")
        print(f"{took:.0f} s, {len(found.code) / cpu:.0f} voxels per CPU-second, {found.counts()}")
        print(f"peak memory {peak:.2f} GB (bar 6 GB); {made:.2f} GB before the fit, from making the data")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for part in sys.argv[1:] or ["speed", "models", "memory"]:
        {"speed": speed, "models": models, "memory": memory}[part]()
