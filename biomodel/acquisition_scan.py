"""One visit of a virtual patient at the scanner."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass

import numpy as np
import xarray as xr

from biomodel.acquisition_protocol import Protocol
from biomodel.acquisition_signal import (
    Bolus,
    bolus,
    bolus_delay,
    coarser,
    diffusion_signal,
    draw_motion,
    magnitude,
    moved,
    shifted,
    smooth_pattern,
    spoiled_echo,
    tissue_concentration,
    walk,
)
from biomodel.acquisition_tissue import GLAND, FieldOfView, Maps, Streams, field_of_view, settings_of, tissue_maps
from biomodel.errors import InputError
from biomodel.imaging.aif import InputFunction
from biomodel.imaging.series import Kind, Series
from biomodel.imaging.series_grid import Grid
from biomodel.truth import Array
from biomodel.virtual import VirtualPatient

__all__ = ["Acquired", "acquire"]

#: Flip angle of the anatomical image, degrees: fat is bright.
ANATOMY_ANGLE = 20.0
#: Density of protons from which a voxel gives signal.
SOLID = 1e-3
#: Maps of the truth: name in the tissue maps, and units.
TRUTH = {
    "cell_fraction": "1", "T10": "s", "Ktrans": "1/min", "ve": "1", "vp": "1", "ADC": "mm^2/s", "fat_share": "1",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Acquired:
    """What a visit gave, and the truth behind it.

    Parameters
    ----------
    visit, day
        Number from 1; days from the first.
    series : tuple of Series
        All that an analysis may see.
    truth : xarray.Dataset
        Maps of the body in its pose at visit 1, on the grid of the series: ``T10`` (s), ``Ktrans`` (1/min), ``ve``,
        ``vp``, ``ADC`` (mm^2/s), ``cell_fraction``, ``region`` (cell fraction from which the tumour is visible),
        ``body`` and ``artery``. The patient's own grid is ``box`` of it. The attributes hold motion, noise and flaws.
    scanned : xarray.Dataset
        The same maps in the pose of this visit, exactly those from which the signals were computed, with the receiver's
        ``M0`` of the spoiled gradient echoes, ``S0`` of the diffusion-weighted images, ``receive`` and ``B1``.
    motion : array (4, 4)
        From the place of a point of the body at visit 1 to its place now, mm, RAS+. The identity at visit 1.
    shifts : array (phases, 3)
        Shift of the body at each phase of the dynamic series on top of that (mm; z, y, x).
    plasma : InputFunction
        Plasma concentration in the artery, on the clock of the dynamic series.
    haematocrit : float
    noise : dict of float
        Standard deviation of each channel's noise by kind of series, in units of its images.
    box : three slices
        Where the patient's grid lies in that of the series.
    """

    visit: int
    day: float
    series: tuple[Series, ...]
    truth: xr.Dataset
    scanned: xr.Dataset
    motion: np.ndarray
    shifts: np.ndarray
    plasma: InputFunction
    haematocrit: float
    noise: Mapping[str, float]
    box: tuple[slice, slice, slice]

    def one(self, kind: Kind) -> Series:
        """Return the series of a kind.

        Raises
        ------
        InputError
            If the protocol has none.
        """
        for series in self.series:
            if series.kind is kind:
                return series
        raise InputError(f"Virtual acquisition: no {kind.title} in this protocol. Use one that has it.")


def acquire(virtual: VirtualPatient, visit: int, protocol: Protocol, *, seed: int = 0) -> Acquired:
    """Scan a virtual patient at one visit.

    Parameters
    ----------
    virtual : VirtualPatient
    visit : int
        From 1.
    protocol : Protocol
    seed : int
        The same patient, visit, protocol and seed give the same images. Tissue belongs to the patient and stays from
        visit to visit; the arterial input, motion, receiver, B1 and noise are drawn anew at each, every purpose from a
        stream of its own.

    Returns
    -------
    Acquired

    Raises
    ------
    InputError
        If there is no such visit, or the seed is no whole number from 0.
    """
    visits = virtual.patient.visits
    if isinstance(visit, bool) or not 1 <= visit <= len(visits):
        raise InputError(f"Virtual acquisition: visit {visit!r}; expected 1 to {len(visits)}.")
    streams = Streams(seed, virtual.patient.id)
    fov = field_of_view(virtual, protocol.margin, protocol.dwi_factors)
    grid, day = fov.grid, float(visits[visit - 1].day)
    source = bolus(streams.of(f"bolus {visit}"), protocol)
    still = tissue_maps(virtual, visit, fov, protocol.field_strength, protocol.dwi_te, source.haematocrit, streams)
    motion = np.eye(4)
    if visit > 1:
        motion = draw_motion(streams.of(f"motion {visit}"), protocol.motion, grid)
    maps = moved(still, motion, grid)
    scan = _Scan(visit, day, protocol, maps, grid, source, streams)
    series = tuple(scan.series())
    visible = settings_of(virtual)[0].visible_fraction
    attributes = scan.attributes | {
        "title": "Truth of a virtual acquisition; not a person", "virtual": 1, "patient": virtual.patient.id,
        "visit": visit, "day": day, "seed": seed, "protocol": json.dumps(_finite(asdict(protocol))),
        "motion": motion.ravel().tolist(),
        "box": [edge for part in fov.box for edge in (part.start, part.stop)],
    }  # fmt: skip
    truth = _dataset(still, fov, visible, attributes | {"pose": "visit 1"})
    scanned = _dataset(maps, fov, visible, attributes | {"pose": f"visit {visit}"})
    for name, values in scan.scanner_maps().items():
        scanned[name] = (("z", "y", "x"), values.astype(np.float32), {"units": "1"})
    return Acquired(
        visit, day, series, truth, scanned, motion, scan.shifts, source.plasma, source.haematocrit, scan.noise, fov.box
    )


class _Scan:
    """The images of one visit, one after the other."""

    def __init__(
        self, visit: int, day: float, protocol: Protocol, maps: Maps, grid: Grid, source: Bolus, streams: Streams
    ) -> None:
        self.visit, self.day, self.protocol, self.maps, self.grid = visit, day, protocol, maps, grid
        self.source, self.streams = source, streams
        self.flaws = protocol.flaws
        self.body = maps["water"] + maps["fat"] > SOLID
        self.receive = np.exp(protocol.receive_bias * smooth_pattern(self._stream("receiver"), grid, self.body))
        rng = self._stream("B1")
        uniform = protocol.b1_spread * rng.standard_normal()
        self.b1 = np.maximum(1.0 + uniform + 0.5 * protocol.b1_spread * smooth_pattern(rng, grid, self.body), 0.3)
        self.shifts = walk(self._stream("motion within"), protocol.phases, protocol.motion.within, grid)
        self.adc_factor = 1.0 + protocol.adc_cv * float(self._stream("ADC").standard_normal())
        reach = 0.0 if self.flaws is None else self.flaws.dwi_shift
        self.dwi_shift = reach * float(self._stream("DWI shift").uniform(-1.0, 1.0)) if grid.shape[1] > 1 else 0.0
        # One receiver: the noise of all spoiled gradient echoes is that of the dynamic series.
        angle = np.deg2rad(protocol.flip_angle)
        reference = GLAND.water * float(
            spoiled_echo(np.array(1.0 / GLAND.t1[protocol.field_strength]), np.array(angle), protocol.tr)
        )
        self.gain = protocol.gain / reference
        self.dwi_gain = protocol.gain / (GLAND.water * math.exp(-protocol.dwi_te / GLAND.t2))
        echo, diffusion = protocol.gain / protocol.snr, protocol.gain / protocol.dwi_snr
        self.noise = {"vfa": echo, "dce": echo, "anatomy": echo, "dwi": diffusion}

    def _stream(self, purpose: str) -> np.random.Generator:
        return self.streams.of(f"{purpose} {self.visit}")

    @property
    def attributes(self) -> dict[str, object]:
        return {
            "flaws": json.dumps(
                {} if self.flaws is None else {name: getattr(self.flaws, name) for name in self.flaws.present}
            ),
            "noise": json.dumps(self.noise),
            "haematocrit": self.source.haematocrit,
            "bolus_arrival_s": self.source.arrival,
            "bolus_scale": self.source.scale,
            "adc_factor": self.adc_factor,
            "dwi_shift_mm": self.dwi_shift,
            "dce_shifts_mm": self.shifts.ravel().tolist(),
        }

    def scanner_maps(self) -> dict[str, Array]:
        """The receiver's side of the signals, in the pose of this visit."""
        water, fat, _, _ = self._pools(self.protocol.fat_residual)
        return {
            "M0": self.gain * self.receive * (water + fat),
            "S0": self._diffusion_pools()[0] + self._diffusion_pools()[1],
            "receive": self.receive,
            "B1": self.b1,
        }

    def series(self) -> Iterator[Series]:
        """All series, in the order in which they are acquired."""
        yield self._anatomy()
        if self.protocol.b1_map:
            yield self._b1_map()
        yield self._diffusion()
        if self.protocol.vfa_angles:
            yield self._variable_angles()
        yield self._dynamic()

    def _make(self, kind: Kind, images: np.ndarray, what: str, **details: object) -> Series:
        if self.protocol.whole_numbers and kind is not Kind.B1:
            np.rint(images, out=images)
        common = {
            "grid": self.grid, "field_strength": self.protocol.field_strength, "vendor": self.protocol.vendor,
            "sequence": self.protocol.name, "day": self.day, "name": f"visit {self.visit} {what}",
        }  # fmt: skip
        return Series(kind=kind, data=images, **(common | details))  # type: ignore[arg-type]

    def _noisy(self, rng: np.random.Generator, image: Array, sigma: float, grid: Grid | None = None) -> np.ndarray:
        length = 0.0 if self.flaws is None else self.flaws.noise_length
        return magnitude(rng, image, sigma, (grid or self.grid).spacing, length)

    def _pools(self, residual: float) -> tuple[Array, Array, Array, Array]:
        """Magnetisation of water and fat, and R1 of both: equal where a voxel is one pool."""
        maps, residue = self.maps, residual * self.maps["fat"]
        if self.flaws is None or not self.flaws.fat_pool:
            return maps["water"], residue, 1.0 / maps["T10"], 1.0 / maps["T10"]
        share = maps["fat_share"]
        # A voxel's T10 is the mean over its shares of fat and water.
        fat_t1 = np.where(share > 1e-3, (maps["T10"] - (1 - share) * maps["water_T10"]) / np.maximum(share, 1e-3), 0.3)
        return maps["water"], residue, 1.0 / maps["water_T10"], 1.0 / np.clip(fat_t1, 0.2, 0.6)

    def _still_echo(self, flip_angle: float, residual: float) -> Array:
        """A spoiled gradient echo without contrast agent."""
        water, fat, r1_water, r1_fat = self._pools(residual)
        angle, tr = self.b1 * np.deg2rad(flip_angle), self.protocol.tr
        signal = water * spoiled_echo(r1_water, angle, tr) + fat * spoiled_echo(r1_fat, angle, tr)
        return np.asarray(self.gain * self.receive * signal)

    def _echo_details(self) -> dict[str, object]:
        return {
            "tr": self.protocol.tr, "te": self.protocol.te, "fat_saturated": self.protocol.fat_residual < 1,
            "phase_encoding": "x",
        }  # fmt: skip

    def _anatomy(self) -> Series:
        image = self._noisy(self._stream("noise anatomy"), self._still_echo(ANATOMY_ANGLE, 1.0), self.noise["anatomy"])
        details = self._echo_details() | {"fat_saturated": False, "flip_angles": [ANATOMY_ANGLE]}
        return self._make(Kind.ANATOMY, image[None], "T1w", **details)

    def _b1_map(self) -> Series:
        noise = self.protocol.b1_noise * self._stream("noise B1").standard_normal(self.grid.shape)
        return self._make(Kind.B1, (self.b1 + noise).astype(np.float32)[None], "B1 map")

    def _variable_angles(self) -> Series:
        rng, angles = self._stream("noise VFA"), self.protocol.vfa_angles
        images = np.stack(
            [self._noisy(rng, self._still_echo(a, self.protocol.fat_residual), self.noise["vfa"]) for a in angles]
        )
        return self._make(Kind.VFA, images, "VFA", flip_angles=angles, **self._echo_details())

    def _diffusion_pools(self) -> tuple[Array, Array]:
        scale = self.dwi_gain * self.receive
        return scale * self.maps["dwi_water"], scale * self.maps["dwi_fat"] * self.protocol.dwi_fat_residual

    def _diffusion(self) -> Series:
        protocol, rng = self.protocol, self._stream("noise DWI")
        water, fat = self._diffusion_pools()
        perfusion = 0.0 if self.flaws is None else self.flaws.perfusion
        grid = _coarse(self.grid, protocol.dwi_factors)
        images, b_values, directions = [], [], []
        for b in protocol.b_values:
            adc = self.adc_factor * self.maps["ADC"]
            signal = diffusion_signal(water, fat, adc, self.maps["perfused"], b, perfusion)
            signal = coarser(shifted(signal, (0.0, self.dwi_shift, 0.0), self.grid), protocol.dwi_factors)
            axes = np.eye(3) if b > 0 else np.zeros((1, 3))
            found = [self._noisy(rng, signal, self.noise["dwi"], grid) for _ in axes]
            if not protocol.directions and len(found) > 1:
                # In logarithms the mean over directions has the ADC of the tensor's trace.
                found, axes = [np.exp(np.mean(np.log(np.maximum(found, 1e-6)), axis=0))], np.zeros((1, 3))
            images += found
            b_values += [b] * len(found)
            directions += list(axes)
        return self._make(
            Kind.DWI, np.stack(images).astype(np.float32), "DWI", grid=grid, b_values=b_values,
            directions=np.array(directions) if protocol.directions else None, tr=protocol.dwi_tr, te=protocol.dwi_te,
            sequence="epse2d", fat_saturated=protocol.dwi_fat_residual < 1, phase_encoding="y",
        )  # fmt: skip

    def _dynamic(self) -> Series:
        protocol, maps, body = self.protocol, self.maps, self.body
        delay = bolus_delay(self._stream("delay"), self.flaws, self.grid, maps["artery"])[body]
        curves, samples = tissue_concentration(
            maps["Ktrans"][body], maps["ve"][body], maps["vp"][body], self.source, protocol, delay
        )
        water, fat, r1_water, r1_fat = (values[body] for values in self._pools(protocol.fat_residual))
        angle, scale = self.b1[body] * np.deg2rad(protocol.flip_angle), self.gain * self.receive[body]
        relaxivity = protocol.relaxivity.r1
        decay, dilute = 0.0, np.ones_like(water)
        if self.flaws is not None:
            decay = protocol.te * self.flaws.r2star
            if self.flaws.fat_pool:
                dilute = 1.0 / np.maximum(1.0 - maps["fat_share"][body], 0.1)
        one_pool = self.flaws is None or not self.flaws.fat_pool
        still_fat = fat * spoiled_echo(r1_fat, angle, protocol.tr)
        rng = self._stream("noise DCE")
        images = np.empty((protocol.phases, *self.grid.shape), np.float32)
        for phase in range(protocol.phases):
            signal = np.zeros_like(water)
            for sample in range(samples):
                agent = curves[:, phase * samples + sample].astype(float) * dilute
                echo = spoiled_echo(r1_water + relaxivity * agent, angle, protocol.tr) * np.exp(-decay * agent)
                signal += (water + fat) * echo if one_pool else water * echo + still_fat
            image = np.zeros(self.grid.shape)
            image[body] = scale * signal / samples
            images[phase] = self._noisy(rng, shifted(image, self.shifts[phase], self.grid), self.noise["dce"])
        return self._make(
            Kind.DCE, images, "DCE", times=protocol.times, flip_angles=protocol.flip_angle,
            contrast_agent=protocol.agent, **self._echo_details(),
        )  # fmt: skip


