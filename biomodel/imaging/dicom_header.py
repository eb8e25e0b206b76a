"""One DICOM frame: what its header says, whatever the vendor and whether the file holds one frame or many.

Sources of what vendors write beside the standard: conformance statements and the notes of the dcm2niix converter (Li et
al. 2016, 10.1016/j.jneumeth.2016.03.001). b-values: standard (0018,9087); Siemens (0019,100C) or ``B_value`` in the CSA
header (0029,1010); GE first number of (0043,1039), to which multi-b protocols add 1e9; Philips (2001,1003).
"""

from __future__ import annotations

import struct
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import date, datetime, time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from biomodel.errors import InputError
from biomodel.imaging.deidentify import dropped_elements, known_agent, known_vendor, plain_code

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

__all__ = ["Frame", "NotAnImage", "read_frames"]

MR_IMAGE = "1.2.840.10008.5.1.4.1.1.4"
ENHANCED_MR_IMAGE = "1.2.840.10008.5.1.4.1.1.4.1"
LEGACY_CONVERTED_MR_IMAGE = "1.2.840.10008.5.1.4.1.1.4.4"
_IMAGES = {MR_IMAGE, ENHANCED_MR_IMAGE, LEGACY_CONVERTED_MR_IMAGE}

#: What GE adds to b-values of protocols with several of them.
GE_OFFSET = 10**9

#: Words of ImageType that say that a frame is no magnitude as it was acquired, by what it is. T1 and T2 alone are no
#: maps there, but weightings.
MOSAIC = "Siemens mosaic"
_CONTENT = {
    MOSAIC: {"MOSAIC"},
    "phase": {"P", "PHASE", "PHASE MAP", "B0 MAP", "VELOCITY"},
    "real or imaginary part": {"R", "REAL", "I", "IMAGINARY"},
    "map computed by the scanner": {"ADC", "ADC_UNSPECIFIED", "EADC", "FA", "T1 MAP", "T2 MAP", "RCBV", "TTP"},
    "subtraction": {"SUBTRACTION", "SUB"},
    "projection or reformat": {"MIP", "PROJECTION IMAGE", "MPR", "RESAMPLED", "REFORMATTED"},
    "localizer": {"LOCALIZER"},
}

#: What a damaged header raises on its way through pydicom.
DAMAGED = (
    OSError,
    EOFError,
    ValueError,
    AttributeError,
    LookupError,
    TypeError,
    ArithmeticError,
    NotImplementedError,
    RuntimeError,
    struct.error,
)


class NotAnImage(Exception):
    """The file is readable DICOM, or no DICOM at all, but no MR image."""


def load_pydicom() -> Any:
    """Return pydicom.

    Raises
    ------
    InputError
        If it is not installed.
    """
    try:
        import pydicom
        import pydicom.pixels
    except ImportError:
        raise InputError(
            "DICOM files are read with pydicom, which is not installed. Install it with "
            "pip install 'tumorcast[imaging]'."
        ) from None
    return pydicom


@dataclass(slots=True)
class Frame:
    """One slice of one sample, as acquired; lengths in mm, times in s, positions and directions in LPS."""

    path: Path
    index: int
    series: str
    instance_uid: str
    number: int
    content: str
    rows: int
    columns: int
    position: np.ndarray
    row: np.ndarray
    column: np.ndarray
    pixel: tuple[float, float]
    thickness: float | None
    slope: float
    intercept: float
    philips_slope: float | None
    largest: int
    instance: int
    temporal: int | None
    clocks: dict[str, float] = field(default_factory=dict)
    b_value: float | None = None
    direction: tuple[float, ...] = ()
    direction_known: bool = True
    flip_angle: float | None = None
    tr: float | None = None
    te: float | None = None
    ti: float | None = None
    field_strength: float | None = None
    vendor: str | None = None
    sequence: str | None = None
    contrast_agent: str | None = None
    fat_saturated: bool | None = None
    phase_encoding: str | None = None
    day: date | None = None


class _Layers:
    """A frame's attributes, wherever in the file they are: its own groups, the shared ones, then the file's."""

    def __init__(self, *layers: Dataset) -> None:
        self.flat: list[Dataset] = []
        late: list[Dataset] = []
        for layer in layers:
            _flatten(layer, self.flat, late)
        self.flat += late

    def get(self, *keywords: str) -> Any:
        for keyword in keywords:
            for layer in self.flat:
                value = layer.get(keyword)
                if value is not None and value != "" and value != []:
                    return value
        return None

    def number(self, *keywords: str) -> float | None:
        value = self.get(*keywords)
        if isinstance(value, (list, tuple)) or hasattr(value, "__len__") and not isinstance(value, str):
            value = value[0] if len(value) else None
        return None if value is None else _finite(value)

    def private(self, group: int, creator: str, element: int) -> Any:
        for layer in self.flat:
            try:
                return layer.private_block(group, creator)[element].value
            except KeyError:
                continue
        # Tools that clean headers remove the creator and leave the numbers; vendors use the first block.
        for layer in self.flat:
            found = layer.get((group, 0x1000 + element))
            if found is not None and (group, 0x0010) not in layer:
                return found.value
        return None


