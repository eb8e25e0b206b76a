"""Maps of a visit as DICOM: one parametric map for each quantity, and one segmentation of organ and tumour.

Stored values are the quantity's values, as 32-bit floats: the mapping to real-world values is the identity and names
quantity and unit in codes. Voxels without a value are NaN, which lies outside the range that is mapped. Slices are
written as viewers expect them: rows to the patient's left, columns to the back, slices to the head.

Codes: DICOM PS3.16, context groups 4107 (tracer kinetic models), 4109, 7180 (quantities), 7150 and 7151 (segments);
units are UCUM. What has no code there gets one of the scheme ``99TUMORCAST``.
"""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from biomodel.errors import InputError
from biomodel.files import atomic_write
from biomodel.imaging.deidentify import written_date
from biomodel.quantify.maps import Map, VisitMaps
from biomodel.quantify.quantities import export_units, quantity, spoken_units

if TYPE_CHECKING:
    from highdicom import Volume
    from highdicom.pm import ParametricMap
    from highdicom.seg import Segmentation
    from pydicom.dataset import Dataset

__all__ = ["BRAIN", "BREAST", "ORGAN", "PROSTATE", "Anatomy", "write_dicom_maps"]

#: Of DICOM, where PS3.16 has one: (code, meaning) by the map's name. ``D`` of two models shares the general term.
_QUANTITIES = {
    "Ktrans": ("126312", "Ktrans"),
    "kep": ("126313", "kep"),
    "ve": ("126314", "ve"),
    "vp": ("126331", "vp"),
    "delay": ("126371", "Bolus Arrival Time"),
    "T1": ("113063", "T1"),
    "R1": ("126393", "R1"),
    "ADC": ("113041", "Apparent Diffusion Coefficient"),
    "ADC_tumour": ("113041", "Apparent Diffusion Coefficient"),
    "D": ("113289", "Diffusion Coefficient"),
    "D*": ("113292", "Fast Diffusion Coefficient"),
    "f": ("113293", "Fast Diffusion Coefficient Fraction"),
    "TTP": ("113069", "Time To Peak"),
}
#: Areas under the curve have codes for curves of concentration alone.
_OF_CONCENTRATION = {"AUC60": ("126321", "IAUC60"), "AUC90": ("126322", "IAUC90")}
#: UCUM by the units of exported maps.
_UCUM = {
    "1": "1", "1/min": "/min", "1/s": "/s", "s": "s", "min": "min", "mm^2/s": "mm2/s", "mM": "mmol/l",
    "mM s": "mmol/l.s", "mM*s": "mmol/l.s", "mL/100mL": "mL/dL", "mL/min/100mL": "mL/min/dL", "%": "%", "bit": "bit",
}  # fmt: skip
_SCHEME = "99TUMORCAST"
_START = time(9, 0)
#: Of the first series; maps, errors and the segmentation count up from here.
_SERIES = 9001


@dataclass(frozen=True)
class Anatomy:
    """An organ in SNOMED CT.

    Parameters
    ----------
    code, meaning : str
    side : {"L", "R", "B", "U"}, optional
        Left, right, both, or unpaired; None where it is not known.
    """

    code: str
    meaning: str
    side: Literal["L", "R", "B", "U"] | None = None


#: For a breast, ``dataclasses.replace(BREAST, side="L")`` says which.
ORGAN, BREAST, BRAIN, PROSTATE = (
    Anatomy("91772007", "Organ"),
    Anatomy("76752008", "Breast"),
    Anatomy("12738006", "Brain", "U"),
    Anatomy("41216001", "Prostate", "U"),
)


