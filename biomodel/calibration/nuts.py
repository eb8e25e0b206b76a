"""No-U-turn sampling of a bare density: by PyMC, with the density as a PyTensor operation, or by nutpie.

Both are given coordinates in which the density is near a standard normal, and adapt a diagonal mass matrix from there.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from typing import Any, Protocol

import numpy as np

from biomodel.calibration.bayes import library
from biomodel.calibration.checkpoint import ChainFile, as_plain, as_state
from biomodel.calibration.density import Density
from biomodel.errors import CalibrationError

__all__ = ["ByNutpie", "ByPymc", "Drawn", "Engine", "Settings", "log_density_op", "sample_nuts"]

#: Starting points are drawn from this many times the width of the standard normal, so that chains that agree in the
#: end have come from different places.
SPREAD = 1.5
#: Times that the distance of a starting point is halved until the density there is finite.
HALVINGS = 12
#: Worth in draws of the mass matrix that the chain starts with.
TRUST = 50
#: Draws between two reports of progress.
REPORT = 100


@dataclass(frozen=True)
class Settings:
    """What shapes a chain, whichever engine draws it; see :class:`biomodel.calibration.mcmc.NUTS`."""

    draws: int
    tune: int
    target_accept: float
    seed: int


@dataclass(frozen=True, eq=False)
class Drawn:
    """Chains of a bare density.

    Attributes
    ----------
    x : ndarray, shape (chains, draws, p)
    stats : dict of str to ndarray, shape (chains, draws)
    gradients : int
    seconds : float
        CPU time.
    """

    x: np.ndarray
    stats: dict[str, np.ndarray]
    gradients: int
    seconds: float


class Engine(Protocol):
    """A sampler of one chain."""

    @property
    def version(self) -> str:
        """Name and version of the library."""

    def chain(self, density: Density, start: np.ndarray, settings: Settings, seed: np.random.SeedSequence,
              file: ChainFile | None, report: Callable[[int], None]) -> dict[str, np.ndarray]:  # fmt: skip
        """Draws ``x`` (draws, p), statistics (draws,), ``gradients`` and ``seconds`` (both ()) of one chain."""


class _Cell:
    """Holds the density that a compiled operation evaluates, so that one compilation serves many densities."""

    def __init__(self) -> None:
        self.density: Callable[[np.ndarray], tuple[float, np.ndarray]] | None = None
        self.count = 0

    def __call__(self, x: np.ndarray) -> tuple[float, np.ndarray]:
        assert self.density is not None
        self.count += 1
        return self.density(x)


def log_density_op(density: Callable[[np.ndarray], tuple[float, np.ndarray]]) -> Any:
    """A PyTensor operation of a vector whose first output is the log density and whose second its gradient.

    The derivative of the first output is taken from the second, so that both cost one evaluation. For use inside any
    ``pymc.Model``: ``pm.Potential("posterior", op(x)[0])``.

    Parameters
    ----------
    density : callable
        (p,) to (log density, gradient (p,)).
    """
    pt, apply = library("pytensor.tensor"), library("pytensor.graph.basic").Apply

    class LogDensity(library("pytensor.graph.op").Op):  # type: ignore[misc]
        __props__ = ()

        def make_node(self, *inputs):
            return apply(self, [pt.as_tensor_variable(inputs[0])], [pt.dscalar(), pt.dvector()])

        def perform(self, node, inputs, outputs):
            value, gradient = density(np.asarray(inputs[0], float))
            outputs[0][0], outputs[1][0] = np.asarray(value, float), np.asarray(gradient, float)

        def L_op(self, inputs, outputs, output_gradients):
            return [output_gradients[0] * outputs[1]]

    return LogDensity()


@lru_cache(maxsize=8)
def _pymc_step(size: int, tune: int, target_accept: float) -> tuple[Any, _Cell, Any]:
    """PyMC's step for densities of a size, compiled once, with the cell that holds the density, and its first state."""
    pm = library("pymc")
    adapting = library("pymc.step_methods.hmc.quadpotential").QuadPotentialDiagAdapt
    cell = _Cell()
    zeros, ones = np.zeros(size), np.ones(size)
    # One window over all of the tuning, which starts from the mass matrix given: short ones forget it.
    potential = adapting(size, zeros, ones, TRUST, adaptation_window=tune + 1, early_update=True,
                         rng=np.random.default_rng(0))  # fmt: skip
    with pm.Model() as model:
        x = pm.Flat("x", shape=size, initval=zeros)
        pm.Potential("posterior", log_density_op(cell)(x)[0])
        step = pm.NUTS(vars=[x], potential=potential, model=model, target_accept=target_accept,
                       initial_point={"x": zeros}, rng=np.random.default_rng(0), mode="FAST_COMPILE")  # fmt: skip
    return step, cell, step.sampling_state


