"""Virtual patients for the tests and the benchmark of `pinn`'s amortised inference.

Truth is made by `biomodel.truth`: finite volumes on cells half as wide as the scans' voxels, Runge-Kutta of fourth
order on the whole equation. In the matched setting patients come from the very distributions that the operator is
trained under; the mismatched one adds what it has never seen. All is virtual.
"""

from dataclasses import dataclass

import numpy as np
from scipy.fft import idctn
from scipy.special import expit

import biomodel as bm
from biomodel.truth import Hazard, average, integrate
from pinn.amortised.setting import Courses, Setting
from pinn.joint.starts import Foci

SHAPE, SPACING, FINER = (1, 32, 32), (2.0, 2.0, 2.0), 2
#: Reference dose and decay of the drug's effect: `bm.Chemotherapy`'s own.
DECAY = 0.35
#: Seed of the patients that are tested on; training uses others.
TESTED = 9100


def setting() -> Setting:
    """The cohort: logistic growth, diffusion, a drug in courses of 1 to 6 doses, one focus, two visits."""
    model = bm.ReactionDiffusion(
        bm.Logistic(k=bm.LogNormal(0.06, 0.4)), bm.Isotropic(D=bm.LogNormal(0.15, 0.5)),
        (bm.Chemotherapy("paclitaxel", efficacy=bm.LogNormal(0.12, 0.5), decay=bm.Fixed(DECAY)),),
    )  # fmt: skip
    start = Foci(1, bm.LogitNormal(0.35, 0.7), bm.LogNormal(5.5, 0.25), 0.12)
    return Setting(model, bm.Domain.box(SHAPE, SPACING), start, courses=(Courses(),))


@dataclass(frozen=True)
class Truth:
    """What the generator does beyond the model; nothing in the matched setting.

    Attributes
    ----------
    uneven : float
        Sd of the logarithm of D, half of that for k, over the organ (smooth maps, correlated over about 8 mm).
    ragged : float
        Sd of the logit of the start around its Gaussian shape.
    correlated : float
        Share of the noise's variance that is smooth over two voxels; noise is then also heavy-tailed (Student, 4
        degrees of freedom).
    resistant : float
        Fraction of the cells that the drug does not kill.
    """

    uneven: float = 0.0
    ragged: float = 0.0
    correlated: float = 0.0
    resistant: float = 0.0


MATCHED = Truth()
MISMATCHED = Truth(uneven=0.3, ragged=0.3, correlated=0.3, resistant=0.05)


def smooth(rng, shape, length):
    """A smooth random field of mean 0 and about unit variance; `length` in cells."""
    k = sum(np.meshgrid(*[(np.pi * np.arange(n) / n) ** 2 for n in shape], indexing="ij"))
    field = idctn(rng.standard_normal(shape) * np.exp(-k * length**2 / 2))
    return field / field.std()


class Patient:
    """One virtual patient.

    Attributes
    ----------
    case : Case
        Parameters, days, schedule and noise.
    scans : ndarray, shape (2, z, y, x)
        Noisy cell fractions of both visits.
    states : ndarray, shape (3, z, y, x)
        True cell fractions of both visits and of the forecast.
    """

    def __init__(self, cohort: Setting, index: int, truth: Truth = MATCHED, seed: int = TESTED):
        self.case = cohort.case(seed, index)
        rng = np.random.default_rng([seed, 62, index])
        values = cohort.values(self.case.z)
        factors = tuple(FINER if n > 1 else 1 for n in cohort.domain.shape)
        shape = tuple(n * f for n, f in zip(cohort.domain.shape, factors, strict=True))
        step = tuple(s / f for s, f in zip(cohort.domain.spacing, factors, strict=True))
        place, (peak, width) = self.case.z[3:-2], self.case.z[-2:]
        peak, width = float(cohort.start.peak.to_value(peak)), float(cohort.start.width.to_value(width))
        square = np.zeros(shape)
        axes = [a for a in range(3) if shape[a] > 1]
        for axis, centre in zip(axes, place, strict=True):
            first = cohort.domain.coords["zyx"[axis]][0] - cohort.domain.spacing[axis] / 2
            at = first + (np.arange(shape[axis]) + 0.5) * step[axis]
            square = square + ((at - centre) ** 2).reshape([-1 if a == axis else 1 for a in range(3)])
        start = peak * np.exp(-square / (2 * width**2))
        plane = tuple(shape[a] for a in axes)
        ragged, uneven, uneven_k = (smooth(rng, plane, 4 * FINER / 2).reshape(shape) for _ in range(3))
        if truth.ragged:
            inside = np.clip(start, 1e-12, 1 - 1e-12)
            start = expit(np.log(inside / (1 - inside)) + truth.ragged * ragged)
        doses = self.case.schedule.doses
        n = len(doses)
        hazard = Hazard(np.array([d.day for d in doses]), np.full(n, values["paclitaxel.efficacy"]), np.full(n, DECAY))
        populations = np.stack([start])
        sensitivity = (1.0,)
        if truth.resistant:
            populations, sensitivity = np.stack([(1 - truth.resistant) * start, truth.resistant * start]), (1.0, 0.0)
        run = integrate(
            populations, np.ones(shape, bool), values["diffusion.D"] * np.exp(truth.uneven * uneven), step,
            values["growth.k"] * np.exp(truth.uneven / 2 * uneven_k), hazard, self.case.days, sensitivity=sensitivity,
        )  # fmt: skip
        self.states = np.stack([average(u.sum(0), factors) for u in (populations, *run)])
        self.scans = self.states[:2] + self.case.noise * np.stack([self._unit(rng, truth, axes) for _ in range(2)])

    def _unit(self, rng, truth, axes):
        """Noise of unit variance."""
        shape = self.states.shape[1:]
        if not truth.correlated:
            return rng.standard_normal(shape)
        rough = rng.standard_t(4, shape) / np.sqrt(2.0)
        even = smooth(rng, tuple(shape[a] for a in axes), 2).reshape(shape)
        return np.sqrt(1 - truth.correlated) * rough + np.sqrt(truth.correlated) * even
