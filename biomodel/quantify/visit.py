"""One visit: from its series to maps on the grid of the dynamic series."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from biomodel.errors import InputError, TumorcastError
from biomodel.imaging.aif import (
    InputFunction,
    Parker,
    PopulationInput,
    arrival_time,
    baseline_samples,
    input_from_mask,
    select_artery,
)
from biomodel.imaging.concentration import Relaxivity, concentration, relaxivity
from biomodel.imaging.dce import ExtendedTofts, Model, enhancement, fit_volume
from biomodel.imaging.dce.semiquantitative import EARLY, LATE
from biomodel.imaging.drugmap import tofts_supply
from biomodel.imaging.dwi import Gaussian, fit_adc, residual_noise
from biomodel.imaging.motion import align, correct_motion
from biomodel.imaging.preprocess import resample, resample_series
from biomodel.imaging.regions.exam import Exam
from biomodel.imaging.regions.methods import FuzzyClusters, RegionMethod, ThresholdRegions, TissueMethod
from biomodel.imaging.regions.organ import breast_mask
from biomodel.imaging.regions.tissue import Tissues
from biomodel.imaging.registration import Rigid
from biomodel.imaging.series import SAME_B, Intake, Kind, Series
from biomodel.imaging.series_quality import check_intake
from biomodel.imaging.series_signal import body
from biomodel.imaging.t1 import SpoiledGradientEcho
from biomodel.imaging.voxelfit import Code, VoxelFit
from biomodel.quantify.maps import Curve, Map, VisitMaps
from biomodel.quantify.study import StudyVisit
from biomodel.quantify.t1_map import t1_map

__all__ = ["Settings", "measure"]

#: Share of the brightening voxels whose mean curve shows when the agent arrives.
BRIGHTEST = 0.02
#: Least part by which those brighten, or no agent arrives; tumours and vessels do by half and more.
LEAST_RISE = 0.1
#: Peak of a measured input that is believable, mM in plasma: below it is no artery, above it inflow or T2* speak.
PEAK = (1.0, 30.0)
#: Longest time between images that shows the first pass of a bolus, s.
FIRST_PASS = 5.0


@dataclass(frozen=True, eq=False)
class Settings:
    """How a study is quantified.

    Parameters
    ----------
    model : Model
        Tracer-kinetic model; it needs Ktrans, ve and vp for the drug map.
    population : PopulationInput, optional
        Arterial input to use; by default it is measured in the images, and Parker's stands in where that fails.
    agent : Relaxivity, optional
        By default from the series' contrast agent and field strength.
    correct_motion : bool
        Within the dynamic series.
    region : RegionMethod
        Way to the tumour's region: thresholds of enhancement, or ``NetworkRegions(TumourNetwork.load("tumour.pt"))``.
    tissue : TissueMethod, optional
        Way to the tissues of a breast: by default fuzzy c-means; ``NetworkTissues(TissueNetwork.load("tissue.pt"))``.
    """

    model: Model = ExtendedTofts()
    population: PopulationInput | None = None
    agent: Relaxivity | None = None
    correct_motion: bool = True
    region: RegionMethod = ThresholdRegions()
    tissue: TissueMethod | None = None


def measure(visit: StudyVisit, intake: Intake, organ: str, settings: Settings) -> VisitMaps:
    """Quantify one visit on the grid of its dynamic series.

    Parameters
    ----------
    visit
    intake
        Its series: a dynamic one, one for T1 (flip angles or inversion times), a diffusion-weighted one; a B1 map
        where there is one.
    organ
        ``breast`` is looked for as such; anything else is the body in the image.
    settings

    Raises
    ------
    InputError
        If a series is missing or cannot be used.
    """
    try:
        return _Measurement(visit, intake, organ, settings).maps()
    except TumorcastError as error:
        raise type(error)(f"visit {visit.number} ({visit.folder.name}): {error}") from None


class _Measurement:
    """Steps of one visit, each with its note."""

    def __init__(self, visit: StudyVisit, intake: Intake, organ: str, settings: Settings):
        self.visit, self.intake, self.settings, self.organ_name = visit, intake, settings, organ
        self.notes: list[str] = []
        self.dce = intake.one(Kind.DCE)
        self.grid = self.dce.grid
        if settings.correct_motion and self.dce.samples > 2:
            corrected = correct_motion(self.dce)
            self.dce = corrected.series
            self.notes.append(f"Motion in the dynamic series: {corrected}.")
        self.spoiled = SpoiledGradientEcho(float(self._needed("flip_angle")), float(self._needed("tr")), self.dce.te)
        self.found: dict[str, Map] = {}

    def _needed(self, name: str) -> float:
        value = getattr(self.dce, name)
        if value is None:
            raise InputError(f"{self.dce.name}: no {name}; it is needed for concentrations. Add it to the sidecar.")
        return float(value)

    def maps(self) -> VisitMaps:
        assert self.dce.times is not None
        self.times = np.asarray(self.dce.times, float)
        first = np.nan_to_num(np.asarray(self.dce.data[0], float))
        self.inside = body(first)
        self._bolus()
        self._images()
        organ = self._organ()
        self._t1()
        self._dynamic()
        self._diffusion()
        fractions = self._tissues(organ)
        region = self._region(organ, fractions)
        return VisitMaps(
            number=self.visit.number,
            day=self.visit.day,
            grid=self.grid,
            maps=self.found,
            organ=organ | region,
            tissues={} if fractions is None else {
                "fibroglandular": fractions.fibroglandular, "adipose": fractions.adipose
            },
            region=region,
            curves=self._curves(region, organ),
            resolution=self.resolution,
            edge=self.edge,
            findings=tuple(check_intake(self.intake, self.visit.folder.name)),
            notes=tuple(self.notes),
            acquisition={
                key: value
                for key, value in (
                    ("vendor", self.dce.vendor), ("field_strength", self.dce.field_strength),
                    ("sequence", self.dce.sequence),
                )
                if value is not None
            },
        )  # fmt: skip

    # Helpers ---------------------------------------------------------------------------------------------------------

    def _spread(self, name: str, units: str, fit: VoxelFit, mask: np.ndarray, method: str, scale: float = 1.0) -> None:
        """A fit of the mask's voxels as a map."""
        shape = self.grid.shape
        values, sd = np.full(shape, np.nan), np.full(shape, np.nan)
        code = np.full(shape, Code.OUTSIDE, np.uint8)
        values[mask], sd[mask], code[mask] = scale * fit[name], scale * fit.sd(name), fit.code
        self.found[name] = Map(name, units, values, sd, code, method)

    def _plain(self, name: str, units: str, values: np.ndarray, method: str) -> None:
        self.found[name] = Map(name, units, values, method=method)

    def _here(self, series: Series) -> Series:
        return series if series.grid.same_as(self.grid) else resample_series(series, self.grid)

    # Steps -----------------------------------------------------------------------------------------------------------

    def _bolus(self) -> None:
        """When the agent arrives, from the voxels that brighten most."""
        signal = self.dce.signal(self.inside)
        with np.errstate(invalid="ignore"):
            rise = np.nanmax(signal, 1) - signal[:, 0]
        rise = np.where(np.isfinite(signal).all(1), rise, -np.inf)
        self._arrives(signal)
        count = max(int(BRIGHTEST * len(rise)), 10)
        self.curve = signal[np.argsort(rise)[-count:]].mean(0)
        self.baseline = baseline_samples(self.curve, self.times)
        self.arrival = float(arrival_time(self.curve, self.times)[0])
        self.notes.append(
            f"The agent arrives {self.arrival - self.times[0]:.0f} s after the first image; "
            f"{len(self.baseline)} images lie before it."
        )

    def _arrives(self, signal: np.ndarray) -> None:
        """Refuse a series in which nothing brightens: chosen by some images, voxels must rise in the others, too."""
        if signal.shape[1] < 4:
            return
        whole = signal[np.isfinite(signal).all(1)]
        rise = whole[:, 2::2].max(1) - whole[:, 0]
        curve = whole[np.argsort(rise)[-max(int(BRIGHTEST * len(rise)), 10) :]].mean(0)
        # The first image is low where it was chosen for that; the second was not chosen by.
        gain = float(curve[1::2].max()) / max(float(curve[1]), 1e-12) - 1
        if not gain > LEAST_RISE:
            raise InputError(
                f"{self.dce.name}: the voxels that brighten most do so by {100 * gain:.0f} % over "
                f"{self.times[-1] - self.times[0]:.0f} s; expected more than {100 * LEAST_RISE:.0f} %. No contrast "
                "agent arrives within the series, or it is there from the start: check that all images were exported."
            )

    def _images(self) -> None:
        """Signal before, early and late after the agent."""
        after = self.times - self.arrival
        late = min(LATE, float(after[-1]))  # the nearest where a protocol ends earlier; the note says when
        data = np.asarray(self.dce.data)
        self.exam = Exam.of_series(data, self.times, self.baseline, self.grid.spacing, arrival=self.arrival, late=late)
        for name in ("before", "early", "late"):
            self._plain(name, "1", getattr(self.exam, name), f"signal of {self.dce.name}")
        taken = [float(after[np.abs(after - t).argmin()]) for t in (EARLY, late)]
        self.notes.append(f"Early and late images: {taken[0]:.0f} and {taken[1]:.0f} s after the agent.")

    def _organ(self) -> np.ndarray:
        before = np.asarray(self.found["before"].values, float)
        if self.organ_name != "breast":
            return self.inside
        organ = breast_mask(np.nan_to_num(before), self.grid.spacing)
        self.notes.extend((*organ.notes, *organ.doubts))
        return np.asarray(organ.mask)

    def _t1(self) -> None:
        """T1 and the flip-angle factor in the body."""
        b1: np.ndarray | None = None
        maps = self.intake.of(Kind.B1)
        if maps:
            b1 = np.asarray(resample(np.asarray(maps[0].data[0], float), maps[0].grid, self.grid))
            self._plain("B1", "1", b1, f"measured, {maps[0].name}")
        parts = [self._here(s) for kind in (Kind.VFA, Kind.INVERSION) for s in self.intake.of(kind)]
        if not parts:
            self.intake.one(Kind.VFA)  # says what is missing and why
        found = t1_map(parts, self.inside, b1)
        self.b1 = found.b1
        self._spread("T1", "s", found.fit, self.inside, found.method)
        if found.fitted and found.b1 is not None:
            self._plain("B1", "1", np.where(self.inside, found.b1, np.nan), f"fitted, {found.method}")
        self.notes.extend(found.notes)

    def _convert(self, signal: np.ndarray, voxels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        factor = None if self.b1 is None else self.b1.ravel()[voxels]
        t10 = np.asarray(self.found["T1"].values, float).ravel()[voxels]
        found = concentration(signal, t10, self.spoiled, self.agent, self.baseline, b1=factor,
                              ceiling=_ceiling(self.dce))  # fmt: skip
        return found.values, found.code

    def _dynamic(self) -> None:
        """Tracer-kinetic maps and descriptors."""
        self.agent = self.settings.agent or self._agent()
        self.input = self._input()
        fit = fit_volume(
            np.asarray(self.dce.data), self.times, self.input, self.settings.model, convert=self._convert,
            mask=self.inside,
        )  # fmt: skip
        self.fit = fit
        inside = self.inside.ravel()
        part = VoxelFit(fit.names, fit.units, fit.values[inside], fit.covariance[inside], fit.rss[inside],
                        fit.code[inside], fit.samples, fit.known_noise)  # fmt: skip
        model = type(self.settings.model).__name__
        for name, units in zip(fit.names, fit.units, strict=True):
            self._spread(name, units, part, self.inside, f"{model}, exact convolution, {self.input_from}")
        signal = self.dce.signal(self.inside)
        curves = enhancement(signal, self.times, self.baseline, arrival=self.arrival)
        before, early, late = (np.asarray(self.found[n].values, float) for n in ("before", "early", "late"))
        with np.errstate(invalid="ignore", divide="ignore"):
            enhanced, ratio = (early - before) / before, (early - before) / (late - before)
        whole = np.full(self.grid.shape, np.nan)
        whole[self.inside] = curves.auc90
        self._plain("AUC90", "s", whole, "area under the relative enhancement, 90 s from the arrival")
        for name, values in (("PE", enhanced), ("SER", np.where(enhanced > 0.1, ratio, np.nan))):
            self._plain(name, "1", np.where(self.inside & np.isfinite(values), values, np.nan), "early and late images")
        if {"Ktrans", "ve", "vp"} <= set(fit.names):
            supply = np.full(self.grid.shape, np.nan)
            supply[self.inside] = tofts_supply(
                part["Ktrans"], part["ve"], part["vp"], self.input.times, np.asarray(self.input.plasma)
            )
            self._plain("supply", "mM s", supply, "area under the fitted curve of the extended Tofts model")

    def _agent(self) -> Relaxivity:
        name, field = self.dce.contrast_agent, self.dce.field_strength
        if name is None or field is None:
            raise InputError(
                f"{self.dce.name}: contrast agent {name!r} at {field} T; expected both, for the relaxivity. Add "
                "'ContrastBolusIngredient' and 'MagneticFieldStrength' to the sidecar."
            )
        return relaxivity(name, field)

    def _input(self) -> InputFunction:
        """Measured in the images, or a population's from the arrival on."""
        haematocrit = 0.42 if self.visit.haematocrit is None else self.visit.haematocrit
        end = float(self.times[-1] - self.times[0])
        chosen = self.settings.population
        if chosen is None:
            # Signals, not concentrations: voxels of an artery saturate one by one, their mean does not.
            signal = self.dce.signal(self.inside)
            try:
                artery = select_artery(signal - signal[:, self.baseline].mean(1, keepdims=True), self.times)
                t10 = float(np.nanmedian(np.asarray(self.found["T1"].values)[self.inside][artery]))
                factor = None if self.b1 is None else float(np.mean(self.b1[self.inside][artery]))
                mean = signal[artery].mean(0, keepdims=True)
                blood = concentration(mean, t10, self.spoiled, self.agent, self.baseline, b1=factor)
                found = input_from_mask(blood.values, np.ones(1, bool), self.times, haematocrit)
            except InputError as error:
                self.notes.append(f"No arterial input was found in the images ({error})")
            else:
                peak = float(np.max(found.plasma))
                if PEAK[0] <= peak <= PEAK[1]:
                    self.input_from = "input measured in the images"
                    self.notes.append(f"Arterial input: mean of {int(artery.sum())} voxels, peak {peak:.1f} mM.")
                    step = float(np.median(np.diff(self.times)))
                    return found if step <= FIRST_PASS else self._between_samples(blood.values[0], haematocrit)
                self.notes.append(f"The arterial input found in the images peaks at {peak:.2g} mM and was not used.")
        start = self.arrival - float(self.times[0])
        population = chosen if chosen is not None else Parker(arrival=start)
        self.input_from = f"population input {type(population).__name__}"
        self.notes.append(f"Arterial input: that of a population ({type(population).__name__}).")
        found = InputFunction.of(population, end, haematocrit)
        return InputFunction(found.times + float(self.times[0]), found.plasma)

    def _between_samples(self, blood: np.ndarray, haematocrit: float) -> InputFunction:
        """A population's first pass through the measured samples, where these lie too far apart to show it.

        Scale and arrival by least squares; a straight line between samples would cut the first pass off, and Ktrans
        would come out too high.
        """
        clock = self.times - self.times[0]
        start, step = self.arrival - self.times[0], float(np.median(np.diff(self.times)))
        best: tuple[float, Parker] | None = None
        for arrival in np.linspace(max(start - step, 0.0), start + step, 81):
            shape = Parker(arrival=float(arrival)).blood(clock)
            scale = float(blood @ shape / max(shape @ shape, 1e-12))
            misfit = float(np.sum((blood - scale * shape) ** 2))
            if scale > 0 and (best is None or misfit < best[0]):
                best = misfit, Parker(arrival=float(arrival), scale=scale)
        if best is None:
            return InputFunction.from_blood(self.times, blood, haematocrit)
        self.notes.append(
            f"Images are {step:.0f} s apart, too far for the first pass of the bolus: the population input of Parker "
            f"was put through the measured samples (scale {best[1].scale:.2f}); Ktrans rests on it."
        )
        self.input_from = "population input scaled to the images"
        found = InputFunction.of(best[1], float(clock[-1]), haematocrit)
        return InputFunction(found.times + float(self.times[0]), found.plasma)

    def _diffusion(self) -> None:
        """ADC with its error, on the grid of the dynamic series."""
        dwi = self.intake.one(Kind.DWI)
        before = self.found["before"].values
        fixed = Series(Kind.ANATOMY, np.asarray(before, np.float32)[None], self.grid, name="signal before the agent")
        try:
            dwi, alignment = align(dwi, fixed, Rigid(), mask=self.inside)
            self.notes.append(f"Diffusion series moved onto the dynamic one: {_size(alignment.transform.matrix)}.")
        except InputError as error:
            self.notes.append(f"The diffusion series was not aligned with the dynamic one: {error}")
        # Size of the diffusion series' voxels along the axes (z, y, x) of the grid.
        axes = np.linalg.inv(self.grid.affine[:3, :3] / np.linalg.norm(self.grid.affine[:3, :3], axis=0))
        z, y, x = np.linalg.norm(axes @ dwi.grid.affine[:3, :3], axis=1)[::-1]
        self.resolution = (float(z), float(y), float(x))
        dwi = self._here(dwi)
        assert dwi.b_values is not None
        signal = dwi.signal(self.inside)
        directions = self._directions(dwi)
        rough = fit_adc(signal, dwi.b_values, directions=directions)
        # One noise level for the series: a voxel's own few residuals say little about it.
        known = np.isfinite(signal).all(1)
        sigma = residual_noise(rough, np.where(known, signal.min(1, where=known[:, None], initial=np.inf), np.nan))
        fit = fit_adc(signal, dwi.b_values, noise=Gaussian(sigma), directions=directions,
                      ceiling=_ceiling(dwi))  # fmt: skip
        self._spread("ADC", "mm^2/s", fit, self.inside, "weighted log-linear, noise from all residuals")
        self.dwi = dwi

    def _directions(self, dwi: Series) -> np.ndarray | None:
        """Gradient directions, over which signals must be averaged yet; None where the scanner has done so."""
        if dwi.directions is None or dwi.b_values is None:
            return None
        without = (dwi.b_values > SAME_B) & ~dwi.directions.any(1)
        if without.any() and dwi.directions.any():
            self.notes.append(
                f"{int(without.sum())} of the diffusion images have no direction; all are taken as averages over them."
            )
        return None if without.any() else dwi.directions

    def _tissues(self, organ: np.ndarray) -> Tissues | None:
        if self.organ_name != "breast":
            if self.settings.tissue is not None:
                raise InputError(f"organ {self.organ_name}: tissues are told apart in a breast only. Leave them out.")
            return None
        if self.dce.fat_saturated is None:
            self.notes.append("The dynamic series does not say whether fat is suppressed; taken as not suppressed.")
        method = FuzzyClusters() if self.settings.tissue is None else self.settings.tissue
        found = method.tissues(self.exam, organ, fat_suppressed=bool(self.dce.fat_saturated))
        inside = np.asarray(found.bias)[organ & np.isfinite(found.bias)]
        low, high = np.quantile(inside, [0.025, 0.975]) if inside.size else (1.0, 1.0)
        self.notes.append(
            f"Coil shading from {low:.2f} to {high:.2f} (N4, middle 95 % of the organ) was taken out of the images by "
            "which tissues are told apart. T1, concentration, ADC and enhancement are ratios of signals, in which it "
            "cancels; their series were left as they are."
        )
        self.notes.extend(found.notes)
        if found.spread is not None:
            spread = np.where(organ, found.spread, np.nan)
            self._plain("tissue_spread", "1", spread, "standard deviation between the network's views")
        return found

    def _region(self, organ: np.ndarray, fractions: Tissues | None) -> np.ndarray:
        exam = replace(self.exam, adc=np.asarray(self.found["ADC"].values, float))
        found = self.settings.region.region(exam, organ, fractions)
        self.edge = found.edge
        self.notes.append(" ".join(found.notes))
        if found.probability is not None:
            self._plain("tumour_probability", "1", found.probability, found.method)
        if found.entropy is not None:
            self._plain("tumour_entropy", "bit", found.entropy, found.method)
        return np.asarray(found.mask, bool)

    def _curves(self, region: np.ndarray, organ: np.ndarray) -> tuple[Curve, ...]:
        """Measured and fitted curves of the tumour's middle, its best supplied voxel and tissue outside."""
        valid = np.isfinite(np.asarray(self.found[self.fit.names[0]].values)) & np.isfinite(
            np.asarray(self.found["ADC"].values)
        )
        places: list[tuple[str, tuple[int, ...]]] = []
        if (region & valid).any():
            where = np.argwhere(region & valid)
            middle = where[np.argmin(((where - where.mean(0)) ** 2).sum(1))]
            best = where[np.argmax(np.asarray(self.found[self.fit.names[0]].values)[tuple(where.T)])]
            places += [("tumour, middle", tuple(middle)), ("tumour, largest Ktrans", tuple(best))]
        outside = np.argwhere(organ & ~region & valid)
        if len(outside):
            places.append(("organ, outside of the tumour", tuple(outside[len(outside) // 2])))
        found: list[Curve] = []
        knots, plasma = torch.tensor(self.input.times), torch.tensor(np.asarray(self.input.plasma))
        for title, place in places:
            flat = int(np.ravel_multi_index(place, self.grid.shape))
            voxel = (int(place[0]), int(place[1]), int(place[2]))
            signal = np.array([sample[place] for sample in self.dce.data], float)[None]
            measured, _ = self._convert(signal, np.array([flat]))
            values = torch.tensor(self.fit.values[flat][None])
            fitted = self.settings.model.concentration(values, torch.tensor(self.times), knots, plasma)[0].numpy()
            found.append(Curve(f"DCE, {title}", voxel, self.times, "time, s", measured[0], fitted, "agent, mM"))
            assert self.dwi.b_values is not None
            b = np.asarray(self.dwi.b_values, float)
            decay = np.array([sample[place] for sample in self.dwi.data], float)
            adc = float(self.found["ADC"].values[place])
            model = np.exp(-b * adc)
            scale = float(decay @ model / (model @ model))
            found.append(Curve(f"DWI, {title}", voxel, b, "b, s/mm²", decay, scale * model, "signal"))
        return tuple(found)


def _ceiling(series: Series) -> float | None:
    """Smallest value at which a sample of the series may be cut off; None where the storage says nothing."""
    known = () if series.ceiling is None else series.ceiling[np.isfinite(series.ceiling)]
    return float(np.min(known)) if len(known) else None


def _size(matrix: np.ndarray) -> str:
    """Turn of a rigid movement in words."""
    angle = np.degrees(np.arccos(np.clip((np.trace(matrix[:3, :3]) - 1) / 2, -1, 1)))
    return f"turned by {angle:.1f}°"