def _flatten(layer: Dataset, out: list[Dataset], late: list[Dataset]) -> None:
    out.append(layer)
    for element in layer:
        if element.VR != "SQ" or not element.value or len(element.value) != 1:
            continue
        # Philips repeats whole headers in private sequences; they count only where nothing else tells.
        _flatten(element.value[0], late if element.tag.is_private else out, late)


def read_frames(path: Path) -> tuple[list[Frame], set[str]]:
    """Read the frames of one file, without their voxels, and the names of what was not kept.

    Raises
    ------
    NotAnImage
        If the file is no DICOM file, or not an MR image.
    InputError
        If it is one, but damaged or lacks what every MR image must have.
    """
    pydicom = load_pydicom()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom tells of values that break the standard; what matters is checked here
        try:
            header = pydicom.dcmread(path, stop_before_pixels=True)
        except pydicom.errors.InvalidDicomError:
            raise NotAnImage("no DICOM file") from None
        except DAMAGED as error:
            raise InputError(f"{path.name}: damaged ({_short(error)}). Copy or export it again.") from None
        sop = str(header.get("SOPClassUID", "") or header.file_meta.get("MediaStorageSOPClassUID", ""))
        if not sop:
            if "DirectoryRecordSequence" in header:
                raise NotAnImage("directory")
            raise InputError(f"{path.name}: the header ends before it says what it is. Copy or export the file again.")
        if sop not in _IMAGES:
            raise NotAnImage(str(pydicom.uid.UID(sop).name))
        try:
            return list(_frames(header, path)), dropped_elements(header)
        except InputError:
            raise
        except DAMAGED as error:
            raise InputError(f"{path.name}: header damaged ({_short(error)}). Copy or export the file again.") from None


def _frames(header: Dataset, path: Path) -> Iterator[Frame]:
    per_frame = header.get("PerFrameFunctionalGroupsSequence")
    if not per_frame:
        yield _frame(_Layers(header), path, 0)
        return
    shared = header.get("SharedFunctionalGroupsSequence") or []
    # Flattened once: the file's own attributes and the shared groups are the same for thousands of frames.
    from pydicom.dataset import Dataset as NewDataset

    top = NewDataset({tag: element for tag, element in header.items() if tag not in _GROUPS})
    common = _Layers(*shared, top)
    for number, groups in enumerate(per_frame):
        layers = _Layers(groups)
        layers.flat += common.flat
        yield _frame(layers, path, number)


_GROUPS = (0x52009229, 0x52009230)


def _frame(layers: _Layers, path: Path, index: int) -> Frame:
    vendor = known_vendor(layers.get("Manufacturer"))
    position, orientation = layers.get("ImagePositionPatient"), layers.get("ImageOrientationPatient")
    pixel = layers.get("PixelSpacing")
    needed = {"ImagePositionPatient": position, "ImageOrientationPatient": orientation, "PixelSpacing": pixel}
    needed |= {name: layers.get(name) for name in ("Rows", "Columns", "SeriesInstanceUID", "BitsStored")}
    missing = [name for name, value in needed.items() if value is None]
    if missing:
        raise InputError(
            f"{path.name}: {', '.join(missing)} missing; an MR image cannot be placed without. The file is cut or was "
            "stripped: export it again."
        )
    directions = np.array(orientation, float)
    signed = bool(layers.get("PixelRepresentation") or 0)
    b_value, direction, known = _diffusion(layers, vendor)
    tr, te = layers.number("RepetitionTime"), layers.number("EffectiveEchoTime", "EchoTime")
    ti = layers.number("InversionTimes", "InversionTime")
    temporal = layers.number("TemporalPositionIndex", "TemporalPositionIdentifier")
    agent = layers.get("ContrastBolusAgent")
    slope = layers.number("RescaleSlope")
    return Frame(
        path=path,
        index=index,
        series=str(layers.get("SeriesInstanceUID")),
        instance_uid=f"{layers.get('SOPInstanceUID')}/{index}",
        number=int(layers.number("SeriesNumber") or 0),
        content=_content(layers, vendor),
        rows=int(layers.get("Rows")),
        columns=int(layers.get("Columns")),
        position=np.array(position, float),
        row=directions[:3],
        column=directions[3:],
        pixel=(float(pixel[0]), float(pixel[1])),
        thickness=layers.number("SpacingBetweenSlices", "SliceThickness"),
        slope=1.0 if slope is None else slope,
        intercept=layers.number("RescaleIntercept") or 0.0,
        philips_slope=_philips_slope(layers) if vendor == "Philips" else None,
        largest=2 ** (int(layers.get("BitsStored")) - signed) - 1,
        instance=int(layers.number("InstanceNumber") or 0) * 100000 + index,
        temporal=None if temporal is None else int(temporal),
        clocks=_clocks(layers),
        b_value=b_value,
        direction=direction,
        direction_known=known,
        flip_angle=layers.number("FlipAngle"),
        tr=tr / 1e3 if tr else None,
        te=te / 1e3 if te else None,
        ti=ti / 1e3 if ti else None,
        field_strength=layers.number("MagneticFieldStrength"),
        vendor=vendor,
        sequence=plain_code(layers.get("SequenceName", "PulseSequenceName"))
        or plain_code(layers.get("ScanningSequence")),
        contrast_agent=known_agent(agent if isinstance(agent, str) else None),
        fat_saturated=_fat(layers),
        phase_encoding=_phase_encoding(layers),
        day=_day(layers),
    )


