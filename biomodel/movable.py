"""A kill whose doses can be moved and resized: the day and the amount of each are parameters of the term.

Solvers give derivatives by parameters, so with this term they give those by dose days and amounts, without knowing of
it: every movable dose becomes an agent of its own, with one dose of one reference dose, which the term moves and
scales. What the wrapped term makes of levels and exposures stays its own affair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace

from biomodel.errors import ModelError
from biomodel.models import ReactionDiffusion
from biomodel.parameters import Fixed, Operand, Parameter
from biomodel.schedule import Dose, Schedule
from biomodel.treatments import Kill, Treatment

__all__ = ["Movable", "with_movable"]


@dataclass(frozen=True)
class Movable(Kill):
    """A kill with movable doses.

    Parameters
    ----------
    term : Kill
        The treatment itself; its parameters keep their names.
    doses : tuple of (str, str)
        Agent of each movable dose, and the name under which it stands in the schedule. Its parameters are
        ``amount_<name>`` (in reference doses) and ``delay_<name>`` (days after the day in the schedule).

    Notes
    -----
    Derivatives by a delay are exact where the delay is 0: the solver's breakpoints lie on the days in the schedule.
    """

    term: Kill
    doses: tuple[tuple[str, str], ...]

    def __post_init__(self):
        strange = sorted({a for a, _ in self.doses} - set(self.term.agents))
        if strange:
            raise ModelError(f"Movable: {self.term.name} has no agent {', '.join(strange)}.")

    @property
    def name(self) -> str:
        return self.term.name

    @property
    def continuing(self) -> bool:  # type: ignore[override]
        return self.term.continuing

    @property
    def map(self) -> str | None:  # type: ignore[override]
        return self.term.map

    @property
    def agents(self) -> tuple[str, ...]:
        return (*self.term.agents, *(name for _, name in self.doses))

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        own: list[Parameter] = []
        for _, name in self.doses:
            own.append(Parameter(f"amount_{name}", "1", Fixed(1.0), (0.0, 1e3), "", "reference doses"))
            own.append(Parameter(f"delay_{name}", "day", Fixed(0.0), (-1e3, 1e3), "", "moved by"))
        return (*self.term.parameters, *own)

    def _base(self, agent: str) -> str | None:
        return next((base for base, name in self.doses if name == agent), None)

    def relative_amount(self, amount: float, units: str, agent: str) -> float:
        return amount if self._base(agent) else self.term.relative_amount(amount, units, agent)

    def kinetics(self, elapsed, p, ops, agent) -> tuple[Operand, Operand]:
        base = self._base(agent)
        if base is None:
            return self.term.kinetics(elapsed, p, ops, agent)
        level, exposure = self.term.kinetics(elapsed - p[f"delay_{agent}"], p, ops, base)
        return p[f"amount_{agent}"] * level, p[f"amount_{agent}"] * exposure

    def _folded(self, c) -> SimpleNamespace:
        """The context as the wrapped term knows it: what a movable dose does counts for its agent."""
        level, exposure = ({a: values[a] for a in self.term.agents} for values in (c.level, c.exposure))
        for base, name in self.doses:
            level[base] = level[base] + c.level[name]
            exposure[base] = exposure[base] + c.exposure[name]
        return SimpleNamespace(level=level, exposure=exposure, map=c.map)

    def rate(self, u, p, c, ops) -> Operand:
        return self.term.rate(u, p, self._folded(c), ops)

    def cumulative(self, p, c, ops) -> Operand:
        return self.term.cumulative(p, self._folded(c), ops)


def with_movable(
    model: ReactionDiffusion, fixed: Schedule, doses: Sequence[Dose]
) -> tuple[ReactionDiffusion, Schedule, tuple[str, ...]]:
    """Make doses movable.

    Parameters
    ----------
    model : ReactionDiffusion
    fixed : Schedule
        What stays as it is.
    doses : sequence of Dose
        What may be moved; each stands in the schedule returned on its own day.

    Returns
    -------
    model : ReactionDiffusion
        With `Movable` terms.
    schedule : Schedule
        The fixed part with one reference dose for each movable one.
    prefixes : tuple of str
        For each dose: its parameters are ``prefix.format("amount")`` and ``prefix.format("delay")``.
    """
    terms: list[Treatment] = []
    added: list[Dose] = []
    prefixes = [""] * len(doses)
    for term in model.treatments:
        mine = [n for n, dose in enumerate(doses) if isinstance(term, Kill) and dose.agent in term.agents]
        if not mine or not isinstance(term, Kill):
            terms.append(term)
            continue
        names = {n: f"{doses[n].agent}:{n + 1}" for n in mine}
        terms.append(Movable(term, tuple((doses[n].agent, names[n]) for n in mine)))
        for n in mine:
            added.append(Dose(doses[n].day, names[n], 1.0, "1", "planned"))
            prefixes[n] = f"{term.name}.{{}}_{names[n]}"
    missing = sorted({dose.agent for dose, prefix in zip(doses, prefixes, strict=True) if not prefix})
    if missing:
        raise ModelError(f"the model has no term for {', '.join(missing)}; add bm.Chemotherapy(...) to its treatments.")
    return replace(model, treatments=terms), Schedule(doses=tuple(added)) + fixed, tuple(prefixes)
