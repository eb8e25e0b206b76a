"""The folder of a study with raw series: what a clinic would hand over, and the truth beside it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from os import PathLike
from pathlib import Path

import xarray as xr

from biomodel.acquisition_protocol import Protocol
from biomodel.acquisition_scan import Acquired, acquire
from biomodel.errors import InputError
from biomodel.files import atomic_folder
from biomodel.imaging.bids_write import write_bids
from biomodel.imaging.dicom_write import write_dicom
from biomodel.imaging.series import Kind
from biomodel.manifest import validate
from biomodel.schema import PatientManifest
from biomodel.virtual import VirtualPatient

__all__ = ["write_raw"]

SCHEMA = "tumorcast/study/v1"


def write_raw(
    virtual: VirtualPatient,
    folder: str | PathLike[str],
    protocol: Protocol | Sequence[Protocol],
    *,
    seed: int = 0,
    visits: Sequence[int] | None = None,
    dicom: bool = False,
    overwrite: bool = False,
) -> Path:
    """Scan a virtual patient and write the folder of the study; :mod:`biomodel.acquisition` describes it.

    One visit is in memory at a time.

    Parameters
    ----------
    folder
        Folder to make; it appears whole or not at all.
    protocol : Protocol or sequence of Protocol
        Of all visits, or one for each of `visits`, as where the scanner changes.
    seed : int
        See :func:`~biomodel.acquisition.acquire`.
    visits : sequence of int, optional
        Those to scan, rising, from 1; all by default.
    dicom
        Write DICOM (``ses-01/dicom``) instead of BIDS; needs the extra ``imaging``.
    overwrite
        Whether the folder of another study (one with ``study.json``) may be replaced as a whole.

    Returns
    -------
    Path
        Of ``study.json``.

    Raises
    ------
    InputError
        If visits or protocols do not fit.
    OutputError
        If the folder exists or cannot be written.
    """
    chosen = list(range(1, len(virtual.patient.visits) + 1)) if visits is None else list(visits)
    if not chosen or any(b <= a for a, b in zip(chosen, chosen[1:], strict=False)):
        raise InputError(f"Virtual study: visits {chosen}; expected rising numbers from 1.")
    protocols = [protocol] * len(chosen) if isinstance(protocol, Protocol) else list(protocol)
    if len(protocols) != len(chosen):
        raise InputError(
            f"Virtual study: {len(protocols)} protocols for {len(chosen)} visits; expected one, or one each."
        )
    subject = re.sub(r"[^A-Za-z0-9]", "", virtual.patient.id)
    entries: list[dict[str, object]] = []
    with atomic_folder(folder, overwrite=overwrite, marker="study.json") as temporary:
        for number, used in zip(chosen, protocols, strict=True):
            acquired = acquire(virtual, number, used, seed=seed)
            session = f"ses-{number:02d}"
            _write_series(acquired, temporary / session, f"sub-{subject}_{session}", virtual.patient.id, dicom)
            _write_truth(acquired, temporary / "truth")
            entries.append({"day": acquired.day, "folder": session, "haematocrit": round(acquired.haematocrit, 3)})
        _write_dataset(virtual.truth, temporary / "truth" / "truth.nc")
        text = json.dumps(_study(virtual, entries), indent=2, ensure_ascii=False) + "\n"
        (temporary / "study.json").write_text(text, encoding="utf-8")
    return Path(folder) / "study.json"


def _write_series(acquired: Acquired, folder: Path, name: str, patient: str, dicom: bool) -> None:
    for number, series in enumerate(acquired.series, start=1):
        if dicom and series.kind is not Kind.B1:
            target = folder / "dicom" / f"{number:02d}_{series.kind.value}"
            write_dicom(series, target, number=number, patient=patient)
        else:
            write_bids(series, folder, name, suffix="T1w" if series.kind is Kind.ANATOMY else None)


def _write_truth(acquired: Acquired, folder: Path) -> None:
    plasma = xr.DataArray(
        acquired.plasma.plasma.astype("float32"),
        {"input_time": ("input_time", acquired.plasma.times, {"units": "s"})},
        attrs={"units": "mmol/L"},
    )
    still = acquired.truth.assign(plasma=plasma)
    _write_dataset(still, folder / f"visit{acquired.visit}.nc")
    _write_dataset(acquired.scanned, folder / f"visit{acquired.visit}_scanned.nc")


def _write_dataset(dataset: xr.Dataset, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    packed = {name: {"zlib": True} for name in dataset.data_vars if dataset[name].ndim > 1}
    # In memory first: where a disk fills up, HDF5 cannot close its file any more and ends the process.
    path.write_bytes(bytes(dataset.to_netcdf(engine="h5netcdf", encoding=packed)))


def _study(virtual: VirtualPatient, visits: list[dict[str, object]]) -> dict[str, object]:
    """What images cannot say, in the words of ``patient.json``."""
    patient = virtual.patient
    data: dict[str, object] = {
        "schema": "tumorcast/patient/v1", "id": patient.id, "organ": patient.organ, "baseline": patient.baseline,
        "visits": [{"day": visit["day"]} for visit in visits],
    }  # fmt: skip
    settings = patient.cellularity
    if settings is not None:
        data["cellularity"] = {
            "adc_w": {"value": settings.adc_w, "units": "mm^2/s"},
            "adc_min": {"value": settings.adc_min, "units": "mm^2/s"},
            "packing": settings.packing,
            "cell_radius": {"value": settings.cell_radius_mm, "units": "mm"},
            "repeatability_cv": settings.repeatability_cv,
            "voxel_cv": settings.voxel_cv,
            "visible_fraction": settings.visible_fraction,
        }
    data["treatments"] = [
        {
            "kind": "chemotherapy",
            "agent": dose.agent,
            "day": dose.day,
            "dose": {"value": dose.amount, "units": dose.units},
            "status": dose.status,
        }
        for dose in patient.schedule.doses
    ]
    data["clinical"] = dict(patient.clinical)
    data["notes"] = list(patient.notes)
    validate(PatientManifest, data, "study.json")  # the words must be those of a patient's manifest
    return data | {"schema": SCHEMA, "visits": visits}