def write_dicom_maps(
    visit: VisitMaps,
    folder: str | os.PathLike[str],
    *,
    patient: str = "ANONYMOUS",
    organ: Anatomy = ORGAN,
    sources: Sequence[Dataset] = (),
) -> tuple[Path, ...]:
    """Write ``visit1_Ktrans.dcm``, ``visit1_Ktrans_sd.dcm``, ... and ``visit1_regions.dcm``.

    The same maps give the same files, whatever the clock says: dates count from 1900-01-01 by the visit's day, UIDs are
    made from the contents. Study and frame of reference are those of
    :func:`~biomodel.imaging.dicom_write.write_dicom` for the same patient and day. Reason codes are not written: NaN
    says that there is no value, the NIfTI files say why.

    Parameters
    ----------
    visit
    folder
        Made if it is missing; files of the same names are replaced.
    patient
        Pseudonym, written as name and id. Without use where `sources` are given.
    organ
        What the organ's mask shows.
    sources
        Headers of the series that the maps were made from, of one study and series. The maps then belong to its
        study and frame of reference, and refer to its images; the patient's name and dates are copied from them, so
        hand over headers without what identifies a person.

    Returns
    -------
    tuple of Path
        The files, the segmentation last. Each appears whole or not at all.

    Raises
    ------
    InputError
        If highdicom is not installed, or the sources are of several studies or have no frame of reference.
    OutputError
        If a file cannot be written.
    """
    _highdicom()
    target = Path(folder)
    headers = list(sources) or [_header(visit, patient)]
    _check(headers)
    writer = _Writer(visit, headers, bool(sources), organ)
    written = []
    with ExitStack() as together, warnings.catch_warnings():
        # A pseudonym is a name of one component, and meant so.
        warnings.filterwarnings("ignore", message="The string .* is unlikely to represent", category=UserWarning)
        for stem, made in writer.objects():
            path = target / f"{stem}.dcm"
            made.save_as(together.enter_context(atomic_write(path)), enforce_file_format=True)
            written.append(path)
    return tuple(written)


def _highdicom() -> Any:
    try:
        import highdicom
    except ImportError:
        raise InputError(
            "DICOM maps are written with highdicom, which is not installed. Install it with "
            "pip install 'tumorcast[imaging]'."
        ) from None
    return highdicom


def _check(headers: Sequence[Dataset]) -> None:
    for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID"):
        found = {str(header.get(keyword, "")) for header in headers}
        if len(found) > 1 or "" in found:
            raise InputError(
                f"sources: {len(found)} values of {keyword}{' or none' if '' in found else ''}; expected one. Hand "
                "over the images of one series."
            )
    needed: tuple[str, ...] = ("SOPClassUID", "SOPInstanceUID", "PatientID", "PatientName", "Rows", "Columns")
    if "PerFrameFunctionalGroupsSequence" not in headers[0]:
        needed += ("ImageOrientationPatient", "ImagePositionPatient", "PixelSpacing", "SliceThickness")
    for header in headers:
        missing = [keyword for keyword in needed if keyword not in header]
        if missing:
            raise InputError(f"sources: an image without {', '.join(missing)}. Hand over the whole headers.")


def _header(visit: VisitMaps, patient: str) -> Dataset:
    """Return an image that stands for the series that are not handed over: patient, study and frame of reference."""
    from pydicom.dataset import Dataset
    from pydicom.uid import MRImageStorage, generate_uid

    day = written_date(visit.day).strftime("%Y%m%d")
    header = Dataset()
    header.SOPClassUID = MRImageStorage
    header.SOPInstanceUID = generate_uid(entropy_srcs=[f"none {patient} {visit.day}"])
    header.StudyInstanceUID = generate_uid(entropy_srcs=[f"study {patient} {visit.day}"])
    header.SeriesInstanceUID = generate_uid(entropy_srcs=[f"series none {patient} {visit.day}"])
    header.FrameOfReferenceUID = generate_uid(entropy_srcs=[f"frame of reference {patient} {visit.day}"])
    header.PatientName = header.PatientID = patient
    header.PatientBirthDate = header.PatientSex = header.StudyID = header.AccessionNumber = ""
    header.ReferringPhysicianName = header.PositionReferenceIndicator = ""
    header.PatientIdentityRemoved = "YES"
    header.DeidentificationMethod = "written from a virtual or de-identified series"
    header.StudyDate, header.StudyTime, header.Modality = day, _START.strftime("%H%M%S"), "MR"
    header.SpecificCharacterSet = "ISO_IR 192"
    header.Manufacturer = str(visit.acquisition.get("vendor") or "")
    header.Rows, header.Columns = visit.grid.shape[1:]
    header.ImageOrientationPatient = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]
    header.ImagePositionPatient = [0.0, 0.0, 0.0]
    header.PixelSpacing, header.SliceThickness = [1.0, 1.0], 1.0
    return header


