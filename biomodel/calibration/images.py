"""Calibration data from images: the initial state, the residuals and their weights.

The first visit gives the initial state: the measured cell fraction inside the region and, outside, a halo that falls
off with the distance from the region's edge (cells that nobody sees). Later visits give residuals: inside the region
the measured cell fraction, outside only that nothing visible was seen, so that a prediction is held against it where
it exceeds the visible fraction.

Two errors of the measurement are kept apart. The one shared by all voxels of a visit (repeatability of a tumour's
mean ADC) is an unknown shift per visit, calibrated beside the model's parameters. The one of single voxels also sits
in the initial state, from where the model carries it to later visits; it is marginalised exactly (to first order) by
weighting residuals with the inverse of C = R + J R0 J', where J is the derivative of the predictions by the initial
state, applied matrix-free with conjugate gradients.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy.ndimage import distance_transform_edt

from biomodel.calibration.discrepancy import blocks_of, edge_groups, inflation, weights
from biomodel.calibration.image_weights import Weights
from biomodel.calibration.initial_state import InitialState, shift_name, shift_parameter, start_noise
from biomodel.calibration.placement import Outline, Placement
from biomodel.errors import CalibrationError
from biomodel.models import ReactionDiffusion
from biomodel.observation import Seen, observe
from biomodel.parameters import Normal, Parameter
from biomodel.patient import Patient
from biomodel.solvers.base import Built, Solver
from biomodel.treatments import Jump, Kill

#: Halving the voxels removes three quarters of the error of a second-order scheme, so the whole error would be 4/3 of
#: the change if the start were known inside the voxels. It is not, and tumour fronts are hardly wider than voxels: the
#: factor is taken between none and 4/3 (two standard deviations either way).
GRID = Parameter(
    "error", "1", Normal(2 / 3, 1 / 3), (-2.0, 4.0), "Richardson extrapolation of a second-order scheme",
    "error of the grid, in units of the change from voxels half as large",
)  # fmt: skip
#: Largest computing box (voxels) on which the grid is refined to estimate its error.
REFINABLE = 150_000
#: Tissue around the regions, mm, that a model with mechanics needs: held 20 mm away instead of at the organ's edge, the
#: stress of virtual breast tumours changes by at most 3 %.
SUPPORT = 20.0
#: Voxels farther from every region than this say nothing new; mm.
NEIGHBOURHOOD = 12.0
#: Least standard deviation of a voxel's cell fraction: no model is nearer than that to any tissue.
LEAST_SD = 0.005
#: Relative tolerance of the runs that carry noise from the initial state to the residuals' weights.
ROUGH = 0.02


def computing_box(patient: Patient, model: ReactionDiffusion, days: float) -> tuple[slice, slice, slice]:
    """Box around all regions with room for `days` of spread at an upper diffusivity and growth of the priors."""
    inside = np.logical_or.reduce([v.region for v in patient.visits if v.region is not None])
    upper = {n: (p.typical if p.fixed else p.prior.quantile(0.95)) for n, p in model.parameters.items()}
    speeds = {n: v for n, v in upper.items() if model.parameters[n].units == "mm^2/day"}
    d = max((v for n, v in speeds.items() if n.startswith("diffusion.")), default=0.0)
    k = max((v for n, v in upper.items() if n.startswith("growth.")), default=0.0)
    # Whichever is smaller bounds where visible tumour can be: diffusion alone is too little, an untreated front too
    # much for most; six millimetres are kept in any case.
    margin = 6.0 + min(3 * np.sqrt(2 * d * days), 2 * np.sqrt(d * k) * days + 2 * np.sqrt(2 * d * days))
    if model.auxiliaries:
        margin = max(margin, SUPPORT)
    return patient.domain.bounding_box(inside, float(margin))


def field_maps(model: ReactionDiffusion, patient: Patient) -> dict[str, np.ndarray]:
    """Fields that terms read from the visits (the drug map of the first visit that has one), on the whole grid."""
    found = {}
    if "drug_map" in model.fields:
        maps = [v.drug_map for v in patient.visits if v.drug_map is not None]
        if not maps:
            raise CalibrationError(
                f"patient {patient.id}: the model reads 'drug_map', but no visit has one; add it to the manifest or "
                "use a treatment without map."
            )
        found["drug_map"] = maps[0]
    return found


def _telling(seen: Seen, visible: float) -> np.ndarray:
    """Voxels of a region whose ADC says more than that tumour is there, bool (z, y, x).

    Where tissues mix, at the edge, the measured fraction may be less certain than the visible one is small: then that
    tumour was seen says more. Errors that are alike everywhere are no such case.
    """
    if seen.sd is None or not seen.region.any():
        return seen.region
    limit = max(visible, 3 * float(np.quantile(seen.sd[seen.region], 0.1)))
    return np.asarray(seen.region & (seen.sd <= limit))


class ImageProblem:
    """Residuals, sensitivities and weights of one imaged patient.

    Raises
    ------
    CalibrationError
        If there is no tumour in the first visit, or no later visit to calibrate on.
    """

    def __init__(self, model: ReactionDiffusion, patient: Patient, solver: Solver):
        self.model, self.patient = model, patient
        seen = [s for s in (observe(patient, v) for v in patient.visits) if s is not None]
        if not seen or not seen[0].region.any():
            raise CalibrationError(
                f"patient {patient.id}: no tumour region at the first visit; there is nothing to calibrate. Start the "
                "record at the first visit where tumour was segmented."
            )
        if len(seen) < 2:
            raise CalibrationError(
                f"patient {patient.id}: only visit {seen[0].number} has a region; a calibration needs at least two "
                "visits (patient.until(visit=2) or later)."
            )
        settings = patient.cellularity
        self.visible = settings.visible_fraction if settings else 0.15
        self.cv = settings.repeatability_cv if settings else 0.0
        self.days = np.array([s.day for s in seen])
        box = computing_box(patient, model, float(self.days[-1] - self.days[0]))
        self.box, self.domain = box, patient.domain.crop(box)
        crop = [s.crop(box) for s in seen]
        self.initial = InitialState.of(crop[0], self.visible, self.cv, self.domain, settings)
        self.start_noise = start_noise(self.initial.seen, self.domain, settings)
        self.later = crop[1:]
        fields = {k: np.asarray(v)[box] for k, v in field_maps(model, patient).items()}
        self.simulation: Built = solver.build(model, self.domain, patient.schedule, fields, start=self.days[0])
        self.rough: Built = replace(solver, rtol=max(solver.rtol, ROUGH)).build(
            model, self.domain, patient.schedule, fields, start=self.days[0]
        )
        nuisance = list(zip(self.initial.names, self.initial.parameters, strict=True))
        later = [s.number for s in self.later if s.fraction is not None and self.cv]
        nuisance += [(shift_name(n), shift_parameter(n)) for n in later]
        if np.prod(self.domain.shape) <= REFINABLE:
            nuisance.append(("grid.error", GRID))
        self._rows()
        self.placement = Placement(self.later, self.domain.spacing, self.rows & ~self.measured, settings)
        nuisance += [(p.name, p) for p in self.placement.unknowns]
        self.parameters: dict[str, Parameter] = {n: model.parameters[n] for n in model.free} | dict(nuisance)
        self.names = tuple(self.parameters)
        self.acting = {n for n in model.free if not n.startswith(tuple(_idle(model, patient, self.days[-1])))}
        self.fine_plan: Any = None
        self.coarse_plan: Any = None
        #: While the search is far from the optimum, runs are no more accurate than the weights.
        self.searching = False
        self.solves = 0
        # Change of the measured initial state towards its posterior mean, about which the model is linearised.
        self.update = np.zeros(self.domain.shape)
        self.grid_error = np.zeros(int(self.rows.sum()))

    def _rows(self) -> None:
        """Lay out the residuals: (time, voxel) of measured rows first, then of rows where nothing was seen."""
        any_region = np.logical_or.reduce([self.initial.seen.region] + [s.region for s in self.later])
        near = distance_transform_edt(~any_region, sampling=self.domain.spacing) <= NEIGHBOURHOOD
        settings = self.patient.cellularity
        # Noise of the cell fraction just at the visible level, for rows where only visibility is known.
        visible_sd = 0.05
        if settings:
            adc = settings.adc_w - self.visible * (settings.adc_w - settings.adc_min)
            visible_sd = max(settings.voxel_cv * adc / (settings.adc_w - settings.adc_min), 1e-3)
        shape = (len(self.later), *self.domain.shape)
        self.measured, self.rows = np.zeros(shape, bool), np.zeros(shape, bool)
        columns: list[list[np.ndarray]] = [[], [], [], []]
        for t, s in enumerate(self.later):
            self.measured[t] = _telling(s, self.visible) if s.fraction is not None else False
            outline = Outline.of(s, self.domain.spacing, settings)
            if outline is not None:
                self.measured[t] &= outline.sure
            self.rows[t] = s.region | (near & self.domain.mask)
            here, seen = self.rows[t], self.measured[t][self.rows[t]]
            sign = np.where(seen, 0.0, np.where(s.region[here], -1.0, 1.0))
            found = [sign, np.zeros(sign.shape), np.full(sign.shape, visible_sd**2), np.zeros(sign.shape)]
            if s.fraction is not None and s.sd is not None and s.response is not None:
                found[1] = np.where(seen, s.fraction[here], 0.0)
                found[2] = np.where(seen, np.maximum(s.sd[here], LEAST_SD) ** 2, visible_sd**2)
                found[3] = np.where(seen, self.cv * s.response[here], 0.0)
            for column, part in zip(columns, found, strict=True):
                column.append(part)
        self.sign, self.value, self.variance, self.response = (np.concatenate(c) for c in columns)
        self.together = 1.0
        if settings and settings.noise_length_mm:
            # Seen through predictions that are smooth over that length, correlated noise is white noise of as many
            # fewer voxels.
            steps = [s for s, n in zip(self.domain.spacing, self.domain.shape, strict=True) if n > 1]
            self.together = float(np.prod([max(1.0, settings.noise_length_mm / s) for s in steps]))
            self.variance = self.variance * self.together
        self.time_of_row = np.nonzero(self.rows)[0].astype(np.int16)
        first = self.initial.seen  # with noise only where it is read
        self.initial_variance = np.zeros(self.domain.shape) if first.sd is None else first.sd**2 * first.region
        # As if the noise of the first map were carried on voxel by voxel, without smoothing or growth.
        self.spread = np.broadcast_to(self.initial_variance * self.together, self.rows.shape)[self.rows]
        self.blocks = blocks_of(self.rows, self.domain.spacing)
        regions = [s.region for s in (self.initial.seen, *self.later)]
        self.groups = edge_groups(self.rows, regions, self.domain.spacing)
        self.trust = np.ones(len(self.variance))
        self.inflation = 1.0

    # Evaluation -------------------------------------------------------------------------------------------------------

    @property
    def plain(self) -> bool:
        """Whether images and outlines lie where they should and the voxels' noise is independent."""
        return not self.placement.active and self.initial.outline is None and self.start_noise is None

    def require_plain(self, method: str) -> None:
        """Refuse what only `MAP` and `Laplace` can do.

        Raises
        ------
        CalibrationError
            If not `plain`.
        """
        if not self.plain:
            raise CalibrationError(
                f"patient {self.patient.id}: the cellularity states errors of outlines or registration, or correlated "
                f"noise (edge_sd, region_shift_sd, misalignment_sd, noise_length), which {method} cannot take into "
                "account yet; calibrate with Laplace(), or set these to 0."
            )

    @property
    def count(self) -> int:
        """Number of measured values."""
        return int(self.measured.sum())

    def values(self, z: np.ndarray) -> dict[str, float]:
        """Parameter values by name from transformed coordinates (p,)."""
        return {n: float(p.prior.to_value(v)) for (n, p), v in zip(self.parameters.items(), z, strict=True)}

    def _split(self, values: dict) -> dict:
        return {n: values[n] for n in self.model.free}

    def _arguments(self, values: dict) -> tuple[dict, torch.Tensor, np.ndarray]:
        u0 = self.initial.state({n: np.array([values[n]]) for n in self.initial.names}) + self.update
        return self._split(values), torch.tensor(u0), self.days[1:]

    @property
    def plan(self) -> Any:
        """Steps of the model's runs."""
        return self.coarse_plan if self.searching else self.fine_plan

    def replan(self, z: np.ndarray) -> None:
        """Choose the steps anew at these coordinates."""
        arguments = self._arguments(self.values(z))
        self.fine_plan = self.simulation.plan(*arguments)
        # Weights need no more accuracy than the noise is known.
        self.coarse_plan = self.rough.plan(*arguments)
        if "grid.error" in self.names:
            self.solves += 9
            self.grid_error = self.simulation.grid_error(*arguments, plan=self.fine_plan).cpu().numpy()[self.rows]

    def _residual(self, predicted: np.ndarray, values: dict) -> tuple[np.ndarray, np.ndarray]:
        """Residuals of all rows (n,), 0 where nothing counts, and the indices of the rows that count."""
        shift = np.array([values.get(shift_name(s.number), 0.0) for s in self.later])[self.time_of_row]
        excess = self.sign * (predicted - self.visible)
        active = (self.sign == 0) | (excess > 0)
        residual = np.where(self.sign == 0, self.value - predicted - shift * self.response, -self.sign * excess)
        return np.where(active, residual, 0.0), np.flatnonzero(active)

    def _predict(self, values: dict) -> np.ndarray:
        """Predicted rows, with the estimated error of the grid."""
        self.solves += 1
        u = self.simulation(*self._arguments(values), plan=self.plan)[0].cpu().numpy()
        return self.seen(u, values)[self.rows] + values.get("grid.error", 0.0) * self.grid_error

    def seen(self, u: np.ndarray, values: dict) -> np.ndarray:
        """Maps (..., T, z, y, x) as the later visits show them."""
        return self.placement.seen(u, values) if self.placement.active else u

    def residual(self, z: np.ndarray) -> np.ndarray:
        """Residuals alone, by one forward run."""
        values = self.values(z)
        return self._residual(self._predict(values), values)[0]

    def refine(self, linear: ImageLinear) -> float:
        """Move the initial state to its posterior mean given `linear`; how far it went, in units of its noise.

        Derivatives taken at the measured state would carry its noise, and correlate with the residuals that the same
        noise makes: the diffusivity would come out too high (errors in variables). At the posterior mean they do not.
        """
        if linear.weights.linear is None:
            return 0.0
        new = linear.weights.pulled(linear.weighted[None])[0]
        moved = float(np.abs(new - self.update).max() / np.sqrt(max(self.initial_variance.max(), 1e-30)))
        self.update = new
        return moved

    def reweigh(self, linear: ImageLinear, precision: np.ndarray) -> float:
        """Weigh outliers and the data as a whole anew by the misfit at `linear`; the relative change of the latter.

        See :mod:`biomodel.calibration.discrepancy`.
        """
        residual = np.zeros(len(self.variance))
        residual[linear.weights.active] = linear.residual
        self.trust = weights(residual, self.variance + self.spread, self.groups)
        before = self.inflation
        scores, blocks = linear.jacobian * linear.weighted, self.blocks[linear.weights.active]
        self.inflation = inflation(scores, blocks, linear.information, precision)
        return abs(self.inflation / before - 1)

    def shifts(self, active: np.ndarray) -> np.ndarray:
        """Derivatives (p, rows that count) of the predictions by the shifts of the later visits."""
        found = np.zeros((len(self.names), len(active)))
        for t, s in enumerate(self.later):
            if shift_name(s.number) in self.names:
                here = self.time_of_row[active] == t
                found[self.names.index(shift_name(s.number))] = np.where(here, self.response[active], 0.0)
        return found

    def chain(self, z: np.ndarray) -> np.ndarray:
        """Derivatives (p,) of the values by the transformed coordinates."""
        return np.array([_slope(p, v) for p, v in zip(self.parameters.values(), z, strict=True)])

    def linearise(self, z: np.ndarray, exact: bool) -> ImageLinear:
        """Residuals with derivatives and weights at z; `exact` marginalises the initial state's noise by C."""
        values = self.values(z)
        params, u0, times = self._arguments(values)
        if self.plan is None:
            self.replan(z)
        du0 = np.zeros((len(self.names), 1, *self.domain.shape))
        wrt: list[str | None] = [n if n in self.model.free else None for n in self.names]
        for name, derivative in zip(self.initial.names, self.initial.derivatives(values), strict=True):
            du0[self.names.index(name), 0] = derivative
        moving = [i for i, n in enumerate(self.names) if n in self.acting or n in self.initial.names]
        # Maps that are moved need their neighbours; otherwise the rows are enough.
        wanted = None if self.placement.active else self.rows
        u, du = self.simulation.sensitivities(
            params, u0, times, [wrt[i] for i in moving], plan=self.plan, du0=torch.tensor(du0[moving]), rows=wanted
        )
        self.solves += 1 + len(moving)
        whole, changes = u[0].cpu().numpy(), du[:, 0].cpu().numpy()
        placed: dict[str, np.ndarray] = {}
        if self.placement.active:
            placed = {n: d[self.rows] for n, d in self.placement.derivatives(whole, values).items()}
            whole, changes = self.seen(whole, values)[self.rows], self.seen(changes, values)[:, self.rows]
        predicted = whole + values.get("grid.error", 0.0) * self.grid_error
        residual, active = self._residual(predicted, values)
        jacobian = np.zeros((len(self.names), len(active)))
        if "grid.error" in self.names:
            jacobian[self.names.index("grid.error")] = self.grid_error[active]
        for i, d in zip(moving, changes, strict=True):
            jacobian[i] = d[active]
        for name, d in placed.items():
            jacobian[self.names.index(name)] = d[active]
        jacobian = (jacobian + self.shifts(active)) * self.chain(z)[:, None]
        weights = Weights(self, params, u0, times, active, exact, values)
        carried = weights.carried(self.update)
        return ImageLinear(self, residual[active] + carried, jacobian, weights, carried)


