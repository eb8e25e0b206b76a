"""Many patients: a folder of patient folders, and how they are split."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from biomodel.errors import InputError, TumorcastError
from biomodel.frozen import FrozenDict
from biomodel.manifest import load_json, validate
from biomodel.patient import Patient
from biomodel.schema import CohortManifest

__all__ = ["Cohort"]


@dataclass(frozen=True)
class Cohort:
    """Patients that lie in folders, read one at a time.

    Parameters
    ----------
    name
        Of the cohort.
    folder
        In which the patient folders lie.
    members
        Patient folders, relative to `folder`.
    splits
        Disjoint parts of the members, by name.
    description
        Free text.

    Raises
    ------
    InputError
        If a member is listed twice, or a split holds something that is no member or is in another split, too.

    Examples
    --------
    Read patient after patient; only one is in memory::

        for patient in Cohort.read("cohort"):
            print(patient.id, len(patient.visits))
    """

    name: str
    folder: Path
    members: tuple[str, ...]
    splits: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    description: str = ""

    def __post_init__(self) -> None:
        where = f"cohort {self.name}"
        seen: dict[str, str] = {}
        for member in self.members:
            # "P1" and "./P1/" are the same folder.
            plain = os.path.normpath(member)
            if plain in seen:
                raise InputError(f"{where}: patient '{member}' is listed twice; expected each once. Remove one entry.")
            seen[plain] = member
        part_of: dict[str, str] = {}
        for part, members in self.splits.items():
            for member in members:
                if member not in self.members:
                    raise InputError(
                        f"{where}: split '{part}' names '{member}', which is not among the patients. Correct the name, "
                        "or add it to 'patients'."
                    )
                if member in part_of:
                    raise InputError(
                        f"{where}: patient '{member}' is in the splits '{part_of[member]}' and '{part}'; expected one. "
                        "Splits must not share patients, or what is tested was seen in training."
                    )
                part_of[member] = part
        object.__setattr__(self, "members", tuple(self.members))
        object.__setattr__(self, "splits", FrozenDict({part: tuple(members) for part, members in self.splits.items()}))

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Cohort:
        """Read ``cohort.json``, or take every patient folder directly inside a folder without one, by name.

        Parameters
        ----------
        path
            The manifest or the folder.

        Raises
        ------
        InputError
            If the manifest cannot be used, or a folder that it lists holds no patient.
        """
        path = Path(path)
        if path.is_dir() and not (path / "cohort.json").is_file():
            members = tuple(sorted(found.parent.name for found in path.glob("*/patient.json")))
            if not members:
                raise InputError(
                    f"{path}: no cohort.json and no patient folders in it; expected one of them. Give the folder that "
                    "holds the patients."
                )
            return cls(name=path.resolve().name, folder=path, members=members)
        manifest_path = path / "cohort.json" if path.is_dir() else path
        if not manifest_path.is_file():
            raise InputError(f"{path}: does not exist; expected cohort.json or its folder. Check the path.")
        manifest = validate(CohortManifest, load_json(manifest_path), manifest_path.name)
        folder = manifest_path.parent
        missing = [member for member in manifest.patients if not (folder / member / "patient.json").is_file()]
        if missing:
            more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
            raise InputError(
                f"{manifest_path.name}: no patient.json in {', '.join(missing[:5])}{more}; expected a patient folder "
                "for each entry of 'patients'. Correct the list."
            )
        return cls(
            name=manifest.name,
            folder=folder,
            members=tuple(manifest.patients),
            splits={part: tuple(members) for part, members in manifest.splits.items()},
            description=manifest.description or "",
        )

    def split(self, part: str) -> Cohort:
        """Return the cohort of one split.

        Raises
        ------
        InputError
            If there is no such split.
        """
        if part not in self.splits:
            held = ", ".join(self.splits) or "none"
            raise InputError(f"cohort {self.name}: no split '{part}'; it has {held}.")
        return Cohort(name=f"{self.name}, {part}", folder=self.folder, members=self.splits[part])

    def patient(self, member: str) -> Patient:
        """Read one patient.

        Raises
        ------
        InputError
            If it is no member or cannot be read; the message names the folder.
        """
        if member not in self.members:
            raise InputError(f"cohort {self.name}: no patient '{member}' among its {len(self)}. Check the name.")
        try:
            return Patient.read(self.folder / member)
        except TumorcastError as error:
            raise type(error)(f"{member}/{error}") from None

    def __len__(self) -> int:
        return len(self.members)

    def __iter__(self) -> Iterator[Patient]:
        for member in self.members:
            yield self.patient(member)
