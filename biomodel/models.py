"""The model: growth, diffusion and treatments as one immutable object, with its parameters and priors."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType

from biomodel.errors import ModelError
from biomodel.parameters import Fixed, JointPrior, Parameter, Prior
from biomodel.schedule import Schedule
from biomodel.tables import html_table
from biomodel.terms import Auxiliary, Diffusion, Growth, Isotropic, Logistic, Term
from biomodel.treatments import Jump, Kill, Treatment


@dataclass(frozen=True)
class ReactionDiffusion:
    """Reaction-diffusion model of the tumour cell fraction u = N / theta.

    du/dt = div(D grad u) + growth(u) - sum_j kill_j u inside the mask, zero flux on its boundary, and
    u -> survival u at each radiotherapy fraction.

    Parameters
    ----------
    growth : Growth
    diffusion : Diffusion
    treatments : sequence of Kill or Jump
    priors : mapping of str to Prior or Fixed
        Overrides of the terms' own priors, by global name (``"growth.k"``, ``"paclitaxel.efficacy"``).
    joint : JointPrior, optional
        Joint Gaussian prior over some parameters, as learned from a cohort; it replaces their own priors.

    Examples
    --------
    >>> import biomodel as bm
    >>> model = bm.ReactionDiffusion(bm.Logistic(), bm.Isotropic(), [bm.Chemotherapy("paclitaxel")])
    >>> sorted(model.parameters)
    ['diffusion.D', 'growth.k', 'paclitaxel.decay', 'paclitaxel.efficacy']
    """

    growth: Growth = field(default_factory=Logistic)
    diffusion: Diffusion = field(default_factory=Isotropic)
    treatments: Sequence[Treatment] = ()
    priors: Mapping[str, Prior] = field(default_factory=dict)
    joint: JointPrior | None = None

    def __post_init__(self):
        object.__setattr__(self, "treatments", tuple(self.treatments))
        object.__setattr__(self, "priors", MappingProxyType(dict(self.priors)))
        for what, value, kind in (("growth", self.growth, Growth), ("diffusion", self.diffusion, Diffusion)):
            if not isinstance(value, kind):
                raise ModelError(f"ReactionDiffusion: {what} is {value!r}; expected an object of {kind.__name__}.")
        for term in self.treatments:
            if not isinstance(term, (Kill, Jump)):
                raise ModelError(f"ReactionDiffusion: treatment {term!r} is neither a Kill nor a Jump.")
        names = [t.name for t in self.terms]
        doubled = sorted({n for n in names if names.count(n) > 1})
        if doubled:
            raise ModelError(f"ReactionDiffusion: two terms are called {', '.join(doubled)}; give each its own name.")
        self._check_names(self.priors)
        if self.joint is not None:
            self._check_names(self.joint.names)
            known = [n for n in self.joint.names if self.parameters[n].fixed]
            if known:
                raise ModelError(f"joint prior: {', '.join(known)} is fixed and cannot have a prior.")

    def _check_names(self, names) -> None:
        for name in names:
            if name not in self.parameters:
                close = difflib.get_close_matches(name, self.parameters, 1)
                hint = f" Did you mean {close[0]!r}?" if close else ""
                raise ModelError(f"parameter {name!r} is not in this model ({', '.join(self.parameters)}).{hint}")

    @property
    def terms(self) -> tuple[Term, ...]:
        """All terms: growth, diffusion, treatments, then the equations of auxiliary fields."""
        return (self.growth, self.diffusion, *self.treatments, *(a.equation for a in self.auxiliaries))

    @property
    def auxiliaries(self) -> tuple[Auxiliary, ...]:
        """Fields that follow from the cell fraction by equations of their own, each once."""
        terms = (self.growth, self.diffusion, *self.treatments)
        return tuple(dict.fromkeys(a for term in terms for a in term.auxiliaries))

    @cached_property
    def parameters(self) -> Mapping[str, Parameter]:
        """Parameters by global name, with their priors."""
        found = {}
        for term in self.terms:
            for parameter in term.parameters:
                name = f"{term.name}.{parameter.name}"
                found[name] = replace(parameter, prior=self.priors.get(name, parameter.prior))
        return MappingProxyType(found)

    @property
    def free(self) -> tuple[str, ...]:
        """Names of the parameters that are calibrated (all that are not `Fixed`)."""
        return tuple(n for n, p in self.parameters.items() if not p.fixed)

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the spatial fields that the terms read."""
        return tuple(dict.fromkeys(f for term in self.terms for f in term.fields))

    @property
    def label(self) -> str:
        """Short description: growth × diffusion × treatments."""
        treatments = " + ".join(t.name for t in self.treatments) or "no treatment"
        return f"{type(self.growth).__name__} × {type(self.diffusion).__name__} × {treatments}"

    def of(self, term: Term, values: Mapping) -> dict:
        """The term's own parameters by short name, out of `values` by global name."""
        return {p.name: values[f"{term.name}.{p.name}"] for p in term.parameters}

    def complete(self, values: Mapping | None = None) -> dict:
        """`values` with known values and prior medians filled in; bounds are checked for numbers."""
        values = dict(values or {})
        self._check_names(values)
        for name, parameter in self.parameters.items():
            value = values.setdefault(name, parameter.typical)
            if isinstance(value, (int, float)):
                low, high = parameter.bounds
                if not (math.isfinite(value) and low <= value <= high):
                    raise ModelError(
                        f"{name} = {value!r} {parameter.units} lies outside its bounds [{low:g}, {high:g}]."
                    )
        return values

    def with_priors(self, priors: Mapping[str, Prior]) -> ReactionDiffusion:
        """The same model with other priors for some parameters, by global name."""
        return replace(self, priors={**self.priors, **priors})

    def with_joint_prior(self, joint: JointPrior) -> ReactionDiffusion:
        """The same model with a joint prior learned from a cohort."""
        return replace(self, joint=joint)

    def fix(self, values: Mapping[str, float]) -> ReactionDiffusion:
        """The same model with some parameters known."""
        return self.with_priors({name: Fixed(value) for name, value in values.items()})

    def check_schedule(self, schedule: Schedule) -> None:
        """Raise where the schedule has a therapy for which the model has no term."""
        known = {agent for t in self.treatments if isinstance(t, Kill) for agent in t.agents}
        missing = [agent for agent in schedule.agents if agent not in known]
        if missing:
            terms = ", ".join(f"bm.Chemotherapy({agent!r})" for agent in missing)
            raise ModelError(
                f"the schedule has doses of {', '.join(missing)}, but the model has no term for it; add {terms} to "
                "treatments, or drop the doses with schedule.without(agent)."
            )
        for term in self.treatments:
            if isinstance(term, Kill):
                doses = {d.agent for d in schedule.doses}.intersection(term.agents)
                ongoing = {o.agent for o in schedule.ongoing}.intersection(term.agents)
                if doses if term.continuing else ongoing:
                    have, want = ("single doses", "bm.Chemotherapy") if term.continuing else ("a course", "bm.Systemic")
                    raise ModelError(
                        f"the schedule has {have} of {', '.join(sorted(doses or ongoing))}, which "
                        f"{type(term).__name__} does not describe; use {want} "
                        "for this agent, or give the two kinds different agent names."
                    )
        if schedule.fractions and not any(isinstance(t, Jump) for t in self.treatments):
            raise ModelError("the schedule has radiotherapy, but the model has no term for it; add bm.Radiotherapy().")

    def _repr_html_(self) -> str:
        rows = [
            (name, f"{p.typical:.4g}", p.units, "known" if p.fixed else p.prior, p.description)
            for name, p in self.parameters.items()
        ]
        return html_table(("parameter", "median", "unit", "prior", "meaning"), rows, self.label)
