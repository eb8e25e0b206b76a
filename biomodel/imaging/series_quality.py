"""A check of raw series before anything is fitted to them, in three steps.

Complete? What the signal equations need and the constructor cannot ask for; empty or repeated samples. Consistent?
Voxel size, time steps, series of one visit in one place. Plausible? Signal over noise, motion between samples, ghosts,
fat that was not suppressed, values at the limit of the storage. Limits are working values unless a source is given: a
finding is worth a look. The steps carry the names of the other checks: ``schema``, ``geometry``, ``plausibility``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from itertools import combinations

import numpy as np

from biomodel.findings import Finding, Findings, Severity, Step
from biomodel.imaging.series import Intake, Kind, Series
from biomodel.imaging.series_signal import (
    body,
    clipped,
    ghost_ratio,
    in_plane,
    noise_level,
    rim_sectors,
    shift,
    unsuppressed_fat,
)

__all__ = ["check_intake", "check_series"]

#: Signal over noise under which the floor of magnitude images biases the signal by more than 5 % (Rice distribution:
#: sqrt(1 + 1/SNR²) - 1; Gudbjartsson and Patz 1995, 10.1002/mrm.1910340618).
LEAST_SNR = 3.0
#: The image without weighting or contrast carries all others: its noise is theirs, too. 10 is 10 % per voxel.
LEAST_FIRST_SNR = 10.0
#: A shift of half a voxel mixes a voxel at an edge with as much of its neighbour.
LARGEST_SHIFT = 0.5
#: Limit of the American College of Radiology for its phantom (Phantom Test Guidance for the MRI Accreditation Program,
#: percent-signal ghosting).
LARGEST_GHOST = 0.025
#: Fat that is not suppressed gives about 2.5 times the signal of gland in a spoiled gradient echo (T1 0.37 and 1.4 s,
#: TR 5 ms, 10 degrees), suppressed fat a small part of it; coils make less than three of difference around a body.
RIM_CONTRAST = 3.0
#: Fat brighter than tissue by this all around says that it was not suppressed at all.
RIM_BRIGHT = 1.5
#: Fat hardly diffuses: tumours and gland have 0.8e-3 to 2e-3 mm²/s, and fat that is not suppressed lowers them
#: (Partridge et al. 2011, 10.1016/j.mri.2011.07.024). Half of the lowest plausible ADC of a tumour.
FAT_ADC = 0.2e-3
#: Part of the body from which fat counts; the plausibility check takes the same for odd voxels.
FAT_PART = 0.05
#: Voxels at the limit of the storage: more than chance gives, and more than a vessel's inflow matters.
LEAST_CLIPPED, CLIPPED_PART = 10, 1e-5
#: Largest step in time over the median one before it counts as a gap.
TIME_GAP = 1.5
#: The first pass of a bolus lasts about 10 s; coarser steps miss it.
FIRST_PASS = 10.0
#: Voxel sides of patients and small animals, mm.
VOXEL_SIDES = (0.03, 20.0)
#: Two series of one visit show the same place if this part of the smaller field of view is common.
LEAST_COMMON = 0.5
#: Samples on which noise and ghosts are measured: they do not change from one to the next.
MEASURED = 8
#: Voxels along an axis above which images are halved before their shift is measured.
HALVED = 128


def check_intake(intake: Intake, name: str) -> Findings:
    """Return what was found on reading a folder and what a check of its series finds, the gravest first.

    Parameters
    ----------
    name
        Of the folder.
    """
    items = list(intake.findings)
    for series in intake.series:
        items += check_series(series)
    items += _together(intake.series)
    return Findings(name, tuple(items))


def check_series(series: Series) -> tuple[Finding, ...]:
    """Check one series in three steps.

    Where a sample holds no signal the third step is left out.
    """
    items = [*_complete(series), *_consistent(series)]
    if not any(item.severity == "error" for item in items):
        items += _plausible(series)
    return tuple(items)


def _finding(series: Series, severity: Severity, step: Step, message: str, remedy: str) -> Finding:
    return Finding(severity, step, series.name, f"{series.name}: {message}", remedy)


def _complete(series: Series) -> Iterator[Finding]:
    for note in series.notes:
        yield _finding(series, "warning", "schema", f"{note}.", "Check that the series can be used like this.")
    if series.kind is Kind.DCE:
        if series.field_strength is None:
            message = "field strength missing; the relaxivity of the contrast agent depends on it."
            yield _finding(series, "warning", "schema", message, "Give MagneticFieldStrength, T.")
        if series.contrast_agent is None:
            message = "contrast agent missing, or not one that is known; its relaxivity is not known."
            yield _finding(series, "warning", "schema", message, "Name the agent, or give its relaxivity.")
        if series.te is None:
            message = "echo time missing; T2* decay by contrast agent cannot be told."
            yield _finding(series, "info", "schema", message, "Give EchoTime, s.")
    if series.kind is Kind.VFA and series.samples == 2:
        message = "two flip angles give T1 without any way to see whether it fits."
        yield _finding(series, "info", "schema", message, "Acquire three or more.")
    if series.kind is Kind.DWI and series.b_values is not None and series.b_values.min() > 5:
        message = f"lowest b-value {series.b_values.min():g} s/mm²; no image without weighting."
        yield _finding(series, "info", "schema", message, "Perfusion matters less so, but T2 contrast is not known.")
    yield from _empty(series)


def _empty(series: Series) -> Iterator[Finding]:
    remedy = "Export the series again, or leave the sample out."
    digests: dict[bytes, int] = {}
    filled = np.zeros((series.samples, series.grid.shape[0]), bool)
    for number, sample in enumerate(series.data, start=1):
        if not np.isfinite(sample).all():
            bad = int((~np.isfinite(sample)).sum())
            message = f"sample {number}: {bad} voxels are NaN or infinite."
            severity: Severity = "error" if bad == sample.size else "warning"
            yield _finding(series, severity, "schema", message, remedy)
        filled[number - 1] = np.nan_to_num(sample).any((1, 2))
        digest = hashlib.sha256(np.ascontiguousarray(sample).tobytes()).digest()
        twin = digests.setdefault(digest, number)
        if twin != number and filled[number - 1].any():
            message = f"samples {twin} and {number} are the same, voxel by voxel."
            yield _finding(series, "warning", "schema", message, remedy)
    for at in np.flatnonzero(~filled.any(1)):
        yield _finding(series, "error", "schema", f"sample {at + 1} is empty.", remedy)
    some = filled.any(0)
    for number, row in enumerate(filled, start=1):
        if row.any() and (row != some).any():
            z = int(np.flatnonzero(row != some)[0]) + 1
            message = f"sample {number}: slice {z} is empty, though not in other samples."
            yield _finding(series, "error", "schema", message, remedy)


def _consistent(series: Series) -> Iterator[Finding]:
    low, high = min(series.grid.spacing), max(series.grid.spacing)
    if low < VOXEL_SIDES[0] or high > VOXEL_SIDES[1]:
        message = f"voxel size {' × '.join(f'{side:g}' for side in series.grid.spacing)} mm (z, y, x)."
        yield _finding(series, "warning", "geometry", message, "Check that the header's lengths are in mm.")
    if series.kind is not Kind.DCE or series.times is None or series.samples < 3:
        return
    steps = np.diff(series.times)
    usual = float(np.median(steps))
    for at in np.flatnonzero(steps > TIME_GAP * usual):
        message = (
            f"{steps[at]:.3g} s between samples {at + 1} and {at + 2}, usually {usual:.3g} s: a pause, or a sample is "
            "missing."
        )
        yield _finding(series, "warning", "geometry", message, "Check that all samples were exported.")
    if usual > FIRST_PASS:
        message = f"a sample every {usual:.3g} s; the first pass of the bolus falls between them."
        remedy = "Take an input function from a population; vp and Ktrans of permeable vessels are not well told apart."
        yield _finding(series, "info", "geometry", message, remedy)


def _plausible(series: Series) -> Iterator[Finding]:
    if series.kind is Kind.B1:
        return
    reference = _reference(series)
    first = np.asarray(series.data[reference])
    inside = body(first)
    if inside.sum() < 1000 or min(first.shape[1:]) < 16:
        message = "too small, or no body against a background: signal, motion and ghosts were not checked."
        yield _finding(series, "info", "plausibility", message, "Look at the images.")
        return
    yield from _noise(series, reference, inside)
    yield from _motion(series, reference, inside)
    yield from _ghosts(series, inside)
    yield from _fat(series, reference, inside)
    yield from _clipping(series)


def _reference(series: Series) -> int:
    """Return the sample with the plainest signal: the lowest b-value, or the first."""
    return int(np.argmin(series.b_values)) if series.b_values is not None else 0


def _chosen(series: Series, reference: int) -> list[int]:
    spread = np.linspace(0, series.samples - 1, min(MEASURED, series.samples)).round().astype(int)
    highest = [] if series.b_values is None else [int(np.argmax(series.b_values))]
    return sorted({reference, *highest, *spread.tolist()})


def _noise(series: Series, reference: int, inside: np.ndarray) -> Iterator[Finding]:
    axes = in_plane(series.grid.spacing)
    ratios = {}
    for sample in _chosen(series, reference):
        image = series.data[sample]
        sigma = noise_level(image, inside, axes)
        if sigma > 0:
            ratios[sample] = float(np.nanmedian(image[inside])) / sigma
    if not ratios:
        message = "no noise could be measured (smoothed or masked images?)."
        yield _finding(series, "info", "plausibility", message, "Look at the images.")
        return
    lowest = min(ratios, key=lambda sample: ratios[sample])
    at_first = ratios.get(reference, float("nan"))
    least = f"at the least {ratios[lowest]:.3g} (sample {lowest + 1})"
    message = f"signal over noise {at_first:.3g} in sample {reference + 1}, {least}."
    yield _finding(series, "info", "plausibility", message, "")
    if ratios[lowest] < LEAST_SNR:
        message = (
            f"signal over noise {ratios[lowest]:.2g} in sample {lowest + 1}; under {LEAST_SNR:g} magnitudes are biased."
        )
        remedy = "Fit with the noise taken as Rician, or leave that sample out."
        yield _finding(series, "warning", "plausibility", message, remedy)
    if at_first < LEAST_FIRST_SNR:
        message = f"signal over noise {at_first:.2g} in sample {reference + 1}, to which all others are compared."
        yield _finding(series, "warning", "plausibility", message, "Average over regions rather than voxels.")


def _motion(series: Series, reference: int, inside: np.ndarray) -> Iterator[Finding]:
    if series.samples < 2:
        return
    if not _visible(series, reference, inside):
        return
    steps = [2 if count > HALVED else 1 for count in series.grid.shape]
    fixed = _halved(series.data[reference], steps)
    moved = np.zeros((series.samples, 3))
    for number, sample in enumerate(series.data):
        if number != reference and (series.b_values is None or _visible(series, number, inside)):
            moved[number] = shift(fixed, _halved(sample, steps)) * steps
    size = np.abs(moved).max(1)
    far = np.flatnonzero(size > LARGEST_SHIFT)
    if far.size:
        worst = int(np.argmax(size))
        length = float(np.linalg.norm(moved[worst] * series.grid.spacing))
        axis = "zyx"[int(np.argmax(np.abs(moved[worst])))]
        message = (
            f"{far.size} of {series.samples} samples lie more than {LARGEST_SHIFT:g} voxels from sample "
            f"{reference + 1}; the furthest, sample {worst + 1}, {length:.2g} mm ({size[worst]:.2g} voxels along "
            f"{axis})."
        )
        yield _finding(series, "warning", "plausibility", message, "Correct the motion before fitting.")


def _visible(series: Series, number: int, inside: np.ndarray) -> bool:
    """Whether a sample shows enough of the body to be compared: not where there is hardly more than noise."""
    image = series.data[number]
    sigma = noise_level(image, inside, in_plane(series.grid.spacing))
    return bool(float(np.nanmedian(image[inside])) > 5 * sigma)


def _halved(image: np.ndarray, steps: Sequence[int]) -> np.ndarray:
    values: np.ndarray = np.asarray(image, np.float32)
    for axis, step in enumerate(steps):
        if step == 2:
            even = values.shape[axis] // 2 * 2
            parts = [np.take(values, range(start, even, 2), axis) for start in (0, 1)]
            values = (parts[0] + parts[1]) / 2
    return values


def _ghosts(series: Series, inside: np.ndarray) -> Iterator[Finding]:
    first, second = in_plane(series.grid.spacing)
    encoded = None if series.phase_encoding is None else "zyx".index(series.phase_encoding)
    if encoded is not None and encoded not in (first, second):
        return
    axis, other = (second, first) if encoded == second else (first, second)
    found: dict[int, float] = {}
    for sample in _chosen(series, 0):
        if _visible(series, sample, inside):
            found[sample] = ghost_ratio(series.data[sample], inside, axis, other)
    known = {sample: value for sample, value in found.items() if np.isfinite(value)}
    if not known:
        message = "ghosts could not be measured: no air beside the body on two sides, or the scanner masked it."
        yield _finding(series, "info", "plausibility", message, "Look at the images.")
        return
    # Without the phase-encoded axis the brighter one is taken for it.
    worst = max(known, key=lambda sample: known[sample] if encoded is not None else abs(known[sample]))
    value = known[worst] if encoded is not None else abs(known[worst])
    if value > LARGEST_GHOST:
        along = "zyx"[axis if known[worst] > 0 else other]
        message = f"ghosts of {value:.1%} of the body's signal along {along} (sample {worst + 1})."
        remedy = "Look for ghosts over the tumour; leave samples with strong ones out."
        yield _finding(series, "warning", "plausibility", message, remedy)


def _fat(series: Series, reference: int, inside: np.ndarray) -> Iterator[Finding]:
    if series.kind is Kind.DWI and series.b_values is not None:
        highest = int(np.argmax(series.b_values))
        low, high = series.data[reference], series.data[highest]
        difference = float(series.b_values[highest] - series.b_values[reference])
        sigma = noise_level(high, inside, in_plane(series.grid.spacing))
        part = unsuppressed_fat(low, high, difference, inside, sigma if sigma > 0 else 0.0, FAT_ADC)
        if part > FAT_PART:
            message = (
                f"{part:.0%} of the body loses no signal up to b = {series.b_values[highest]:g} s/mm², as fat does."
            )
            remedy = "Fat suppression failed there: leave these voxels out, and look for displaced fat over the tumour."
            yield _finding(series, "warning", "plausibility", message, remedy)
        return
    if not series.fat_saturated:
        return
    sectors, deep = rim_sectors(series.data[reference], inside, series.grid.spacing)
    known = sectors[np.isfinite(sectors)]
    if known.size < 4 or not deep > 0:
        return
    usual, top = float(np.median(known)), float(known.max())
    remedy = "Look at the images: fat that is not suppressed hides enhancement, and its signal is no gland's."
    if usual > RIM_BRIGHT * deep:
        message = f"fat is {usual / deep:.2g} times as bright as tissue all around, though it was to be suppressed."
        yield _finding(series, "warning", "plausibility", message, remedy)
    elif top > RIM_CONTRAST * usual and top > deep:
        message = (
            f"fat on one side is {top / max(usual, 1e-9):.2g} times as bright as elsewhere: suppression failed there."
        )
        yield _finding(series, "warning", "plausibility", message, remedy)


def _clipping(series: Series) -> Iterator[Finding]:
    counts = []
    for number, sample in enumerate(series.data):
        ceiling = float("nan") if series.ceiling is None else float(series.ceiling[number])
        counts.append(clipped(sample, ceiling))
    worst = int(np.argmax(counts))
    if counts[worst] >= max(LEAST_CLIPPED, CLIPPED_PART * series.data[0].size):
        message = f"{counts[worst]} voxels of sample {worst + 1} are at the largest value that could be stored."
        remedy = "Their signal is cut off: leave them out, and have the scanner's image scale lowered next time."
        yield _finding(series, "warning", "plausibility", message, remedy)


def _together(many: Sequence[Series]) -> Iterator[Finding]:
    for one, two in combinations(many, 2):
        if one.day != two.day:
            continue
        small, large = sorted((one, two), key=lambda series: series.grid.voxel_volume * np.prod(series.grid.shape))
        common = _common(small, large)
        if common < LEAST_COMMON:
            message = f"shows only {common:.0%} of its place in {large.name}."
            remedy = "Check that both are of one visit and one frame of reference; maps are compared voxel by voxel."
            yield _finding(small, "warning", "geometry", message, remedy)


def _common(small: Series, large: Series) -> float:
    """Return the part of a field of view that lies in another."""
    axes = [np.linspace(0, count - 1, min(count, 12)) for count in small.grid.shape[::-1]]
    index = np.stack([*np.meshgrid(*axes, indexing="ij"), np.ones([len(axis) for axis in axes])]).reshape(4, -1)
    place = np.linalg.solve(large.grid.affine, small.grid.affine @ index)[:3]
    limit = np.array(large.grid.shape[::-1])[:, None] - 0.5
    return float(((place >= -0.5) & (place <= limit)).all(0).mean())
