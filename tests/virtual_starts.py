"""Virtual patients whose start nobody knows, for the tests and the benchmark of `pinn`'s inference from few visits.

Truth is made by `biomodel.truth`: finite volumes on cells a third as wide as the voxels, Runge-Kutta of fourth order on
the whole equation. What the generator draws from is written here once; in the matched setting the fitted model has the
same distributions as priors. All is virtual.
"""

from dataclasses import dataclass

import numpy as np
from scipy.fft import idctn
from scipy.special import expit, ndtr

import biomodel as bm
from biomodel.truth import Hazard, average, integrate

SHAPE, SPACING, FINER = (1, 28, 28), (2.5, 2.5, 2.5), 3
#: Days between visits, and from the last visit to the forecast.
GAPS, AHEAD = (8.0, 25.0), 20.0
#: Day of the first visit: half of the patients are seen on the day of the start, half later.
BEFORE = 15.0
#: A visit has a map of cell fractions, an outline, or both; a map has a strip without values this often.
CELLS, OUTLINE, CUT = 0.75, 0.5, 0.3
#: Cell fraction above which volumes are counted.
VISIBLE = 0.1
#: Seeds of the benchmark's patients: `FIRST`, FIRST + 1, ... Seeds from 7000 on were seen while the sampler was made.
FIRST = 8000

PRIORS = {"diffusion.D": bm.LogNormal(0.15, 0.5), "growth.k": bm.LogNormal(0.06, 0.4)}
PEAK, WIDTH = bm.LogitNormal(0.4, 0.8), bm.LogNormal(4.5, 0.3)
NOISE = bm.LogNormal(0.06, 0.4)
THRESHOLD, EDGE = bm.LogitNormal(0.25, 0.3), bm.LogNormal(0.04, 0.3)


def drawn(prior, rng):
    """One value of a prior."""
    return float(prior.to_value(prior.location + prior.scale * rng.standard_normal()))


def smooth(rng, shape, length):
    """A smooth random field of mean 0 and about unit variance; `length` in cells."""
    k = sum(np.meshgrid(*[(np.pi * np.arange(n) / n) ** 2 for n in shape], indexing="ij"))
    field = idctn(rng.standard_normal(shape) * np.exp(-k * length**2 / 2))
    return field / field.std()


@dataclass(frozen=True)
class Truth:
    """What the generator does beyond the fitted model; nothing in the matched setting.

    Attributes
    ----------
    uneven : float
        Sd of the logarithm of D, half of that for k, over the organ (smooth maps, correlated over about 10 mm).
    ragged : float
        Sd of the logit of the start around its Gaussian shape.
    correlated : float
        Share of the noise's variance that is smooth over two voxels; noise is then also heavy-tailed (Student, 4
        degrees of freedom).
    foci : (int, int)
        Fewest and most foci.
    """

    uneven: float = 0.0
    ragged: float = 0.0
    correlated: float = 0.0
    foci: tuple[int, int] = (1, 1)


MATCHED = Truth()
MISMATCHED = Truth(uneven=0.5, ragged=0.5, correlated=0.3)
MULTIFOCAL = Truth(foci=(2, 3))


class Patient:
    """One virtual patient.

    Attributes
    ----------
    values : dict
        D (mm²/day) and k (1/day); the level of the map where it is uneven.
    visits : list of (day, cells or None, outline or None)
        Arrays (1, y, x), NaN where nothing was measured.
    later : float
        Day of the forecast.
    truth : ndarray, shape (1, y, x)
        Cell fraction at `later`, averages of voxels.
    foci : list of (y, x, peak, width)
        Position in the domain's mm, cell fraction, sd in mm.
    volume : float
        Volume at `later` with a cell fraction of at least `VISIBLE`, mm³, on the fine cells.
    """

    def __init__(self, seed: int, setting: Truth = MATCHED):
        rng = np.random.default_rng([seed, 6])
        self.seed, self.domain = seed, bm.Domain.box(SHAPE, SPACING)
        self.values = {n: drawn(p, rng) for n, p in PRIORS.items()}
        fine = tuple(n * (FINER if n > 1 else 1) for n in SHAPE)
        step = tuple(s / (FINER if n > 1 else 1) for s, n in zip(SPACING, SHAPE, strict=True))
        y, x = ((np.arange(n) - (n - 1) / 2) * s for n, s in zip(fine[1:], step[1:], strict=True))
        middle = np.array([(n - 1) / 2 * s for n, s in zip(SHAPE[1:], SPACING[1:], strict=True)])
        centre = 8.0 * rng.standard_normal(2)
        count = int(rng.integers(setting.foci[0], setting.foci[1] + 1))
        turn = rng.uniform(0, 2 * np.pi)
        empty, self.foci = np.ones(fine), []
        for i in range(count):
            place = centre
            if count > 1:
                angle, far = turn + 2 * np.pi * i / count, rng.uniform(9.0, 13.0)
                place = 0.5 * centre + far * np.array([np.sin(angle), np.cos(angle)])
            peak, width = drawn(PEAK, rng), drawn(WIDTH, rng)
            self.foci.append((*(place + middle), peak, width))
            bump = np.exp(-((y[:, None] - place[0]) ** 2 + (x - place[1]) ** 2) / (2 * width**2))
            empty *= 1 - peak * bump[None]
        start = 1 - empty
        ragged, uneven, uneven_k = (smooth(rng, fine[1:], 4 * FINER / 2)[None] for _ in range(3))
        start = np.clip(start, 1e-12, 1 - 1e-12)  # far away nothing is left of a Gaussian
        start = expit(np.log(start / (1 - start)) + setting.ragged * ragged)
        first = 0.0 if seed % 2 else BEFORE
        days = first + np.concatenate(([0.0], np.cumsum(rng.uniform(*GAPS, int(rng.integers(1, 4))))))
        self.later = float(days[-1] + AHEAD)
        run = list(integrate(
            start[None], np.ones(fine, bool), self.values["diffusion.D"] * np.exp(setting.uneven * uneven), step,
            self.values["growth.k"] * np.exp(setting.uneven / 2 * uneven_k), Hazard.none(), [*days, self.later],
        ))  # fmt: skip
        block = tuple(f // n for f, n in zip(fine, SHAPE, strict=True))
        states = [average(u, block)[0] for u in run]
        self.truth = states[-1]
        self.volume = float((run[-1][0] >= VISIBLE).sum() * np.prod(step))
        self.noise, self.threshold, self.edge = (drawn(p, rng) for p in (NOISE, THRESHOLD, EDGE))
        self.visits = []
        for day, u in zip(days, states, strict=False):
            has_cells, has_outline = rng.random() < CELLS, rng.random() < OUTLINE
            cells = u + self.noise * self._unit(rng, setting)
            outline = (u + self.edge * self._unit(rng, setting) > self.threshold).astype(float)
            cut, strip = rng.random() < CUT, int(rng.integers(0, SHAPE[2] - 6))
            if cut:
                cells[..., strip : strip + 6] = np.nan
            self.visits.append((float(day), cells if has_cells else None,
                                outline if has_outline or not has_cells else None))  # fmt: skip

    @staticmethod
    def _unit(rng, setting):
        """Noise of unit variance."""
        if setting.correlated == 0:
            return rng.standard_normal(SHAPE)
        rough = rng.standard_t(4, SHAPE) / np.sqrt(2.0)
        return np.sqrt(1 - setting.correlated) * rough + np.sqrt(setting.correlated) * smooth(rng, SHAPE[1:], 2)[None]

    def probability(self, u):
        """Chance that a voxel with that cell fraction lies in an outline."""
        return ndtr((u - self.threshold) / self.edge)
