"""Versioned JSON Schemas of the package's files, and their loader.

The schemas are generated from ``biomodel.schema`` (``python -m biomodel.schema``); other tools can read them without
installing anything but this package.
"""

from __future__ import annotations

import json
from pathlib import Path

__all__ = ["folder", "load", "names"]


def folder(version: str = "v1") -> Path:
    """Return the folder that holds the schemas of a version."""
    return Path(__file__).parent / version


def names(version: str = "v1") -> tuple[str, ...]:
    """Return the kinds of file that have a schema, in alphabetical order."""
    return tuple(sorted(path.name.removesuffix(".schema.json") for path in folder(version).glob("*.schema.json")))


def load(name: str, version: str = "v1") -> dict:
    """Return the JSON Schema of a kind of file.

    Raises
    ------
    KeyError
        If there is none of that name and version.

    Examples
    --------
    >>> load("patient")["$id"]
    'tumorcast/patient/v1'
    """
    path = folder(version) / f"{name}.schema.json"
    if not path.is_file():
        raise KeyError(f"no schema '{name}' in version {version}; there are: {', '.join(names(version)) or 'none'}")
    return json.loads(path.read_text(encoding="utf-8"))
