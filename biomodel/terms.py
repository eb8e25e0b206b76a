"""Growth and diffusion: pointwise functions ``f(u, p, c, ops)``, written once for every solver.

`u` is the tumour cell fraction, `p` the term's own parameters by short name, `c` the context (the fields the term
declares, by attribute) and `ops` the back end's primitive functions (`exp, log, sqrt, where, xlogx`). A term must not
use anything else: then torch, UFL, sympy and automatic differentiation evaluate the same function.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

from biomodel.parameters import LogNormal, Operand, Parameter, Prior

JARRETT = "Jarrett et al. 2018, Phys Med Biol 63:105015, doi:10.1088/1361-6560/aac040"
LALEH = "Laleh et al. 2022, PLoS Comput Biol 18:e1009822, doi:10.1371/journal.pcbi.1009822"


class Flow(Enum):
    """Closed forms of the reaction's flow over one step, with two coefficients a and b.

    BERNOULLI: u a / (1 + b u).  POWER: u^a exp(b) for u > 0, u exp(b) otherwise.
    """

    BERNOULLI = 1
    POWER = 2


@dataclass(frozen=True)
class Term:
    """Base of all terms. Subclasses are frozen dataclasses whose fields are priors."""

    @property
    def name(self) -> str:
        """Prefix of the term's parameters in the model."""
        raise NotImplementedError

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """The term's parameters."""
        return ()

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the spatial fields the term reads from the context."""
        return ()

    @property
    def auxiliaries(self) -> tuple[Auxiliary, ...]:
        """Fields that the solver works out at every step, which the term reads from the context beside `fields`."""
        return ()


@dataclass(frozen=True)
class Equation(Term):
    """What determines an auxiliary field, as data; solvers know how to solve it (see `biomodel.mechanics`)."""

    @property
    def gives(self) -> str:
        """Name under which terms read the field from the context."""
        raise NotImplementedError


@dataclass(frozen=True)
class Auxiliary:
    """A field that follows from the cell fraction by an equation of its own.

    A term that lists it in its `auxiliaries` reads it as ``c.<equation.gives>``; the solver solves the equation.
    """

    equation: Equation


@dataclass(frozen=True)
class Growth(Term):
    """Net proliferation, du/dt = rate(u)."""

    @property
    def name(self) -> str:
        return "growth"

    def rate(self, u, p, c, ops) -> Operand:
        """Growth rate of the cell fraction, 1/day."""
        raise NotImplementedError

    #: A growth law that has a closed-form flow under a kill that does not depend on u names it here and gives its
    #: coefficients; otherwise solvers integrate `rate` numerically.
    flow: ClassVar[Flow | None] = None

    def flow_coefficients(self, p, c, ops) -> tuple[Operand, Operand]:
        """Coefficients (a, b) of the closed-form flow over a step.

        `c.dt` is the step's length, `c.kill` the kill exponent of the whole step, and ``c.integral(f)`` the integral
        over the step of ``f(s, rest, K)``, where s is the time since the step began, rest the time until it ends and K
        the kill exponent from its beginning up to s.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Exponential(Growth):
    """Exponential growth, k u."""

    k: Prior = LogNormal(0.03, 0.7)
    flow = Flow.BERNOULLI

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        return (Parameter("k", "1/day", self.k, (1e-6, 2.0), JARRETT, "net proliferation rate"),)

    def rate(self, u, p, c, ops) -> Operand:
        return p["k"] * u

    def flow_coefficients(self, p, c, ops) -> tuple[Operand, Operand]:
        growth = ops.exp(p["k"] * c.dt - c.kill)
        return growth, 0.0 * growth


@dataclass(frozen=True)
class Logistic(Growth):
    """Logistic growth, k u (1 - u)."""

    k: Prior = LogNormal(0.05, 0.4)
    flow = Flow.BERNOULLI

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        return (Parameter("k", "1/day", self.k, (1e-6, 2.0), JARRETT, "proliferation rate"),)

    def rate(self, u, p, c, ops) -> Operand:
        return p["k"] * u * (1 - u)

    def flow_coefficients(self, p, c, ops) -> tuple[Operand, Operand]:
        k = p["k"]
        return ops.exp(k * c.dt - c.kill), k * c.integral(lambda s, rest, kill: ops.exp(k * s - kill))


@dataclass(frozen=True)
class Gompertz(Growth):
    """Gompertz growth, -k u log u.

    The rate per cell, -k log u, grows without bound where there are few cells. With diffusion, which carries a few
    everywhere, tumour then appears far from where it was: on images prefer the logistic law, and read a comparison of
    growth laws with that in mind. On volumes (no space) nothing of the kind happens.
    """

    k: Prior = LogNormal(0.02, 0.7)
    flow = Flow.POWER

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        return (Parameter("k", "1/day", self.k, (1e-6, 2.0), LALEH, "Gompertz rate"),)

    def rate(self, u, p, c, ops) -> Operand:
        return -p["k"] * ops.xlogx(u)

    def flow_coefficients(self, p, c, ops) -> tuple[Operand, Operand]:
        # y = log u obeys y' = -k y - kill'(s): linear, solved with one integration by parts so that jumps of the
        # kill exponent need no derivative.
        k = p["k"]
        return ops.exp(-k * c.dt), -c.kill + k * c.integral(lambda s, rest, kill: ops.exp(-k * rest) * kill)


