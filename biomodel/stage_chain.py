"""One calibrated model as a function of the errors of every stage between the scanner and the forecast.

A draw from the posterior is made from errors that are independent of each other, stage by stage: the data are measured
anew with the stated errors and the prior is moved by its own spread, and the calibration answers (randomise, then
optimise: Bardsley et al. 2014, SIAM J Sci Comput 36:A1895, doi:10.1137/140964023). With the model linear about the fit
the answer to a change r of the residuals and xi of the prior's mean is

    dz = P J' C^-1 r / inflation + P P0^-1 xi,      P = (J' C^-1 J / inflation + P0^-1)^-1,

and for r ~ N(0, inflation C), xi ~ N(0, P0) that has exactly the covariance P of the posterior: nothing is counted
twice. The forecast from there is run in full.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from biomodel.calibration.fit import Fit
from biomodel.calibration.images import ImageProblem, computing_box, field_maps
from biomodel.forecast import first_day, initial_states
from biomodel.schedule import Schedule
from biomodel.stage_errors import DrugMapError, TreatmentError

__all__ = ["STAGES", "Answer", "Chain", "Errors", "Setting", "course", "stage_of"]

#: Every stage, in the order from the scanner to the forecast.
STAGES = ("adc", "drug_map", "registration", "segmentation", "parameters", "model", "treatment", "grid", "misfit")
_PREFIXES = {"adc_shift.": "adc", "misalignment.": "registration", "edge.": "segmentation",
             "region_shift.": "segmentation", "grid.": "grid"}  # fmt: skip


def stage_of(name: str) -> str:
    """Stage to which a calibrated unknown belongs."""
    return next((s for prefix, s in _PREFIXES.items() if name.startswith(prefix)), "parameters")


@dataclass(frozen=True, eq=False)
class Errors:
    """One draw of the errors of all stages, the same for every model.

    Attributes
    ----------
    seed : tuple of int
        From which every stage has a stream of its own.
    """

    seed: tuple[int, ...]

    def rng(self, purpose: str) -> np.random.Generator:
        """The stream of one purpose."""
        return np.random.default_rng(np.random.SeedSequence([*self.seed, zlib.crc32(purpose.encode())]))

    def normal(self, name: str) -> float:
        """Standard normal error of one unknown, by its name."""
        return float(self.rng(name).standard_normal())


@dataclass(frozen=True, eq=False)
class Setting:
    """What one run of a model needs: coordinates, change of the start, treatment, and the drug map if changed."""

    z: np.ndarray
    start: np.ndarray
    schedule: Schedule
    supply: np.ndarray | None


@dataclass(frozen=True, eq=False)
class Answer:
    """What a model's calibration and start make of one draw: dz (p,) by stage, and change of the start."""

    moves: Mapping[str, np.ndarray]
    start: np.ndarray


