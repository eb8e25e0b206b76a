"""What `summary.json` holds: the results of a forecast without its maps, in plain numbers.

The models here are the file's schema (``data_schemas/v1/summary.schema.json`` is generated from them). Numbers have 8
significant digits, null stands for what does not exist, and nothing depends on the clock or on where files lie, so two
runs with the same seed give the same bytes.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["SCHEMA", "Summary"]

SCHEMA = "tumorcast/summary/v1"

Number = float | None
Plain = bool | int | float | str | None


class Record(BaseModel):
    """Base: no unknown fields, no silent conversion of types, no NaN, immutable."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, populate_by_name=True,
        use_attribute_docstrings=True,
    )  # fmt: skip


class GridSummary(Record):
    """The voxels on which the tumour was computed."""

    shape: list[int]
    """Voxels of the whole grid (z, y, x)."""
    computed: list[int]
    """Voxels of the computing box (z, y, x), on which forecast.nc holds maps."""
    spacing_mm: list[float]
    visible_fraction: float
    """Cell fraction from which a voxel counts as tumour."""
    cells_per_voxel: Number
    """Carrying capacity; null without ADC maps."""


class PatientSummary(Record):
    """Who the forecast is for."""

    id: str
    organ: str
    baseline: str | None
    """ISO date of day 0."""
    virtual: bool
    """Made by a generator; not a person."""
    grid: GridSummary | None
    """Null for a patient without images."""
    detection_floor_cm3: float
    """A volume below this is not seen."""
    clinical: dict[str, Plain]
    outcome: dict[str, Plain] | None
    """What was found in the end, if the record handed in for comparison has it. No forecast knows it."""


class ParameterSummary(Record):
    """One calibrated parameter."""

    name: str
    description: str
    units: str
    estimate: float
    low: float
    """Lower end of the 90 % interval; equal to the estimate where the method gives no interval."""
    high: float
    prior_median: float
    prior_low: float
    prior_high: float
    shrinkage: float
    """Posterior over prior standard deviation: 1 says that the data told nothing."""
    informed_by: Literal["data", "data and prior", "prior", "not computed"]
    source: str
    """Where the prior comes from."""


class CalibrationSummary(Record):
    """How the model was fitted, and on what."""

    visits: int
    """Visits 1 to this one were used."""
    first_day: float
    last_day: float
    model: str
    known_parameters: dict[str, float]
    """Parameters that were not calibrated."""
    method: str
    converged: bool
    iterations: int
    solves: int
    data: int
    """Measured voxels or volumes."""
    log_likelihood: Number
    log_evidence: Number
    aic: Number
    bic: Number
    identified: list[str]
    """Parameters whose standard deviation the data at least halved."""
    parameters: list[ParameterSummary]


class Quantiles(Record):
    """Quantiles of the predictive distribution on one day."""

    day: float
    q05: float = Field(alias="0.05")
    q25: float = Field(alias="0.25")
    q50: float = Field(alias="0.5")
    q75: float = Field(alias="0.75")
    q95: float = Field(alias="0.95")


class Quantity(Record):
    """A forecast quantity on the requested days."""

    units: str
    quantiles: list[Quantiles]


class Chance(Record):
    """A probability on one day."""

    day: float
    probability: float


class ForecastSummary(Record):
    """The predictive distribution under the assumed treatments."""

    draws: int
    seed: int
    days: list[float]
    quantities: dict[str, Quantity]
    """volume, cells, longest_diameter; measured_volume includes the error of a measurement."""
    none_detectable: list[Chance]
    """Probability that the volume lies below the detection floor."""


class Observation(Record):
    """What one visit measured."""

    visit: int
    day: float
    role: Literal["calibration", "later"]
    """later: never seen by the fit."""
    adc: bool
    region: bool
    volume_cm3: Number
    longest_diameter_mm: Number
    cells: Number


class ScoreSummary(Record):
    """A predictor against what one later visit measured. Errors are relative; null where a predictor gives none."""

    visit: int
    day: float
    predictor: str
    volume: float
    observed_volume: float
    volume_error: Number
    crps: float
    """Continuous ranked probability score of the volume, cm^3; the absolute error of a single number."""
    covered_50: bool | None
    covered_90: bool | None
    dice: Number = None
    ccc: Number = None
    """Concordance of the cell fraction over the union of predicted and observed tumour."""
    pearson: Number = None
    rmse: Number = None
    cells_error: Number = None
    diameter_error: Number = None


class TreatmentSummary(Record):
    """A dose, a fraction of radiotherapy, or the start of an ongoing therapy."""

    kind: Literal["chemotherapy", "radiotherapy", "ongoing"]
    agent: str | None
    day: float
    amount: Number
    units: str | None
    status: Literal["given", "planned"]


class WhatIfSummary(Record):
    """A forecast of the same fit and the same draws under another schedule, on the last day."""

    label: str
    day: float
    schedule: list[TreatmentSummary]
    quantities: dict[str, Quantity]
    none_detectable: float
    less_volume: float
    """Share of draws in which this schedule leaves less volume than the main one."""
    same_volume: float
    fewer_cells: Number


class FindingSummary(Record):
    """One finding of the quality check."""

    severity: Literal["error", "warning", "info"]
    step: str
    file: str
    message: str
    remedy: str


class SolverSummary(Record):
    """The numerics behind the numbers."""

    name: str
    rtol: float
    dtype: str
    device: str


class Provenance(Record):
    """What a result was made with and from."""

    solver: SolverSummary
    patient_sha256: str
    """Of the data that the calibration saw."""
    versions: dict[str, str]


class Summary(Record):
    """summary.json: the results of one forecast."""

    schema_: Literal["tumorcast/summary/v1"] = Field(alias="schema")
    patient: PatientSummary
    calibration: CalibrationSummary
    forecast: ForecastSummary
    schedule: list[TreatmentSummary]
    """Treatments that the forecast assumed."""
    observations: list[Observation]
    scores: list[ScoreSummary]
    """Empty where nothing was observed on a forecast day."""
    what_if: list[WhatIfSummary]
    findings: list[FindingSummary] | None
    """Of the quality check; null where none was run."""
    notes: list[str]
    """What a reader must know about this forecast."""
    provenance: Provenance
