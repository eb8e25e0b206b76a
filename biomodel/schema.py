"""The files of a patient and a cohort, as pydantic models, and the JSON Schemas made from them.

Unknown fields are refused, so a misspelt one never goes unnoticed. ``python -m biomodel.schema`` writes the JSON
Schemas to ``data_schemas/v1``; ``python -m biomodel.schema --check`` tells whether they are up to date.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator
from pydantic.config import JsonDict

from biomodel.summary import Summary

__all__ = ["MODELS", "CohortManifest", "Outcome", "PatientManifest", "json_schemas"]

Text = Annotated[str, StringConstraints(min_length=1, max_length=200)]
File = Annotated[str, StringConstraints(min_length=1, max_length=500)]
Date = Annotated[str, StringConstraints(pattern=r"^\d{4}-\d{2}-\d{2}([T ]\d{2}:\d{2}(:\d{2})?)?$")]
Agent = Annotated[str, StringConstraints(min_length=1, max_length=80, pattern=r"^[^\s.]+$")]
Tissue = Annotated[str, StringConstraints(pattern=r"^[A-Za-z][A-Za-z0-9_]*$")]
Status = Literal["given", "planned"]

_ONE_TIME: JsonDict = {"oneOf": [{"required": ["day"]}, {"required": ["date"]}]}


class Strict(BaseModel):
    """Base of all models: no unknown fields, no silent conversion of types, no NaN, immutable."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        allow_inf_nan=False,
        populate_by_name=True,
        use_attribute_docstrings=True,
    )


class Timed(Strict):
    """Something that happened on a day."""

    model_config = ConfigDict(json_schema_extra=_ONE_TIME)

    day: float | None = None
    """Days from day 0, with any hour as a fraction. Give either this or a date."""
    date: Date | None = None
    """ISO date, with an hour if known (2024-03-01T14:30). Day 0 is the baseline."""

    @model_validator(mode="after")
    def _one_time(self) -> Timed:
        if (self.day is None) == (self.date is None):
            found = "neither" if self.day is None else "both"
            raise ValueError(f"{found} of 'day' and 'date'; expected one of them")
        return self


class Quantity(Strict):
    """A number with its unit."""

    value: float
    units: Text
    """Anything that pint knows. Units are never guessed."""


class Map(Strict):
    """An image of a quantity."""

    file: File
    """NIfTI file, relative to the manifest's folder."""
    units: Text
    """Units of the file's values, with a scale if they have one ('1e-6 mm^2/s')."""


class Region(Strict):
    """A mask with the values 0 and 1."""

    file: File
    """NIfTI file, relative to the manifest's folder."""


class Grid(Strict):
    """The grid on which all images lie."""

    mask: File
    """NIfTI file with 1 inside the organ; its grid is the computing grid."""
    tissues: Annotated[dict[Tissue, File], Field(json_schema_extra={"additionalProperties": False})] = {}
    """NIfTI files with the fraction (0 to 1) of a tissue in each voxel, by name of the tissue."""


class Cellularity(Strict):
    """How ADC is turned into cell fractions."""

    adc_w: Quantity
    """ADC of free water, about 3e-3 mm^2/s."""
    adc_min: Quantity
    """ADC of a voxel full of cells."""
    packing: float = 0.7405
    """Largest fraction of a voxel that cells can fill."""
    cell_radius: Quantity = Quantity(value=10.0, units="um")
    """Radius of a cell."""
    repeatability_cv: float = 0.05
    """Within-subject coefficient of variation of a tumour's mean ADC."""
    voxel_cv: float = 0.05
    """Coefficient of variation of a single voxel's ADC beyond that."""
    visible_fraction: float = 0.15
    """Cell fraction from which a voxel counts as tumour."""
    noise_length: Quantity = Quantity(value=0.0, units="mm")
    """Correlation length of the voxels' noise; 0 where they are independent."""
    edge_sd: Quantity = Quantity(value=0.0, units="mm")
    """Standard deviation of how far a drawn edge lies inside or outside the tumour's, alike all around."""
    region_shift_sd: Quantity = Quantity(value=0.0, units="mm")
    """Standard deviation, along each axis, of a drawn region's place in its visit's images."""
    misalignment_sd: Quantity = Quantity(value=0.0, units="mm")
    """Standard deviation, along each axis, of the shift that registration left between a later visit and the first."""


