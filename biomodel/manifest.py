"""Reading the JSON manifests, with errors that name the field, what was found and what is allowed."""

from __future__ import annotations

import difflib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from biomodel.errors import InputError, UnitError
from biomodel.schema import Outcome, PatientManifest, Strict

__all__ = ["find_manifest", "load_json", "load_outcome", "load_patient", "problems", "validate"]

Model = TypeVar("Model", bound=Strict)

#: More than this many problems would not fit on a screen.
SHOWN = 8


def find_manifest(path: str | os.PathLike[str], name: str = "patient.json") -> Path:
    """Return the path of a manifest, given it or its folder.

    Raises
    ------
    InputError
        If there is none.
    """
    path = Path(path)
    if path.is_dir():
        path = path / name
        if not path.is_file():
            raise InputError(
                f"{path.parent}: no {name} in this folder; expected a manifest. Give the folder that holds it."
            )
    elif not path.is_file():
        raise InputError(f"{path}: does not exist; expected {name} or the folder that holds it. Check the path.")
    return path


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for key, value in pairs:
        if key in seen:
            raise ValueError(f"field '{key}' appears twice in one object")
        seen[key] = value
    return seen


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def load_json(path: Path) -> object:
    """Read a JSON file.

    Raises
    ------
    InputError
        If it cannot be read or is no JSON.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path.name}: is not UTF-8 text ({error.reason}); expected JSON. Save it as UTF-8.") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}). Check its permissions.") from None
    try:
        return json.loads(text, object_pairs_hook=_no_repeats, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path.name}: line {error.lineno}, column {error.colno}: {error.msg}; expected JSON. Correct it there."
        ) from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path.name}: {error}; expected plain JSON. Correct it there.") from None


def load_patient(path: Path) -> PatientManifest:
    """Read and check ``patient.json``.

    Raises
    ------
    InputError, UnitError
        With every problem, one per line.
    """
    return validate(PatientManifest, load_json(path), path.name)


def load_outcome(manifest: PatientManifest, folder: Path, name: str) -> Outcome | None:
    """Return the outcome, from the manifest or from ``outcome.json`` beside it.

    Raises
    ------
    InputError
        If both are there, or the file cannot be used.
    """
    beside = folder / "outcome.json"
    if not beside.is_file():
        return manifest.outcome
    if manifest.outcome is not None:
        raise InputError(f"{name}: has an 'outcome', and so has outcome.json beside it; expected one. Remove one.")
    return validate(Outcome, load_json(beside), beside.name)


def validate(model: type[Model], data: object, name: str) -> Model:
    """Return `data` as `model`.

    Raises
    ------
    UnitError
        If the first problem is a missing unit.
    InputError
        With every problem, one per line.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        lines = problems(error, model, name)
        kind = UnitError if any("units are never guessed" in line for line in lines) else InputError
        more = [f"… and {len(lines) - SHOWN} more."] if len(lines) > SHOWN else []
        raise kind("\n".join(lines[:SHOWN] + more)) from None


def problems(error: ValidationError, model: type[BaseModel], name: str) -> list[str]:
    """Return one line for each problem: where, what was found, what is expected and how to mend it."""
    return [_line(detail, model, name) for detail in error.errors(include_url=False)]


