"""The JSON Schemas are those of the code, and both agree on what a manifest is."""

import copy
import json
import subprocess
import sys

import jsonschema
import pytest
from pydantic import ValidationError

import data_schemas
from biomodel.errors import InputError, UnitError
from biomodel.manifest import validate
from biomodel.schema import MODELS, json_schemas, main

PATIENT = {
    "schema": "tumorcast/patient/v1",
    "id": "P014",
    "organ": "breast",
    "baseline": "2024-03-01",
    "grid": {"mask": "mask.nii.gz", "tissues": {"adipose": "adipose.nii.gz"}},
    "cellularity": {
        "adc_w": {"value": 3.0e-3, "units": "mm^2/s"},
        "adc_min": {"value": 5e-4, "units": "mm^2/s"},
        "packing": 0.7405,
        "cell_radius": {"value": 10, "units": "um"},
        "repeatability_cv": 0.05,
        "voxel_cv": 0.05,
        "visible_fraction": 0.15,
    },
    "volumes": {"cv": 0.2, "floor": {"value": 0.05, "units": "cm^3"}},
    "visits": [
        {
            "day": 0,
            "adc": {"file": "v1_adc.nii.gz", "units": "mm^2/s"},
            "region": {"file": "v1_region.nii.gz"},
            "volume": {"value": 12.3, "units": "cm^3"},
            "longest_diameter": {"value": 31, "units": "mm"},
            "drug_map": {"file": "v1_drug.nii.gz", "units": "1"},
            "acquisition": {
                "vendor": "A",
                "field_strength": {"value": 3, "units": "T"},
                "institution": "B",
                "sequence": "C",
            },
        },
        {"date": "2024-03-22T14:30"},
    ],
    "treatments": [
        {
            "kind": "chemotherapy",
            "agent": "paclitaxel",
            "day": 1.0,
            "dose": {"value": 80, "units": "mg/m^2"},
            "status": "planned",
        },
        {"kind": "radiotherapy", "day": 2, "dose": {"value": 2, "units": "Gy"}},
        {"kind": "ongoing", "agent": "trastuzumab", "day": 3, "status": "given"},
    ],
    "clinical": {"age": 51, "menopausal_state": "post", "hr": True, "her2": False, "grade": 3, "breast_density": "c"},
    "outcome": {"pcr": True, "rcb_class": "II", "event_free_days": 900, "event": False},
    "notes": ["drawn by two readers"],
}
COHORT = {"schema": "tumorcast/cohort/v1", "name": "c", "patients": ["P1", "P2"], "splits": {"train": ["P1"]}}
OUTCOME = {"schema": "tumorcast/outcome/v1", "pcr": False, "survival_days": 12.5, "death": True}
EXAMPLES = {"patient": PATIENT, "cohort": COHORT, "outcome": OUTCOME}


def at(data, path):
    for step in path:
        data = data[step]
    return data


def put(*path, value):
    def change(data):
        at(data, path[:-1])[path[-1]] = value

    return change


def drop(*path):
    def change(data):
        del at(data, path[:-1])[path[-1]]

    return change


def changed(change, name="patient"):
    data = copy.deepcopy(EXAMPLES[name])
    change(data)
    return data


def test_schemas_are_those_of_the_code():
    assert set(json_schemas()) <= set(data_schemas.names())
    for name, text in json_schemas().items():
        kept = (data_schemas.folder() / f"{name}.schema.json").read_text(encoding="utf-8")
        assert kept == text, "run 'python -m biomodel.schema'"
        assert data_schemas.load(name) == json.loads(text)


