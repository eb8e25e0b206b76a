"""What every solver gives: a built simulation, and the context that terms see."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np

from biomodel.domain import Domain
from biomodel.errors import SolverError
from biomodel.models import ReactionDiffusion
from biomodel.schedule import Schedule

if TYPE_CHECKING:
    import torch


class Solver(Protocol):
    """Numerics: an immutable dataclass that builds simulations. This is what calibration and forecasts ask of one."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def rtol(self) -> float:
        """Relative L2 error in time that is aimed at."""

    @property
    def dtype(self) -> torch.dtype:
        """Type of the numbers with which it computes."""

    @property
    def device(self) -> str:
        """Where it computes."""

    def versions(self) -> dict[str, str]:
        """Versions of libraries that it uses beyond those of the package."""

    def build(self, model: ReactionDiffusion, domain: Domain, schedule: Schedule,
              fields: Mapping[str, np.ndarray] | None = None, start: float = 0.0) -> Built:  # fmt: skip
        """The simulation of a model on a domain under a schedule, from day `start`; `fields` are (z, y, x)."""


class Built(Protocol):
    """A built simulation. Shapes and meanings are those of :class:`biomodel.solvers.simulation.Simulation`.

    A plan is the simulation's own; it is only handed back to it.
    """

    def __call__(self, params: Mapping, u0, times, plan: Any = None) -> torch.Tensor:
        """States (batch, T, z, y, x), differentiable by parameters and initial state."""

    def plan(self, params: Mapping, u0, times) -> Any:
        """Steps for these parameters, so that the error in time stays below the solver's `rtol`."""

    def grid_error(self, params: Mapping, u0, times, plan: Any) -> torch.Tensor:
        """Change of the voxel averages (T, z, y, x) when grid or mesh are refined once."""

    def sensitivities(self, params: Mapping, u0, times, wrt: Sequence[str | None], plan: Any = None,
                      du0: torch.Tensor | None = None,
                      rows: np.ndarray | None = None) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """States and their derivatives along directions."""

    def linearise(self, params: Mapping, u0, times, plan: Any = None) -> Linearised:
        """The derivative by the initial state, for many products."""


class Linearised(Protocol):
    """The derivative J of a run's outputs by its initial state."""

    outputs: torch.Tensor

    def push(self, du0: torch.Tensor) -> torch.Tensor:
        """J du0: (directions, batch, z, y, x) to (directions, batch, T, z, y, x)."""

    def pull(self, cotangents: torch.Tensor) -> torch.Tensor:
        """Transpose of J: (directions, batch, T, z, y, x) to (directions, batch, z, y, x)."""


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
