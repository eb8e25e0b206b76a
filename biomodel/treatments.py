"""Treatments: a continuous kill that decays after each dose, or an instantaneous survival fraction.

A `Kill` sees two numbers of each of its agents at the current time, both in units of the reference dose: the `level`
(sum over past doses of the impulse response) and the `exposure` (its integral). It gives the hazard, `rate`, and the
exact exponent accumulated since treatment began, `cumulative`; a step's kill is the difference of two such values, so
a solver may cross doses without stopping at them.
"""

from __future__ import annotations

from dataclasses import dataclass

from biomodel.errors import ModelError
from biomodel.parameters import Fixed, LogitNormal, LogNormal, Operand, Parameter, Prior
from biomodel.terms import JARRETT, Term

SPARED = "working value"

#: Usual single doses by agent, the unit of `level` (NCCN breast cancer regimens; KEYNOTE-522, Schmid et al. 2020,
#: doi:10.1056/NEJMoa1910549): amount and unit.
REFERENCE_DOSES: dict[str, tuple[float, str]] = {
    "paclitaxel": (80.0, "mg/m^2"),
    "docetaxel": (75.0, "mg/m^2"),
    "doxorubicin": (60.0, "mg/m^2"),
    "epirubicin": (90.0, "mg/m^2"),
    "cyclophosphamide": (600.0, "mg/m^2"),
    "carboplatin": (2.0, "AUC"),
    "trastuzumab": (6.0, "mg/kg"),
    "pertuzumab": (420.0, "mg"),
    "temozolomide": (75.0, "mg/m^2"),
}


@dataclass(frozen=True)
class Treatment(Term):
    """Base of `Kill` and `Jump`."""


@dataclass(frozen=True)
class Kill(Treatment):
    """A loss of cells, du/dt = -rate u, driven by the doses of `agents`."""

    @property
    def agents(self) -> tuple[str, ...]:
        """Agents whose doses drive this term (each contributes amount / reference dose)."""
        raise NotImplementedError

    def relative_amount(self, amount: float, units: str, agent: str) -> float:
        """A dose in units of the reference dose."""
        return 1.0

    def kinetics(self, elapsed, p, ops, agent) -> tuple[Operand, Operand]:
        """Level and exposure at time `elapsed` (day, positive) after one reference dose of an agent."""
        raise NotImplementedError

    def rate(self, u, p, c, ops) -> Operand:
        """Hazard (1/day) at the current `c.level[agent]`, `c.exposure[agent]` and drug map `c.map` (1 without one)."""
        raise NotImplementedError

    def cumulative(self, p, c, ops) -> Operand:
        """Integral of the hazard from the first dose to now: minus the log of the surviving fraction."""
        raise NotImplementedError

    #: Whether the term describes a therapy that goes on from its start (`Ongoing`) rather than single doses.
    continuing = False

    #: Name of the field that scales the drug in space, or None for a drug that reaches all voxels alike. Its type is
    #: in a comment because an annotation would make it a field of the dataclass.
    map = None  # type: str | None

    @property
    def fields(self) -> tuple[str, ...]:
        return (self.map,) if self.map else ()


@dataclass(frozen=True)
class Sparing(Kill):
    """A kill in proportion to the level of its drugs, which spares a fraction f of the cells.

    With efficacy a and exposure E the surviving fraction is (1 - f) exp(-a E map) + f, where f is the term's parameter
    ``resistant``; without such a parameter f = 0.
    """

    def strength(self, p, amounts) -> Operand:
        """Sum over the agents of efficacy times amount, where the amounts are levels or exposures."""
        (agent,) = self.agents
        return p["efficacy"] * amounts[agent]

    def rate(self, u, p, c, ops) -> Operand:
        hazard = self.strength(p, c.level) * c.map
        if "resistant" not in p:
            return hazard
        sensitive = (1 - p["resistant"]) * ops.exp(-self.strength(p, c.exposure) * c.map)
        return hazard * sensitive / (sensitive + p["resistant"])

    def cumulative(self, p, c, ops) -> Operand:
        exponent = self.strength(p, c.exposure) * c.map
        if "resistant" not in p:
            return exponent
        return -ops.log((1 - p["resistant"]) * ops.exp(-exponent) + p["resistant"])


@dataclass(frozen=True)
class Jump(Treatment):
    """An instantaneous loss: u becomes survival * u at each fraction."""

    def survival(self, p, c, ops) -> Operand:
        """Surviving fraction after a fraction of `c.dose` (Gy)."""
        raise NotImplementedError


