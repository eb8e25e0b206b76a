"""What harmonisation takes away: the batch, and how much of the clinical signal."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import f_oneway, rankdata

from biomodel.errors import InputError
from biomodel.findings import Finding
from biomodel.imaging.harmonise.checks import check_assumptions
from biomodel.imaging.harmonise.combat import Table, as_table, fit_combat

__all__ = ["Estimate", "HarmonisationReport", "harmonisation_report"]

#: Ridge penalties per sample among which generalised cross-validation chooses on the training part.
PENALTIES = np.logspace(-4, 2, 13)
#: Level of the test whether the outcome differs between batches.
DIFFERS = 0.05


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


@dataclass(frozen=True)
class HarmonisationReport:
    """Prediction of an outcome and of the batch from features, before and after harmonisation, on held-out samples.

    Attributes
    ----------
    metric : str
        ``AUC`` for an outcome of two values, ``R²`` for others.
    before, after, change : Estimate
        Of all samples together; `change` is after - before, paired.
    within_before, within_after, within_change : Estimate
        The same, comparing only samples of one batch: what the features say beyond which site a patient came to.
    batch_before, batch_after : Estimate
        Balanced accuracy of predicting the batch.
    batch_chance : float
        What guessing gives.
    findings : tuple of Finding
        Of :func:`check_assumptions`.
    """

    metric: str
    before: Estimate
    after: Estimate
    change: Estimate
    within_before: Estimate
    within_after: Estimate
    within_change: Estimate
    batch_before: Estimate
    batch_after: Estimate
    batch_chance: float
    findings: tuple[Finding, ...]

    def __str__(self) -> str:
        rows = [
            ("", "before", "after", "change"),
            (f"{self.metric} of the outcome", str(self.before), str(self.after), str(self.change)),
            ("  within batches", str(self.within_before), str(self.within_after), str(self.within_change)),
            (
                f"batch, balanced accuracy (chance {self.batch_chance:.2f})",
                str(self.batch_before),
                str(self.batch_after),
                "",
            ),
        ]
        lines = [f"{a:44s}{b:>26s}{c:>26s}{d:>28s}".rstrip() for a, b, c, d in rows]
        return "\n".join([*lines, *(f"{f.severity}: {f.message} {f.remedy}" for f in self.findings)])


def harmonisation_report(
    features: np.ndarray,
    batch: np.ndarray,
    outcome: np.ndarray,
    covariates: np.ndarray | None = None,
    *,
    reference: object = None,
    shrink: bool = True,
    names: tuple[str, ...] | None = None,
    folds: int = 5,
    draws: int = 1000,
    seed: int = 0,
) -> HarmonisationReport:
    """Say how much of the batch and how much of the clinical signal ComBat takes out of features.

    In each fold ComBat and a ridge regression (of the outcome, and of each batch's indicator) are fitted to the
    training part alone and applied to the rest. Intervals are percentiles of a bootstrap over samples within batches,
    the same draws before and after, for given predictions: they do not hold the chance of the training.

    Where sites treat other patients, features that know the site know something of the outcome. Harmonisation takes
    that away, rightly: judge the clinical signal by the values within batches.

    Parameters
    ----------
    features : ndarray, shape (samples, p)
    batch : array_like, shape (samples,)
    outcome : ndarray, shape (samples,)
        Two values (AUC of the larger) or a number (R²).
    covariates : ndarray, shape (samples, q), optional
        Kept by ComBat. Not the outcome.
    reference, shrink, names
        As in :func:`fit_combat`.
    folds : int
        Parts of the cross-validation, balanced over batches and outcome.
    draws : int
        Of the bootstrap.
    seed : int

    Returns
    -------
    HarmonisationReport

    Raises
    ------
    InputError
        If the outcome is missing, constant or among the covariates, or a batch has too few samples for the folds.
    """
    table = as_table(features, batch, covariates, names)
    y = np.asarray(outcome, float)
    if y.shape != (len(table.features),) or not np.isfinite(y).all() or np.ptp(y) == 0:
        raise InputError(
            f"harmonisation report: outcome of shape {y.shape}; expected {len(table.features)} numbers that are known "
            "and differ. Leave samples without outcome out."
        )
    for column in table.covariates.T:
        if np.ptp(column) > 0 and abs(np.corrcoef(column, y)[0, 1]) > 1 - 1e-9:
            raise InputError(
                "harmonisation report: the outcome is among the covariates; harmonisation would write it into the "
                "features of the very samples that it is predicted for. Leave it out of the covariates."
            )
    labels, which, counts = np.unique(table.batch, return_inverse=True, return_counts=True)
    if folds < 2 or len(labels) < 2 or counts.min() < 3 * folds / (folds - 1):
        raise InputError(
            f"harmonisation report: {folds} folds and {counts.min()} samples in the smallest of {len(labels)} "
            "batch(es); expected two or more folds and batches, and several samples of each batch in a training part."
        )
    levels = np.unique(y)
    binary = len(levels) == 2
    rng = np.random.default_rng(seed)
    part = _folds(which, y if binary else (y > np.median(y)).astype(float), folds, rng)
    target = (y == levels[1]).astype(float) if binary else y
    indicators = (which[:, None] == np.arange(len(labels))).astype(float)
    aims = np.column_stack([target, indicators])
    scores = {"before": np.empty(aims.shape), "after": np.empty(aims.shape)}
    for fold in range(folds):
        train, test = part != fold, part == fold
        before, after = _views(table, train, test, reference, shrink)
        for name, (x_train, x_test) in (("before", before), ("after", after)):
            scores[name][test] = _ridge(x_train, aims[train], x_test)
    measure = _auc if binary else _r2

    def values(rows: np.ndarray) -> list[float]:
        result = []
        for name in ("before", "after"):
            s = scores[name][rows]
            result += [measure(target[rows], s[:, 0]), _within(measure, target[rows], s[:, 0], which[rows])]
            # Over the batch's share, so that large batches are not guessed for their size.
            result.append(_balanced(which[rows], (s[:, 1:] / (counts / len(y))).argmax(1), len(labels)))
        return [*result, result[3] - result[0], result[4] - result[1]]

    point = values(np.arange(len(y)))
    members = [np.flatnonzero(which == i) for i in range(len(labels))]
    drawn = np.array([values(np.concatenate([rng.choice(m, len(m)) for m in members])) for _ in range(draws)])
    low, high = np.nanquantile(drawn, [0.025, 0.975], axis=0)
    e = [Estimate(float(v), float(a), float(b)) for v, a, b in zip(point, low, high, strict=True)]
    findings = check_assumptions(
        table.features, table.batch, table.covariates, reference=reference, shrink=shrink, names=table.names
    )
    p = f_oneway(*(y[m] for m in members)).pvalue
    if p < DIFFERS:
        findings += (
            Finding(
                "info",
                "plausibility",
                "features",
                f"The outcome differs between batches (p {p:.1g}): part of its prediction before harmonisation is the "
                "site itself.",
                "Judge the clinical signal by the values within batches.",
            ),
        )
    return HarmonisationReport(
        "AUC" if binary else "R²", e[0], e[3], e[6], e[1], e[4], e[7], e[2], e[5], 1 / len(labels), findings
    )


def _folds(which: np.ndarray, group: np.ndarray, folds: int, rng: np.random.Generator) -> np.ndarray:
    # Dealt out like cards, batch by batch and within it by outcome, so that all folds are alike.
    order = np.lexsort((rng.random(len(which)), group, which))
    part = np.empty(len(which), int)
    part[order] = np.arange(len(which)) % folds
    return part


def _views(
    table: Table, train: np.ndarray, test: np.ndarray, reference: object, shrink: bool
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    x, b, z = table.features, table.batch, table.covariates
    combat = fit_combat(x[train], b[train], z[train], reference=reference, shrink=shrink, names=table.names)
    after = tuple(combat.apply(x[rows], b[rows], z[rows]) for rows in (train, test))
    return (x[train], x[test]), (after[0], after[1])


def _ridge(x: np.ndarray, y: np.ndarray, new: np.ndarray) -> np.ndarray:
    # One ridge regression per column of y; for indicators its ranking is that of a regularised linear discriminant.
    centre, sd = x.mean(0), x.std(0)
    sd = np.where(sd > 0, sd, 1.0)
    u, s, vt = np.linalg.svd((x - centre) / sd, full_matrices=False)
    mean = y.mean(0)
    along = u.T @ (y - mean)
    n = len(x)
    best = np.full(y.shape[1], np.inf)
    weights = np.zeros((x.shape[1], y.shape[1]))
    for penalty in PENALTIES * n:
        shrunk = s**2 / (s**2 + penalty)
        rest = ((y - mean) ** 2).sum(0) - ((2 * shrunk - shrunk**2)[:, None] * along**2).sum(0)
        score = rest / (1 - (shrunk.sum() + 1) / n) ** 2 if shrunk.sum() + 1 < n else np.full(y.shape[1], np.inf)
        better = score < best
        best = np.where(better, score, best)
        weights[:, better] = (vt.T @ ((s / (s**2 + penalty))[:, None] * along))[:, better]
    return (new - centre) / sd @ weights + mean


def _auc(y: np.ndarray, score: np.ndarray) -> float:
    positive = int(y.sum())
    if positive in (0, len(y)):
        return np.nan
    return float((rankdata(score)[y == 1].sum() - positive * (positive + 1) / 2) / (positive * (len(y) - positive)))


def _r2(y: np.ndarray, score: np.ndarray) -> float:
    return float(1 - ((y - score) ** 2).sum() / ((y - y.mean()) ** 2).sum())


def _within(measure, y: np.ndarray, score: np.ndarray, which: np.ndarray) -> float:
    if measure is _r2:
        centred = [(v - (np.bincount(which, v) / np.maximum(np.bincount(which), 1))[which]) for v in (y, score)]
        return _r2(*centred)
    total, pairs = 0.0, 0.0
    for i in np.unique(which):
        rows = which == i
        weight = float(y[rows].sum() * (1 - y[rows]).sum())
        if weight > 0:
            total += weight * _auc(y[rows], score[rows])
            pairs += weight
    return total / pairs if pairs > 0 else np.nan


def _balanced(which: np.ndarray, guess: np.ndarray, count: int) -> float:
    return float(np.mean([(guess[which == i] == i).mean() for i in range(count)]))
