"""What of a header is kept, and that nothing else comes through."""

from datetime import date

import pytest

from biomodel.errors import InputError
from biomodel.imaging.deidentify import (
    EPOCH,
    KEPT_ELEMENTS,
    days_from_first,
    dropped_elements,
    dropped_fields,
    dropped_finding,
    known_agent,
    known_vendor,
    plain_code,
    written_date,
)

pydicom = pytest.importorskip("pydicom")


def test_nothing_that_identifies_is_on_the_list() -> None:
    # Of DICOM PS3.15 table E.1-1, the attributes of the patient, of people, institutions, devices, and identifiers.
    for word in ("Patient", "Physician", "Institution", "Operator", "Accession", "UID", "Comments", "Description",
                 "Address", "Station", "Serial", "Protocol", "Study", "Name"):  # fmt: skip
        kept = {name for name in KEPT_ELEMENTS if word in name}
        assert kept <= {"SOPClassUID", "StudyDate", "SequenceName", "PulseSequenceName", "ImagePositionPatient",
                        "ImageOrientationPatient"}  # fmt: skip


def test_dropped_elements_are_names_also_from_within_sequences() -> None:
    header = pydicom.Dataset()
    header.PatientName, header.PatientID, header.FlipAngle = "Doe^Jane", "12345678", 10
    inner = pydicom.Dataset()
    inner.OperatorsName = "Roe^Richard"
    header.RequestAttributesSequence = [inner, inner]
    header.private_block(0x0029, "SIEMENS CSA HEADER", create=True).add_new(0x10, "OB", b"Doe")
    names = dropped_elements(header)
    assert names == {"PatientName", "PatientID", "OperatorsName", "private elements of group 0029"}
    (finding,) = dropped_finding(names, "visit")
    assert finding.step == "identification" and finding.severity == "info"
    assert "PatientName" in finding.message and "Doe" not in finding.message and "1234" not in finding.message
    assert dropped_finding([], "visit") == ()


def test_dropped_fields() -> None:
    assert dropped_fields({"EchoTime": 0.002, "PatientName": "Doe", "SeriesDescription": "x"}) == {
        "PatientName",
        "SeriesDescription",
    }


@pytest.mark.parametrize(
    ("text", "vendor"),
    [
        ("SIEMENS", "Siemens"),
        ("Siemens Healthineers", "Siemens"),
        ("GE MEDICAL SYSTEMS", "GE"),
        ("GE", "GE"),
        ("Philips Medical Systems", "Philips"),
        ("Bruker BioSpin MRI GmbH", "Bruker"),
        ("Georgia Smith", None),
        ("", None),
        (None, None),
    ],
)
def test_vendors(text, vendor) -> None:
    assert known_vendor(text) == vendor


@pytest.mark.parametrize(
    ("text", "agent"),
    [
        ("Gadovist 7.5 ml, Doe^Jane", "gadobutrol"),
        ("DOTAREM", "gadoterate"),
        ("Gd-DTPA", "gadopentetate"),
        ("MultiHance", "gadobenate"),
        ("yes", None),
        (None, None),
    ],
)
def test_agents_are_known_words_and_nothing_else(text, agent) -> None:
    assert known_agent(text) == agent


def test_codes_look_like_codes() -> None:
    assert plain_code("*fl3d1_ns") == "*fl3d1_ns" and plain_code("GR") == "GR"
    for text in ("Jane Doe", "Doe^Jane", "scan12345678", "", None, "x" * 40):
        assert plain_code(text) is None


def test_days() -> None:
    visits = [date(2024, 3, 1), date(2024, 2, 1), date(2024, 3, 1)]
    assert days_from_first(visits) == (29.0, 0.0, 29.0)
    assert days_from_first(visits, shift=100.0) == (129.0, 100.0, 129.0)
    assert days_from_first(visits, first=date(2024, 1, 1)) == (60.0, 31.0, 60.0)
    assert days_from_first([]) == ()
    with pytest.raises(InputError, match="29 days before the first visit"):
        days_from_first(visits, first=date(2024, 3, 1))
    assert written_date(21.0) == date(1900, 1, 22) and written_date(None) == EPOCH
