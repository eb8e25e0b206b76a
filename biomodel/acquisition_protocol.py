"""How raw series of virtual patients are acquired: protocols of a few scanners, motion, and what goes wrong besides."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from biomodel.errors import InputError
from biomodel.imaging.concentration import Relaxivity, relaxivity

__all__ = ["GE_15T", "PHILIPS_3T", "SIEMENS_3T", "ImagingFlaws", "Motion", "Protocol"]


def _from_zero(value: float, where: str) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise InputError(f"{where} {value!r}; expected a number from 0 up.")


@dataclass(frozen=True)
class Motion:
    """Rigid motion of the body.

    Parameters
    ----------
    translation : float
        Standard deviation of the shift between visits along each axis (mm).
    rotation : float
        Standard deviation of the rotation between visits about each axis (degrees).
    within : float
        Standard deviation of the shift along each axis that has built up by the last phase of the dynamic series (mm);
        a random walk from phase to phase. 0 is none.
    """

    translation: float = 2.0
    rotation: float = 2.0
    within: float = 0.0

    def __post_init__(self) -> None:
        for item in fields(self):
            _from_zero(getattr(self, item.name), f"Motion: {item.name}")


@dataclass(frozen=True)
class ImagingFlaws:
    """Physics and errors that the analysis of raw series does not model; a field at 0 is absent.

    Parameters
    ----------
    noise_length : float
        Correlation length of the noise (mm), as from interpolation on the scanner.
    fat_pool : bool
        Fat and water of a voxel have a T1 each and only water takes up contrast agent; without it a voxel is one pool.
    phase_average : bool
        A phase shows the mean signal over its duration instead of that at its start.
    delay : float
        The bolus reaches tissue later than the artery, by 0 to this many seconds, smooth in space.
    dispersion : float
        Time constant (s) of an exponential that widens the arterial input, as a slow injection or heart does: the
        population input no longer fits, a measured one does.
    r2star : float
        T2* relaxivity of the contrast agent, L/(mmol s); it lowers the signal of the artery most.
    perfusion : float
        Share of the diffusion-weighted signal of tumour and gland that belongs to flowing blood and is lost by b = 200
        s/mm²: 0.105 in invasive ductal carcinoma, with a pseudodiffusion of 14.9e-3 mm²/s (Sigmund et al. 2011,
        doi:10.1002/mrm.22740).
    dwi_shift : float
        Shift of the diffusion-weighted images against the others along the phase-encoded axis (mm, uniform from minus
        to plus this), as from a wrong centre frequency in echo-planar imaging.
    """

    noise_length: float = 1.5
    fat_pool: bool = True
    phase_average: bool = True
    delay: float = 4.0
    dispersion: float = 4.0
    r2star: float = 5.0
    perfusion: float = 0.07
    dwi_shift: float = 2.0

    def __post_init__(self) -> None:
        for item in fields(self):
            _from_zero(float(getattr(self, item.name)), f"ImagingFlaws: {item.name}")
        if self.perfusion > 0.5:
            raise InputError(f"ImagingFlaws: perfusion {self.perfusion:g}; expected a share of the signal up to 0.5.")

    @property
    def present(self) -> tuple[str, ...]:
        """Names of the flaws that are there."""
        return tuple(item.name for item in fields(self) if getattr(self, item.name))


@dataclass(frozen=True)
class Protocol:
    """What a scanner does at a visit.

    Parameters
    ----------
    vendor, name
        Written into the series. They say whose typical settings these are; every image is virtual all the same.
    field_strength : float
        1.5 or 3 T; T1 and relaxivity depend on it.
    agent : str
        Contrast agent (generic name).
    tr, te : float
        Of the spoiled gradient echoes, s.
    flip_angle : float
        Of the dynamic series, degrees.
    vfa_angles : tuple of floats
        Flip angles for T1, degrees. Empty: none are acquired.
    phases : int
        Images of the dynamic series.
    phase_time : float
        From one phase to the next, s.
    baseline : int
        Phases before the bolus reaches the artery.
    b_values : tuple of floats
        s/mm². ACRIN 6698 used 0, 100, 600 and 800 (Newitt et al. 2019, doi:10.1002/jmri.26539).
    directions : bool
        Keep three perpendicular directions apart; otherwise their geometric mean is stored, as scanners do.
    dwi_te, dwi_tr : float
        s.
    dwi_factors : (int, int, int)
        How many voxels of the other series one diffusion-weighted voxel spans along z, y, x.
    fat_residual, dwi_fat_residual : float
        Share of fat's signal that fat suppression leaves, in the spoiled gradient echoes for T1 and contrast and in the
        diffusion-weighted images. 1 is none. The anatomical image is never fat-suppressed.
    snr, dwi_snr : float
        Signal of fibroglandular tissue over the standard deviation of the noise in each channel, at the baseline of the
        dynamic series and at b = 0, where the receiver's sensitivity is 1. ``math.inf`` is without noise.
    receive_bias : float
        Standard deviation over the body of the logarithm of the receiver's sensitivity.
    b1_spread : float
        How far the true flip angle is from the nominal one (relative standard deviation): one number per visit, and
        half of it over the body. In the breast at 3 T the mean was off by -14 % on one side and +3 % on the other with
        quadrature transmission, and by less than 1 % with two sources (Radiology 2013, PubMed 23401582).
    b1_map : bool
        Whether the true flip angles are measured.
    b1_noise : float
        Standard deviation of that map.
    adc_cv : float
        Coefficient of variation of one factor per visit on all ADCs, as from the gradients' calibration. Beyond it the
        ADC has the noise of the images.
    input_cv : float
        Coefficient of variation of the arterial input's scale between visits.
    haematocrit : (float, float)
        Range (uniform, per visit); women have 0.36 to 0.46.
    margin : float
        How far the field of view reaches beyond the patient's grid on every side (mm). It holds air for measuring
        noise, and the chest wall with an artery.
    gain : float
        Signal of fibroglandular tissue at the baseline of the dynamic series, in the units of the images.
    whole_numbers : bool
        Store whole numbers, as scanners do.
    motion : Motion
    flaws : ImagingFlaws, optional
        None in the matched setting.

    Raises
    ------
    InputError
        If a value cannot be used.
    """

    vendor: str = "virtual"
    name: str = "virtual"
    field_strength: float = 3.0
    agent: str = "gadobutrol"
    tr: float = 5.0e-3
    te: float = 2.2e-3
    flip_angle: float = 12.0
    vfa_angles: tuple[float, ...] = (2.0, 5.0, 10.0, 15.0, 20.0)
    phases: int = 40
    phase_time: float = 12.0
    baseline: int = 5
    b_values: tuple[float, ...] = (0.0, 100.0, 600.0, 800.0)
    directions: bool = False
    dwi_te: float = 0.06
    dwi_tr: float = 6.0
    dwi_factors: tuple[int, int, int] = (1, 1, 1)
    fat_residual: float = 0.1
    dwi_fat_residual: float = 0.05
    snr: float = 30.0
    dwi_snr: float = 40.0
    receive_bias: float = 0.25
    b1_spread: float = 0.08
    b1_map: bool = True
    b1_noise: float = 0.01
    adc_cv: float = 0.05
    input_cv: float = 0.15
    haematocrit: tuple[float, float] = (0.36, 0.46)
    margin: float = 8.0
    gain: float = 400.0
    whole_numbers: bool = True
    motion: Motion = Motion()
    flaws: ImagingFlaws | None = None

    def __post_init__(self) -> None:
        if self.field_strength not in (1.5, 3.0):
            raise InputError(
                f"Protocol: field strength {self.field_strength:g} T; expected 1.5 or 3, where T1 of breast tissue was "
                "measured."
            )
        relaxivity(self.agent, self.field_strength)
        for name in ("tr", "te", "flip_angle", "phase_time", "dwi_te", "dwi_tr", "snr", "dwi_snr", "gain"):
            value = getattr(self, name)
            if not value > 0:
                raise InputError(f"Protocol: {name} {value!r}; expected more than 0.")
        for name in ("fat_residual", "dwi_fat_residual", "receive_bias", "b1_spread", "b1_noise", "adc_cv",
                     "input_cv", "margin"):  # fmt: skip
            _from_zero(getattr(self, name), f"Protocol: {name}")
        if not 2 <= self.baseline < self.phases:
            raise InputError(
                f"Protocol: {self.baseline} phases before the bolus of {self.phases}; expected 2 or more, and fewer "
                "than all."
            )
        low, high = self.haematocrit
        if not 0 <= low <= high < 0.8:
            raise InputError(f"Protocol: haematocrit from {low:g} to {high:g}; expected fractions from 0 to 0.8.")
        if len(self.dwi_factors) != 3 or any(not isinstance(f, int) or f < 1 for f in self.dwi_factors):
            raise InputError(f"Protocol: dwi_factors {self.dwi_factors}; expected three whole numbers from 1.")

    @property
    def relaxivity(self) -> Relaxivity:
        """Of the contrast agent at this field."""
        return relaxivity(self.agent, self.field_strength)

    @property
    def times(self) -> Sequence[float]:
        """Start of each phase, s."""
        return tuple(phase * self.phase_time for phase in range(self.phases))

    def noiseless(self) -> Protocol:
        """Return the protocol without noise, rounding, motion and calibration errors; B1 and receiver stay."""
        return replace(
            self, snr=math.inf, dwi_snr=math.inf, b1_noise=0.0, adc_cv=0.0, whole_numbers=False,
            motion=Motion(0.0, 0.0, 0.0),
        )  # fmt: skip

    def mismatched(self, flaws: ImagingFlaws = ImagingFlaws()) -> Protocol:  # noqa: B008 (immutable)
        """Return the protocol with flaws, for patients of the mismatched setting."""
        return replace(self, flaws=flaws)


#: Settings of three kinds of scanners, within what breast protocols use; no site's own protocol.
SIEMENS_3T = Protocol(vendor="Siemens", name="fl3d1")
GE_15T = Protocol(
    vendor="GE", name="efgre3d", field_strength=1.5, agent="gadobenate", tr=6.5e-3, te=2.4e-3, flip_angle=10.0,
    vfa_angles=(2.0, 5.0, 10.0, 20.0), phases=30, phase_time=16.0, baseline=4, dwi_te=0.07, fat_residual=0.15,
    snr=22.0, dwi_snr=30.0, receive_bias=0.15, b1_spread=0.03, b1_map=False, gain=250.0,
)  # fmt: skip
PHILIPS_3T = Protocol(
    vendor="Philips", name="T1TFE", agent="gadoterate", tr=4.6e-3, te=2.3e-3, flip_angle=10.0,
    vfa_angles=(3.0, 7.0, 10.0, 15.0), phases=48, phase_time=10.0, baseline=6, directions=True, snr=26.0,
    dwi_snr=35.0, receive_bias=0.3, b1_spread=0.02, b1_map=False, gain=800.0,
)  # fmt: skip