@dataclass(frozen=True)
class ByPymc:
    """PyMC's sampler, draw by draw. An interrupted chain goes on as if it had not been."""

    @property
    def version(self) -> str:
        """Name and version of the library."""
        return f"pymc {version('pymc')}"

    def chain(self, density: Density, start: np.ndarray, settings: Settings, seed: np.random.SeedSequence,
              file: ChainFile | None, report: Callable[[int], None]) -> dict[str, np.ndarray]:  # fmt: skip
        """See :class:`Engine`."""
        step, cell, first = _pymc_step(len(start), settings.tune, settings.target_accept)
        total = settings.tune + settings.draws
        names = {"lp": "model_logp", "diverging": "diverging", "acceptance_rate": "mean_tree_accept",
                 "step_size": "step_size", "n_steps": "tree_size", "energy": "energy"}  # fmt: skip
        x, stats = np.zeros((total, len(start))), {n: np.zeros(total) for n in names}
        step.sampling_state = first
        step.rng, step.potential.rng = (np.random.default_rng(s) for s in seed.spawn(2))
        point, done, before, count = {"x": np.asarray(start, float)}, 0, 0.0, 0
        kept = None if file is None else file.read()
        if kept is not None:
            arrays, state = kept
            done = min(int(state["done"]), total)
            x[:done], before, count = arrays["x"][:done], float(state["seconds"]), int(state["gradients"])
            for n in names:
                stats[n][:done] = arrays[n][:done]
            step.sampling_state = as_state(first, state["sampler"])
            if done:
                point = {"x": x[done - 1].copy()}
        cell.density, cell.count = density, count
        begun = time.process_time()

        def keep() -> None:
            if file is not None:
                state = {"done": done, "seconds": before + time.process_time() - begun, "gradients": cell.count,
                         "sampler": as_plain(step.sampling_state)}  # fmt: skip
                file.write({"x": x[:done], **{n: v[:done] for n, v in stats.items()}}, state)

        try:
            while done < total:
                if done == settings.tune:
                    step.stop_tuning()
                point, (stat,) = step.step(point)
                x[done] = point["x"]
                for n, theirs in names.items():
                    stats[n][done] = stat[theirs]
                done += 1
                if done % REPORT == 0:
                    report(done)
                if done == total or (file is not None and file.due):
                    keep()
        finally:
            cell.density = None
        after = slice(settings.tune, None)
        found = {n: v[after] for n, v in stats.items()} | {"x": x[after]}
        found |= {"gradients": np.array(cell.count), "seconds": np.array(before + time.process_time() - begun)}
        return found


