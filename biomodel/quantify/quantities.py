"""What the quantities of maps are called in full, the units they leave the project in, and what reason codes mean.

Volume fractions and flows are 1 and 1/min inside and mL/100 mL and mL/min/100 mL in every exported file, as the lexicon
of contrast agent perfusion OSIPI CAPLEX has it (physiological quantities, https://osipi.github.io/OSIPI_CAPLEX/).
"""

from __future__ import annotations

from dataclasses import dataclass

from biomodel.imaging.voxelfit import Code

__all__ = ["REASONS", "Quantity", "export_units", "internal_units", "quantity", "spoken_units"]


@dataclass(frozen=True)
class Quantity:
    """Words for one quantity.

    Attributes
    ----------
    long_name : str
        As a reader says it.
    meaning : str
        One plain sentence.
    caplex : str
        Code in OSIPI CAPLEX, empty where it has none.
    """

    long_name: str
    meaning: str
    caplex: str = ""


_KNOWN = {
    "Ktrans": Quantity(
        "volume transfer constant",
        "How fast contrast agent passes from the blood plasma into the tissue, from blood flow and leakiness together.",
        "Q.PH1.008",
    ),
    "kep": Quantity(
        "rate constant of the return to plasma",
        "How fast contrast agent passes back from the tissue into the blood plasma, Ktrans over ve.",
    ),
    "ve": Quantity(
        "volume fraction of extravascular extracellular space",
        "Share of the tissue between the cells and outside the vessels, into which contrast agent leaks.",
        "Q.PH1.001.[e]",
    ),
    "vp": Quantity(
        "volume fraction of blood plasma", "Share of the tissue that is blood plasma in vessels.", "Q.PH1.001.[p]"
    ),
    "Fp": Quantity("blood plasma flow", "Plasma that flows into the tissue per time and volume.", "Q.PH1.002"),
    "PS": Quantity(
        "permeability surface area product", "How leaky the vessels of the tissue are for contrast agent.", "Q.PH1.004"
    ),
    "delay": Quantity(
        "arterial delay time", "How much later than in the artery the contrast agent arrives.", "Q.PH1.007"
    ),
    "T1": Quantity("longitudinal relaxation time", "T1 of the tissue before contrast agent is given."),
    "R1": Quantity("longitudinal relaxation rate", "1 / T1 of the tissue before contrast agent is given.", "Q.EL1.002"),
    "B1": Quantity("relative transmit field", "Flip angle as it was, over the flip angle that was asked for."),
    "S0": Quantity("signal without weighting", "Signal that the model of the fit gives without weighting."),
    "ADC": Quantity(
        "apparent diffusion coefficient",
        "How freely water moves; dense cells hinder it, oedema and necrosis let it rise.",
    ),
    "ADC_tumour": Quantity(
        "apparent diffusion coefficient of tumour",
        "ADC of the tumour's part of voxels that it shares with fat or gland; this is what the forecast uses.",
    ),
    "D": Quantity("diffusion coefficient", "How freely water outside the vessels moves."),
    "D*": Quantity("pseudo-diffusion coefficient", "How fast blood in small vessels dephases the signal."),
    "f": Quantity("perfusion fraction", "Share of the diffusion signal that comes from blood in small vessels."),
    "K": Quantity("kurtosis", "How far diffusion is from being free: 0 for free water."),
    "AUC60": Quantity("area under the curve, 60 s", "Enhancement summed over 60 s from arrival.", "Q.CD1.013"),
    "AUC90": Quantity("area under the curve, 90 s", "Enhancement summed over 90 s from arrival.", "Q.CD1.013"),
    "TTP": Quantity("time to peak", "Time from the contrast agent's arrival to the largest enhancement.", "Q.CD1.010"),
    "SER": Quantity(
        "signal enhancement ratio", "Early over late enhancement: above 1 where contrast agent washes out."
    ),
    "PE": Quantity("early enhancement", "Rise of the signal in the early image, relative to the one before contrast."),
    "cell_fraction": Quantity("tumour cell fraction", "Tumour cells over the most that fit into the voxel."),
    "tumour_probability": Quantity(
        "probability of tumour", "How likely the network holds the voxel for tumour; the region is a half and more."
    ),
    "tumour_entropy": Quantity(
        "uncertainty of the tumour's region", "How unsure the network is of the voxel: 0 is sure, 1 is a coin's toss."
    ),
    "tissue_spread": Quantity(
        "spread of the tissue fraction", "How far the network's mirrored views of the voxel disagree on its tissue."
    ),
    "drug": Quantity("relative supply with drug", "How much of a drug reaches the voxel, relative to the tumour."),
}
_KNOWN["drug_map"] = _KNOWN["drug"]

#: (units inside, units in files, file over inside) of volume fractions and flows.
_FRACTION, _FLOW = ("1", "mL/100mL", 100.0), ("1/min", "mL/min/100mL", 100.0)
_EXPORTED = {"ve": _FRACTION, "vp": _FRACTION, "vb": _FRACTION, "Fp": _FLOW, "PS": _FLOW}

#: What a code means to somebody who looks at a map.
REASONS = {
    Code.FITTED: "fitted",
    Code.NOT_FINITE: "no value: the signal is not a finite number",
    Code.NO_SIGNAL: "no value: zero or negative signal",
    Code.NO_ENHANCEMENT: "no value: the signal does not rise above its noise",
    Code.SATURATED: "no value: the signal is saturated, or beyond what the model can reach",
    Code.AT_BOUND: "fitted, but a parameter lies on its bound: its error says little",
    Code.NOT_CONVERGED: "fitted, but the search stopped early",
    Code.OUTSIDE: "outside the mask",
}


def quantity(name: str) -> Quantity:
    """Return the words for a map's name; for a name that is not known, the name itself."""
    return _KNOWN.get(name, Quantity(name.replace("_", " "), ""))


def export_units(name: str, units: str) -> tuple[str, float]:
    """Return the units in which a map leaves the project, and the factor from its own.

    Examples
    --------
    >>> export_units("ve", "1"), export_units("f", "1")
    (('mL/100mL', 100.0), ('1', 1.0))
    """
    inside, outside, factor = _EXPORTED.get(name, ("", "", 1.0))
    return (outside, factor) if units == inside else (units, 1.0)


def internal_units(units: str) -> tuple[str, float]:
    """Return the units inside the project for those of a file, and the factor from inside to the file.

    Examples
    --------
    >>> internal_units("mL/100mL"), internal_units("1")
    (('1', 100.0), ('1', 1.0))
    """
    for inside, outside, factor in (_FRACTION, _FLOW):
        if units == outside:
            return inside, factor
    return units, 1.0


def spoken_units(units: str) -> str:
    """Return units as they are printed.

    Examples
    --------
    >>> spoken_units("mm^2/s"), spoken_units("mL/100mL"), spoken_units("1")
    ('mm²/s', 'mL/100 mL', '')
    """
    if units == "1":
        return ""
    return units.replace("/100mL", "/100 mL").replace("^2", "²").replace("^3", "³").replace("*", "·")
