"""What every solver gives: a built simulation, and the context that terms see."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from biomodel.domain import Domain
from biomodel.errors import SolverError
from biomodel.models import ReactionDiffusion


class Context(SimpleNamespace):
    """What a term reads as `c`: attributes set by the solver; an undeclared one gives a clear error."""

    def __getattr__(self, name: str):
        raise SolverError(
            f"a term reads c.{name}, which this solver does not provide here; declare fields in the term's `fields` "
            "and put them on the domain's tissues or pass them to `build(..., fields=...)`."
        )


def check_fields(model: ReactionDiffusion, available) -> None:
    """Raise where a term declares a spatial field that is not available."""
    missing = [f for f in model.fields if f not in available]
    if missing:
        raise SolverError(
            f"{model.label}: needs the field {', '.join(missing)}, but the domain has "
            f"{', '.join(available) or 'none'}; add it to the domain's tissues or to the patient's visits."
        )


def coordinate_fields(domain: Domain) -> dict[str, np.ndarray]:
    """The place of each voxel's centre as fields ``x``, ``y`` and ``z`` (z, y, x), mm; every solver gives them.

    They are `Domain.coords`: distances along the grid's own axes.
    """
    z, y, x = np.meshgrid(*(domain.coords[a] for a in "zyx"), indexing="ij")
    return {"x": x, "y": y, "z": z}