def _coarse(grid: Grid, factors: tuple[int, int, int]) -> Grid:
    """Return the grid of blocks of voxels."""
    used = [factor if n > 1 else 1 for factor, n in zip(factors, grid.shape, strict=True)]
    affine = grid.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ ((np.array(used[::-1]) - 1) / 2)
    affine[:3, :3] = affine[:3, :3] * np.array(used[::-1], float)
    shape = [n // factor for n, factor in zip(grid.shape, used, strict=True)]
    return Grid.at((shape[0], shape[1], shape[2]), affine)


def _finite(fields: dict[str, object]) -> dict[str, object]:
    """Return fields for JSON, which has no infinity: without noise the signal over noise is null."""
    return {name: None if value == math.inf else value for name, value in fields.items()}


def _dataset(maps: Maps, fov: FieldOfView, visible: float, attributes: Mapping[str, object]) -> xr.Dataset:
    dims, grid = ("z", "y", "x"), fov.grid
    body = maps["water"] + maps["fat"] > SOLID
    variables: dict[str, object] = {
        name: (dims, np.where(body, maps[name], np.nan).astype(np.float32), {"units": units})
        for name, units in TRUTH.items()
    }
    variables["body"] = (dims, body.astype(np.int8), {"units": "1"})
    variables["artery"] = (dims, (maps["artery"] > 0.99).astype(np.int8), {"units": "1"})
    variables["region"] = (dims, (maps["cell_fraction"] >= visible).astype(np.int8), {"units": "1"})
    coords = {name: (name, values, {"units": "mm"}) for name, values in grid.domain().coords.items()}
    return xr.Dataset(variables, coords, dict(attributes) | {"affine": grid.affine.ravel().tolist()})