@dataclass(frozen=True, eq=False)
class _Writer:
    visit: VisitMaps
    headers: Sequence[Dataset]
    real: bool
    organ: Anatomy

    def objects(self) -> list[tuple[str, Dataset]]:
        """All objects of the visit with the stems of their files."""
        made: list[tuple[str, Dataset]] = []
        stem = f"visit{self.visit.number}"
        for name, one in self.visit.maps.items():
            safe = re.sub(r"[^A-Za-z0-9_]+", "-", name.replace("*", "star"))
            made.append((f"{stem}_{safe}", self._map(one, one.values, False, len(made))))
            if one.sd is not None:
                made.append((f"{stem}_{safe}_sd", self._map(one, one.sd, True, len(made))))
        made.append((f"{stem}_regions", self._segments(len(made))))
        return made

    def volume(self, values: np.ndarray) -> Volume:
        """An array (z, y, x, ...) with its place, slices to the head, rows to the left, columns to the back."""
        highdicom = _highdicom()
        rows, columns = values.shape[1:3]
        # From the index (slice, row, column) of the flipped array to that of the grid, (x, y, z), then to LPS.
        to_grid = np.array([[0, 0, -1, columns - 1], [0, -1, 0, rows - 1], [1, 0, 0, 0], [0, 0, 0, 1.0]])
        affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ self.visit.grid.affine @ to_grid
        frame = self.headers[0].FrameOfReferenceUID
        flipped = np.ascontiguousarray(values[:, ::-1, ::-1])
        return highdicom.Volume(flipped, affine, coordinate_system="PATIENT", frame_of_reference_uid=frame)

    def _map(self, one: Map, values: np.ndarray, error: bool, place: int) -> ParametricMap:
        highdicom = _highdicom()
        from highdicom.pm import ParametricMap, RealWorldValueMapping
        from highdicom.sr import CodeContentItem, CodedConcept
        from pydicom.sr.codedict import codes

        units, factor = export_units(one.name, one.units)
        array = (values.astype(np.float64) * factor).astype(np.float32)
        finite = array[np.isfinite(array)]
        low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
        words = quantity(one.name)
        explained = f"{'standard deviation of ' if error else ''}{words.long_name}"
        mapping = RealWorldValueMapping(
            lut_label=_shortened(f"{one.name}{' sd' if error else ''}", 16),
            lut_explanation=_shortened(explained, 64),
            unit=CodedConcept(
                _UCUM.get(units) or _shortened(units, 16), "UCUM" if units in _UCUM else _SCHEME, _said(units)
            ),
            value_range=(low, high),
            slope=1.0,
            intercept=0.0,
            quantity_definition=_coded(one.name, units),
        )
        if error:
            derived = CodeContentItem(codes.DCM.Derivation, codes.SCT.StandardDeviation, None)
            mapping.QuantityDefinitionSequence.append(derived)
        at = f"{one.name} {'sd' if error else ''} {one.method} {units}"
        made = ParametricMap(
            source_images=list(self.headers),
            pixel_array=self.volume(array),
            real_world_value_mappings=[mapping],
            voi_lut_transformations=[_window(highdicom, finite)],
            contains_recognizable_visual_features=False,
            content_label=re.sub(r"[^A-Z0-9_]+", "_", f"{one.name}{'_SD' if error else ''}".upper())[:16],
            content_description=_shortened(one.method, 64) or None,
            derivation=codes.DCM.PerfusionImageAnalysis if _is_perfusion(one) else None,
            **self._identity(at, array, place),
        )
        made.SeriesDescription = _shortened(f"visit {self.visit.number}: {explained}", 64)
        self._locate(made)
        _climb(made)
        return self._finished(made)

    def _locate(self, made: ParametricMap) -> None:
        """Say which part of the body is shown."""
        from highdicom.sr import CodedConcept
        from pydicom.dataset import Dataset

        if self.organ.side is None:
            made.Laterality = ""  # asked for where the part may be paired; empty says that the side is not known
            return
        part = Dataset()
        part.FrameLaterality = self.organ.side
        part.AnatomicRegionSequence = [CodedConcept(self.organ.code, "SCT", self.organ.meaning)]
        made.SharedFunctionalGroupsSequence[0].FrameAnatomySequence = [part]

    def _segments(self, place: int) -> Segmentation:
        _highdicom()
        from highdicom import AlgorithmIdentificationSequence
        from highdicom.color import CIELabColor
        from highdicom.seg import SegmentAlgorithmTypeValues, Segmentation, SegmentationTypeValues, SegmentDescription
        from highdicom.sr import CodedConcept
        from pydicom.sr.codedict import codes

        region = CodedConcept(self.organ.code, "SCT", self.organ.meaning)
        shown = [(self.organ.meaning.lower(), codes.SCT.AnatomicalStructure, region, self.visit.organ, (62.0, 0, 0))]
        if self.visit.region is not None:
            tumour = (codes.SCT.MorphologicallyAbnormalStructure, codes.SCT.Neoplasm, self.visit.region, (60.0, 60, 40))
            shown.append(("tumour", *tumour))
        algorithm = AlgorithmIdentificationSequence(
            "tumorcast quantify", family=codes.DCM.NeighborhoodAnalysis, version=_version()
        )
        segments = [
            SegmentDescription(
                segment_number=number, segment_label=label, segmented_property_category=category,
                segmented_property_type=kind, algorithm_type=SegmentAlgorithmTypeValues.AUTOMATIC,
                algorithm_identification=algorithm, anatomic_regions=None if label != "tumour" else [region],
                tracking_id=label, tracking_uid=_uid(f"{label} {self.headers[0].get('PatientID', '')}"),
                display_color=CIELabColor(*colour),
            )
            for number, (label, category, kind, _, colour) in enumerate(shown, start=1)
        ]  # fmt: skip
        masks = np.stack([np.asarray(mask, bool) for *_, mask, _ in shown], axis=-1).astype(np.uint8)
        geometry = self.volume(masks[..., 0])
        made = Segmentation(
            source_images=list(self.headers),
            pixel_array=masks[:, ::-1, ::-1],
            segmentation_type=SegmentationTypeValues.BINARY,
            segment_descriptions=segments,
            pixel_measures=geometry.get_pixel_measures(),
            plane_orientation=geometry.get_plane_orientation(),
            plane_positions=geometry.get_plane_positions(),
            # Slices without a mask are kept where a mask is empty altogether: an object must have frames.
            omit_empty_frames=bool(masks.any(axis=(0, 1, 2)).all()),
            content_label="REGIONS",
            content_description="Organ and tumour" if len(shown) > 1 else "Organ",
            **self._identity("regions", masks, place),
        )
        made.SeriesDescription = f"visit {self.visit.number}: organ and tumour"
        return self._finished(made)

    def _identity(self, name: str, values: np.ndarray, place: int) -> dict[str, Any]:
        header = self.headers[0]
        digest = hashlib.sha256(f"{header.StudyInstanceUID} {self.visit.number} {name}".encode())
        digest.update(self.visit.grid.affine.tobytes() + np.ascontiguousarray(values).tobytes())
        return {
            "series_instance_uid": _uid(f"series {digest.hexdigest()}"),
            "sop_instance_uid": _uid(f"object {digest.hexdigest()}"),
            "series_number": _SERIES + place,
            "instance_number": 1,
            "manufacturer": "tumorcast",
            "manufacturer_model_name": "tumorcast quantify",
            "software_versions": _version(),
            "device_serial_number": "none",
        }

    def _finished(self, made: Dataset) -> Any:
        header = self.headers[0]
        # The study's date instead of the clock's: the same maps give the same file.
        day, clock = header.get("StudyDate") or "19000101", header.get("StudyTime") or "000000"
        for prefix in ("Content", "InstanceCreation", "Series"):
            setattr(made, f"{prefix}Date", day)
            setattr(made, f"{prefix}Time", clock)
        for item in made.get("ContributingEquipmentSequence", ()):
            item.ContributionDateTime = day + clock
        # highdicom draws this one at random.
        organisation = _uid(f"dimensions {made.SOPInstanceUID}")
        for item in (*made.DimensionOrganizationSequence, *made.DimensionIndexSequence):
            item.DimensionOrganizationUID = organisation
        if "ContentCreatorName" not in made:
            made.ContentCreatorName = ""  # asked for, may be empty
        for keyword in ("PatientIdentityRemoved", "DeidentificationMethod"):
            if header.get(keyword):
                setattr(made, keyword, header.get(keyword))
        if not self.real:
            # There is no image that could be referred to.
            for keyword in ("ReferencedSeriesSequence", "SourceImageSequence"):
                made.pop(keyword, None)
            for group in (*made.SharedFunctionalGroupsSequence, *made.PerFrameFunctionalGroupsSequence):
                group.pop("DerivationImageSequence", None)
        return made