def _content(layers: _Layers, vendor: str | None) -> str:
    component = str(layers.get("ComplexImageComponent") or "").upper()
    if component in ("PHASE", "REAL", "IMAGINARY"):
        return "phase" if component == "PHASE" else "real or imaginary part"
    if vendor == "GE":
        code = layers.private(0x0043, "GEMS_PARM_01", 0x2F)
        if isinstance(code, int) and code in (1, 2, 3):
            return "phase" if code == 1 else "real or imaginary part"
    words = {str(word).strip().upper() for word in (layers.get("FrameType", "ImageType") or [])}
    return next((what for what, signs in _CONTENT.items() if words & signs), "magnitude")


def _diffusion(layers: _Layers, vendor: str | None) -> tuple[float | None, tuple[float, ...], bool]:
    """Return b (s/mm²), the direction as written, and whether that is in patient coordinates (LPS)."""
    b_value = layers.number("DiffusionBValue")
    direction = _vector(layers.get("DiffusionGradientOrientation"))
    if vendor == "Siemens":
        if b_value is None:
            b_value = _first(layers.private(0x0019, "SIEMENS MR HEADER", 0x0C))
        if not direction:
            direction = _vector(layers.private(0x0019, "SIEMENS MR HEADER", 0x0E), "<3d")
        if b_value is None:
            b_value, direction = _siemens_csa(layers)
    elif vendor == "GE":
        if b_value is None:
            b_value = _first(layers.private(0x0043, "GEMS_PARM_01", 0x39))
            b_value = None if b_value is None else float(int(b_value) % GE_OFFSET)
        if not direction:
            # Along frequency, phase and slice, with signs that depend on the software: told apart by it, not used.
            parts = [_first(layers.private(0x0019, "GEMS_ACQU_01", element)) for element in (0xBB, 0xBC, 0xBD)]
            if all(part is not None for part in parts):
                raw = tuple(float(part) for part in parts if part is not None)
                return b_value, raw, not any(raw) or not b_value
    elif vendor == "Philips":
        if b_value is None:
            b_value = _first(layers.private(0x2001, "Philips Imaging DD 001", 0x03), "<f")
        if not direction:
            parts = [_first(layers.private(0x2005, "Philips MR Imaging DD 001", e), "<f") for e in (0xB0, 0xB1, 0xB2)]
            if all(part is not None for part in parts):
                direction = tuple(float(part) for part in parts if part is not None)
    if b_value is not None and b_value < 0:
        b_value = None  # Siemens marks averages over directions that are no diffusion images with -1
    return b_value, direction if b_value else (), True


def _siemens_csa(layers: _Layers) -> tuple[float | None, tuple[float, ...]]:
    raw = layers.private(0x0029, "SIEMENS CSA HEADER", 0x10)
    if not isinstance(raw, bytes):
        return None, ()
    from nibabel.nicom import csareader  # it warns, on import, that it is young; the caller silences warnings

    try:
        csa = csareader.read(raw)
    except (csareader.CSAReadError, *DAMAGED):
        return None, ()
    b_value, vector = csareader.get_scalar(csa, "B_value"), csareader.get_vector(csa, "DiffusionGradientDirection", 3)
    return (None if b_value is None else float(b_value)), () if vector is None else tuple(float(v) for v in vector)