def test_command_writes_and_checks(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data_schemas, "folder", lambda version="v1": tmp_path)
    assert main(["--check"]) == 1 and "out of date" in capsys.readouterr().out
    assert main([]) == 0 and main(["--check"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{name}.schema.json" for name in sorted(MODELS)]


def test_command_from_the_shell():
    done = subprocess.run([sys.executable, "-m", "biomodel.schema", "--check"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_loader():
    with pytest.raises(KeyError, match="no schema 'x' in version v1; there are: cohort, outcome"):
        data_schemas.load("x")


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_pass_both(name):
    schema = data_schemas.load(name)
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(EXAMPLES[name], schema, cls=jsonschema.Draft202012Validator)
    validate(MODELS[name], EXAMPLES[name], f"{name}.json")


BAD = [
    (drop("schema"), InputError, "field 'schema' is missing; expected 'tumorcast/patient/v1'. Add it."),
    (put("schema", value="v2"), InputError, "schema: found \"v2\"; expected 'tumorcast/patient/v1'"),
    (put("visit", value=3), InputError, "unknown field 'visit'; expected schema, id, organ"),
    (
        put("visits", 0, "adc", "unit", value="mm"),
        InputError,
        "visit 1, adc: unknown field 'unit'; expected file, units.",
    ),
    (drop("visits", 0, "adc", "units"), UnitError, "visit 1, adc: units are missing. Set 'units' in the manifest"),
    (
        put("cellularity", "adc_w", value=3e-3),
        UnitError,
        "cellularity, adc_w: found 0.003; expected an object with 'value', 'units'. Set 'units'",
    ),
    (
        drop("cellularity", "adc_min"),
        InputError,
        "cellularity: field 'adc_min' is missing; expected an object with 'value', 'units'. Add it.",
    ),
    (put("treatments", 0, "dose", value=80), UnitError, "treatment 1, dose: found 80; expected an object"),
    (
        put("treatments", 0, "dose", "value", value="80"),
        InputError,
        'treatment 1, dose, value: found "80"; expected a number',
    ),
    (
        put("treatments", 0, "kind", value="chemo"),
        InputError,
        "treatment 1: kind \"chemo\"; expected kind 'chemotherapy'",
    ),
    (drop("treatments", 0, "kind"), InputError, "treatment 1: no 'kind'; expected kind 'chemotherapy'"),
    (
        put("treatments", 0, "status", value="gven"),
        InputError,
        "treatment 1, status: found \"gven\"; expected 'given' or",
    ),
    (
        put("treatments", 0, "agent", value="a b"),
        InputError,
        'treatment 1, agent: found "a b"; expected a name without',
    ),
    (drop("treatments", 0, "agent"), InputError, "treatment 1: field 'agent' is missing"),
    (put("treatments", 1, "agent", value="x"), InputError, "treatment 2: unknown field 'agent'"),
    (drop("visits", 0, "day"), InputError, "visit 1: neither of 'day' and 'date'; expected one of them"),
    (
        put("visits", 0, "date", value="2024-03-01"),
        InputError,
        "visit 1: both of 'day' and 'date'; expected one of them",
    ),
    (put("visits", value=[]), InputError, "visits: found []; expected at least one entry"),
    (put("visits", 0, value=3), InputError, "visit 1: found 3; expected an object with 'day', 'date', 'adc'"),
    (put("visits", 1, "date", value="22.3.2024"), InputError, 'visit 2, date: found "22.3.2024"; expected an ISO date'),
    (put("visits", 1, "date", value="2024-03-22T10:00+02:00"), InputError, "expected an ISO date like 2024-03-01"),
    (put("grid", value="mask.nii"), InputError, "grid: found \"mask.nii\"; expected an object with 'mask', 'tissues'"),
    (put("grid", "tissues", "a b", value="x.nii"), InputError, "expected names of letters, digits and underscores"),
    (put("clinical", "hr", value=1), InputError, "clinical, hr: found 1; expected true or false"),
    (put("clinical", "grade", value=7), InputError, "clinical, grade: found 7; expected less than or equal to 4"),
    (
        put("clinical", "breast_density", value="D"),
        InputError,
        "clinical, breast_density: found \"D\"; expected 'a', 'b'",
    ),
    (put("clinical", "patient_name", value="x"), InputError, "clinical: unknown field 'patient_name'"),
    (put("outcome", "pCR", value=True), InputError, "outcome: unknown field 'pCR'; expected schema, pcr"),
    (put("id", value=14), InputError, "id: found 14; expected text in quotes"),
    (put("notes", value="x"), InputError, 'notes: found "x"; expected a list in square brackets'),
]


@pytest.mark.parametrize(("change", "kind", "message"), BAD)
def test_both_refuse_and_the_message_helps(change, kind, message):
    data = changed(change)
    assert not jsonschema.Draft202012Validator(data_schemas.load("patient")).is_valid(data)
    with pytest.raises(InputError) as caught:
        validate(MODELS["patient"], data, "patient.json")
    assert type(caught.value) is kind
    text = str(caught.value)
    assert text.startswith(f"patient.json: {message}") or message in text
    assert len(text.splitlines()) == 1 and text[-1] in ".?" and "pydantic" not in text


def test_infinite_numbers_are_refused():
    data = changed(put("visits", 0, "day", value=float("inf")))
    with pytest.raises(InputError, match="visit 1, day: found Infinity; expected a finite number"):
        validate(MODELS["patient"], data, "patient.json")


def test_models_are_frozen():
    manifest = validate(MODELS["patient"], PATIENT, "patient.json")
    with pytest.raises(ValidationError):
        manifest.id = "x"
