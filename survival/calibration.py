"""Probabilities made right, sets that hold the truth as often as promised, and the threshold at which to act."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import minimize_scalar
from scipy.special import expit, logit
from sklearn.isotonic import IsotonicRegression

from biomodel.errors import InputError
from survival.metrics.binary import checked_pair, checked_probability

__all__ = [
    "Calibration",
    "ConformalSets",
    "Costs",
    "Isotonic",
    "SensitivityFloor",
    "SpecificityFloor",
    "Temperature",
    "VennAbers",
]

EDGE = 1e-6


class Calibration(Protocol):
    """A map from probabilities to better ones, learned on patients whom the model did not see."""

    def learn(self, label: ArrayLike, probability: ArrayLike) -> Calibration: ...

    def apply(self, probability: ArrayLike) -> np.ndarray: ...


class Temperature:
    """Divides the logits by one number, which leaves the order as it is (Guo et al. 2017, arXiv:1706.04599).

    Parameters
    ----------
    shift : bool
        Also adds a number, so that the mean is right (Platt's scaling).
    """

    def __init__(self, shift: bool = False):
        self.shift = shift

    def learn(self, label: ArrayLike, probability: ArrayLike) -> Temperature:
        """Learn by maximum likelihood, on labels (n,) with both classes and probabilities (n,)."""
        y, p = checked_probability(label, probability, "Temperature")
        checked_pair(y, p, "Temperature")
        x = logit(np.clip(p, EDGE, 1 - EDGE))

        def loss(log_slope: float) -> tuple[float, float]:
            z = np.exp(log_slope) * x
            b = _mean_shift(z, y) if self.shift else 0.0
            return float(np.mean(np.logaddexp(0, z + b) - y * (z + b))), b

        found = minimize_scalar(lambda s: loss(s)[0], bounds=(-4, 4), method="bounded", options={"xatol": 1e-9})
        self.slope_, self.shift_ = float(np.exp(found.x)), loss(found.x)[1]
        return self

    def apply(self, probability: ArrayLike) -> np.ndarray:
        """Better probabilities (n,)."""
        x = logit(np.clip(np.asarray(probability, float), EDGE, 1 - EDGE))
        return expit(self.slope_ * x + self.shift_)


def _mean_shift(z: np.ndarray, y: np.ndarray) -> float:
    """What must be added to the logits so that the mean probability is the mean label."""
    b = 0.0
    for _ in range(50):
        mu = expit(z + b)
        step = (y - mu).sum() / max((mu * (1 - mu)).sum(), 1e-12)
        b += float(np.clip(step, -2, 2))
        if abs(step) < 1e-12:
            break
    return b


class Isotonic:
    """The rising step function with the least squared error; wants some hundred patients."""

    def learn(self, label: ArrayLike, probability: ArrayLike) -> Isotonic:
        """Learn on labels (n,) with both classes and probabilities (n,)."""
        y, p = checked_probability(label, probability, "Isotonic")
        checked_pair(y, p, "Isotonic")
        self.map_ = IsotonicRegression(out_of_bounds="clip", y_min=0.0, y_max=1.0).fit(p, y)
        return self

    def apply(self, probability: ArrayLike) -> np.ndarray:
        """Better probabilities (n,)."""
        return self.map_.predict(np.asarray(probability, float))


class VennAbers:
    """Two isotonic maps, one with the new patient as 1 and one as 0: an interval that is calibrated whatever the model.

    Vovk and Petej 2014, arXiv:1211.0025. The single probability is the one with the least regret, p1 / (1 - p0 + p1).
    """

    def learn(self, label: ArrayLike, probability: ArrayLike) -> VennAbers:
        """Keep labels (n,) with both classes and probabilities (n,)."""
        self.label_, self.probability_ = checked_probability(label, probability, "VennAbers")
        checked_pair(self.label_, self.probability_, "VennAbers")
        return self

    def interval(self, probability: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper probability (n,) each."""
        new = np.asarray(probability, float)
        asked, back = np.unique(new, return_inverse=True)
        ends = np.empty((2, len(asked)))
        for k, p in enumerate(asked):
            x = np.append(self.probability_, p)
            for label in (0, 1):
                fitted = IsotonicRegression().fit(x, np.append(self.label_, label))
                ends[label, k] = fitted.predict([p])[0]
        return ends[0][back], ends[1][back]

    def apply(self, probability: ArrayLike) -> np.ndarray:
        """Better probabilities (n,)."""
        low, high = self.interval(probability)
        return high / (1 - low + high)


class ConformalSets:
    """Sets of classes that hold the true one with a given probability, in each class by itself.

    A class belongs to the set unless fewer than `1 - coverage` of the patients of that class looked as little like it
    (split conformal prediction, class by class: Vovk 2012, arXiv:1209.2673). An empty set says that the patient is like
    neither class, one with both that the data do not tell.

    Parameters
    ----------
    coverage : float
        Above 0 and below 1.
    """

    def __init__(self, coverage: float = 0.9):
        if not 0 < coverage < 1:
            raise InputError(f"ConformalSets: coverage is {coverage:g}; expected above 0 and below 1.")
        self.coverage = coverage

    def learn(self, label: ArrayLike, probability: ArrayLike) -> ConformalSets:
        """Keep the probabilities of patients whom the model did not see, by class.

        Raises
        ------
        InputError
            If a class has so few patients that only the whole set could keep the promise.
        """
        y, p = checked_probability(label, probability, "ConformalSets")
        self.known_ = [np.sort(1 - p[y == 0]), np.sort(p[y == 1])]
        fewest = int(np.ceil(1 / (1 - self.coverage))) - 1
        for k, known in enumerate(self.known_):
            if len(known) < fewest:
                raise InputError(
                    f"ConformalSets: {len(known)} patients of class {k}; coverage {self.coverage:g} needs {fewest}."
                )
        return self

    def p_values(self, probability: ArrayLike) -> np.ndarray:
        """How many patients of each class look as little like it, (n, 2), as a share."""
        p = np.asarray(probability, float)
        found = [
            (np.searchsorted(known, own, side="right") + 1) / (len(known) + 1)
            for known, own in zip(self.known_, (1 - p, p), strict=True)
        ]
        return np.stack(found, 1)

    def sets(self, probability: ArrayLike) -> np.ndarray:
        """Whether each class is in the set, (n, 2)."""
        return self.p_values(probability) > 1 - self.coverage


@dataclass(frozen=True)
class Costs:
    """The threshold that costs least: act where the probability exceeds the odds of the two errors.

    Right for calibrated probabilities; a patient's own costs give a patient's own threshold. It is also the threshold
    at which a decision curve is read.

    Attributes
    ----------
    false_positive, false_negative : float
        Cost of acting in vain, and of not acting where it was needed; above 0, in any unit.
    """

    false_positive: float
    false_negative: float

    def __post_init__(self) -> None:
        if not (self.false_positive > 0 and self.false_negative > 0):
            raise InputError("Costs: both must be above 0.")

    def threshold(self, label: ArrayLike = (), probability: ArrayLike = ()) -> float:
        """The threshold; labels and probabilities are not needed."""
        return self.false_positive / (self.false_positive + self.false_negative)


def _floor(share: float, where: str) -> None:
    if not 0 < share < 1:
        raise InputError(f"{where}: the floor is {share:g}; expected above 0 and below 1.")


@dataclass(frozen=True)
class SensitivityFloor:
    """The highest threshold that still finds a given share of those with the outcome.

    Attributes
    ----------
    floor : float
        Above 0 and below 1. It is met on the patients it was chosen on; on new ones it varies by chance.
    """

    floor: float

    def __post_init__(self) -> None:
        _floor(self.floor, "SensitivityFloor")

    def threshold(self, label: ArrayLike, probability: ArrayLike) -> float:
        """The threshold, from patients whom the model did not see."""
        y, p = checked_pair(label, probability, "SensitivityFloor")
        one = np.sort(p[y == 1])[::-1]
        return float(one[int(np.ceil(self.floor * len(one) - 1e-9)) - 1])


@dataclass(frozen=True)
class SpecificityFloor:
    """The lowest threshold that still spares a given share of those without the outcome.

    Attributes
    ----------
    floor : float
        Above 0 and below 1. It is met on the patients it was chosen on; on new ones it varies by chance.
    """

    floor: float

    def __post_init__(self) -> None:
        _floor(self.floor, "SpecificityFloor")

    def threshold(self, label: ArrayLike, probability: ArrayLike) -> float:
        """The threshold, from patients whom the model did not see: the least prediction above enough of them."""
        y, p = checked_pair(label, probability, "SpecificityFloor")
        none = np.sort(p[y == 0])
        last = none[int(np.ceil(self.floor * len(none) - 1e-9)) - 1]
        above = p[p > last]
        return float(above.min()) if len(above) else float(np.nextafter(last, np.inf))