class Volumes(Strict):
    """Noise of measured volumes."""

    cv: float = 0.2
    """Coefficient of variation of a repeated measurement."""
    floor: Quantity = Quantity(value=0.05, units="cm^3")
    """Volume under which nothing is seen."""
    df: float = 8.0
    """Degrees of freedom of the Student-t errors of log(volume + floor)."""


class Acquisition(Strict):
    """How a scan was made."""

    vendor: Text | None = None
    field_strength: Quantity | None = None
    institution: Text | None = None
    sequence: Text | None = None


class VisitRecord(Timed):
    """What was measured on one day."""

    adc: Map | None = None
    adc_sd: Map | None = None
    """Standard deviation of the ADC in each voxel; in place of the cellularity's voxel_cv."""
    region: Region | None = None
    volume: Quantity | None = None
    """Tumour volume; 0 says that no tumour was seen."""
    longest_diameter: Quantity | None = None
    drug_map: Map | None = None
    """Relative supply of drug, a pure number from 0 up."""
    acquisition: Acquisition | None = None


class ChemotherapyRecord(Timed):
    """One dose of a drug."""

    kind: Literal["chemotherapy"]
    agent: Agent
    dose: Quantity
    """Amount in mg/m^2, mg/kg, mg, AUC or 1 (relative to a reference dose)."""
    status: Status = "given"


class RadiotherapyRecord(Timed):
    """One fraction of radiotherapy."""

    kind: Literal["radiotherapy"]
    dose: Quantity
    status: Status = "given"


class OngoingRecord(Timed):
    """A therapy that continues from its start, of which single doses are not known."""

    kind: Literal["ongoing"]
    agent: Agent
    status: Status = "given"


Treatment = Annotated[ChemotherapyRecord | RadiotherapyRecord | OngoingRecord, Field(discriminator="kind")]


class Clinical(Strict):
    """What was known before treatment. No names, birth dates or record numbers."""

    age: Annotated[float, Field(ge=0, le=120)] | None = None
    """Years at baseline."""
    sex: Literal["female", "male", "other"] | None = None
    menopausal_state: Literal["pre", "peri", "post"] | None = None
    hr: bool | None = None
    """Hormone receptors positive (oestrogen or progesterone)."""
    er: bool | None = None
    """Oestrogen receptor positive."""
    pr: bool | None = None
    """Progesterone receptor positive."""
    her2: bool | None = None
    """HER2 positive."""
    subtype: Text | None = None
    histology: Text | None = None
    grade: Annotated[int, Field(ge=1, le=4)] | None = None
    """Nottingham grade 1 to 3 in the breast, WHO grade 1 to 4 in the brain."""
    stage: Text | None = None
    breast_density: Literal["a", "b", "c", "d"] | None = None
    """BI-RADS category."""
    ki67: Annotated[float, Field(ge=0, le=1)] | None = None
    """Fraction of dividing cells in the biopsy."""
    laterality: Literal["left", "right", "bilateral"] | None = None
    idh_mutated: bool | None = None
    mgmt_methylated: bool | None = None
    karnofsky: Annotated[float, Field(ge=0, le=100)] | None = None
    arm: Text | None = None
    """Arm of the trial."""


class Outcome(Strict):
    """What was found in the end; never seen by a forecast."""

    schema_: Literal["tumorcast/outcome/v1"] | None = Field(default=None, alias="schema")
    pcr: bool | None = None
    """Pathological complete response."""
    rcb_class: Literal["0", "I", "II", "III"] | None = None
    rcb_index: Annotated[float, Field(ge=0)] | None = None
    """Residual cancer burden."""
    event_free_days: Annotated[float, Field(ge=0)] | None = None
    event: bool | None = None
    """Whether an event ended the event-free time (false: censored)."""
    survival_days: Annotated[float, Field(ge=0)] | None = None
    death: bool | None = None
    """Whether death ended the survival time (false: censored)."""


class PatientManifest(Strict):
    """patient.json: one patient's visits, treatments and clinical data."""

    schema_: Literal["tumorcast/patient/v1"] = Field(alias="schema")
    id: Annotated[str, StringConstraints(min_length=1, max_length=100)]
    """Pseudonym."""
    organ: Text
    """breast, brain or any other."""
    baseline: Date | None = None
    """ISO date of day 0; the first visit's date if dates are given without it."""
    grid: Grid | None = None
    """Absent for a patient without images."""
    cellularity: Cellularity | None = None
    """Required with ADC maps."""
    volumes: Volumes | None = None
    visits: Annotated[list[VisitRecord], Field(min_length=1)]
    """In the order of days."""
    treatments: list[Treatment] = []
    clinical: Clinical | None = None
    outcome: Outcome | None = None
    """May lie in outcome.json beside instead."""
    notes: list[Annotated[str, StringConstraints(min_length=1, max_length=1000)]] = []
    """Remarks to be shown with results."""


