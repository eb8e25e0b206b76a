"""What of a header is kept when images come in; the rest is left behind and reported by name.

An allow list, not a block list: a field that nobody thought of is dropped. Free text is never kept. Vendor and contrast
agent are kept only as one of the words known here, codes only if they look like codes. Dates become days from the first
visit, identifiers (UIDs included) are used to tell series apart and then forgotten. DICOM PS3.15 annex E lists what may
identify a person; nothing of it is on the lists below but dates, which are turned into days.

This covers headers. A face in the images, or text burnt into them, stays: :mod:`biomodel.identification` warns of both.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import date, timedelta
from typing import TYPE_CHECKING

from biomodel.errors import InputError
from biomodel.findings import Finding

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

__all__ = [
    "EPOCH",
    "days_from_first",
    "dropped_elements",
    "dropped_fields",
    "dropped_finding",
    "known_agent",
    "known_vendor",
]

#: Day 0 where a date must be written (DICOM, BIDS). Dates before 1925 tell readers of BIDS that they are shifted.
EPOCH = date(1900, 1, 1)

#: DICOM attributes of which something is kept: as a number, as one of the known words, or as the image itself.
KEPT_ELEMENTS = frozenset(
    """
    SOPClassUID ImageType FrameType Modality Manufacturer
    Rows Columns BitsAllocated BitsStored HighBit PixelRepresentation SamplesPerPixel PhotometricInterpretation
    PixelData NumberOfFrames RescaleSlope RescaleIntercept RescaleType
    ImagePositionPatient ImageOrientationPatient PixelSpacing SliceThickness SpacingBetweenSlices
    InPlanePhaseEncodingDirection
    RepetitionTime EchoTime EffectiveEchoTime EchoNumbers FlipAngle InversionTime InversionTimes MagneticFieldStrength
    ScanningSequence SequenceVariant SequenceName PulseSequenceName ScanOptions SpectrallySelectedSuppression
    ContrastBolusAgent ContrastBolusIngredient SeriesNumber InstanceNumber ComplexImageComponent
    DiffusionBValue DiffusionGradientOrientation DiffusionDirectionality
    TemporalPositionIdentifier TemporalPositionIndex TemporalPositionTimeOffset NumberOfTemporalPositions
    TemporalResolution TriggerTime
    AcquisitionDate AcquisitionTime AcquisitionDateTime FrameAcquisitionDateTime ContentDate ContentTime StudyDate
    SeriesDate
    """.split()
)

#: Fields of a BIDS sidecar that are kept.
KEPT_FIELDS = frozenset(
    """
    RepetitionTime RepetitionTimeExcitation EchoTime FlipAngle InversionTime VolumeTiming FrameTimesStart
    MagneticFieldStrength Manufacturer SequenceName PulseSequenceName ScanningSequence PulseSequenceType ScanOptions
    ContrastBolusIngredient ContrastBolusAgent PhaseEncodingDirection PhaseEncodingAxis BValueUnits Units
    """.split()
)

_VENDORS = {
    "siemens": "Siemens",
    "ge": "GE",
    "general electric": "GE",
    "philips": "Philips",
    "canon": "Canon",
    "toshiba": "Canon",
    "hitachi": "Hitachi",
    "fujifilm": "Fujifilm",
    "uih": "United Imaging",
    "united imaging": "United Imaging",
    "bruker": "Bruker",
    "agilent": "Agilent",
    "varian": "Agilent",
    "mr solutions": "MR Solutions",
    "aspect": "Aspect",
    "tumorcast": "virtual",
    "virtual": "virtual",
}

#: Generic names of contrast agents, by the names under which they are sold or written.
_AGENTS = {
    "gadobutrol": ("gadobutrol", "gadovist", "gadavist"),
    "gadoterate": ("gadoterate", "gadoteric", "dotarem", "clariscan", "gd-dota", "artirem"),
    "gadopentetate": ("gadopentetate", "gadopentetic", "magnevist", "gd-dtpa"),
    "gadobenate": ("gadobenate", "gadobenic", "multihance", "gd-bopta"),
    "gadodiamide": ("gadodiamide", "omniscan"),
    "gadoteridol": ("gadoteridol", "prohance"),
    "gadoxetate": ("gadoxetate", "gadoxetic", "primovist", "eovist", "gd-eob"),
    "gadofosveset": ("gadofosveset", "ablavar", "vasovist"),
    "gadoversetamide": ("gadoversetamide", "optimark"),
    "gadopiclenol": ("gadopiclenol", "elucirem", "vueway"),
}

_CODE = re.compile(r"^[A-Za-z0-9*_.+-]{1,24}$")
#: Digits like those of a date or a record number never are part of a sequence's name.
_NUMBER = re.compile(r"\d{6,}")


def known_vendor(text: object) -> str | None:
    """Return the vendor in one word, or None if it is not known here."""
    words = str(text or "").strip().casefold()
    return next((name for start, name in _VENDORS.items() if re.match(rf"{start}\b", words)), None)


def known_agent(text: object) -> str | None:
    """Return a contrast agent's generic name, or None if the text names none known here."""
    words = str(text or "").casefold()
    return next((name for name, names in _AGENTS.items() if any(word in words for word in names)), None)


