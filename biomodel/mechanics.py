"""Tissue mechanics: elastic equilibrium as data, and diffusion that stress slows down.

Cells press on the tissue around them in proportion to how densely they lie. The tissue yields as an elastic solid in
equilibrium, div(sigma(w) - lambda u I) = 0 for the displacement w, and cells move less where the von Mises stress of
sigma(w) is high: D = D0 exp(-gamma sigma_vm). Weis et al. 2013, Phys Med Biol 58:5851,
doi:10.1088/0031-9155/58/17/5851, and 2015, Cancer Res 75:4697, doi:10.1158/0008-5472.CAN-14-2945 (breast); Hormuth et
al. 2017, J R Soc Interface 14:20161010, doi:10.1098/rsif.2016.1010 (brain).

Equilibrium is linear and quasi-static. So stress is proportional to lambda, and gamma and lambda are known by data only
through their product: lambda has a fixed value unless it is given a prior. With clamped edges the stress depends on the
ratios of the moduli alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from biomodel.errors import ModelError
from biomodel.parameters import Fixed, LogNormal, Operand, Parameter, Prior
from biomodel.terms import Auxiliary, Diffusion, Equation, Isotropic, NoDiffusion

__all__ = ["Clamped", "Edge", "Elastic", "StressDamped", "TractionFree"]

WEIS = "Weis et al. 2013, Phys Med Biol 58:5851, doi:10.1088/0031-9155/58/17/5851"
BUDDAY = "Budday et al. 2015, J Mech Behav Biomed Mater 46:318, doi:10.1016/j.jmbbm.2015.02.024"
STYLIANOPOULOS = (
    "a working value within the solid stress estimated in tumours, Stylianopoulos et al. 2012, Proc Natl Acad Sci USA "
    "109:15101, doi:10.1073/pnas.1213353109"
)


@dataclass(frozen=True)
class Edge:
    """What holds the organ at its edge. Use one of its subclasses."""


@dataclass(frozen=True)
class Clamped(Edge):
    """The edge of the organ's mask does not move, w = 0, as in the models of Weis and Hormuth."""


@dataclass(frozen=True)
class TractionFree(Edge):
    """Nothing holds the organ: no traction on its edge, (sigma - lambda u I) n = 0; rigid motion is left out of w."""


