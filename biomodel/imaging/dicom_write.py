"""DICOM folders out, for virtual raw series and for tests: classic MR images, one file per slice and sample."""

from __future__ import annotations

import hashlib
import math
import os
from datetime import datetime, time, timedelta
from typing import TYPE_CHECKING

import numpy as np

from biomodel.errors import InputError
from biomodel.files import atomic_folder
from biomodel.imaging.deidentify import written_date
from biomodel.imaging.dicom_header import MR_IMAGE, load_pydicom
from biomodel.imaging.series import Kind, Series

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

__all__ = ["write_dicom"]

#: Largest stored value: unsigned, 16 bit.
_TOP = 2**16 - 1
#: Clock of the first sample, so that no series starts at midnight.
_START = time(9, 0)


def write_dicom(
    series: Series,
    folder: str | os.PathLike[str],
    *,
    number: int = 1,
    patient: str = "VIRTUAL",
    overwrite: bool = False,
) -> None:
    """Write a series as MR Image Storage files; :func:`~biomodel.imaging.dicom.read_dicom` gives it back.

    Whole numbers from 0 to 65535 are kept exactly; other values in 65536 steps over their range, with one slope and
    intercept for all samples so that they stay comparable. Dates count from 1900-01-01; UIDs are made from the
    contents, so that the same series gives the same files. DICOM has no sign of a B1 map: it is read back with its kind
    named.

    Parameters
    ----------
    folder
        Folder to make; it appears whole or not at all.
    number
        Of the series in its study.
    patient
        Pseudonym, written as name and id.
    overwrite
        Whether an existing folder may be replaced as a whole.

    Raises
    ------
    InputError
        If values are NaN or infinite, or pydicom is not installed.
    OutputError
        If the folder exists or cannot be written.
    """
    pydicom = load_pydicom()
    if not np.isfinite(series.data).all():
        raise InputError(f"{series.name}: NaN or infinite values cannot be written as DICOM. Set them to 0.")
    slope, intercept = _scaling(series.data)
    uids = _Uids(series, number, patient, pydicom)
    orientation = _orientation(series)
    shape = series.grid.shape
    with atomic_folder(folder, overwrite=overwrite) as temporary:
        for sample in range(series.samples):
            for k in range(shape[0]):
                header = _header(series, sample, k, number, patient, uids, orientation, slope, intercept)
                stored = np.rint((series.data[sample, k].astype(np.float64) - intercept) / slope)
                header.PixelData = np.clip(stored, 0, _TOP).astype("<u2").tobytes()
                header["PixelData"].VR = "OW"
                name = f"{number:03d}_{sample + 1:04d}_{k + 1:04d}.dcm"
                header.save_as(temporary / name, enforce_file_format=True)


def _scaling(data: np.ndarray) -> tuple[float, float]:
    low, high = float(data.min()), float(data.max())
    whole = low >= 0 and high <= _TOP and all(bool((sample == np.rint(sample)).all()) for sample in data)
    if whole or high == low == 0:
        return 1.0, 0.0
    # Decimal strings hold 16 characters; what is written is what is used.
    base = min(low, 0.0)
    return float(f"{max(high - base, 1e-30) / _TOP * (1 + 1e-9):.9g}"), float(f"{base:.9g}")


class _Uids:
    """Identifiers made from the contents."""

    def __init__(self, series: Series, number: int, patient: str, pydicom: object) -> None:
        digest = hashlib.sha256(
            f"{patient} {series.day} {number} {series.kind} {series.grid.affine.tobytes()!r}".encode()
        )
        for sample in series.data:
            digest.update(np.ascontiguousarray(sample).tobytes())
        self._make = pydicom.uid.generate_uid  # type: ignore[attr-defined]
        self._series = digest.hexdigest()
        self.study = self._make(entropy_srcs=[f"study {patient} {series.day}"])
        self.frame = self._make(entropy_srcs=[f"frame of reference {patient} {series.day}"])
        self.series = self._make(entropy_srcs=[f"series {self._series}"])

    def image(self, sample: int, k: int) -> str:
        return str(self._make(entropy_srcs=[f"image {self._series} {sample} {k}"]))


def _orientation(series: Series) -> np.ndarray:
    """Return the affine in LPS; x is written along rows, y along columns, z from slice to slice."""
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ series.grid.affine


def _decimal(value: float) -> str:
    from pydicom.valuerep import format_number_as_ds

    return format_number_as_ds(float(value) + 0.0)