def plain_code(text: object) -> str | None:
    """Return a sequence's name if it is a short code without blanks, else None."""
    words = str(text or "").strip()
    return words if _CODE.match(words) and not _NUMBER.search(words) else None


def dropped_elements(header: Dataset) -> set[str]:
    """Return the names of a DICOM header's elements that are not kept; private ones as their group alone.

    Sequences are looked into, of many items only the first: all frames of a file carry the same elements.
    """
    names: set[str] = set()
    for element in header:
        if element.tag.is_private:
            names.add(f"private elements of group {element.tag.group:04X}")
        elif element.VR == "SQ":
            if element.value:
                names |= dropped_elements(element.value[0])
        elif element.keyword not in KEPT_ELEMENTS:
            names.add(element.keyword or f"unknown element {element.tag}")
    return names


def dropped_fields(sidecar: Mapping[str, object]) -> set[str]:
    """Return the names of a BIDS sidecar's fields that are not kept."""
    return {str(name) for name in sidecar if name not in KEPT_FIELDS}


def dropped_finding(names: Iterable[str], file: str) -> tuple[Finding, ...]:
    """Return what was dropped as one finding, or nothing if nothing was."""
    listed = sorted(set(names))
    if not listed:
        return ()
    message = f"{file}: {len(listed)} kinds of header fields were not kept: {', '.join(listed)}."
    return (Finding("info", "identification", file, message, "Nothing to do; the source files are as they were."),)


def days_from_first(dates: Sequence[date], *, first: date | None = None, shift: float = 0.0) -> tuple[float, ...]:
    """Return dates as days from the first visit.

    Parameters
    ----------
    dates
        Of the visits or series, in any order.
    first
        Day 0; the earliest of `dates` by default.
    shift
        Days added to all: the same number for one patient keeps every interval and hides when the visits took place
        relative to anything else.

    Raises
    ------
    InputError
        If a date lies before `first`.

    Examples
    --------
    >>> days_from_first([date(2024, 3, 22), date(2024, 3, 1)])
    (21.0, 0.0)
    """
    start = min(dates) if first is None and dates else first
    days = tuple(float((day - start).days) + shift for day in dates) if start is not None else ()
    if any(day < shift for day in days):
        raise InputError(
            f"dates: a scan lies {shift - min(days):g} days before the first visit; expected it on or after that day. "
            "Check the day of the first visit."
        )
    return days


def written_date(day: float | None) -> date:
    """Return the date that is written for a day, counted from :data:`EPOCH`."""
    return EPOCH + timedelta(days=int(day or 0))