def _climb(made: ParametricMap) -> None:
    """Let the frames climb along the cross product of rows and columns: some readers take that for granted."""
    frames = list(made.PerFrameFunctionalGroupsSequence)
    axis = np.array(made.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence[0].ImageOrientationPatient, float)
    ends = [np.array(frames[end].PlanePositionSequence[0].ImagePositionPatient, float) for end in (0, -1)]
    if np.dot(np.cross(axis[:3], axis[3:]), ends[1] - ends[0]) >= 0:
        return
    values = np.frombuffer(made.FloatPixelData, "<f4").reshape(len(frames), -1)
    made.FloatPixelData = values[::-1].tobytes()
    frames.reverse()
    for place, frame in enumerate(frames, start=1):
        frame.FrameContentSequence[0].DimensionIndexValues = place
    made.PerFrameFunctionalGroupsSequence = frames


def _uid(text: str) -> str:
    from pydicom.uid import generate_uid

    return str(generate_uid(entropy_srcs=[text]))


def _version() -> str:
    try:
        return version("tumorcast")
    except PackageNotFoundError:
        return "0"


def _shortened(text: str, length: int) -> str:
    """Text for a field of limited length, in ASCII: the sources' character set may have no more than that."""
    text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode("ascii")
    return text if len(text) <= length else text[: length - 3].rstrip(" ,;") + "..."