@dataclass(frozen=True)
class NoGrowth(Growth):
    """No proliferation."""

    flow = Flow.BERNOULLI

    def rate(self, u, p, c, ops) -> Operand:
        return 0.0 * u

    def flow_coefficients(self, p, c, ops) -> tuple[Operand, Operand]:
        growth = ops.exp(-c.kill)
        return growth, 0.0 * growth


@dataclass(frozen=True)
class Diffusion(Term):
    """Invasion by diffusion: the divergence of D grad u, which each solver owns; the term gives D."""

    @property
    def name(self) -> str:
        return "diffusion"

    #: Name of the one parameter that is D itself where D is the same everywhere, else None.
    uniform: ClassVar[str | None] = None
    #: Whether D is a symmetric tensor: the coefficient then has three rows of three entries over (x, y, z).
    tensor: ClassVar[bool] = False

    def coefficient(self, u, p, c, ops) -> Operand:
        """Diffusivity D, mm²/day."""
        raise NotImplementedError


@dataclass(frozen=True)
class Isotropic(Diffusion):
    """One diffusivity D everywhere in the organ."""

    D: Prior = LogNormal(0.1, 0.5)
    uniform = "D"

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        return (Parameter("D", "mm^2/day", self.D, (1e-6, 20.0), JARRETT, "diffusivity of tumour cells"),)

    def coefficient(self, u, p, c, ops) -> Operand:
        return p["D"]


@dataclass(frozen=True)
class TissueDiffusion(Diffusion):
    """A diffusivity per tissue, averaged by the tissues' fractions: D = sum_t D_t f_t / sum_t f_t.

    In the brain, cells move faster in white than in grey matter (Swanson et al. 2000, Cell Prolif 33:317,
    doi:10.1046/j.1365-2184.2000.00177.x).
    """

    tissues: tuple[str, ...] = ("adipose", "fibroglandular")
    D: tuple[Prior, ...] = ()

    def __post_init__(self):
        if not self.D:
            object.__setattr__(self, "D", tuple(LogNormal(0.1, 0.5) for _ in self.tissues))
        if len(self.D) != len(self.tissues):
            from biomodel.errors import ModelError

            raise ModelError(f"TissueDiffusion: {len(self.tissues)} tissues, but {len(self.D)} priors.")

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        return tuple(
            Parameter(f"D_{t}", "mm^2/day", prior, (1e-6, 20.0), JARRETT, f"diffusivity in {t}")
            for t, prior in zip(self.tissues, self.D, strict=True)
        )

    @property
    def fields(self) -> tuple[str, ...]:
        return self.tissues

    def coefficient(self, u, p, c, ops) -> Operand:
        total = sum(getattr(c, t) for t in self.tissues)
        weighted = sum(p[f"D_{t}"] * getattr(c, t) for t in self.tissues)
        # Voxels of no listed tissue take the plain mean, so that D stays positive in the whole mask.
        mean = sum(p[f"D_{t}"] for t in self.tissues) / len(self.tissues)
        known = total > 1e-6
        return ops.where(known, weighted / ops.where(known, total, 1.0), mean)


@dataclass(frozen=True)
class TensorDiffusion(Diffusion):
    """Diffusion with a preferred direction: D times a symmetric tensor field without unit, as along nerve fibres.

    The fields are the tensor's entries along the grid's own axes, called ``tensor_xx``, ``tensor_yy``, ``tensor_zz``,
    ``tensor_xy``, ``tensor_xz`` and ``tensor_yz``; of a diffusion tensor image usually divided by its mean diffusivity
    (Jbabdi et al. 2005, Magn Reson Med 54:616, doi:10.1002/mrm.20625). Solved by `FenicsSolver`.
    """

    D: Prior = LogNormal(0.1, 0.5)
    tensor = True

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        return (Parameter("D", "mm^2/day", self.D, (1e-6, 20.0), JARRETT, "mean diffusivity of tumour cells"),)

    @property
    def fields(self) -> tuple[str, ...]:
        return tuple(f"tensor_{pair}" for pair in ("xx", "yy", "zz", "xy", "xz", "yz"))

    def coefficient(self, u, p, c, ops) -> Operand:
        d = p["D"]
        xy, xz, yz = d * c.tensor_xy, d * c.tensor_xz, d * c.tensor_yz
        return ((d * c.tensor_xx, xy, xz), (xy, d * c.tensor_yy, yz), (xz, yz, d * c.tensor_zz))


@dataclass(frozen=True)
class NoDiffusion(Diffusion):
    """No movement of cells: every voxel for itself, as in a well-mixed domain."""

    def coefficient(self, u, p, c, ops) -> Operand:
        return 0.0
