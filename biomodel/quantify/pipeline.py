"""A whole study: every visit measured, later ones registered to the first, and a patient that can be forecast."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from scipy.ndimage import distance_transform_edt

from biomodel.domain import Domain
from biomodel.errors import GeometryError, InputError
from biomodel.files import atomic_folder
from biomodel.imaging.drugmap import drug_map
from biomodel.imaging.partial_volume import tumour_adc, tumour_share
from biomodel.imaging.preprocess import isotropic, resample
from biomodel.imaging.registration import BSpline, Image, Kind, Registration, Rigid, register
from biomodel.imaging.series_grid import Grid
from biomodel.imaging.transforms import Transform
from biomodel.patient import Patient
from biomodel.quantify.displaced import UNSEEN, displacement_sd
from biomodel.quantify.maps import Map, VisitMaps
from biomodel.quantify.study import Study
from biomodel.quantify.visit import Settings, measure
from biomodel.visit import Visit

__all__ = ["Quantified", "quantify"]

#: Least standard deviation of ADC, relative: what interpolation smooths away is not gained.
LEAST_CV = 0.005


@dataclass(frozen=True, eq=False)
class Quantified:
    """A study on one grid.

    Parameters
    ----------
    patient
        To be calibrated and forecast.
    visits
        Maps of every visit on the reference grid, that of the first visit.
    registrations
        Of the later visits; the first is the reference and moves nowhere.
    """

    patient: Patient
    visits: tuple[VisitMaps, ...]
    registrations: tuple[Registration, ...]

    def write(self, folder: str | os.PathLike[str], *, overwrite: bool = False, dicom: bool = False) -> None:
        """Write a patient folder with ``maps/``, ``registration/`` and ``quantify.html`` beside; all or nothing.

        Raises
        ------
        OutputError
            If the folder exists or cannot be written.
        """
        from biomodel.quantify.nifti_maps import write_maps
        from biomodel.quantify.page import page

        with atomic_folder(folder, overwrite=overwrite, marker="patient.json") as temporary:
            self.patient.write(temporary / "patient")
            for path in (temporary / "patient").iterdir():
                path.rename(temporary / path.name)
            (temporary / "patient").rmdir()
            for visit in self.visits:
                write_maps(visit, temporary / "maps")
                if dicom:
                    _write_dicom(visit, temporary / "dicom", self.patient)
            for registration in self.registrations:
                registration.write(temporary / "registration" / f"visit{registration.visit}")
            page(self.visits, f"Quantitative maps of {self.patient.id}").save(temporary / "quantify.html")


def _write_dicom(visit: VisitMaps, folder: Path, patient: Patient) -> None:
    from biomodel.quantify.dicom_maps import BRAIN, BREAST, ORGAN, write_dicom_maps

    organ = {"breast": BREAST, "brain": BRAIN}.get(patient.organ, ORGAN)
    write_dicom_maps(visit, folder, patient=patient.id, organ=organ)


def quantify(
    study: Study,
    settings: Settings | None = None,
    registration: Kind | None = None,
    spacing: float | None = None,
    repeats: int = 3,
    say: Callable[[str], None] | None = None,
) -> Quantified:
    """Quantify all visits of a study and bring them onto the grid of the first.

    Parameters
    ----------
    study
    settings
        Of the measurements.
    registration
        What may move between visits: ``Rigid()``, ``Affine()`` or ``BSpline()`` (default). The tumour is moved rigidly
        in any case, so that a deformation cannot swallow the response.
    spacing
        Side of cubic voxels of the reference grid, mm; by default the grid of the first visit's dynamic series.
    repeats
        How often each registration is repeated on drawn parts of the images; how far the results differ goes into the
        errors of the later visits' maps. Each costs about as much as the registration, some seconds; 0 leaves it out.
    say : callable, optional
        Receives a line of text per step.

    Returns
    -------
    Quantified

    Raises
    ------
    InputError, GeometryError
        If a visit cannot be measured or registered; the message names it.
    """
    if isinstance(repeats, bool) or repeats < 0 or repeats == 1:
        raise InputError(f"quantify: {repeats} repeats; expected 0, or 2 and more, whose results can differ.")
    tell = say if say is not None else (lambda text: None)
    settings = Settings() if settings is None else settings
    kind = BSpline() if registration is None else registration
    measured: list[VisitMaps] = []
    found: list[Registration] = []
    for visit in study.visits:
        tell(f"Visit {visit.number}: reading and measuring")
        maps = measure(visit, visit.read(), study.organ, settings)
        if not measured:
            if spacing is not None:
                maps = _drawn(maps, isotropic(maps.grid, spacing), None)
            if maps.region is None or not maps.region.any():
                raise InputError(
                    f"visit {visit.number}: no tumour was found, and the first visit is where the model begins. Look "
                    "at the series and the thresholds."
                )
            measured.append(maps)
            continue
        tell(f"Visit {visit.number}: registering to visit 1")
        first = measured[0]
        assert first.region is not None and maps.region is not None
        one, doubts = _registered(first, maps, kind, tuple(range(repeats)))
        moved = _drawn(maps, first.grid, one)
        note = f"Registered to visit 1; squared local correlation {one.alike[0]:.2f} before, {one.alike[1]:.2f} after."
        if one.tumour is not None and one.tumour.before > 0:
            note += f" Tumour {one.tumour.before / 1e3:.2f} cm³ before, {one.tumour.after / 1e3:.2f} cm³ after."
        if one.spread is None:
            note += " Errors of the maps do not hold that of the registration."
        else:
            apart = float(np.sqrt(np.mean(one.spread[first.organ] ** 2)))
            note += (
                f" Repeated {repeats} times, it differs by {apart:.2f} mm (root mean square in the organ); {UNSEEN:g} "
                "times of that is taken as its error and is in the errors of the maps."
            )
        measured.append(replace(moved, notes=(*moved.notes, *doubts, note)))
        found.append(one)
    tell("Putting the patient together")
    measured = [_freed(maps) for maps in measured]
    return Quantified(_patient(study, measured), tuple(measured), tuple(found))


def _registered(
    first: VisitMaps, maps: VisitMaps, kind: Kind, seeds: tuple[int, ...]
) -> tuple[Registration, tuple[str, ...]]:
    """A later visit on the first one; rigidly where bending folds, and not at all where that helps nothing."""
    # Without masks: the chest wall and the air around hold the search, which loses its way in a half-seen organ.
    fixed = Image(first["before"].values, first.grid, name="visit 1")
    moving = Image(maps["before"].values, maps.grid, name=f"visit {maps.number}")
    assert first.region is not None and maps.region is not None
    notes: list[str] = []

    def by(what: Kind) -> Registration:
        drawn = {"tumour": first.region, "moving_tumour": maps.region}
        return register(fixed, moving, what, **drawn, visit=maps.number, seeds=seeds)

    try:
        one = by(kind)
    except GeometryError as error:
        if isinstance(kind, Rigid):
            raise
        one = by(Rigid())
        notes.append(f"Registered rigidly, since {type(kind).__name__} gave no usable transform: {error}")
    if one.alike[1] <= one.alike[0]:
        notes.append(
            f"The registration made visit {maps.number} less like visit 1 (squared local correlation "
            f"{one.alike[0]:.2f} before, {one.alike[1]:.2f} after) and was not used; images lie as their headers say."
        )
        still = Transform(first.grid, np.eye(4))
        one = Registration(still, maps.grid, (one.alike[0], one.alike[0]), visit=maps.number)
    return one, tuple(notes)


def _drawn(maps: VisitMaps, grid: Grid, path: Registration | None) -> VisitMaps:
    """All maps of a visit on another grid, along a registration where there is one."""

    def draw(values: np.ndarray, nearest: bool) -> np.ndarray:
        if path is None:
            return np.asarray(resample(values, maps.grid, grid, nearest=nearest))
        return np.asarray(path.apply(values, maps.grid, nearest=nearest))

    def one(m: Map) -> Map:
        values = draw(np.asarray(m.values, float), False)
        sd = None if m.sd is None else np.sqrt(draw(np.asarray(m.sd, float) ** 2, False))
        if sd is not None and path is not None and path.spread is not None:
            sd = np.hypot(sd, displacement_sd(values, grid, path.spread))
        code = None if m.code is None else draw(np.asarray(m.code), True)
        return Map(m.name, m.units, values, sd, code, m.method)

    # Voxels of the curves lie on the old grid; curves are for looking at single voxels as they were measured.
    return replace(
        maps,
        grid=grid,
        maps={name: one(m) for name, m in maps.maps.items()},
        organ=draw(np.asarray(maps.organ, bool), False),
        tissues={n: np.clip(np.nan_to_num(draw(np.asarray(t, float), False)), 0, 1) for n, t in maps.tissues.items()},
        region=None if maps.region is None else draw(np.asarray(maps.region, bool), False),
        curves=(),
    )


def _freed(maps: VisitMaps) -> VisitMaps:
    """With the ADC of the tumour alone, in voxels that it shares with other tissue."""
    # On the grid of the patient: drawn along a registration it would mix with what lies outside of the region.
    adc, region = maps["ADC"], maps.region
    if region is None or not region.any() or adc.sd is None or maps.resolution is None:
        return maps
    gain = np.asarray(maps["early"].values, float) - np.asarray(maps["before"].values, float)
    spacing = maps.grid.spacing
    try:
        share = tumour_share(gain, region, maps.organ | region, spacing, maps.resolution)
        values, sd = tumour_adc(np.asarray(adc.values), np.asarray(adc.sd), share, region, spacing)
    except InputError as error:
        return replace(maps, notes=(*maps.notes, f"ADC at the tumour's edge holds other tissue, too: {error}"))
    method = "ADC freed from the tissue beside the tumour by the share that enhances"
    return replace(
        maps, maps={**maps.maps, "ADC_tumour": Map("ADC_tumour", adc.units, values, sd, adc.code, method)}
    )


def _patient(study: Study, visits: list[VisitMaps]) -> Patient:
    """The patient on the first visit's grid; nothing of a later visit shapes what the first one says."""
    first = visits[0]
    mask = np.asarray(first.organ, bool)
    domain = Domain(
        mask=mask,
        spacing=first.grid.spacing,
        affine=first.grid.affine,
        tissues={name: np.where(mask, values, 0.0) for name, values in first.tissues.items()},
    )
    notes = list(study.notes)
    made = []
    for maps in visits:
        region = np.asarray(maps.region, bool) & mask
        lost = int(np.asarray(maps.region, bool).sum()) - int(region.sum())
        if lost:
            notes.append(f"Visit {maps.number}: {lost} voxels of tumour outside the organ of visit 1 are left out.")
        adc, sd = _filled(maps["ADC"], mask)
        if "ADC_tumour" in maps.maps:
            own, own_sd = _filled(maps["ADC_tumour"], mask)
            adc, sd = np.where(region, own, adc), np.where(region, own_sd, sd)
        supply = None
        if maps.number == 1 and "supply" in maps.maps:
            supply = drug_map(np.asarray(maps["supply"].values, float), region, domain, code=maps["Ktrans"].code).values
        made.append(
            Visit(
                maps.number, maps.day, adc=adc, adc_sd=sd, region=region if region.any() else None,
                volume=None if region.any() else 0.0, drug_map=supply, acquisition=maps.acquisition,
            )
        )  # fmt: skip
    cellularity = study.cellularity
    if cellularity is not None and first.edge < 1:
        # The study says from what fraction of cells a voxel looks wholly like tumour; the region ends before.
        whole = cellularity.visible_fraction
        cellularity = replace(cellularity, visible_fraction=whole * first.edge)
        notes.append(
            f"Regions end where a voxel holds {first.edge:.0%} of tumour, so at a cell fraction of "
            f"{cellularity.visible_fraction:.3g} instead of {whole:.3g}; volumes are those of such regions."
        )
    return Patient(
        id=study.id, organ=study.organ, domain=domain, visits=tuple(made), schedule=study.schedule,
        cellularity=cellularity, clinical=study.clinical, baseline=study.baseline, notes=tuple(notes),
    )  # fmt: skip


def _filled(adc: Map, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """ADC and its error with voxels of the mask that have none filled from the nearest that do."""
    values = np.asarray(adc.values, float)
    assert adc.sd is not None
    sd = np.asarray(adc.sd, float)
    known = np.isfinite(values) & np.isfinite(sd) & (values > 0)
    if not known.any():
        raise InputError("ADC: no voxel of the organ has a value. Look at the diffusion series.")
    nearest = distance_transform_edt(~known, return_distances=False, return_indices=True)
    values, sd = values[tuple(nearest)], sd[tuple(nearest)]
    return np.where(mask, values, 0.0), np.where(mask, np.maximum(sd, LEAST_CV * np.abs(values)), 0.0)
