"""Whether data meet what ComBat assumes."""

from __future__ import annotations

import numpy as np
from scipy.stats import false_discovery_control, levene, shapiro

from biomodel.errors import InputError
from biomodel.findings import Finding
from biomodel.imaging.harmonise.combat import Combat, Table, as_table, fit_combat

__all__ = ["check_assumptions"]

#: Samples per batch under which its estimates hang on the prior. A working default.
FEW = 10
#: Share of a covariate's variance that lies between batches from which the two are hard to tell apart: a variance
#: inflation of 5. A working default.
CONFOUNDED = 0.8
#: False discovery rate of the tests.
RATE = 0.05


def check_assumptions(
    features: np.ndarray,
    batch: np.ndarray,
    covariates: np.ndarray | None = None,
    *,
    reference: object = None,
    shrink: bool = True,
    names: tuple[str, ...] | None = None,
) -> tuple[Finding, ...]:
    """Check what :func:`fit_combat` assumes of the same data.

    Enough samples per batch; covariates that are not tied to batches; residuals that are about normal (Shapiro-Wilk)
    and, once harmonised, equally spread over batches (Levene's test with medians), both with a false discovery rate
    over features; shifts of a batch that are about normal over features, as the prior says.

    Parameters
    ----------
    features, batch, covariates, reference, shrink, names
        As in :func:`fit_combat`.

    Returns
    -------
    tuple of Finding
        Errors where ComBat cannot be fitted, warnings where its result is doubtful; empty where nothing was found.

    Raises
    ------
    InputError
        If the data are no table of numbers at all.
    """
    table = as_table(features, batch, covariates, names)
    batches, counts = np.unique(table.batch, return_counts=True)
    found: list[Finding] = []

    def note(severity: str, message: str, remedy: str) -> None:
        found.append(Finding(severity, "plausibility", "features", message, remedy))  # type: ignore[arg-type]

    if counts.min() < FEW:
        few = ", ".join(f"{b} ({c})" for b, c in zip(batches, counts, strict=True) if c < FEW)
        note(
            "error" if counts.min() < 2 else "warning",
            f"Batches with fewer than {FEW} samples: {few}.",
            "Join batches of the same scanner and protocol, or leave them out.",
        )
    for column, share in enumerate(_between(table)):
        if share > CONFOUNDED:
            note(
                "error" if share > 1 - 1e-9 else "warning",
                f"Covariate {column + 1}: {share:.0%} of its variance lies between batches.",
                "Batch and covariate can hardly be told apart: use batches that share the covariate's range.",
            )
    try:
        combat = fit_combat(
            table.features, table.batch, table.covariates, reference=reference, shrink=shrink, names=table.names
        )
    except InputError as error:
        what, _, remedy = str(error).partition(". ")
        note("error", what.rstrip(".") + ".", remedy)
        return tuple(found)
    residual = _residuals(table, combat)
    _normality(table, residual, note)
    _spread(table, residual, note)
    if shrink and table.features.shape[1] >= 8:
        p = np.array([shapiro(row).pvalue for row in combat.raw_shift])
        odd = false_discovery_control(p) < RATE
        if odd.any():
            note(
                "info",
                f"Shifts of batch {', '.join(map(str, batches[odd]))} are not normal over features, as the prior says.",
                "Harmonise kinds of features (volumes, diffusion, texture) separately.",
            )
    return tuple(found)


def _between(table: Table) -> list[float]:
    shares = []
    for column in table.covariates.T:
        total = ((column - column.mean()) ** 2).sum()
        means = [column[table.batch == b] for b in np.unique(table.batch)]
        between = sum(len(part) * (part.mean() - column.mean()) ** 2 for part in means)
        shares.append(float(between / total) if total > 0 else 1.0)
    return shares


def _residuals(table: Table, combat: Combat) -> np.ndarray:
    # What is left once batches and covariates are taken out, in units of the pooled standard deviation.
    harmonised = combat.apply(table.features, table.batch, table.covariates)
    return (harmonised - combat.mean - table.covariates @ combat.slopes) / combat.sd


def _normality(table: Table, residual: np.ndarray, note) -> None:
    # Of at most 5000 samples, the range of the test.
    p = np.array([shapiro(column[:5000]).pvalue for column in residual.T])
    odd = false_discovery_control(p) < RATE
    if odd.any():
        names = [table.names[i] for i in np.flatnonzero(odd)]
        note(
            "warning",
            f"Residuals of {len(names)} of {len(p)} features are not normal: {', '.join(names[:5])}"
            f"{', …' if len(names) > 5 else ''}.",
            "Transform them (logarithm of volumes and ratios), look for outliers.",
        )


def _spread(table: Table, residual: np.ndarray, note) -> None:
    parts = [residual[table.batch == b] for b in np.unique(table.batch)]
    p = np.array([levene(*(part[:, g] for part in parts)).pvalue for g in range(residual.shape[1])])
    odd = false_discovery_control(np.nan_to_num(p, nan=1.0)) < RATE
    if odd.any():
        names = [table.names[i] for i in np.flatnonzero(odd)]
        note(
            "warning",
            f"{len(names)} of {len(p)} features are still spread unequally over batches after harmonisation: "
            f"{', '.join(names[:5])}{', …' if len(names) > 5 else ''}.",
            "Their spread is unlike that of the batch's other features, or depends on more than the batch: harmonise "
            "them apart, without shrinkage.",
        )