@dataclass(frozen=True)
class Elastic(Equation):
    """Linear elastic equilibrium of the organ under the pressure of the tumour's cells.

    div(sigma(w) - lambda u I) = 0 with Hooke's law sigma = 2 mu eps(w) + lame tr(eps(w)) I, where Young's modulus is
    the mean of the tissues' moduli by their fractions and turns into the tumour's where cells are: E = E_tissue (1 - u)
    + E_tumour u. Solvers give the von Mises stress of sigma(w), in kPa, as ``c.von_mises``.

    Parameters
    ----------
    tissues : tuple of str
        Fields with the tissues' fractions.
    moduli : tuple of Prior
        Young's modulus of each, kPa. The defaults, and those of the tumour and Poisson's ratio, are those of Weis et
        al. 2013, doi:10.1088/0031-9155/58/17/5851.
    tumour : Prior or None
        Young's modulus of a voxel full of tumour cells, kPa; None where cells do not stiffen the tissue.
    coupling : Prior
        lambda, the pressure of a voxel full of cells, kPa. Solid stress of 2 to 19 kPa was estimated in human tumours
        (Stylianopoulos et al. 2012, doi:10.1073/pnas.1213353109); the default lies between.
    poisson : float
        Poisson's ratio, the same everywhere.
    edge : Edge
        What holds the organ's edge.

    Raises
    ------
    ModelError
        If numbers of tissues and moduli differ, a modulus or the coupling is not positive, or Poisson's ratio does not
        lie between 0 and 0.5.

    Examples
    --------
    >>> [p.name for p in Elastic().parameters]
    ['E_adipose', 'E_fibroglandular', 'E_tumour', 'coupling']
    """

    tissues: tuple[str, ...] = ("adipose", "fibroglandular")
    moduli: tuple[Prior, ...] = (Fixed(2.0), Fixed(4.0))
    tumour: Prior | None = Fixed(20.0)
    coupling: Prior = Fixed(10.0)
    poisson: float = 0.45
    edge: Edge = Clamped()
    source: str = WEIS

    def __post_init__(self):
        object.__setattr__(self, "tissues", tuple(self.tissues))
        object.__setattr__(self, "moduli", tuple(self.moduli))
        if not self.tissues or len(set(self.tissues)) != len(self.tissues):
            raise ModelError(f"Elastic: tissues {self.tissues!r}; expected at least one name, each once.")
        if len(self.moduli) != len(self.tissues):
            raise ModelError(
                f"Elastic: {len(self.tissues)} tissues ({', '.join(self.tissues)}), but {len(self.moduli)} moduli; "
                "give one prior or Fixed value in kPa for each."
            )
        if not 0 < self.poisson < 0.5:
            raise ModelError(
                f"Elastic: Poisson's ratio is {self.poisson!r}; expected a number between 0 and 0.5, both excluded "
                "(soft tissue: 0.45)."
            )
        if not isinstance(self.edge, Edge):
            raise ModelError(f"Elastic: edge is {self.edge!r}; expected Clamped() or TractionFree().")
        for p in self.parameters:
            if not p.typical > 0:
                raise ModelError(f"Elastic: {p.name} is {p.typical:g} kPa; expected a positive number.")

    @classmethod
    def brain(cls, edge: Edge = Clamped()) -> Elastic:
        """White and grey matter and ventricles, as the fields ``white``, ``grey`` and ``ventricles``.

        Moduli of white and grey matter: Budday et al. 2015, doi:10.1016/j.jmbbm.2015.02.024 (indentation). Fluid that
        can flow away from the ventricles is taken as a soft solid (a working value), and the tumour as twice as stiff
        as white matter (a working value).
        """
        return cls(
            ("white", "grey", "ventricles"), (Fixed(1.895), Fixed(1.389), Fixed(0.2)),
            tumour=Fixed(3.8), edge=edge, source=BUDDAY,
        )  # fmt: skip

    @property
    def name(self) -> str:
        return "mechanics"

    @property
    def gives(self) -> str:
        return "von_mises"

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        bounds = (1e-4, 1e5)
        found = [Parameter(f"E_{t}", "kPa", prior, bounds, self.source, f"Young's modulus of {t}")
                 for t, prior in zip(self.tissues, self.moduli, strict=True)]  # fmt: skip
        if self.tumour is not None:
            found.append(Parameter("E_tumour", "kPa", self.tumour, bounds, self.source, "Young's modulus of tumour"))
        text = "pressure of a voxel full of tumour cells"
        return (*found, Parameter("coupling", "kPa", self.coupling, bounds, STYLIANOPOULOS, text))

    @property
    def fields(self) -> tuple[str, ...]:
        return self.tissues

    def young(self, u, p, c, ops) -> Operand:
        """Young's modulus, kPa, at cell fraction u."""
        total = sum(getattr(c, t) for t in self.tissues)
        weighted = sum(p[f"E_{t}"] * getattr(c, t) for t in self.tissues)
        # Voxels of no listed tissue take the plain mean, so that the modulus stays positive in the whole mask.
        mean = sum(p[f"E_{t}"] for t in self.tissues) / len(self.tissues)
        known = total > 1e-6
        tissue = ops.where(known, weighted / ops.where(known, total, 1.0), mean)
        return tissue if self.tumour is None else tissue + (p["E_tumour"] - tissue) * u

    def pressure(self, u, p, c, ops) -> Operand:
        """Pressure of the cells, kPa: the force on the tissue is minus its gradient."""
        return p["coupling"] * u


@dataclass(frozen=True)
class StressDamped(Diffusion):
    """Diffusion that stress slows down: D = D0 exp(-gamma sigma_vm), with D0 of another term.

    Weis et al. 2013, doi:10.1088/0031-9155/58/17/5851.

    Parameters
    ----------
    base : Diffusion
        The diffusivity D0 without stress; its parameters keep their names (``diffusion.D``).
    gamma : Prior or Fixed
        Decrease of log D per stress, 1/kPa. The default is a working value: with the default moduli and coupling,
        stress at the edge of virtual breast tumours is about 0.2 kPa, so that it lowers D by a third. That of Weis et
        al. belongs to counted cells and another unit of the coupling.
    mechanics : Elastic

    Raises
    ------
    ModelError
        If the base is a tensor or no diffusion at all.

    Examples
    --------
    >>> import biomodel as bm
    >>> model = bm.ReactionDiffusion(bm.Logistic(), StressDamped())
    >>> model.free
    ('growth.k', 'diffusion.D', 'diffusion.gamma')
    """

    base: Diffusion = field(default_factory=Isotropic)
    gamma: Prior = LogNormal(2.0, 0.7)
    mechanics: Elastic = field(default_factory=Elastic)

    def __post_init__(self):
        if self.base.tensor or isinstance(self.base, (NoDiffusion, StressDamped)):
            raise ModelError(
                f"StressDamped: the base is {type(self.base).__name__}; expected a scalar diffusivity such as "
                "Isotropic() or TissueDiffusion(...)."
            )

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        text = "decrease of log diffusivity per von Mises stress"
        source = "form: " + WEIS + "; a working value"
        return (*self.base.parameters, Parameter("gamma", "1/kPa", self.gamma, (1e-6, 1e3), source, text))

    @property
    def fields(self) -> tuple[str, ...]:
        return self.base.fields

    @property
    def auxiliaries(self) -> tuple[Auxiliary, ...]:
        return (Auxiliary(self.mechanics),)

    def coefficient(self, u, p, c, ops) -> Operand:
        return self.base.coefficient(u, p, c, ops) * ops.exp(-p["gamma"] * c.von_mises)