class Chain:
    """A calibrated model, linearised about its fit, with what its forecast needs.

    Parameters
    ----------
    fit : Fit
        Of an imaged patient.
    until : float
        Day of the forecast.
    drug_map : DrugMapError or None
        Used where the model reads a drug map.
    """

    def __init__(self, fit: Fit, until: float, drug_map: DrugMapError | None):
        self.fit, self.until = fit, until
        self.problem = problem = ImageProblem(fit.model, fit.patient, fit.solver)
        precision = fit.prior.precision
        if fit.initial_update is not None:
            problem.update = fit.initial_update.copy()
        problem.replan(fit.z)
        problem.reweigh(problem.linearise(fit.z, False), precision)
        problem.inflation = fit.inflation
        linear = problem.linearise(fit.z, True)
        weights = linear.weights
        covariance = np.linalg.inv(linear.hessian + precision)
        self.covariance = (covariance + covariance.T) / 2
        self.gain = self.covariance @ weights.solve(linear.jacobian) / linear.inflation
        self.active, self.where = weights.active, weights.where
        #: Answer to the noise of the first map, (p, z, y, x), before its standard deviation.
        self.through = None if weights.linear is None else -weights.carried_back(self.gain)
        stated = problem.variance[weights.active]
        trusted = stated / problem.trust[weights.active]
        if weights.linear is None:
            trusted = trusted + problem.spread[weights.active] / problem.trust[weights.active]
        self.stated = np.sqrt(stated)
        self.excess = np.sqrt(np.maximum(linear.inflation * trusted - stated, 0.0))
        self.more = float(np.sqrt(max(linear.inflation - 1.0, 0.0)))
        self.prior_gain = self.covariance @ precision @ np.linalg.cholesky(fit.prior.covariance)
        self.stage_of = tuple(stage_of(n) for n in fit.names)
        self.supply = field_maps(fit.model, fit.patient).get("drug_map")
        self.drug_map = drug_map if self.supply is not None else None
        self.first = first_day(fit.patient)
        self.box = computing_box(fit.patient, fit.model, until - self.first)
        self.domain = fit.patient.domain.crop(self.box)
        self._counts: tuple[int, ...] | None = None
        self._predicted: np.ndarray | None = None

    # From errors to coordinates ---------------------------------------------------------------------------------------

    def answer(self, errors: Errors) -> Answer:
        """What calibration makes of one draw of errors."""
        problem, shape = self.problem, self.fit.patient.domain.shape
        box = (slice(None), *problem.box)
        moves = {s: np.zeros(len(self.fit.z)) for s in STAGES}
        start = np.zeros(shape, np.float32)
        times = len(problem.later)
        for stage, sd in (("adc", self.stated), ("misfit", self.excess)):
            white = errors.rng(stage).standard_normal((times + 1, *shape), dtype=np.float32)[box]
            moves[stage] += self.gain @ (sd * white[1:].ravel()[self.where])
            first = self._first_noise(white[0])
            if stage == "misfit":
                first = self.more * first
            else:
                start[problem.box] = first
            if self.through is not None:
                moves[stage] += np.tensordot(self.through, first, 3)
        for i, (name, stage) in enumerate(zip(self.fit.names, self.stage_of, strict=True)):
            moves[stage] += self.prior_gain[:, i] * errors.normal(name)
        if self.drug_map is not None:
            change = self._predict(self.draw_supply(errors)) - self._predict(None)
            moves["drug_map"] -= self.gain @ change[self.active]
        return Answer(moves, start[self.box])

    def _first_noise(self, white: np.ndarray) -> np.ndarray:
        noise = self.problem.start_noise
        if noise is None:
            return np.asarray(white * np.sqrt(self.problem.initial_variance))
        return noise.root(white[noise.where])

    def draw_supply(self, errors: Errors) -> np.ndarray | None:
        """The drug map as it may truly be, on the whole grid; None where nothing is said of its error."""
        if self.drug_map is None or self.supply is None:
            return None
        patient = self.fit.patient
        region = next(v.region for v in patient.visits if v.region is not None)
        return self.drug_map.draw(self.supply, region, patient.domain.spacing, errors.rng("drug_map"))

    def _predict(self, supply: np.ndarray | None) -> np.ndarray:
        """Predicted rows of the data at the fit, under another drug map or the given one."""
        problem = self.problem
        if supply is None and self._predicted is not None:
            return self._predicted
        values = problem.values(self.fit.z)
        simulation = problem.simulation
        if supply is not None:
            simulation = self.fit.solver.build(self.fit.model, problem.domain, self.fit.patient.schedule,
                                               {"drug_map": supply[problem.box]}, start=problem.days[0])  # fmt: skip
        with torch.no_grad():
            u = simulation(*problem._arguments(values), plan=problem.fine_plan)[0].cpu().numpy()
        rows = problem.seen(u, values)[problem.rows]
        if supply is None:
            self._predicted = rows
        return rows

    # From coordinates to the forecast ---------------------------------------------------------------------------------

    def run(self, settings: Sequence[Setting]) -> np.ndarray:
        """Volume (cm³), cells in visible tumour and log of all cells, (settings, 3), on the day of the forecast."""
        found = np.zeros((len(settings), 3))
        groups: dict[int, list[int]] = {}
        for i, s in enumerate(settings):
            groups.setdefault(0 if s.supply is None else id(s.supply), []).append(i)
        block = max(1, int(2.5e8 / (8 * np.prod(self.domain.shape) * 8)))
        for members in groups.values():
            for at in range(0, len(members), block):
                part = members[at : at + block]
                found[part] = self._run([settings[i] for i in part])
        return found

    def _run(self, settings: list[Setting]) -> np.ndarray:
        fit = self.fit
        fields = {k: np.asarray(v)[self.box] for k, v in field_maps(fit.model, fit.patient).items()}
        if settings[0].supply is not None:
            fields["drug_map"] = settings[0].supply[self.box]
        z = np.stack([s.z for s in settings])
        values = {n: np.clip(p.prior.to_value(z[:, i]), *p.bounds) for i, (n, p) in enumerate(fit.parameters.items())}
        u0 = initial_states(fit, self.box, self.domain, values, None, np.stack([s.start for s in settings]))
        params = {n: torch.tensor(values[n]) for n in fit.model.free}
        if self._counts is None:
            # Steps for the extremes of the posterior, under the plan; the same for all draws.
            sd = np.sqrt(np.diag(self.covariance))
            extreme = {n: torch.tensor(np.array([
                float(p.prior.to_value(fit.z[i])), float(p.prior.to_value(fit.z[i] + 1.6 * sd[i]))]))
                for i, (n, p) in enumerate(fit.parameters.items()) if n in fit.model.free}  # fmt: skip
            nominal = fit.solver.build(fit.model, self.domain, fit.patient.schedule, fields, start=self.first)
            plan = nominal.plan(extreme, torch.tensor(u0[:1]), [self.until])
            self._counts = tuple(np.diff([0, *plan.outputs]).tolist())
        schedules = [s.schedule for s in settings]
        same = all(s is schedules[0] for s in schedules)
        simulation = fit.solver.build(fit.model, self.domain, schedules[0] if same else schedules, fields,  # type: ignore[arg-type]
                                      start=self.first)  # fmt: skip
        plan = simulation.fixed_plan([self.until], self._counts)  # type: ignore[attr-defined]
        with torch.no_grad():
            u = simulation(params, torch.tensor(u0), [self.until], plan=plan)[:, 0].cpu().numpy()
        cellularity = fit.patient.cellularity
        assert cellularity is not None
        visible = u >= cellularity.visible_fraction
        theta = cellularity.carrying_capacity(self.domain.voxel_volume)
        volume = visible.sum((1, 2, 3)) * self.domain.voxel_volume / 1e3
        cells = (u * visible).sum((1, 2, 3)) * theta
        every = np.log(np.maximum(u.sum((1, 2, 3)) * theta, 1.0))
        return np.stack((volume, cells, every), 1)


def course(errors: Errors, error: TreatmentError | None, schedule: Schedule, day: float) -> Schedule:
    """The treatment of one draw."""
    return schedule if error is None else error.draw(schedule, day, errors.rng("treatment"))
