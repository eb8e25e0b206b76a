"""The reaction half of a step: growth and treatment, pointwise, exact across doses where a closed form exists."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from biomodel.models import ReactionDiffusion
from biomodel.schedule import Schedule
from biomodel.solvers.base import Context
from biomodel.solvers.plan import RESOLUTION, TimePlan
from biomodel.terms import Flow
from biomodel.treatments import Jump, Kill

#: Gauss-Legendre nodes on each piece between breakpoints. The integrand is smooth there; 8 nodes leave an error below
#: 1e-9 for a piece of eight effect half-lives.
NODES = 8
#: Largest rate times step of one classical Runge-Kutta step, for growth laws without closed form.
RK4_STEP = 0.25


class TorchOps:
    """The primitive functions of terms on torch tensors (floats pass through torch as well)."""

    @staticmethod
    def _tensor(x):
        return x if isinstance(x, torch.Tensor) else torch.as_tensor(x, dtype=torch.float64)

    @classmethod
    def exp(cls, x):
        return torch.exp(cls._tensor(x))

    @classmethod
    def log(cls, x):
        return torch.log(cls._tensor(x))

    @classmethod
    def sqrt(cls, x):
        return torch.sqrt(cls._tensor(x))

    @classmethod
    def where(cls, condition, x, y):
        return torch.where(torch.as_tensor(condition), cls._tensor(x), cls._tensor(y))

    @staticmethod
    def xlogx(u):
        """u log u, continued by 0 for u <= 0 with a finite slope."""
        positive = u > 0
        return torch.where(positive, u * torch.log(torch.where(positive, u, torch.ones_like(u))), torch.zeros_like(u))


def _bernoulli(u, a, b):
    return a * u / (1 + b * u)


def _power(u, a, b):
    positive = u > 0
    safe = torch.where(positive, u, torch.ones_like(u))
    return torch.where(positive, torch.exp(a * torch.log(safe) + b), u * torch.exp(b))


FLOWS = {Flow.BERNOULLI: _bernoulli, Flow.POWER: _power}


def _events(term, agent: str, schedule: Schedule) -> list[tuple[float, float]]:
    """Days and relative amounts of one agent, or of the fractions."""
    if isinstance(term, Jump):
        return [(f.day, f.gray) for f in schedule.fractions]
    doses = [(d.day, term.relative_amount(d.amount, d.units, agent)) for d in schedule.doses if d.agent == agent]
    return doses + [(o.start_day, 1.0) for o in schedule.ongoing if o.agent == agent]


def _table(events: list[list[tuple[float, float]]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ragged rows of (day, amount) as two arrays; what is padded never comes."""
    width = max(len(e) for e in events)
    days, amounts = np.full((len(events), width), np.inf), np.zeros((len(events), width))
    for row, here in enumerate(events):
        if here:
            days[row, : len(here)], amounts[row, : len(here)] = zip(*here, strict=True)
    return torch.tensor(days), torch.tensor(amounts)


