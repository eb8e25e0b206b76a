"""Virtual imaging studies for tests of encoders: a tumour that takes up contrast and loses it again at a rate k.

All is virtual, and simple: an ellipsoid with a rim that enhances and a core that does not, in tissue with texture,
beside vessels; every visit has its own receiver gain, ADC maps are missing now and then, and half of the patients have
a second visit. What is to be predicted is log k.
"""

import numpy as np
from scipy import ndimage

from biomodel.imaging.encoder_study import Scan, Study

TIMES = (-10.0, 90.0, 300.0)


def study(seed: int, shape=(8, 16, 16)) -> tuple[Study, float]:
    """A patient and log k (k in 1/s)."""
    rng = np.random.default_rng([7, seed])
    k = float(np.exp(rng.normal(np.log(2e-3), 0.7)))
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    centre, radii = rng.uniform(-0.3, 0.3, 3), rng.uniform(0.3, 0.6, 3)
    r = np.sqrt(sum(((a - c) / s) ** 2 for a, c, s in zip((z, y, x), centre, radii, strict=True)))
    mask, rim = r < 1, (r < 1) & (r > rng.uniform(0.2, 0.8))
    tissue = 1 + 0.3 * ndimage.gaussian_filter(rng.standard_normal(shape), 1.5) * 10
    vessels = ndimage.gaussian_filter(rng.random(shape) > 0.99, 0.7) > 0.1
    scans = []
    for visit in range(int(rng.integers(1, 3))):
        amplitude, gain = rng.uniform(0.8, 2.0), np.exp(0.5 * rng.standard_normal())
        phases = []
        for t in TIMES:
            on = max(t, 0.0)
            taken = amplitude * (1 - np.exp(-on / 40)) * np.exp(-k * on)
            signal = np.clip(tissue, 0.2, None) * (1 + taken * rim + 2.0 * (on > 0) * (vessels & ~mask))
            phases.append(gain * (signal + 0.05 * rng.standard_normal(shape)))
        adc = (1.6e-3 - 0.6e-3 * mask) * np.exp(0.1 * rng.standard_normal(shape)) if rng.random() > 0.3 else None
        scans.append(Scan(21.0 * visit, np.array(phases), TIMES, adc, None, mask))
    return Study(f"V{seed}", scans), float(np.log(k))


def cohort(first: int, count: int, shape=(8, 16, 16)) -> tuple[list[Study], np.ndarray]:
    """Patients and labels (n, 1)."""
    made = [study(first + i, shape) for i in range(count)]
    return [s for s, _ in made], np.array([[k] for _, k in made])


def table(studies) -> np.ndarray:
    """What a reader would measure (n, 4): enhancement of the tumour early and late, their ratio, and its size."""
    rows = []
    for one in studies:
        scan = one.scans[0]
        inside = scan.mask > 0.5
        before, early, late = (float(p[inside].mean()) for p in scan.dce)
        gains = [max(v / before - 1, 1e-2) for v in (early, late)]
        rows.append((*gains, np.log(gains[1] / gains[0]), np.log(inside.sum())))
    return np.array(rows)