def _header(
    series: Series,
    sample: int,
    k: int,
    number: int,
    patient: str,
    uids: _Uids,
    lps: np.ndarray,
    slope: float,
    intercept: float,
) -> Dataset:
    from pydicom.dataset import Dataset as NewDataset
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import UID, ExplicitVRLittleEndian

    ds = NewDataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta.MediaStorageSOPClassUID = UID(MR_IMAGE)
    ds.file_meta.MediaStorageSOPInstanceUID = UID(uids.image(sample, k))
    ds.SOPClassUID = MR_IMAGE
    ds.SOPInstanceUID = uids.image(sample, k)
    ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID = uids.study, uids.series, uids.frame
    ds.PatientName = ds.PatientID = patient
    ds.PatientBirthDate = ds.PatientSex = ds.StudyID = ds.AccessionNumber = ds.ReferringPhysicianName = ""
    ds.PatientIdentityRemoved = "YES"
    ds.DeidentificationMethod = "written from a virtual or de-identified series"
    offset = 0.0 if series.times is None else float(series.times[sample] - min(series.times[0], 0.0))
    moment = datetime.combine(written_date(series.day), _START) + timedelta(seconds=offset)
    ds.StudyDate = ds.SeriesDate = written_date(series.day).strftime("%Y%m%d")
    ds.StudyTime = ds.SeriesTime = datetime.combine(written_date(series.day), _START).strftime("%H%M%S")
    ds.AcquisitionDate = ds.ContentDate = moment.strftime("%Y%m%d")
    ds.AcquisitionTime = ds.ContentTime = moment.strftime("%H%M%S.%f")
    ds.Modality = "MR"
    ds.Manufacturer = series.vendor or ""
    ds.PositionReferenceIndicator = ""
    ds.SeriesNumber, ds.AcquisitionNumber = number, sample + 1
    ds.InstanceNumber = sample * series.grid.shape[0] + k + 1
    ds.ImageType = ["DERIVED", "SECONDARY", "M"]
    ds.ScanningSequence = {Kind.DWI: ["EP", "SE"], Kind.INVERSION: ["GR", "IR"]}.get(series.kind, ["GR"])
    ds.SequenceVariant = "SP"
    ds.ScanOptions = "FS" if series.fat_saturated else ("" if series.fat_saturated is None else "NONE")
    ds.MRAcquisitionType = "2D" if series.kind is Kind.DWI else "3D"
    ds.EchoTrainLength = ""
    ds.SequenceName = (series.sequence or "")[:16]
    if series.tr is None:
        ds.RepetitionTime = ""
    else:
        ds.RepetitionTime = _decimal(series.tr * 1e3)
    ds.EchoTime = "" if series.te is None else _decimal(series.te * 1e3)
    if series.inversion_times is not None:
        ds.InversionTime = _decimal(series.inversion_times[sample] * 1e3)
    if series.flip_angles is not None:
        ds.FlipAngle = _decimal(series.flip_angles[sample])
    if series.field_strength is not None:
        ds.MagneticFieldStrength = _decimal(series.field_strength)
    if series.contrast_agent:
        ds.ContrastBolusAgent = series.contrast_agent
    if series.phase_encoding in ("x", "y"):
        ds.InPlanePhaseEncodingDirection = "ROW" if series.phase_encoding == "x" else "COL"
    if series.kind is Kind.DCE:
        ds.TemporalPositionIdentifier, ds.NumberOfTemporalPositions = sample + 1, series.samples
    if series.b_values is not None:
        ds.DiffusionBValue = float(series.b_values[sample])
        direction = np.zeros(3) if series.directions is None else series.directions[sample]
        ds.DiffusionDirectionality = (
            "DIRECTIONAL" if direction.any() else ("NONE" if ds.DiffusionBValue == 0 else "ISOTROPIC")
        )
        if direction.any():
            ds.DiffusionGradientOrientation = [float(v) + 0.0 for v in direction * [-1, -1, 1]]
    _place(ds, series, lps, k)
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated = ds.BitsStored = 16
    ds.HighBit, ds.PixelRepresentation = 15, 0
    ds.RescaleSlope, ds.RescaleIntercept, ds.RescaleType = _decimal(slope), _decimal(intercept), "US"
    return ds


def _place(ds: Dataset, series: Series, lps: np.ndarray, k: int) -> None:
    dz, dy, dx = series.grid.spacing
    cosines = lps[:3, :3] / np.array([dx, dy, dz])
    normal = np.cross(cosines[:, 0], cosines[:, 1])
    position = lps[:3, 3] + lps[:3, 2] * k
    _, rows, columns = series.grid.shape
    for name, value in {
        "Rows": rows,
        "Columns": columns,
        "PixelSpacing": [_decimal(dy), _decimal(dx)],
        "SliceThickness": _decimal(dz),
        "SpacingBetweenSlices": _decimal(dz),
        "ImageOrientationPatient": [_decimal(v) for v in (*cosines[:, 0], *cosines[:, 1])],
        "ImagePositionPatient": [_decimal(v) for v in position],
        "SliceLocation": _decimal(math.fsum(position * normal)),
    }.items():
        setattr(ds, name, value)