@dataclass(frozen=True)
class ByNutpie:
    """nutpie's sampler (nuts-rs). An interrupted chain starts anew, with the same result; finished ones are kept."""

    @property
    def version(self) -> str:
        """Name and version of the library."""
        return f"nutpie {version('nutpie')}"

    def chain(self, density: Density, start: np.ndarray, settings: Settings, seed: np.random.SeedSequence,
              file: ChainFile | None, report: Callable[[int], None]) -> dict[str, np.ndarray]:  # fmt: skip
        """See :class:`Engine`."""
        kept = None if file is None else file.read()
        if kept is not None and len(kept[0]["x"]) >= settings.draws:
            return {n: (v if v.ndim == 0 else v[: settings.draws]) for n, v in kept[0].items()}
        nutpie, from_pyfunc = library("nutpie"), library("nutpie.compiled_pyfunc").from_pyfunc
        cell, failed = _Cell(), []
        cell.density = density

        def evaluate(x: np.ndarray) -> tuple[float, np.ndarray]:
            try:
                return cell(np.array(x))
            except BaseException as error:  # raised again below: the library would hide what it was
                failed.append(error)
                return -np.inf, np.zeros(len(start))

        begun = time.process_time()
        model = from_pyfunc(
            len(start), lambda: evaluate, lambda *_: lambda x: {"x": x}, [np.dtype("float64")], [(len(start),)], ["x"],
            make_initial_point_fn=lambda _: np.array(start),
        )  # fmt: skip
        try:
            trace = nutpie.sample(
                model, draws=settings.draws, tune=settings.tune, chains=1, cores=1, progress_bar=False,
                save_warmup=False, seed=int(seed.generate_state(1)[0]), target_accept=settings.target_accept,
            )  # fmt: skip
        except RuntimeError as error:
            if not failed:
                raise CalibrationError(f"nutpie could not start: {str(error).splitlines()[0]}") from error
        if failed:
            raise failed[0]
        theirs = {"lp": "logp", "diverging": "diverging", "acceptance_rate": "mean_tree_accept",
                  "step_size": "step_size", "n_steps": "n_steps", "energy": "energy"}  # fmt: skip
        found = {n: np.asarray(trace.sample_stats[t].values[0], float) for n, t in theirs.items()}
        found |= {"x": np.asarray(trace.posterior["x"].values[0]), "gradients": np.array(cell.count),
                  "seconds": np.array(time.process_time() - begun)}  # fmt: skip
        if file is not None:
            file.write(found, {})
        report(settings.tune + settings.draws)
        return found


def _start(density: Density, size: int, seed: np.random.SeedSequence) -> np.ndarray:
    """A starting point with a finite density, near the origin where far ones have none."""
    x = SPREAD * np.random.default_rng(seed).standard_normal(size)
    for _ in range(HALVINGS):
        if np.isfinite(density(x)[0]):
            return x
        x = x / 2
    raise CalibrationError(
        "NUTS: the log density is not finite at the starting point or near it, so that no chain can begin; the model "
        "cannot be evaluated there. Check priors, bounds and data, or see where the Laplace fit ends."
    )


def sample_nuts(
    density: Density,
    chains: int = 4,
    draws: int = 1000,
    tune: int = 500,
    target_accept: float = 0.8,
    seed: int = 0,
    engine: Engine | None = None,
    folder: Any = None,
    progress: Callable[[str], None] | None = None,
) -> Drawn:
    """Sample a bare density whose coordinates are near standard normal (see `Whitened`).

    Nothing is compiled anew for another density of the same size: thousands of small ones cost what their evaluations
    cost, and about 25 microseconds more for each.

    Parameters
    ----------
    density : Density
        Called with x (p,), it returns the log density and its gradient (p,).
    chains, draws, tune, target_accept, seed
        See :class:`biomodel.calibration.mcmc.NUTS`.
    engine : ByPymc or ByNutpie, optional
        The former by default.
    folder : path, optional
        Where chains are kept as they are drawn; the density then needs a `fingerprint`.

    Returns
    -------
    Drawn

    Raises
    ------
    CalibrationError
        If the density is not finite at the start, or `folder` holds another run.
    """
    engine = ByPymc() if engine is None else engine
    settings = Settings(draws, tune, target_accept, seed)
    found = []
    for k in range(chains):
        starting, sampling = np.random.SeedSequence([seed, 3, k]).spawn(2)
        file = None
        if folder is not None:
            what = (density.fingerprint(), tune, target_accept, seed, k, engine.version)
            file = ChainFile(folder, k, "|".join(map(str, what)))

        def report(done: int, k: int = k) -> None:
            if progress:
                progress(f"chain {k + 1} of {chains}: {done} of {tune + draws} draws")

        start = _start(density, density.size, starting)
        found.append(engine.chain(density, start, settings, sampling, file, report))
    stats = {n: np.stack([f[n] for f in found]) for n in found[0] if n not in ("x", "gradients", "seconds")}
    stats["diverging"] = stats["diverging"].astype(bool)
    return Drawn(np.stack([f["x"] for f in found]), stats, sum(int(f["gradients"]) for f in found),
                 sum(float(f["seconds"]) for f in found))  # fmt: skip