def _said(units: str) -> str:
    return _shortened(spoken_units(units) or "no units", 64)


def _coded(name: str, units: str) -> Any:
    from highdicom.sr import CodedConcept

    known = _QUANTITIES.get(name) or (_OF_CONCENTRATION.get(name) if units in ("mM s", "mM*s") else None)
    if known:
        return CodedConcept(known[0], "DCM", known[1])
    return CodedConcept(_shortened(name, 16), _SCHEME, _shortened(quantity(name).long_name, 64))


def _is_perfusion(one: Map) -> bool:
    return one.name in ("Ktrans", "kep", "ve", "vp", "Fp", "PS", "delay", "AUC60", "AUC90", "TTP", "SER", "PE")


def _window(highdicom: Any, finite: np.ndarray) -> Any:
    """From the 1st to the 99th percentile of the values."""
    low, high = np.quantile(finite, [0.01, 0.99]).tolist() if finite.size else (0.0, 1.0)
    width = high - low if high > low else max(abs(high), 1.0)
    # The exact function: others may not be narrower than 1, and most quantities are.
    return highdicom.VOILUTTransformation(
        window_center=float(f"{(low + high) / 2:.8g}"), window_width=float(f"{width:.8g}"),
        voi_lut_function=highdicom.VOILUTFunctionValues.LINEAR_EXACT,
    )  # fmt: skip