def _idle(model: ReactionDiffusion, patient: Patient, day: float) -> list[str]:
    """Name prefixes of treatments that have not begun by a day: the data cannot depend on them."""
    begun = {d.agent for d in patient.schedule.doses if d.day < day}
    begun |= {o.agent for o in patient.schedule.ongoing if o.start_day < day}
    kills = [t for t in model.treatments if isinstance(t, Kill) and not begun.intersection(t.agents)]
    jumps = (
        []
        if any(f.day < day for f in patient.schedule.fractions)
        else [t for t in model.treatments if isinstance(t, Jump)]
    )
    return [f"{t.name}." for t in (*kills, *jumps)]


def _slope(parameter: Parameter, z: float) -> float:
    """Derivative of the value by the transformed coordinate."""
    step = 1e-5
    prior = parameter.prior
    return (float(prior.to_value(z + step)) - float(prior.to_value(z - step))) / (2 * step)


@dataclass(eq=False)
class ImageLinear:
    """Gauss-Newton quantities at one point: objective, gradient and Hessian of the data, and their weights."""

    problem: ImageProblem
    residual: np.ndarray
    jacobian: np.ndarray
    weights: Weights
    carried: np.ndarray

    def __post_init__(self):
        solved = self.weights.solve(np.vstack((self.residual, self.jacobian)))
        self.weighted = solved[0]
        self.inflation = self.problem.inflation
        self.objective = 0.5 * float(self.residual @ solved[0]) / self.inflation
        self.gradient = -self.jacobian @ solved[0] / self.inflation
        information = self.jacobian @ solved[1:].T
        # Conjugate gradients solve to a tolerance, so that a direction without information may come out negative.
        values, vectors = np.linalg.eigh((information + information.T) / 2)
        self.information = (vectors * np.maximum(values, 0.0)) @ vectors.T
        self.hessian = self.information / self.inflation

    def trial(self, z: np.ndarray) -> float:
        """Objective at another point, with these weights held."""
        residual = self.problem.residual(z)[self.weights.active] + self.carried
        return 0.5 * float(residual @ self.weights.solve(residual[None])[0]) / self.inflation

    def log_likelihood(self) -> float:
        """Log-likelihood of the measured values: Gaussian, divided by the inflation where the noise is understated."""
        gaussian = 0.5 * self.weights.log_determinant() + 0.5 * self.problem.count * np.log(2 * np.pi)
        return -self.objective - gaussian / self.inflation
