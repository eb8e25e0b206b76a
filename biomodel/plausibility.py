"""The third step of the quality check: could what the files hold be true of a patient?

The limits are wide, so that a finding is worth a look; they are working values, not published cut-offs, unless a source
is given.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import pairwise

import numpy as np

from biomodel.domain import Domain
from biomodel.findings import Finding, Severity
from biomodel.schedule import Schedule
from biomodel.schema import PatientManifest
from biomodel.visit import CellularitySettings, Visit

__all__ = ["plausibility"]

Files = Mapping[int, Mapping[str, str]]

#: Range of the median ADC of a tumour, mm²/s, widened from the 0.82e-3 to 1.61e-3 of 24 women with locally advanced
#: breast cancer (PubMed Central PMC3599215); fluid has 3e-3.
TUMOUR_ADC = (0.4e-3, 2.5e-3)
#: More voxels of the region than this above free water, or at or below 0, are more than noise.
ODD_VOXELS = 0.05
#: Less overlap of two successive regions than this, as a part of the smaller, says that they are not aligned.
LEAST_OVERLAP = 0.3
#: Dose per fraction from which radiotherapy is unusual outside radiosurgery, Gy.
LARGE_FRACTION = 12.0
#: A planned and a given entry of one treatment at most this far apart are taken for the same, days.
SAME_TREATMENT = 1.0


def plausibility(
    manifest: PatientManifest,
    domain: Domain | None,
    visits: list[Visit],
    schedule: Schedule,
    settings: CellularitySettings | None,
    files: Files,
    name: str,
) -> Iterator[Finding]:
    """Yield what is implausible in the parts of a patient that could be read.

    Parameters
    ----------
    files
        File of each map, by number of the visit and kind.
    name
        Of the manifest.
    """
    if domain is not None and not domain.well_mixed:
        yield from _grid(domain, _mask_file(manifest))
    for visit in visits:
        yield from _adc(visit, domain, settings, files)
        yield from _size(visit, domain, files, name)
    yield from _overlap(visits, files)
    yield from _course(manifest, visits, name)
    yield from _treatments(schedule, visits, name)


def _finding(severity: Severity, file: str, message: str, remedy: str) -> Finding:
    return Finding(severity, "plausibility", file, message, remedy)


def _mask_file(manifest: PatientManifest) -> str:
    return "patient.json" if manifest.grid is None else manifest.grid.mask


def _grid(domain: Domain, file: str) -> Iterator[Finding]:
    size = " × ".join(f"{step:g}" for step in domain.spacing)
    if max(domain.spacing) > 12 or min(domain.spacing) < 0.05:
        message = f"{file}: voxels of {size} mm (z, y, x) are unusual for MRI of a patient."
        yield _finding("warning", file, message, "Check the header's voxel size and its units of length.")
    if domain.mask.all() and domain.mask.size > 1:
        message = f"{file}: the mask fills the whole grid."
        remedy = "Give the organ's mask: cells cannot leave it, and everything outside it is ignored."
        yield _finding("warning", file, message, remedy)
    volume = domain.mask.sum() * domain.voxel_volume / 1e3
    if volume > 10_000:
        message = f"{file}: the mask holds {volume:.0f} cm³, more than an organ."
        yield _finding("warning", file, message, "Check the voxel size and the mask.")
    if domain.tissues:
        total = sum(fraction[domain.mask] for fraction in domain.tissues.values())
        if np.max(total) > 1.05:
            message = f"{file}: tissue fractions add up to as much as {np.max(total):.2f} in a voxel."
            yield _finding("warning", file, message, "Make them add up to at most 1.")


def _adc(visit: Visit, domain: Domain | None, settings: CellularitySettings | None, files: Files) -> Iterator[Finding]:
    if visit.adc is None or domain is None:
        return
    file = files[visit.number]["adc"]
    where = f"visit {visit.number}, adc ({file})"
    inside = visit.adc[domain.mask if visit.region is None else visit.region]
    inside = inside[np.isfinite(inside)]
    if not inside.size:
        return
    what = "the mask" if visit.region is None else "the region"
    median = float(np.median(inside))
    low, high = TUMOUR_ADC
    if visit.region is not None and not low <= median <= high:
        message = f"{where}: median {median:.3g} mm²/s in the region; tumours have about 0.8e-3 to 1.6e-3."
        yield _finding("warning", file, message, "Check the units of the map and the place of the region.")
    below = float(np.mean(inside <= 0))
    if below > ODD_VOXELS:
        message = f"{where}: {below:.0%} of the voxels in {what} are 0 or negative."
        yield _finding("warning", file, message, "Check the fit of the map, or leave these voxels out.")
    if settings is None:
        return
    above = float(np.mean(inside > settings.adc_w))
    if visit.region is not None and above > ODD_VOXELS:
        message = f"{where}: {above:.0%} of the region's voxels exceed adc_w ({settings.adc_w:.3g} mm²/s), free water."
        remedy = "Check adc_w and whether the region holds necrosis, a cyst or fat; such voxels count as free of cells."
        yield _finding("warning", file, message, remedy)
    under = float(np.mean(inside < settings.adc_min))
    if visit.region is not None and under > ODD_VOXELS:
        message = f"{where}: {under:.0%} of the region's voxels lie under adc_min ({settings.adc_min:.3g} mm²/s)."
        yield _finding("warning", file, message, "Check adc_min; such voxels would be more than full of cells.")


def _size(visit: Visit, domain: Domain | None, files: Files, name: str) -> Iterator[Finding]:
    if visit.region is None or domain is None:
        return
    file = files[visit.number]["region"]
    where = f"visit {visit.number}, region ({file})"
    voxels = int(visit.region.sum())
    volume = voxels * domain.voxel_volume / 1e3
    if 0 < voxels < 8:
        message = f"{where}: only {voxels} voxels."
        yield _finding("warning", file, message, "Check the region; so few voxels tell little about growth.")
    part = voxels / int(domain.mask.sum())
    if part > 0.6 and domain.mask.size > 1:
        message = f"{where}: fills {part:.0%} of the mask."
        yield _finding("warning", file, message, "Check that region and mask were not swapped or copied.")
    if visit.volume and voxels and not 0.7 <= visit.volume / volume <= 1.4:
        message = f"visit {visit.number}: volume {visit.volume:.3g} cm³, but the region holds {volume:.3g} cm³."
        yield _finding("warning", name, message, "Check both; the stated volume is the one used for volumes.")
    if visit.volume == 0:
        message = f"visit {visit.number}: volume 0, but the region holds {volume:.3g} cm³."
        yield _finding("warning", name, message, "Leave out the region, or the volume.")
    if visit.longest_diameter and voxels:
        places = [np.flatnonzero(visit.region.any(axis=tuple(a for a in range(3) if a != axis))) for axis in range(3)]
        spans = [(p[-1] - p[0] + 1) * step for p, step in zip(places, domain.spacing, strict=True)]
        most = float(np.linalg.norm(spans))
        if visit.longest_diameter > 1.5 * most or visit.longest_diameter < 0.4 * max(spans):
            message = (
                f"visit {visit.number}: longest diameter {visit.longest_diameter:.3g} mm, but the region's box is "
                f"{' × '.join(f'{span:.3g}' for span in spans)} mm (z, y, x)."
            )
            yield _finding("warning", name, message, "Check the diameter, its units and the region.")


def _overlap(visits: list[Visit], files: Files) -> Iterator[Finding]:
    drawn = [visit for visit in visits if visit.region is not None and visit.region.any()]
    for before, after in pairwise(drawn):
        if before.region.shape != after.region.shape:  # type: ignore[union-attr]
            continue
        smaller = min(int(before.region.sum()), int(after.region.sum()))  # type: ignore[union-attr]
        common = int((before.region & after.region).sum())  # type: ignore[operator]
        if common / smaller < LEAST_OVERLAP:
            how = "do not overlap" if common == 0 else f"overlap in only {common / smaller:.0%} of the smaller"
            message = f"The regions of visits {before.number} and {after.number} {how}."
            remedy = "Register the visits to one another, and check that the regions show the same tumour."
            yield _finding("warning", files[after.number]["region"], message, remedy)


def _course(manifest: PatientManifest, visits: list[Visit], name: str) -> Iterator[Finding]:
    for number, record in enumerate(manifest.visits, start=1):
        if not any((record.adc, record.region, record.volume, record.longest_diameter)):
            message = f"visit {number}: nothing was measured."
            yield _finding("warning", name, message, "Give a map, a region, a volume or a diameter, or leave it out.")
        elif record.adc and not record.region and (record.volume is None or record.volume.value != 0):
            message = f"visit {number}: an ADC map without a region."
            remedy = "Give the tumour's region, or a volume of 0 if no tumour was seen."
            yield _finding("warning", name, message, remedy)
    if len(manifest.visits) == 1:
        message = "Only one visit: growth cannot be told from it."
        yield _finding("info", name, message, "A forecast will rest on prior knowledge alone.")
    for before, after in pairwise(visits):
        if after.day - before.day > 730:
            gap = after.day - before.day
            message = f"Visits {before.number} and {after.number} lie {gap:.0f} days apart."
            yield _finding("warning", name, message, "Check the days or dates.")
    volumes = [(visit.number, visit.volume) for visit in visits if visit.volume is not None]
    for (first, small), (second, large) in pairwise(volumes):
        low, high = sorted((small, large))
        if low > 0 and high / low > 500:
            message = f"The volume changes from {small:.3g} to {large:.3g} cm³ between visits {first} and {second}."
            yield _finding("warning", name, message, "Check both volumes and their units (mm³, mL, cm³).")


def _treatments(schedule: Schedule, visits: list[Visit], name: str) -> Iterator[Finding]:
    for (agent, day, _), count in Counter((dose.agent, dose.day, dose.status) for dose in schedule.doses).items():
        if count > 1:
            message = f"{count} doses of {agent} on day {day:g}."
            yield _finding("warning", name, message, "Keep one of them if it was entered twice.")
    yield from _planned_and_given(schedule, name)
    for (day, _), count in Counter((fraction.day, fraction.status) for fraction in schedule.fractions).items():
        if count > 1:
            message = f"{count} radiotherapy fractions at the same hour of day {day:g}."
            yield _finding("warning", name, message, "Keep one of them, or give each its hour.")
    for agent in schedule.agents:
        amounts = [dose.amount for dose in schedule.of(agent)]
        if amounts and max(amounts) > 5 * min(amounts):
            message = f"Doses of {agent} range from {min(amounts):g} to {max(amounts):g} {schedule.of(agent)[0].units}."
            yield _finding("warning", name, message, "Check the amounts and their units.")
    spelt: dict[str, str] = {}
    for agent in schedule.agents:
        other = spelt.setdefault(agent.casefold().replace("-", "").replace("_", ""), agent)
        if other != agent:
            message = f"'{other}' and '{agent}' are treated as two agents."
            yield _finding("warning", name, message, "Spell the agent the same way everywhere.")
    large = max((fraction.gray for fraction in schedule.fractions), default=0.0)
    if large > LARGE_FRACTION:
        message = f"A radiotherapy fraction of {large:g} Gy."
        yield _finding("warning", name, message, "Check that this is the dose of one fraction (radiosurgery).")
    if not visits or not len(schedule):
        return
    days = [dose.day for dose in schedule.doses] + [fraction.day for fraction in schedule.fractions]
    if days and (min(days) < visits[0].day - 365 or max(days) > visits[-1].day + 730):
        message = (
            f"Treatments from day {min(days):g} to {max(days):g}, visits from {visits[0].day:g} to {visits[-1].day:g}."
        )
        yield _finding("warning", name, message, "Check that all days count from the same day 0.")
    if schedule.given_only and len(visits) > 1 and schedule.given_after(visits[0].day):
        message = "No treatment is marked planned."
        remedy = (
            "Mark what was planned: a forecast otherwise knows the treatments given after its last visit, and says so."
        )
        yield _finding("info", name, message, remedy)


def _planned_and_given(schedule: Schedule, name: str) -> Iterator[Finding]:
    """Find what was entered as planned and, when it had been given, once more as given."""
    entries = [(dose.agent, dose.day, dose.status) for dose in schedule.doses]
    entries += [("radiotherapy", fraction.day, fraction.status) for fraction in schedule.fractions]
    entries += [(one.agent, one.start_day, one.status) for one in schedule.ongoing]
    for treatment in sorted({entry[0] for entry in entries}):
        planned, given = (
            sorted(day for what, day, status in entries if what == treatment and status == wanted)
            for wanted in ("planned", "given")
        )
        # Of daily treatment, today's given and tomorrow's planned entry are two: nearer than half a gap means the same.
        gaps = [after - before for days in (planned, given) for before, after in pairwise(days) if after > before]
        reach = min(SAME_TREATMENT, min(gaps, default=np.inf) / 2)
        pairs = [(plan, done) for plan in planned for done in given if abs(plan - done) <= reach]
        if pairs:
            message = (
                f"{treatment} is entered both as planned and as given, which counts twice: "
                f"{len(pairs)} time{'s' if len(pairs) > 1 else ''}, first planned on day {pairs[0][0]:g} and given on "
                f"day {pairs[0][1]:g}."
            )
            remedy = (
                "Keep one entry of each: the planned one if it was given as planned, which a forecast from an earlier "
                "visit may know; the given one if it was given otherwise."
            )
            yield _finding("warning", name, message, remedy)
