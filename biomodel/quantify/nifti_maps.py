"""Maps of a visit as NIfTI files with JSON sidecars, out and in again.

A folder may hold several visits. ``visit1.json`` lists what belongs to visit 1 and holds what is no image (curves,
findings, notes). Each image ``visit1_Ktrans.nii.gz`` has its sidecar ``visit1_Ktrans.json`` with the words that BIDS
has for derived and quantitative images (``Units``, ``EstimationAlgorithm``, ``Manufacturer``, ...).
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from biomodel.errors import GeometryError, InputError, UnitError
from biomodel.files import atomic_write
from biomodel.findings import Finding
from biomodel.imaging.nifti import check_same_grid, read_image, write_image
from biomodel.imaging.series_grid import Grid
from biomodel.imaging.voxelfit import Code
from biomodel.quantify.maps import Curve, Map, VisitMaps
from biomodel.quantify.quantities import REASONS, export_units, internal_units, quantity

__all__ = ["read_maps", "write_maps"]

FORMAT = "tumorcast-maps/1"


@dataclass(frozen=True, eq=False)
class _File:
    """One image with its sidecar, as it is written."""

    stem: str
    values: np.ndarray
    sidecar: dict[str, object]


def write_maps(visit: VisitMaps, folder: str | os.PathLike[str]) -> tuple[Path, ...]:
    """Write all maps of a visit, with errors, reason codes, region, organ and tissues.

    Volume fractions (``ve``, ``vp``) leave in mL/100 mL and flows (``Fp``, ``PS``) in mL/min/100 mL; the units stand in
    each sidecar. Voxels without a value are NaN, which some readers (ITK, FSL) turn into 0: the reason codes tell them
    from true zeros. Files of the same visit that were there before are replaced, and those that are no longer part of
    it are removed; other files are left alone. All files are written before the first is put in place.

    Parameters
    ----------
    visit
        With axes closest to right, anterior, superior (x, y, z), as all readers of the package give it.
    folder
        Made if it is missing.

    Returns
    -------
    tuple of Path
        The images, then the list ``visitN.json``.

    Raises
    ------
    GeometryError
        If the grid's axes point elsewhere.
    InputError
        If two maps would have one file name, or what is told of the acquisition cannot be written as JSON.
    OutputError
        If a file cannot be written.
    """
    if nib.aff2axcodes(visit.grid.affine) != ("R", "A", "S"):
        raise GeometryError(
            f"visit {visit.number}: the grid's axes point to {nib.aff2axcodes(visit.grid.affine)}; expected right, "
            "anterior, superior. Read the series with the package's readers, which bring them there."
        )
    folder = Path(folder)
    files = _files(visit)
    listing = _dump(_listing(visit, files), f"visit {visit.number}")
    place = folder / f"visit{visit.number}.json"
    stale = _known_stems(place) - {file.stem for file in files}
    with ExitStack() as together:
        # What is opened first is put in place last: the list appears when everything that it lists is there.
        together.enter_context(atomic_write(place)).write_text(listing, encoding="utf-8")
        for file in files:
            name = f"{file.stem}.json"
            text = _dump(file.sidecar, name)
            together.enter_context(atomic_write(folder / name)).write_text(text, encoding="utf-8")
            image = together.enter_context(atomic_write(folder / f"{file.stem}.nii.gz"))
            write_image(image, file.values, visit.grid.affine)
    for stem in stale:
        for ending in (".nii.gz", ".json"):
            (folder / f"{stem}{ending}").unlink(missing_ok=True)
    return (*(folder / f"{file.stem}.nii.gz" for file in files), place)


def _files(visit: VisitMaps) -> list[_File]:
    files: list[_File] = []
    common = _common(visit)
    for name, one in visit.maps.items():
        units, factor = export_units(name, one.units)
        words = quantity(name)
        stem = f"visit{visit.number}_{_safe(name)}"
        told: dict[str, object] = {
            "Name": name, "LongName": words.long_name, "Description": words.meaning, "Units": units,
            "EstimationAlgorithm": one.method, "CAPLEX": words.caplex, "Voxels": _shares(visit, one), **common,
        }  # fmt: skip
        told = {key: value for key, value in told.items() if value != ""}
        files.append(_File(stem, _scaled(one.values, factor), told))
        if one.sd is not None:
            text = f"Standard deviation of {words.long_name}, one for each voxel."
            error = told | {"LongName": f"standard deviation of {words.long_name}", "Description": text}
            files.append(_File(f"{stem}_sd", _scaled(one.sd, factor), error))
        if one.code is not None:
            why = {key: value for key, value in told.items() if key not in ("Units", "CAPLEX")} | {
                "LongName": f"reason codes of {words.long_name}",
                "Description": "Why a voxel has no value, or a doubtful one.",
                "Levels": {str(int(code)): REASONS[code] for code in Code},
            }
            files.append(_File(f"{stem}_code", one.code, why))
    organ: dict[str, object] = {"LongName": "organ", "Description": "Mask of the organ.", "Type": "ROI", **common}
    files.append(_File(f"visit{visit.number}_organ", visit.organ.astype(bool), organ))
    if visit.region is not None:
        volume = float(np.count_nonzero(visit.region)) * visit.grid.voxel_volume / 1000
        region: dict[str, object] = {"LongName": "tumour", "Description": "Mask of the tumour.", "Type": "Lesion"}
        region |= {"VolumeCm3": float(f"{volume:.6g}"), **common}
        files.append(_File(f"visit{visit.number}_region", visit.region.astype(bool), region))
    for name, values in visit.tissues.items():
        text = f"Fraction of each voxel that is {name.replace('_', ' ')} tissue."
        tissue: dict[str, object] = {"Name": name, "LongName": f"{name.replace('_', ' ')} tissue", "Description": text}
        tissue |= {"Units": "1", **common}
        stem = f"visit{visit.number}_tissue-{_safe(name)}"
        files.append(_File(stem, np.asarray(values, np.float32), tissue))
    seen: set[str] = set()
    for file in files:
        if file.stem.lower() in seen:
            raise InputError(f"visit {visit.number}: two images would be written as {file.stem}.nii.gz. Rename a map.")
        seen.add(file.stem.lower())
    return files


def _common(visit: VisitMaps) -> dict[str, object]:
    known = {"vendor": "Manufacturer", "field_strength": "MagneticFieldStrength", "sequence": "SequenceName"}
    found = {word: visit.acquisition[name] for name, word in known.items() if visit.acquisition.get(name) is not None}
    return {"Visit": visit.number, "Day": visit.day, **found}


def _scaled(values: np.ndarray, factor: float) -> np.ndarray:
    return values if factor == 1 else (values.astype(np.float64) * factor).astype(np.float32)


def _safe(name: str) -> str:
    """A name as a part of a file name: ``D*`` becomes ``Dstar``."""
    return re.sub(r"[^A-Za-z0-9_]+", "-", name.replace("*", "star")).strip("-") or "map"


def _shares(visit: VisitMaps, one: Map) -> dict[str, object]:
    """Number of voxels by reason in the organ and in the region."""
    shares: dict[str, object] = {}
    for place, mask in (("organ", visit.organ), ("tumour", visit.region)):
        if mask is not None:
            shares[place] = _counts(one, np.asarray(mask, bool))
    return shares


def _counts(one: Map, mask: np.ndarray) -> dict[str, int]:
    code = np.where(np.isfinite(one.values), Code.FITTED, Code.OUTSIDE) if one.code is None else one.code
    found, count = np.unique(np.asarray(code)[mask], return_counts=True)
    return {Code(int(c)).name.lower(): int(n) for c, n in zip(found, count, strict=True)}


def _listing(visit: VisitMaps, files: list[_File]) -> dict[str, object]:
    stem = f"visit{visit.number}_"
    return {
        "Format": FORMAT,
        "Visit": visit.number,
        "Day": visit.day,
        "Maps": {name: f"{stem}{_safe(name)}" for name in visit.maps},
        "Organ": f"{stem}organ",
        "Region": None if visit.region is None else f"{stem}region",
        "Tissues": {name: f"{stem}tissue-{_safe(name)}" for name in visit.tissues},
        "Files": [file.stem for file in files],
        "Acquisition": dict(visit.acquisition),
        "Notes": list(visit.notes),
        "Findings": [asdict(finding) for finding in visit.findings],
        "Curves": [
            {
                "Title": curve.title, "Voxel": [int(index) for index in curve.voxel],
                "XLabel": curve.x_label, "YLabel": curve.y_label,
                **{key: _numbers(values) for key, values in
                   (("X", curve.x), ("Measured", curve.measured), ("Fitted", curve.fitted))},
            }
            for curve in visit.curves
        ],
    }  # fmt: skip


def _numbers(values: np.ndarray) -> list[float | None]:
    """Numbers for JSON, which has no NaN."""
    return [float(value) if math.isfinite(value) else None for value in np.asarray(values, float)]


def _dump(content: dict[str, object], where: str) -> str:
    def plain(value: object) -> object:
        if isinstance(value, np.generic):
            return value.item()
        raise TypeError(f"{type(value).__name__} {value!r}")

    try:
        return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False, default=plain) + "\n"
    except (TypeError, ValueError) as error:
        raise InputError(f"{where}: {error} cannot be written as JSON. Hand over finite numbers and texts.") from None


def _known_stems(listing: Path) -> set[str]:
    """What an earlier list of this visit holds; nothing where it is missing or of another kind."""
    try:
        content = json.loads(listing.read_text(encoding="utf-8"))
        files = content["Files"] if content["Format"] == FORMAT else []
        # Only names that this module gives: a damaged list must not remove anything else.
        return {name for name in files if re.fullmatch(rf"{re.escape(listing.stem)}_[\w-]+", name)}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


# --- in ---------------------------------------------------------------------------------------------------------------


def read_maps(folder: str | os.PathLike[str], visit: int | None = None) -> VisitMaps:
    """Read what :func:`write_maps` wrote; fractions and flows come back in the units of the project.

    Parameters
    ----------
    folder
        With a list ``visitN.json``.
    visit
        Number; may be left out where the folder holds one visit.

    Returns
    -------
    VisitMaps

    Raises
    ------
    InputError
        If there is no such visit, or a file is missing or damaged.
    UnitError
        If a map's sidecar has no units.
    GeometryError
        If the images do not lie on one grid.
    """
    folder = Path(folder)
    place = _place(folder, visit)
    listing = _load(place)
    if listing.get("Format") != FORMAT:
        raise InputError(f"{place.name}: format {listing.get('Format')!r}; expected {FORMAT!r}. Quantify again.")
    try:
        return _assembled(folder, place, listing)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"no field {error}" if isinstance(error, KeyError) else str(error)
        raise InputError(f"{place.name}: damaged ({reason}). Copy or write it again.") from None


def _place(folder: Path, visit: int | None) -> Path:
    if visit is not None:
        place = folder / f"visit{visit}.json"
        if not place.is_file():
            raise InputError(f"{folder}: no {place.name}; expected the maps of visit {visit}. Check folder and visit.")
        return place
    found = sorted(path for path in folder.glob("visit*.json") if re.fullmatch(r"visit\d+", path.stem))
    if not found:
        raise InputError(f"{folder}: no list of maps (visit1.json). Name a folder that 'tumorcast quantify' made.")
    if len(found) > 1:
        names = ", ".join(path.stem.removeprefix("visit") for path in found)
        raise InputError(f"{folder}: maps of visits {names}. Say which with visit=N.")
    return found[0]


def _load(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"{path.name}: does not exist; expected the sidecar of an image. Copy the folder whole."
        ) from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path.name}: cannot be read as JSON ({error}). Copy or write it again.") from None
    if not isinstance(content, dict):
        raise InputError(f"{path.name}: found {type(content).__name__}; expected a JSON object. Write it again.")
    return content


def _assembled(folder: Path, place: Path, listing: Mapping[str, Any]) -> VisitMaps:
    first = read_image(folder / f"{listing['Organ']}.nii.gz")
    grid = Grid.at(first.values.shape, first.affine)

    def image(stem: str, kind: type) -> np.ndarray:
        found = read_image(folder / f"{stem}.nii.gz")
        check_same_grid(found, first, stem, f"{stem}.nii.gz", f"{listing['Organ']}.nii.gz")
        return found.values.astype(kind)

    maps: dict[str, Map] = {}
    for name, stem in listing["Maps"].items():
        told = _load(folder / f"{stem}.json")
        if not isinstance(told.get("Units"), str):
            raise UnitError(f"{stem}.json: no 'Units'; expected those of {name}. Units are never guessed: add them.")
        units, factor = internal_units(told["Units"])
        parts: dict[str, np.ndarray | None] = {"sd": None, "code": None}
        for part in parts:
            if f"{stem}_{part}" not in listing["Files"]:
                continue
            parts[part] = image(f"{stem}_{part}", np.uint8 if part == "code" else np.float64)
        values, sd = image(stem, np.float64) / factor, None if parts["sd"] is None else parts["sd"] / factor
        maps[name] = Map(name, units, values, sd, parts["code"], told.get("EstimationAlgorithm", ""))
    curves = (
        Curve(
            one["Title"], tuple(one["Voxel"]), _array(one["X"]), one["XLabel"], _array(one["Measured"]),
            _array(one["Fitted"]), one["YLabel"],
        )
        for one in listing["Curves"]
    )  # fmt: skip
    return VisitMaps(
        number=int(listing["Visit"]),
        day=float(listing["Day"]),
        grid=grid,
        maps=maps,
        organ=first.values.astype(bool),
        tissues={name: image(stem, np.float32) for name, stem in listing["Tissues"].items()},
        region=None if listing["Region"] is None else image(listing["Region"], bool),
        curves=tuple(curves),
        findings=tuple(Finding(**one) for one in listing["Findings"]),
        notes=tuple(listing["Notes"]),
        acquisition=listing["Acquisition"],
    )


def _array(numbers: list[float | None]) -> np.ndarray:
    return np.array([np.nan if number is None else number for number in numbers], float)