def _philips_slope(layers: _Layers) -> float | None:
    """Scale slope (2005,100E) of Philips; see :func:`biomodel.imaging.dicom.read_dicom`."""
    value = _first(layers.private(0x2005, "Philips MR Imaging DD 001", 0x0E), "<f")
    return value if value is not None and value > 0 else None


def _clocks(layers: _Layers) -> dict[str, float]:
    """Times of a frame (s) by the attribute they come from, the most telling first."""
    day = _day(layers)
    found = {
        "FrameAcquisitionDateTime": _moment(layers.get("FrameAcquisitionDateTime")),
        "AcquisitionTime": _clock(layers.get("AcquisitionTime"), day),
        "AcquisitionDateTime": _moment(layers.get("AcquisitionDateTime")),
        "TriggerTime": _scaled(layers.number("TriggerTime")),
        "TemporalPositionTimeOffset": layers.number("TemporalPositionTimeOffset"),
        "TemporalResolution": _by_resolution(layers),
        "ContentTime": _clock(layers.get("ContentTime"), day),
    }
    return {name: value for name, value in found.items() if value is not None}


def _by_resolution(layers: _Layers) -> float | None:
    place = layers.number("TemporalPositionIdentifier", "TemporalPositionIndex")
    step = layers.number("TemporalResolution")
    return None if place is None or not step else (place - 1) * step / 1e3


def _scaled(value: float | None) -> float | None:
    return None if value is None else value / 1e3


_START = datetime(1900, 1, 1)


def _moment(value: Any) -> float | None:
    if value is None:
        return None
    from pydicom.valuerep import DT

    try:
        moment = DT(str(value))
        if moment is None:
            return None
        plain = datetime.combine(date(moment.year, moment.month, moment.day), time(*_hms(moment)))
        return (plain - _START).total_seconds()
    except (ValueError, TypeError, OverflowError):
        return None


def _clock(value: Any, day: date | None) -> float | None:
    if value is None:
        return None
    from pydicom.valuerep import TM

    try:
        clock = TM(str(value))
    except (ValueError, TypeError):
        return None
    if clock is None:
        return None
    return (datetime.combine(day or _START.date(), time(*_hms(clock))) - _START).total_seconds()


def _hms(clock: Any) -> tuple[int, int, int, int]:
    return clock.hour, clock.minute, min(clock.second, 59), clock.microsecond


def _day(layers: _Layers) -> date | None:
    from pydicom.valuerep import DA

    for keyword in (
        "AcquisitionDate",
        "FrameAcquisitionDateTime",
        "AcquisitionDateTime",
        "ContentDate",
        "SeriesDate",
        "StudyDate",
    ):
        value = layers.get(keyword)
        if value is None:
            continue
        try:
            found = DA(str(value)[:8])
        except (ValueError, TypeError):
            continue
        if found is not None:
            return date(found.year, found.month, found.day)
    return None


def _fat(layers: _Layers) -> bool | None:
    standard = str(layers.get("SpectrallySelectedSuppression") or "").upper()
    if standard:
        return standard in ("FAT", "FAT_AND_WATER")
    options = layers.get("ScanOptions")
    if options is None:
        return None
    words = {str(word).strip().upper() for word in ([options] if isinstance(options, str) else options)}
    return bool(words & {"FS", "FATSAT", "FAT_SAT", "FS_GEMS", "SFS"})


def _phase_encoding(layers: _Layers) -> str | None:
    word = str(layers.get("InPlanePhaseEncodingDirection") or "").upper()
    # Along columns means that phase grows from row to row; enhanced files write whole words.
    return {"COL": "column", "COLUMN": "column", "ROW": "row"}.get(word)


def _finite(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if np.isfinite(number) else None


def _numbers(value: Any, layout: str) -> list[float]:
    """Read numbers that may have lost their type on the way (implicit transfer syntax, unknown VR)."""
    if value is None:
        return []
    if isinstance(value, bytes):
        if len(value) == struct.calcsize(layout):
            return [float(number) for number in struct.unpack(layout, value)]
        value = value.decode("ascii", "ignore").strip("\0 ").split("\\")
    if isinstance(value, (str, int, float)) or not hasattr(value, "__iter__"):
        value = [value]
    found = [_finite(item) for item in value]
    return [number for number in found if number is not None]


def _first(value: Any, layout: str = "<d") -> float | None:
    numbers = _numbers(value, layout)
    return numbers[0] if numbers else None


def _vector(value: Any, layout: str = "<3d") -> tuple[float, ...]:
    numbers = _numbers(value, layout)
    return tuple(numbers) if len(numbers) == 3 else ()


def _short(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:120]