@dataclass(frozen=True)
class Chemotherapy(Sparing):
    """A drug whose effect decays exponentially after each dose: hazard = efficacy * level * map.

    Parameters
    ----------
    agent : str
        Name of the agent in the patient's schedule.
    efficacy, decay : Prior or Fixed
        Hazard per reference dose (1/day), and decay rate of the effect (1/day).
    map : str, optional
        Field that scales the drug in space (for instance ``"drug_map"``, from DCE-MRI).
    resistant : Prior or Fixed, optional
        With it, a fraction f of the cells that the agent does not kill: the surviving fraction is
        (1 - f) exp(-efficacy exposure map) + f.
    reference_dose : (float, str), optional
        Amount and unit of the dose that counts as 1; needed for agents not in `REFERENCE_DOSES`.

    Notes
    -----
    Model of the hazard: Jarrett et al. 2018, doi:10.1088/1361-6560/aac040. The decay is that of the *effect* on
    cells; it is known badly and therefore fixed by default (half-life of two days).
    """

    agent: str = ""
    efficacy: Prior = LogNormal(0.08, 0.6)
    decay: Prior = Fixed(0.35)
    map: str | None = None
    resistant: Prior | None = None
    reference_dose: tuple[float, str] | None = None

    def __post_init__(self):
        if not self.agent:
            raise ModelError("Chemotherapy: no agent given; write Chemotherapy('paclitaxel').")
        if self.reference_dose is None:
            if self.agent not in REFERENCE_DOSES:
                raise ModelError(
                    f"Chemotherapy('{self.agent}'): no reference dose known for this agent; "
                    "give one, for instance reference_dose=(80.0, 'mg/m^2')."
                )
            object.__setattr__(self, "reference_dose", REFERENCE_DOSES[self.agent])

    @property
    def name(self) -> str:
        return self.agent

    @property
    def agents(self) -> tuple[str, ...]:
        return (self.agent,)

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        both = (
            Parameter("efficacy", "1/day", self.efficacy, (1e-6, 20.0), JARRETT, "hazard per reference dose"),
            Parameter("decay", "1/day", self.decay, (1e-4, 50.0), JARRETT, "decay of the effect after a dose"),
        )
        if self.resistant is None:
            return both
        return (*both, Parameter("resistant", "1", self.resistant, (1e-6, 1 - 1e-6), SPARED, "fraction not killed"))

    def relative_amount(self, amount: float, units: str, agent: str) -> float:
        assert self.reference_dose is not None  # set when the term was made
        return relative_dose(self.reference_dose, amount, units, agent)

    def kinetics(self, elapsed, p, ops, agent) -> tuple[Operand, Operand]:
        return decaying(elapsed, p["decay"], ops)


def relative_dose(reference: tuple[float, str], amount: float, units: str, agent: str) -> float:
    """A dose in units of its reference dose; the units must be the same."""
    if units != reference[1]:
        raise ModelError(
            f"{agent}: dose of {amount} {units}, but the reference dose is in {reference[1]}; give the reference dose "
            f"of {agent!r} as (amount, {units!r})."
        )
    return amount / reference[0]


def decaying(elapsed, decay, ops) -> tuple[Operand, Operand]:
    """Level and exposure of an effect that decays exponentially."""
    level = ops.exp(-decay * elapsed)
    return level, (1 - level) / decay