class Course:
    """Levels, exposures and kill exponents of all treatments along a time plan.

    Parameters of shape (batch,) or (1,) go in. With spatial fields among them, of shape (batch or 1, z, y, x), one
    step is evaluated at a time.
    """

    def __init__(self, model: ReactionDiffusion, schedules: Sequence[Schedule], plan: TimePlan):
        self.model, self.plan = model, plan
        x, w = (v[:, None, None] for v in np.polynomial.legendre.leggauss(NODES))
        self.nodes = torch.tensor(plan.start + plan.length * (x + 1) / 2)  # (q, rows, m)
        self.weights = torch.tensor(plan.length * w / 2)
        self.since = self.nodes - torch.tensor(np.take_along_axis(plan.edges, plan.step, 1))
        self.rest = torch.tensor(np.take_along_axis(plan.edges, plan.step + 1, 1)) - self.nodes
        self.step = torch.tensor(plan.step)
        self.edges = torch.tensor(plan.edges)
        # Days and amounts (rows, n) of each agent of a kill, or of the fractions of a jump.
        self.doses: dict[tuple[str, str], tuple[torch.Tensor, torch.Tensor]] = {}
        for term in model.treatments:
            for agent in term.agents if isinstance(term, Kill) else ("",):
                self.doses[term.name, agent] = _table([_events(term, agent, s) for s in schedules])
        self.active = [t for t in model.treatments
                       if any(self.doses[key][0].shape[1] for key in self.doses if key[0] == t.name)]  # fmt: skip

    def state(self, term: Kill, p: dict, t: torch.Tensor) -> tuple[dict, dict]:
        """Level and exposure of each agent at days `t` (..., rows, m); a dose at exactly t is still to come.

        Parameters of shape (batch,) give results of shape (..., batch, m).
        """
        p = {k: v[:, None, None] for k, v in p.items()}
        levels, exposures = {}, {}
        for agent in term.agents:
            days, amounts = self.doses[term.name, agent]
            elapsed = t[..., None] - days[:, None, :]
            past = elapsed > RESOLUTION
            level, exposure = term.kinetics(torch.where(past, elapsed, 0.0), p, TorchOps, agent)
            amount = amounts[:, None, :] * past
            levels[agent], exposures[agent] = (level * amount).sum(-1), (exposure * amount).sum(-1)
        return levels, exposures

    def _jumps(self, term: Jump, p: dict, t: torch.Tensor) -> torch.Tensor:
        """Minus the log survival of all fractions before `t` (..., rows, m)."""
        days, gray = self.doses[term.name, ""]
        survival = term.survival({k: v[:, None, None] for k, v in p.items()}, Context(dose=gray[:, None, :]), TorchOps)
        return torch.where(t[..., None] - days[:, None, :] > RESOLUTION, -torch.log(survival), 0.0).sum(-1)

    def exponent(self, values: dict, t: torch.Tensor, maps: dict | None = None) -> torch.Tensor:
        """Kill exponent accumulated until days `t` (..., rows, m).

        Drugs reach all places alike unless `maps` gives their fields, which broadcast against `t`.
        """
        total = torch.zeros_like(t)
        for term in self.active:
            p = self.model.of(term, values)
            if isinstance(term, Jump):
                total = total + self._jumps(term, p, t)
            else:
                assert isinstance(term, Kill)
                level, exposure = self.state(term, p, t)
                drug = maps[term.map] if maps and term.map else 1.0
                c = Context(level=level, exposure=exposure, map=drug)
                total = total + term.cumulative({k: v[:, None] for k, v in p.items()}, c, TorchOps)
        return total

    def coefficients(self, values: dict) -> tuple[torch.Tensor, torch.Tensor]:
        """Coefficients of the closed-form flow for every step, each (batch, n); all values are scalars (batch,)."""
        n = self.plan.steps
        at_edges = self.exponent(values, self.edges)
        rows = at_edges.shape[0]
        step = self.step.expand(rows, -1)

        def integral(function):
            # Only laws that need it pay for the nodes inside the steps.
            inside = self.exponent(values, self.nodes) - torch.take_along_dim(at_edges, step, 1)
            pieces = (function(self.since, self.rest, inside) * self.weights).sum(0)
            index = self.step.expand(pieces.shape[0], -1)
            return torch.zeros(pieces.shape[0], n, dtype=torch.float64).scatter_add(1, index, pieces)

        c = Context(dt=self.edges[:, 1:] - self.edges[:, :-1], kill=at_edges[:, 1:] - at_edges[:, :-1],
                    integral=integral)  # fmt: skip
        p = {k: v[:, None] for k, v in self.model.of(self.model.growth, values).items()}
        a, b = self.model.growth.flow_coefficients(p, c, TorchOps)
        batch = max(a.shape[0], b.shape[0])
        return a.expand(batch, n), b.expand(batch, n)

    # The same, one step at a time, where some values or drug maps are fields (batch or 1, z, y, x).

    def _pieces(self, i: int):
        """Pieces of step i: (index, rows that take part)."""
        for m in np.flatnonzero((self.plan.step == i).any(0) & (self.plan.length > 0).any(0)):
            yield m, torch.tensor((self.plan.step[:, m] == i) & (self.plan.length[:, m] > 0))

    def _field_exponent(self, values: dict, maps: dict, t: torch.Tensor) -> torch.Tensor:
        """Kill exponent accumulated until day t (rows,); broadcasts to (batch, z, y, x)."""
        total = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
        for term in self.active:
            p = self.model.of(term, values)
            if isinstance(term, Jump):
                total = total + _spread(self._jumps(term, p, t[:, None])[:, 0])
            else:
                assert isinstance(term, Kill)
                c = self._contexts(term, p, maps, t[:, None])[0]
                total = total + term.cumulative({k: _spread(v) for k, v in p.items()}, c, TorchOps)
        return total

    def _contexts(self, term: Kill, p: dict, maps: dict, t: torch.Tensor) -> list[Context]:
        """What the term reads at each of the days t (rows, m)."""
        level, exposure = self.state(term, {k: v for k, v in p.items() if v.ndim == 1}, t)
        drug = maps[term.map] if term.map else 1.0
        return [
            Context(level={a: _spread(x[:, j]) for a, x in level.items()},
                    exposure={a: _spread(x[:, j]) for a, x in exposure.items()}, map=drug)
            for j in range(t.shape[1])
        ]  # fmt: skip

    def field_coefficients(self, i: int, values: dict, maps: dict) -> tuple[torch.Tensor, torch.Tensor]:
        """Closed-form coefficients of step i as fields."""
        first = self._field_exponent(values, maps, self.edges[:, i])
        last = self._field_exponent(values, maps, self.edges[:, i + 1])

        def integral(function):
            total = 0.0
            for m, rows in self._pieces(i):
                for q in range(NODES):
                    inside = self._field_exponent(values, maps, self.nodes[q, :, m]) - first
                    weight = _spread(self.weights[q, :, m] * rows)
                    total = total + weight * function(_spread(self.since[q, :, m]), _spread(self.rest[q, :, m]), inside)
            return total

        c = Context(dt=_spread(self.edges[:, i + 1] - self.edges[:, i]), kill=last - first, integral=integral)
        p = {k: _spread(v) for k, v in self.model.of(self.model.growth, values).items()}
        return self.model.growth.flow_coefficients(p, c, TorchOps)

    def integrate(self, i: int, u: torch.Tensor, values: dict, maps: dict, fields: dict) -> torch.Tensor:
        """Step i of growth and kill by classical Runge-Kutta, from breakpoint to breakpoint.

        `maps` are the fields that scale drugs, `fields` those that the growth reads.
        """
        read = Context(**fields)
        growth, p = self.model.growth, {k: _spread(v) for k, v in self.model.of(self.model.growth, values).items()}
        kills = [(t, self.model.of(t, values)) for t in self.active if isinstance(t, Kill)]
        with torch.no_grad():
            probe = torch.tensor([0.01, 0.25, 0.5, 1.0], dtype=torch.float64).reshape(-1, 1, 1, 1, 1)
            fastest = float((growth.rate(probe, p, read, TorchOps) / probe).abs().max())
        for m, rows in self._pieces(i):
            begin, length = torch.tensor(self.plan.start[:, m]), torch.tensor(self.plan.length[:, m]) * rows
            after = begin + 10 * RESOLUTION  # right after a dose or fraction at the piece's beginning
            for term in self.active:
                if isinstance(term, Jump):
                    own = self.model.of(term, values)
                    now = self._jumps(term, own, after[:, None]) - self._jumps(term, own, begin[:, None])
                    u = u * _spread(torch.exp(-now[:, 0] * rows)).to(u.dtype)
            with torch.no_grad():
                hazard = sum(
                    float(self._hazard(t, own, u, self._contexts(t, own, maps, after[:, None])[0]).abs().max())
                    for t, own in kills
                )
            count = max(1, int(np.ceil(float(length.max()) * (fastest + hazard) / RK4_STEP)))
            days = begin[:, None] + length[:, None] * torch.linspace(0, 1, 2 * count + 1, dtype=torch.float64)
            days = torch.cat((after[:, None], days[:, 1:]), 1)
            contexts = [self._contexts(t, own, maps, days) for t, own in kills]

            def slope(v, j, contexts=contexts):
                loss = sum(self._hazard(t, own, v, c[j]) for (t, own), c in zip(kills, contexts, strict=True))
                return (growth.rate(v, p, read, TorchOps) - loss * v).to(v.dtype)

            h = _spread(length / count).to(u.dtype)
            for j in range(0, 2 * count, 2):
                k1 = slope(u, j)
                k2 = slope(u + h / 2 * k1, j + 1)
                k3 = slope(u + h / 2 * k2, j + 1)
                k4 = slope(u + h * k3, j + 2)
                u = u + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return u

    @staticmethod
    def _hazard(term: Kill, own: dict, u: torch.Tensor, c: Context) -> torch.Tensor:
        return term.rate(u, {k: _spread(v) for k, v in own.items()}, c, TorchOps)


def _spread(value: torch.Tensor) -> torch.Tensor:
    """(batch,) to (batch, 1, 1, 1); fields stay as they are."""
    return value.reshape(-1, 1, 1, 1) if value.ndim <= 1 else value