def _line(detail: ErrorDetails, model: type[BaseModel], name: str) -> str:
    spot = _follow(detail["loc"], model)
    kind = detail["type"]
    inside = ", ".join(spot.words[:-1])
    where = f"{name}: {inside}" if inside else name
    if kind == "extra_forbidden":
        allowed = _names(spot.owner)
        close = difflib.get_close_matches(spot.field, allowed, n=1)
        return f"{where}: unknown field '{spot.field}'; expected {', '.join(allowed)}.{_suggest(close, 'Remove it.')}"
    if kind == "missing":
        if spot.field == "units":
            return f"{where}: units are missing. Set 'units' in the manifest; units are never guessed."
        return f"{where}: field '{spot.field}' is missing; expected {_meaning(spot)}. Add it."
    where = f"{name}: {', '.join(spot.words)}" if spot.words else name
    found = _short(detail.get("input"))
    if kind == "model_type":
        allowed = _names(spot.inner or spot.owner)
        remedy = "Set 'units' in the manifest; units are never guessed." if "units" in allowed else "Correct it."
        return f"{where}: found {found}; expected an object with {', '.join(map(repr, allowed))}. {remedy}"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        entry = detail.get("input")
        found = f"kind {_short(entry['kind'])}" if isinstance(entry, dict) and "kind" in entry else "no 'kind'"
        return f"{where}: {found}; expected kind 'chemotherapy', 'radiotherapy' or 'ongoing'. Correct it."
    if kind == "string_pattern_mismatch" and spot.field in _PATTERNS:
        return f"{where}: found {found}; expected {_PATTERNS[spot.field]}. Correct it."
    if kind == "value_error":
        return f"{where}: {detail['msg'].removeprefix('Value error, ')}. Correct it."
    expected = _EXPECTED.get(kind) or detail["msg"].removeprefix("Input should be ").removeprefix("a valid ")
    close = []
    if kind == "literal_error" and isinstance(detail.get("input"), str):
        close = difflib.get_close_matches(str(detail["input"]), re.findall(r"'([^']*)'", expected), n=1)
    return f"{where}: found {found}; expected {expected}.{_suggest(close, 'Correct it.')}"


_PATTERNS = {
    "date": "an ISO date like 2024-03-01 or 2024-03-01T14:30, local time",
    "baseline": "an ISO date like 2024-03-01, local time",
    "agent": "a name without blanks and dots, like nab-paclitaxel",
    "tissues": "names of letters, digits and underscores",
}


_EXPECTED = {
    "bool_type": "true or false",
    "string_type": "text in quotes",
    "float_type": "a number without quotes",
    "int_type": "a whole number without quotes",
    "too_short": "at least one entry",
    "string_too_short": "some text",
    "list_type": "a list in square brackets",
    "dict_type": "an object in braces",
    "finite_number": "a finite number",
}


def _suggest(close: list[str], otherwise: str) -> str:
    return f" Did you mean '{close[0]}'?" if close else f" {otherwise}"


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "…"


def _names(model: type[BaseModel]) -> list[str]:
    return [info.alias or name for name, info in model.model_fields.items()]


def _meaning(spot: _Spot) -> str:
    info = next((info for name, info in spot.owner.model_fields.items() if (info.alias or name) == spot.field), None)
    if spot.inner is not None:
        return f"an object with {', '.join(map(repr, _names(spot.inner)))}"
    if info is not None and get_origin(info.annotation) is Literal:
        return " or ".join(map(repr, get_args(info.annotation)))
    return info.description.split(".")[0] if info is not None and info.description else "a value"


@dataclass(frozen=True)
class _Spot:
    """A place in a manifest: the words for it, the model that holds the last field, and the model of its value."""

    words: list[str]
    owner: type[BaseModel]
    field: str
    inner: type[BaseModel] | None


def _follow(loc: tuple[int | str, ...], model: type[BaseModel]) -> _Spot:
    words: list[str] = []
    owner, field = model, ""
    choices: list[type[BaseModel]] = [model]
    for step in loc:
        if isinstance(step, int):
            # "visits", 1 reads "visit 2": users count from 1.
            words.append(f"{words.pop().removesuffix('s')} {step + 1}" if words else f"entry {step + 1}")
        elif len(choices) > 1 and step in map(_tag, choices):
            choices = [choice for choice in choices if _tag(choice) == step]
        elif step == "[key]":
            continue
        else:
            words.append(step)
            if choices:
                owner, field = choices[0], step
                info = next((info for name, info in owner.model_fields.items() if (info.alias or name) == step), None)
                choices = [] if info is None else _models(info.annotation)
    return _Spot(words, owner, field, choices[0] if choices else None)


def _tag(model: type[BaseModel]) -> str | None:
    info = model.model_fields.get("kind")
    return None if info is None else get_args(info.annotation)[0]


def _models(annotation: object) -> list[type[BaseModel]]:
    """Return the models that an annotation is made of, such as those of ``list[A | B]``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models(part)]