class InversionTrain(Strict):
    """Pulses that read inversion-prepared images for T1; what headers leave out, and DICOM has no attribute for."""

    pulses: Annotated[int, Field(ge=1, le=10_000)]
    """Pulses after each inversion."""
    spacing: Quantity
    """Time from pulse to pulse."""
    centre: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Part of the train before the pulse that reads the centre of k-space; 0.5 in linear order, 0 where it is first."""
    cycle: Quantity | None = None
    """Time from inversion to inversion. Give either this or the delay."""
    delay: Quantity | None = None
    """Time from the end of the train to the next inversion."""
    inversion_time_to: Literal["centre", "first pulse"] = "centre"
    """Which pulse the headers' inversion times end at: that of the centre of k-space (DICOM, BIDS), or the first."""


class StudyVisit(Timed):
    """Raw series of one day."""

    folder: File
    """Folder of BIDS or DICOM series, relative to study.json."""
    haematocrit: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Fraction, as measured; 0.42 where it was not."""
    inversion_train: InversionTrain | None = None
    """Of the visit's inversion-prepared series, where sidecars do not say it."""


class StudyManifest(Strict):
    """study.json: what raw series of one patient cannot say; read by ``tumorcast quantify``."""

    schema_: Literal["tumorcast/study/v1"] = Field(alias="schema")
    id: Annotated[str, StringConstraints(min_length=1, max_length=100)]
    """Pseudonym."""
    organ: Text
    """breast, brain or any other."""
    baseline: Date | None = None
    """ISO date of day 0; the first visit's date if dates are given without it."""
    cellularity: Cellularity
    visits: Annotated[list[StudyVisit], Field(min_length=1)]
    """In the order of days; the first is the reference onto which the others are registered."""
    treatments: list[Treatment] = []
    clinical: Clinical | None = None
    notes: list[Annotated[str, StringConstraints(min_length=1, max_length=1000)]] = []
    """Remarks to be shown with results."""


class CohortManifest(Strict):
    """cohort.json: patients and how they are split."""

    schema_: Literal["tumorcast/cohort/v1"] = Field(alias="schema")
    name: Text
    description: Annotated[str, StringConstraints(max_length=2000)] | None = None
    patients: Annotated[list[File], Field(min_length=1)]
    """Patient folders, relative to the manifest's folder."""
    splits: dict[Text, list[File]] = {}
    """Parts such as train and test, each a list of the folders above."""


#: The model of each kind of file.
MODELS: dict[str, type[BaseModel]] = {
    "patient": PatientManifest,
    "study": StudyManifest,
    "cohort": CohortManifest,
    "outcome": Outcome,
    "summary": Summary,
}


def json_schemas() -> dict[str, str]:
    """Return the JSON Schema of each kind of file, as the text that is kept in ``data_schemas/v1``."""
    texts = {}
    for name, model in MODELS.items():
        schema = model.model_json_schema(by_alias=True)
        for part in (schema, *schema.get("$defs", {}).values()):
            for field in part.get("properties", {}).values():
                field.pop("title", None)  # pydantic repeats each field's name as a title, which says nothing
        head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": f"tumorcast/{name}/v1"}
        texts[name] = json.dumps(head | schema, indent=2, ensure_ascii=False) + "\n"
    return texts


def _outdated(folder: Path) -> Iterator[tuple[Path, str]]:
    for name, text in json_schemas().items():
        path = folder / f"{name}.schema.json"
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            yield path, text


def main(arguments: list[str]) -> int:
    """Write the JSON Schemas, or with ``--check`` only tell whether they are up to date (exit code 1 if not)."""
    import data_schemas

    outdated = list(_outdated(data_schemas.folder()))
    for path, text in outdated:
        if "--check" in arguments:
            print(f"{path.name} is out of date: run 'python -m biomodel.schema'")
        else:
            path.write_text(text, encoding="utf-8")
            print(f"{path.name} written")
    return 1 if outdated and "--check" in arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
