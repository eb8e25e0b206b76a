"""Virtual patients: made-up breasts, tumours, treatments and scans whose truth is known.

A virtual patient is the built-in example, the patient of the tests and the yardstick of every calibration. Its truth is
solved by :mod:`biomodel.truth` on a grid twice finer than the voxels and by another method than that of the fitted
models, then averaged to voxels. Two settings exist, and results should always show both: :class:`Matched`, where the
fitted model can be right, and :class:`Mismatched`, where the tumour and the scanner do things it does not know.

The numbers in these classes are the *settings of the generator*: the distributions of the true parameters are at the
same time the right priors for a fit in the matched setting (``Matched().priors()``). They and the seeds belong under
version control before anything is fitted to them.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, is_dataclass
from os import PathLike
from pathlib import Path

import numpy as np
import xarray as xr

from biomodel.anatomy import Breast, draw_breast, draw_tumour
from biomodel.domain import Domain
from biomodel.errors import InputError
from biomodel.files import atomic_write
from biomodel.parameters import LogNormal
from biomodel.patient import CellularitySettings, Patient
from biomodel.regimens import paclitaxel_carboplatin_ac
from biomodel.scanner import Flaws, Scan, observe
from biomodel.schedule import Schedule
from biomodel.truth import Array, Hazard, average, integrate, refine

__all__ = [
    "Breast",
    "Drug",
    "Flaws",
    "Matched",
    "Mismatched",
    "Scan",
    "VirtualPatient",
    "small_patient",
    "virtual_patient",
]


@dataclass(frozen=True)
class Drug:
    """One agent: how strongly and how long a dose kills.

    Right after a dose of `amount` the kill rate rises by ``efficacy * amount / reference_dose``; it then fades as
    ``exp(-decay t)``. The decay is that of the effect on cells (half-life of two days), not of the drug in plasma.
    """

    agent: str
    efficacy: LogNormal
    reference_dose: float
    units: str
    decay: float = 0.35


@dataclass(frozen=True)
class Matched:
    """Truth that the fitted model can describe: logistic growth, uniform diffusion, every cell alike.

    Parameters
    ----------
    growth : LogNormal
        Growth rate k (1/day).
    diffusion : LogNormal
        Diffusion coefficient D (mm^2/day).
    drugs : tuple of Drug
        Every agent that a regimen may hold. All are drawn for each patient, used or not, so that the regimen does not
        change the other draws.
    max_step : float
        Longest time step of the truth (day); at 0.5 the error in time is about 1e-6 of the cells.

    Notes
    -----
    The form of the equation is that of Jarrett et al. 2018 (doi:10.1088/1361-6560/aac040); the medians of k and D are
    those of the published demonstration that the benchmarks repeat. The efficacies and all widths are working choices:
    under the default regimen the median small patient keeps about three quarters of its cells at the second visit; one
    tumour in six is no longer visible at the third, and half of them at the fourth.
    """

    growth: LogNormal = LogNormal(0.05, 0.4)
    diffusion: LogNormal = LogNormal(0.1, 0.5)
    drugs: tuple[Drug, ...] = (
        Drug("paclitaxel", LogNormal(0.06, 0.5), 80.0, "mg/m^2"),
        Drug("carboplatin", LogNormal(0.06, 0.5), 2.0, "AUC"),
        Drug("doxorubicin", LogNormal(0.1, 0.5), 60.0, "mg/m^2"),
        Drug("cyclophosphamide", LogNormal(0.1, 0.5), 600.0, "mg/m^2"),
    )
    max_step: float = 0.5

    def priors(self) -> dict[str, LogNormal]:
        """Distributions of the true parameters, by the names that the fitted models use."""
        return {
            "growth.k": self.growth,
            "diffusion.D": self.diffusion,
            **{f"{drug.agent}.efficacy": drug.efficacy for drug in self.drugs},
        }


@dataclass(frozen=True)
class Mismatched(Matched):
    """Truth with physics and errors that the fitted model lacks; the other fields are those of :class:`Matched`.

    Parameters
    ----------
    resistant_fraction : (float, float)
        Range (uniform) of the share of the cells at day 0 that no agent kills. They grow and spread like the others
        and share the carrying capacity with them.
    adipose_diffusion : (float, float)
        Range (uniform) of the diffusion coefficient in fat relative to that in fibroglandular tissue, which keeps the
        drawn D. That invasion depends on the tissue is the point of mechanically coupled models of the breast (Weis et
        al. 2013, doi:10.1088/0031-9155/58/17/5851).
    gompertz : bool
        Gompertz growth, -k U log(U), in place of logistic growth.
    gompertz_floor : float
        Cell fraction below which the Gompertz rate per cell rises no further.
    flaws : Flaws
        Errors of the scanner and of the drawn regions.
    """

    resistant_fraction: tuple[float, float] = (0.05, 0.3)
    adipose_diffusion: tuple[float, float] = (0.3, 0.8)
    gompertz: bool = False
    gompertz_floor: float = 0.02
    flaws: Flaws = Flaws()


#: Settings of the two presets: the example, and the small patient of studies with many patients.
SCAN, EXAMPLE_BREAST = Scan(), Breast()
EXAMPLE_SHAPE, EXAMPLE_SPACING = (32, 64, 64), (2.5, 1.5, 1.5)
SMALL_SHAPE, SMALL_SPACING = (24, 24, 24), (2.0, 2.0, 2.0)
SMALL_BREAST = Breast(radius=(6.0, 8.5))
#: Days of the visits when none are given, and how far the later ones move (whole days, uniform).
VISIT_DAYS, VISIT_JITTER = (0.0, 19.0, 41.0, 89.0), 2
BASELINE = "2024-03-04"


@dataclass(frozen=True, eq=False)
class VirtualPatient:
    """A patient who does not exist, with the truth behind the scans.

    Parameters
    ----------
    patient : Patient
        What an analysis may see.
    truth : xarray.Dataset
        ``cell_fraction`` (time, z, y, x), ``volume`` (cm^3) and ``cells`` at the visits; ``daily_volume`` and
        ``daily_cells`` on every day up to the last visit. Its attributes say ``virtual``, and hold the parameters and
        the settings as JSON.
    parameters : dict
        True parameters by the names of the fitted models (and those of the mismatched setting, ``truth.*``).
    """

    patient: Patient
    truth: xr.Dataset
    parameters: dict[str, float]

    def write(self, folder: str | PathLike[str], *, overwrite: bool = False) -> None:
        """Write the patient exactly as a real one, and beside it ``truth/truth.nc``, never opened by ``read``.

        Raises
        ------
        OutputError
            If the folder exists already or cannot be written.
        """
        self.patient.write(folder, overwrite=overwrite)
        target = Path(folder) / "truth" / "truth.nc"
        target.parent.mkdir(exist_ok=True)
        with atomic_write(target) as path:
            packed = {name: {"zlib": True} for name in self.truth.data_vars if self.truth[name].ndim > 1}
            # In memory first: where a disk fills up, HDF5 cannot close its file any more and ends the process.
            path.write_bytes(self.truth.to_netcdf(engine="h5netcdf", encoding=packed))


def virtual_patient(
    seed: int,
    truth: Matched = Matched(),
    shape: tuple[int, int, int] = EXAMPLE_SHAPE,
    spacing: tuple[float, float, float] = EXAMPLE_SPACING,
    *,
    regimen: Schedule | None = None,
    visit_days: Sequence[float] | None = None,
    scan: Scan = SCAN,
    anatomy: Breast = EXAMPLE_BREAST,
) -> VirtualPatient:
    """Make one virtual patient.

    Parameters
    ----------
    seed : int
        The same seed and settings give the same patient. Each purpose (anatomy, tumour, every parameter, every visit)
        has its own stream, so that, for instance, other visit days leave anatomy and parameters as they are.
    truth : Matched or Mismatched
        The setting.
    shape, spacing
        Voxels and their size (mm) along z, y, x. Axes of length one give 1D and 2D patients.
    regimen : Schedule, optional
        The treatment; :func:`~biomodel.regimens.paclitaxel_carboplatin_ac` by default. Its agents must be among
        ``truth.drugs``. Doses of a regimen fixed in advance are marked ``planned``, so that ``Patient.until`` keeps
        those to come.
    visit_days : sequence of floats, optional
        Days of the visits, the first at day 0. By default 0, 19, 41 and 89, the later ones moved by up to 2 days.
    scan : Scan
        Observation and its noise.
    anatomy : Breast
        Distributions of organ and tumour.

    Returns
    -------
    VirtualPatient

    Raises
    ------
    InputError
        If an agent is unknown, a dose has other units, or the visit days do not rise from 0.
    GeometryError
        If the organ has no room for the tumour.
    """
    if visit_days is None:
        jitter = _stream(seed, "visit days").integers(-VISIT_JITTER, VISIT_JITTER + 1, len(VISIT_DAYS))
        visit_days = [day + (float(move) if day else 0.0) for day, move in zip(VISIT_DAYS, jitter, strict=True)]
    days = [float(day) for day in visit_days]
    if not days or days[0] != 0.0 or any(b <= a for a, b in zip(days, days[1:], strict=False)):
        raise InputError(f"Virtual patient: visit days {days}; expected rising days that start at 0.")
    schedule = paclitaxel_carboplatin_ac() if regimen is None else regimen

    parameters = {
        name: float(prior.to_value(prior.location + prior.scale * _stream(seed, name).standard_normal()))
        for name, prior in truth.priors().items()
    }
    hazard = _hazard(schedule, truth, parameters)
    mask, fibroglandular, adipose = draw_breast(_stream(seed, "anatomy"), shape, spacing, anatomy)
    factors = tuple(2 if n > 1 else 1 for n in shape)
    tumour = draw_tumour(
        _stream(seed, "tumour"), mask, fibroglandular, spacing, factors, scan.visible_fraction, anatomy
    )

    diffusivity, shares, floor = np.full(shape, parameters["diffusion.D"]), [1.0], 0.0
    if isinstance(truth, Mismatched):
        rng = _stream(seed, "mismatch")
        resistant, slower = rng.uniform(*truth.resistant_fraction), rng.uniform(*truth.adipose_diffusion)
        parameters |= {"truth.resistant_fraction": resistant, "truth.adipose_diffusion": slower}
        diffusivity = parameters["diffusion.D"] * np.where(mask, fibroglandular + slower * adipose, 1.0)
        shares, floor = [1.0 - resistant, resistant], truth.gompertz_floor if truth.gompertz else 0.0
    states = integrate(
        np.array([share * tumour for share in shares]),
        refine(mask, factors),
        refine(diffusivity, factors),
        tuple(s / f for s, f in zip(spacing, factors, strict=True)),
        parameters["growth.k"],
        hazard,
        stops := sorted({*days, *np.arange(0.0, days[-1], 1.0).tolist()}),
        sensitivity=[1.0, 0.0][: len(shares)],
        gompertz_floor=floor,
        max_step=truth.max_step,
    )
    fractions = {day: average(state.sum(axis=0), factors) for day, state in zip(stops, states, strict=True)}

    domain = Domain.box(shape, spacing, mask, {"adipose": adipose, "fibroglandular": fibroglandular})
    flaws = truth.flaws if isinstance(truth, Mismatched) else None
    visits = tuple(
        observe(number, day, fractions[day], domain, scan, _stream(seed, f"scan {number}"), flaws)
        for number, day in enumerate(days, start=1)
    )
    cellularity = CellularitySettings(
        adc_w=scan.adc_w,
        adc_min=scan.adc_min,
        repeatability_cv=scan.repeatability_cv,
        voxel_cv=scan.voxel_cv,
        visible_fraction=scan.visible_fraction,
    )
    patient = Patient(
        id=f"virtual-{seed}",
        organ="breast",
        domain=domain,
        visits=visits,
        schedule=schedule,
        cellularity=cellularity,
        clinical=_clinical(_stream(seed, "clinical"), float(fibroglandular[mask].mean())),
        baseline=BASELINE,
        notes=("Virtual: generated by biomodel.virtual.virtual_patient from a seed.",),
    )
    settings = {"seed": seed, "setting": type(truth).__name__, "truth": truth, "scan": scan, "anatomy": anatomy}
    dataset = _dataset(fractions, days, domain, cellularity, parameters, settings)
    return VirtualPatient(patient, dataset, parameters)


def small_patient(
    seed: int,
    truth: Matched = Matched(),
    *,
    regimen: Schedule | None = None,
    visit_days: Sequence[float] | None = None,
    scan: Scan = SCAN,
) -> VirtualPatient:
    """Make a virtual patient of 24 x 24 x 24 voxels of 2 mm, for studies with many; see :func:`virtual_patient`."""
    return virtual_patient(
        seed,
        truth,
        SMALL_SHAPE,
        SMALL_SPACING,
        regimen=regimen,
        visit_days=visit_days,
        scan=scan,
        anatomy=SMALL_BREAST,
    )


def _stream(seed: int, purpose: str) -> np.random.Generator:
    """A generator of its own for each purpose, so that a new purpose leaves the draws of the others alone."""
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0:
        raise InputError(f"Virtual patient: seed {seed!r}; expected a whole number from 0.")
    key = zlib.crc32(f"biomodel.virtual/{purpose}".encode())
    return np.random.default_rng(np.random.SeedSequence(int(seed), spawn_key=(key,)))


def _clinical(rng: np.random.Generator, share: float) -> dict[str, object]:
    """Clinical data of a patient who would be given the default regimen."""
    age = int(rng.integers(32, 71))
    return {
        "age": float(age),
        "sex": "female",
        "menopausal_state": "pre" if age < 50 else "post",
        "hr": False,
        "her2": False,
        "subtype": "triple-negative",
        "histology": "invasive carcinoma of no special type",
        "grade": 3,
        # Four categories over the range of fibroglandular shares; BI-RADS itself has no cuts by volume.
        "breast_density": "abcd"[int(np.searchsorted([0.12, 0.20, 0.28], share))],
    }


def _hazard(schedule: Schedule, truth: Matched, parameters: dict[str, float]) -> Hazard:
    """The kill of a schedule at the drawn efficacies."""
    drugs = {drug.agent: drug for drug in truth.drugs}
    if schedule.fractions or schedule.ongoing:
        raise InputError(
            "Virtual patient: the regimen holds radiotherapy or an ongoing therapy; expected doses of drugs."
        )
    for dose in schedule.doses:
        known = drugs.get(dose.agent)
        if known is None or dose.units != known.units:
            expected = ", ".join(f"{drug.agent} in {drug.units}" for drug in truth.drugs)
            raise InputError(
                f"Virtual patient: {dose.agent} in {dose.units} on day {dose.day:g}; expected {expected}. Add a Drug "
                "to the setting's drugs for any other agent."
            )
    return Hazard(
        np.array([dose.day for dose in schedule.doses]),
        np.array(
            [parameters[f"{d.agent}.efficacy"] * d.amount / drugs[d.agent].reference_dose for d in schedule.doses]
        ),
        np.array([drugs[dose.agent].decay for dose in schedule.doses]),
    )


def _dataset(
    fractions: dict[float, Array],
    days: Sequence[float],
    domain: Domain,
    cellularity: CellularitySettings,
    parameters: dict[str, float],
    settings: dict[str, object],
) -> xr.Dataset:
    """The truth as a dataset: maps at the visits, volume and cells there and on every day."""
    theta = cellularity.carrying_capacity(domain.voxel_volume)
    volume = {
        d: float((u >= cellularity.visible_fraction).sum()) * domain.voxel_volume / 1e3 for d, u in fractions.items()
    }
    cells = {day: float(u.sum()) * theta for day, u in fractions.items()}
    every = [day for day in fractions if day == int(day)]
    coords = {
        "time": ("time", np.array(days), {"units": "day"}),
        "day": ("day", np.array(every), {"units": "day"}),
        **{axis: (axis, values, {"units": "mm"}) for axis, values in domain.coords.items()},
    }
    maps = np.array([fractions[day] for day in days], np.float32)
    return xr.Dataset(
        {
            "cell_fraction": (("time", "z", "y", "x"), maps, {"units": "1"}),
            "volume": ("time", np.array([volume[day] for day in days]), {"units": "cm^3"}),
            "cells": ("time", np.array([cells[day] for day in days]), {"units": "1"}),
            "daily_volume": ("day", np.array([volume[day] for day in every]), {"units": "cm^3"}),
            "daily_cells": ("day", np.array([cells[day] for day in every]), {"units": "1"}),
        },
        coords,
        {
            "title": "Truth of a virtual patient; not a person",
            "virtual": 1,
            "cells_per_voxel": theta,
            "parameters": json.dumps(parameters, sort_keys=True),
            "settings": json.dumps(settings, default=_plain, sort_keys=True),
        },
    )


def _plain(value: object) -> object:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")
