"""ComBat: location and scale of each batch, shrunk towards what its features have in common, and taken out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from biomodel.errors import InputError
from biomodel.frozen import frozen_array

__all__ = ["Combat", "fit_combat"]

#: Iterations of the posterior modes at most, and their relative change at the end.
MOST_STEPS, RESTS = 1000, 1e-12


@dataclass(frozen=True, eq=False)
class Table:
    """Checked features (samples, p), batch labels (samples,) and covariates (samples, q)."""

    features: np.ndarray
    batch: np.ndarray
    covariates: np.ndarray
    names: tuple[str, ...]


def as_table(
    features: np.ndarray, batch: np.ndarray, covariates: np.ndarray | None, names: tuple[str, ...] | None
) -> Table:
    """Check shapes and values, and refuse what is missing."""
    x = np.asarray(features)
    if x.ndim != 2 or x.dtype.kind not in "fiu" or 0 in x.shape:
        raise InputError(
            f"ComBat: features of shape {x.shape} and type {x.dtype}; expected numbers, (samples, features)."
        )
    x = x.astype(float)
    labels = np.asarray(batch)
    if labels.shape != (len(x),):
        raise InputError(f"ComBat: {labels.size} batch labels for {len(x)} samples; expected one per sample.")
    if (labels.dtype.kind == "f" and not np.isfinite(labels).all()) or any(v is None for v in labels.tolist()):
        raise InputError("ComBat: batch labels are missing; expected one per sample. Leave those samples out.")
    if names is None:
        names = tuple(f"feature {i + 1}" for i in range(x.shape[1]))
    if len(names) != x.shape[1]:
        raise InputError(f"ComBat: {len(names)} names for {x.shape[1]} features; expected one each.")
    z = np.empty((len(x), 0)) if covariates is None else np.asarray(covariates, float)
    z = z[:, None] if z.ndim == 1 else z
    if z.ndim != 2 or len(z) != len(x):
        raise InputError(f"ComBat: covariates of shape {z.shape}; expected ({len(x)}, q), categories as 0/1 columns.")
    for what, values in (("features", x), ("covariates", z)):
        bad = ~np.isfinite(values)
        if bad.any():
            column = int(np.flatnonzero(bad.any(0))[0])
            label = names[column] if what == "features" else f"column {column + 1}"
            raise InputError(
                f"ComBat: {int(bad.sum())} values of the {what} are missing or infinite (first in {label}); expected "
                "none. Leave those samples or that column out, or impute them."
            )
    return Table(x, labels, z, tuple(names))


@dataclass(frozen=True, eq=False)
class Combat:
    """A fitted harmonisation, made by :func:`fit_combat`.

    Attributes
    ----------
    batches : ndarray, shape (k,)
        Labels, sorted.
    reference : object or None
        Label of the batch that all others are brought to.
    names : tuple of str
    mean, sd : ndarray, shape (p,)
        Grand mean and pooled standard deviation of each feature, without covariates.
    slopes : ndarray, shape (q, p)
        Effects of the covariates, which are kept.
    shift, spread : ndarray, shape (k, p)
        Location and variance of each batch after standardisation (γ* and δ*² of the paper).
    raw_shift, raw_spread : ndarray, shape (k, p)
        The same without shrinkage.
    """

    batches: np.ndarray
    reference: object
    names: tuple[str, ...]
    mean: np.ndarray
    sd: np.ndarray
    slopes: np.ndarray
    shift: np.ndarray
    spread: np.ndarray
    raw_shift: np.ndarray
    raw_spread: np.ndarray

    def __post_init__(self) -> None:
        for name in ("mean", "sd", "slopes", "shift", "spread", "raw_shift", "raw_spread"):
            object.__setattr__(self, name, frozen_array(getattr(self, name), float))

    def apply(self, features: np.ndarray, batch: np.ndarray, covariates: np.ndarray | None = None) -> np.ndarray:
        """Harmonise samples of known batches, those fitted or new ones.

        Parameters
        ----------
        features : ndarray, shape (samples, p)
        batch : array_like, shape (samples,)
        covariates : ndarray, shape (samples, q)
            The same as in the fit.

        Returns
        -------
        ndarray, shape (samples, p)

        Raises
        ------
        InputError
            If a batch was not fitted, or columns differ from the fit's.
        """
        table = as_table(features, batch, covariates, None)
        if table.features.shape[1] != len(self.mean) or table.covariates.shape[1] != len(self.slopes):
            raise InputError(
                f"ComBat: {table.features.shape[1]} features and {table.covariates.shape[1]} covariates; expected "
                f"{len(self.mean)} and {len(self.slopes)} as in the fit."
            )
        known = {label: i for i, label in enumerate(self.batches.tolist())}
        unseen = sorted({str(v) for v in table.batch.tolist() if v not in known})
        if unseen:
            raise InputError(
                f"ComBat: batch {', '.join(unseen)} was not in the data that it was fitted to (there were "
                f"{', '.join(map(str, known))}); nothing is known of its shift. Fit again with samples of it, or "
                "leave it out."
            )
        which = np.array([known[v] for v in table.batch.tolist()])
        kept = self.mean + table.covariates @ self.slopes
        standard = (table.features - kept) / self.sd
        result = (standard - self.shift[which]) / np.sqrt(self.spread[which]) * self.sd + kept
        if self.reference is not None:  # exactly, without rounding
            at_home = which == known[self.reference]
            result[at_home] = table.features[at_home]
        return result


def fit_combat(
    features: np.ndarray,
    batch: np.ndarray,
    covariates: np.ndarray | None = None,
    *,
    reference: object = None,
    shrink: bool = True,
    names: tuple[str, ...] | None = None,
) -> Combat:
    """Fit ComBat (Johnson, Li and Rabinovic 2007, doi:10.1093/biostatistics/kxj037) with parametric priors.

    For images: Fortin et al. 2017, doi:10.1016/j.neuroimage.2017.08.047. Feature g of sample j in batch i is
    α + X β + γ_i + δ_i ε. The covariates' part X β is kept, γ_i and δ_i are taken out. Their estimates are shrunk
    towards the batch's mean over features, with a normal prior for γ and an inverse gamma prior for δ², their moments
    matched.

    Parameters
    ----------
    features : ndarray, shape (samples, p)
        On a scale on which noise is about normal (log volumes, not volumes).
    batch : array_like, shape (samples,)
        Scanner or site.
    covariates : ndarray, shape (samples, q), optional
        What differs between sites for reasons of biology, and must be kept; categories as 0/1 columns, one less than
        there are. The outcome that is to be predicted does not belong here: what it says is written into the features.
    reference : optional
        Label of a batch to bring the others to (Stein et al. 2015, BMC Bioinformatics 16:63); its samples stay as they
        are. Without it, all are brought to the mean of the samples.
    shrink : bool
        Without it each feature's own estimates are used, as needed for a single feature.
    names : tuple of str, optional
        Of the features, for messages.

    Returns
    -------
    Combat

    Raises
    ------
    InputError
        If there are fewer than two batches, a batch of one sample, a covariate that is a combination of batches, or a
        feature without spread.
    """
    table = as_table(features, batch, covariates, names)
    x, z = table.features, table.covariates
    batches, which, counts = np.unique(table.batch, return_inverse=True, return_counts=True)
    k, n = len(batches), len(x)
    if k < 2:
        raise InputError(f"ComBat: all samples are of batch {batches[0]}; expected two or more batches.")
    if counts.min() < 2:
        few = ", ".join(map(str, batches[counts < 2]))
        raise InputError(
            f"ComBat: a single sample in batch {few}; expected at least 2, better 10 or more. Join it with a batch of "
            "the same scanner, or leave it out."
        )
    if shrink and x.shape[1] < 3:
        raise InputError(
            f"ComBat: {x.shape[1]} feature(s); shrinkage learns from at least 3. Pass shrink=False, or more features."
        )
    if reference is not None and reference not in batches.tolist():
        raise InputError(
            f"ComBat: reference batch {reference!r} is not among the batches {', '.join(map(str, batches))}."
        )
    dummies = (which[:, None] == np.arange(k)).astype(float)
    design = np.hstack([dummies, z])
    size = np.linalg.norm(design, axis=0)
    if np.linalg.matrix_rank(design / np.where(size > 0, size, 1.0)) < design.shape[1]:
        raise InputError(
            f"ComBat: the {z.shape[1]} covariate(s) and the batches are linearly dependent (a covariate is constant, "
            "differs only between batches, or follows from others); their effects cannot be told apart. Leave that "
            "covariate out."
        )
    beta = np.linalg.lstsq(design, x, rcond=None)[0]
    slopes, home = beta[k:], None if reference is None else batches.tolist().index(reference)
    residual = x - design @ beta
    if home is None:
        mean, variance = counts / n @ beta[:k], (residual**2).mean(0)
    else:
        mean, variance = beta[home], (residual[which == home] ** 2).mean(0)
    scale = np.abs(x).max(0)
    if (variance <= (1e-12 * np.where(scale > 0, scale, 1.0)) ** 2).any():
        flat = [table.names[i] for i in np.flatnonzero(variance <= (1e-12 * np.where(scale > 0, scale, 1.0)) ** 2)]
        raise InputError(
            f"ComBat: {', '.join(flat[:5])} {'has' if len(flat) == 1 else 'have'} no spread beyond batches and "
            "covariates; expected features that vary. Leave them out."
        )
    sd = np.sqrt(variance)
    standard = (x - mean - z @ slopes) / sd
    raw_shift = np.stack([standard[which == i].mean(0) for i in range(k)])
    raw_spread = np.stack([standard[which == i].var(0, ddof=1) for i in range(k)])
    still = raw_spread < 1e-16  # zero but for rounding
    if still.any():
        i, g = (int(v) for v in np.argwhere(still)[0])
        raise InputError(
            f"ComBat: {table.names[g]} is constant in batch {batches[i]}; expected values that vary in every batch. "
            "Leave that feature out."
        )
    shift, spread = raw_shift.copy(), raw_spread.copy()
    if shrink:
        for i in range(k):
            shift[i], spread[i] = _posterior(standard[which == i], raw_shift[i], raw_spread[i])
    if home is not None:
        shift[home], spread[home] = 0.0, 1.0
    return Combat(batches, reference, table.names, mean, sd, slopes, shift, spread, raw_shift, raw_spread)


def _posterior(standard: np.ndarray, shift: np.ndarray, spread: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    # Posterior modes of γ and δ² of one batch, equations 3.1 of the paper, one feature per column.
    n = len(standard)
    centre, width = shift.mean(), shift.var(ddof=1)
    m, s2 = spread.mean(), spread.var(ddof=1)
    if s2 == 0 or width == 0:
        return shift, spread  # features that agree exactly have nothing to shrink to
    shape, rate = (2 * s2 + m * m) / s2, (m * s2 + m**3) / s2
    gamma, delta = shift, spread
    for _ in range(MOST_STEPS):
        new_gamma = (width * n * shift + delta * centre) / (width * n + delta)
        new_delta = (0.5 * ((standard - new_gamma) ** 2).sum(0) + rate) / (n / 2 + shape - 1)
        change = max(
            float(np.abs((new_gamma - gamma) / (np.abs(gamma) + np.sqrt(width))).max()),
            float(np.abs(new_delta / delta - 1).max()),
        )
        gamma, delta = new_gamma, new_delta
        if change < RESTS:
            break
    return gamma, delta