@dataclass(frozen=True)
class Combination(Sparing):
    """Several drugs that spare the same resistant cells.

    The surviving fraction is (1 - f) exp(-sum_j efficacy_j exposure_j) + f: cells that one drug does not reach are
    not reached by the others either, as after a course of chemotherapy that leaves a residual tumour whatever follows.

    Parameters
    ----------
    drugs : sequence of str
        Names of the agents in the patient's schedule.
    efficacy : sequence of Prior or Fixed
        Hazard per reference dose (1/day), by agent.
    resistant : Prior or Fixed
        The fraction f.
    decay : Prior or Fixed
        Decay rate of the effect of all of them (1/day).
    reference_doses : mapping of str to (float, str), optional
        Amount and unit of the doses that count as 1; needed for agents not in `REFERENCE_DOSES`.
    """

    drugs: tuple[str, ...] = ()
    efficacy: tuple[Prior, ...] = ()
    resistant: Prior = LogitNormal(0.05, 1.2)
    decay: Prior = Fixed(0.35)
    reference_doses: tuple[tuple[float, str], ...] = ()
    label: str = "chemotherapy"

    def __post_init__(self):
        if len(set(self.drugs)) != len(self.drugs) or not self.drugs:
            raise ModelError(f"Combination: agents {self.drugs!r}; expected at least one name, each once.")
        if not self.efficacy:
            object.__setattr__(self, "efficacy", tuple(LogNormal(0.08, 0.6) for _ in self.drugs))
        if not self.reference_doses:
            unknown = [a for a in self.drugs if a not in REFERENCE_DOSES]
            if unknown:
                raise ModelError(
                    f"Combination: no reference dose known for {', '.join(unknown)}; give reference_doses."
                )
            object.__setattr__(self, "reference_doses", tuple(REFERENCE_DOSES[a] for a in self.drugs))
        if not len(self.drugs) == len(self.efficacy) == len(self.reference_doses):
            raise ModelError("Combination: efficacy and reference_doses need one entry per agent.")

    @property
    def name(self) -> str:
        return self.label

    @property
    def agents(self) -> tuple[str, ...]:
        return self.drugs

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        each = tuple(
            Parameter(f"efficacy_{a}", "1/day", prior, (1e-6, 20.0), JARRETT, f"hazard per reference dose of {a}")
            for a, prior in zip(self.drugs, self.efficacy, strict=True)
        )
        return (
            *each,
            Parameter("decay", "1/day", self.decay, (1e-4, 50.0), JARRETT, "decay of the effect after a dose"),
            Parameter("resistant", "1", self.resistant, (1e-6, 1 - 1e-6), SPARED, "fraction that no agent kills"),
        )

    def relative_amount(self, amount: float, units: str, agent: str) -> float:
        return relative_dose(self.reference_doses[self.drugs.index(agent)], amount, units, agent)

    def kinetics(self, elapsed, p, ops, agent) -> tuple[Operand, Operand]:
        return decaying(elapsed, p["decay"], ops)

    def strength(self, p, amounts) -> Operand:
        return sum(p[f"efficacy_{a}"] * amounts[a] for a in self.drugs)


@dataclass(frozen=True)
class Systemic(Sparing):
    """A continuing therapy of unknown doses that begins at a day (immunotherapy, targeted or hormone therapy).

    Without `resistant` the hazard is constant from the start on. With it, a sensitive fraction 1 - f declines at
    `efficacy` while the rest keeps growing: the two-population response of tumour-size models,
    V = V0 exp(k t) [(1 - f) exp(-efficacy t) + f]. A declining and a growing exponential describe measured courses well
    (Stein et al. 2011, Clin Cancer Res 17:907, doi:10.1158/1078-0432.CCR-10-1762; the share f came later and is known
    as the generalised Stein-Fojo model).
    """

    continuing = True
    agent: str = "therapy"
    efficacy: Prior = LogNormal(0.01, 1.0)
    resistant: Prior | None = LogitNormal(0.3, 1.5)

    @property
    def name(self) -> str:
        return self.agent

    @property
    def agents(self) -> tuple[str, ...]:
        return (self.agent,)

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        source = "form: Stein et al. 2011, Clin Cancer Res 17:907, doi:10.1158/1078-0432.CCR-10-1762; working values"
        first = (Parameter("efficacy", "1/day", self.efficacy, (1e-7, 20.0), source, "hazard of sensitive cells"),)
        if self.resistant is None:
            return first
        return (*first, Parameter("resistant", "1", self.resistant, (1e-6, 1 - 1e-6), source, "fraction not killed"))

    def kinetics(self, elapsed, p, ops, agent) -> tuple[Operand, Operand]:
        return 0.0 * elapsed + 1.0, elapsed


@dataclass(frozen=True)
class Radiotherapy(Jump):
    """Linear-quadratic survival at each fraction: exp(-alpha d (1 + d / alpha_beta)).

    Parameters
    ----------
    alpha : Prior or Fixed
        Radiosensitivity (1/Gy). The default spans published values for glioma and breast (Rockne et al. 2010,
        Phys Med Biol 55:3271, doi:10.1088/0031-9155/55/12/001: about 0.03 1/Gy; van Leeuwen et al. 2018, Radiat
        Oncol 13:96, doi:10.1186/s13014-018-1040-z).
    alpha_beta : Prior or Fixed
        The ratio alpha / beta (Gy).
    """

    alpha: Prior = LogNormal(0.04, 0.6)
    alpha_beta: Prior = Fixed(10.0)

    @property
    def name(self) -> str:
        return "radiotherapy"

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        source = "van Leeuwen et al. 2018, doi:10.1186/s13014-018-1040-z"
        return (
            Parameter("alpha", "1/Gy", self.alpha, (1e-6, 2.0), source, "linear radiosensitivity"),
            Parameter("alpha_beta", "Gy", self.alpha_beta, (0.5, 50.0), source, "alpha over beta"),
        )

    def survival(self, p, c, ops) -> Operand:
        return ops.exp(-p["alpha"] * c.dose * (1 + c.dose / p["alpha_beta"]))
