"""Training of an operator on samples that stream in while it trains.

Each chunk that arrives is seen with fresh noise and summarised once, joins a memory of the latest samples, and is
followed by a fixed number of gradient steps on random draws of that memory. With the chunks in order and all random
numbers from seeds, training is the same however fast samples come, also when it is stopped and resumed.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from biomodel.errors import CalibrationError
from pinn.amortised.makers import Arrays
from pinn.amortised.operator import CheckpointError, Operator
from pinn.amortised.scans import Scans
from pinn.amortised.streaming import Chunk, Stream
from pinn.memory import OutOfMemoryWarning

#: Rows of a step that are computed at once, at least, when memory is short.
LEAST = 8
#: Separates the random numbers of noise and of steps.
NOISE, STEPS = 63, 64


@dataclass(frozen=True)
class Recipe:
    """How an operator is trained.

    Parameters
    ----------
    steps : int
        Gradient steps after each chunk.
    batch : int
        Noisy patients of a step; a third as many maps for the DeepONet.
    copies : int
        How often each sample is seen with fresh noise.
    memory : int
        Latest samples that are kept.
    rate : float
        Learning rate of Adam, falling to nothing by a cosine.
    points : int
        Voxels of each map, drawn where there is tumour, and points of the equation's residual.
    physics : float
        Weight of the squared residual (times `scale` days) relative to that of the maps; 0 leaves it out.
    every : int
        Steps from one residual to the next: it costs as much as several steps without.
    average : float
        Decay of the running mean of the weights, which is what is kept in the end.
    seed : int
    """

    steps: int = 10
    batch: int = 128
    copies: int = 4
    memory: int = 6000
    rate: float = 2e-3
    points: int = 16
    physics: float = 0.05
    scale: float = 20.0
    every: int = 8
    average: float = 0.995
    seed: int = 0


@dataclass(eq=False)
class History:
    """Losses by step: negative log density, relative squared error of the maps, and of the residual where taken."""

    density: list[float] = field(default_factory=list)
    maps: list[float] = field(default_factory=list)
    residual: list[float] = field(default_factory=list)
    seconds: float = 0.0
    steps: int = 0


class Trainer:
    """Trains an operator on a stream.

    Parameters
    ----------
    operator : Operator
    recipe : Recipe
    chunks : int
        Chunks of the whole training, along which the learning rate falls: ``stream.count``.
    device : str, optional
        By default a GPU where there is one, there in float32; else the CPU in float64. Where a GPU's memory runs out,
        a step's rows go through in smaller parts, then training goes on on the CPU; either is said in a warning.
    """

    def __init__(self, operator: Operator, recipe: Recipe, chunks: int, device: str | None = None):
        self.operator, self.recipe, self.chunks = operator, recipe, chunks
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        operator.to(self.device, torch.float32 if self.device.type == "cuda" else torch.float64)
        self.optimizer = torch.optim.Adam(operator.parameters(), lr=recipe.rate)
        self.mean = {n: p.detach().clone() for n, p in operator.named_parameters()}
        self.generator = torch.Generator().manual_seed(1000 * recipe.seed + STEPS)
        self.part, self.history = recipe.batch, History()
        # The latest samples, written over the oldest; how many have been taken.
        self.samples: dict[str, torch.Tensor] = {}
        self.taken = 0

    # Samples ----------------------------------------------------------------------------------------------------------

    def take(self, chunk: Chunk) -> None:
        """See a chunk's samples with noise, summarise them, and remember them."""
        r, arrays, n = self.recipe, chunk.arrays, len(chunk.arrays["z"])
        many = {k: np.repeat(v, r.copies, 0) for k, v in arrays.items()}
        scans = Scans.noisy(many, np.random.default_rng([r.seed, NOISE, chunk.first]))
        new = dict(zip(("features", "pivot", "spread"), self._summary(scans), strict=True))
        if self.operator.encoder is not None:
            new["images"] = scans.images
        new = {k: v.unflatten(0, (n, r.copies)) for k, v in new.items()}
        new.update(_plain(arrays))
        kept = self.operator.dtype
        for name, values in new.items():
            values = values.to("cpu", torch.float32 if name in ("states", "images") else kept)
            if name not in self.samples:
                self.samples[name] = torch.zeros(r.memory, *values.shape[1:], dtype=values.dtype)
            self.samples[name][(self.taken + torch.arange(len(values))) % r.memory] = values
        self.taken += n

    def _summary(self, scans: Scans) -> tuple[torch.Tensor, ...]:
        # Always in double precision on the CPU, where fits of a focus are safe; it is done once for each copy.
        summary = self.operator.summary
        if summary.places.device.type != "cpu" or summary.places.dtype != torch.float64:
            from pinn.amortised.scans import Summary

            self._own = getattr(self, "_own", None) or Summary(self.operator.setting)
            summary = self._own
        return summary(scans)

    # Steps ------------------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """One gradient step; smaller parts, then the CPU, where memory is short."""
        drawn = self._draw()
        while True:
            try:
                self._try(drawn)
                return
            except torch.OutOfMemoryError:
                self.optimizer.zero_grad(set_to_none=True)
                if self.part > LEAST:
                    self.part = max(LEAST, self.part // 2)
                    text = f"goes on with {self.part} of {self.recipe.batch} rows at once"
                elif self.device.type != "cpu":
                    self._to_cpu()
                    text = "goes on on the CPU, which takes longer"
                else:
                    raise
                warnings.warn(f"training ran out of memory and {text}.", OutOfMemoryWarning, stacklevel=2)

    def _to_cpu(self) -> None:
        torch.cuda.empty_cache()
        self.device, self.part = torch.device("cpu"), self.recipe.batch
        self.operator.to("cpu")
        self.mean = {n: v.cpu() for n, v in self.mean.items()}
        for state in self.optimizer.state.values():
            state.update({k: v.cpu() for k, v in state.items() if isinstance(v, torch.Tensor)})

    def _draw(self) -> dict[str, torch.Tensor]:
        """Everything random of a step, so that parts and repeats use the same."""
        r, g, n = self.recipe, self.generator, min(self.taken, self.recipe.memory)
        count = max(LEAST, r.batch // 3)
        found = {"rows": torch.randint(n, (r.batch,), generator=g), "which": torch.randint(2, (count,), generator=g),
                 "copy": torch.randint(r.copies, (r.batch,), generator=g)}  # fmt: skip
        maps = self.samples["states"][found["rows"][:count], 1 + found["which"]].flatten(1)
        voxels = torch.multinomial(maps.clamp(min=0.0) + 0.02, 2 * r.points, generator=g)
        found["voxels"], found["inside"] = voxels[:, : r.points], voxels[:, r.points :]
        d = self.operator.summary.places.shape[1]
        found["near"] = torch.rand(count, r.points, d, generator=g, dtype=torch.float64) - 0.5
        found["part"] = torch.rand(count, generator=g, dtype=torch.float64)
        return found

    def _try(self, drawn: dict[str, torch.Tensor]) -> None:
        r, rows, count = self.recipe, drawn["rows"], len(drawn["which"])
        self.optimizer.zero_grad(set_to_none=True)
        total = np.zeros(3)
        physics = r.physics > 0 and self.history.steps % r.every == 0
        for low in range(0, len(rows), self.part):
            part = slice(low, min(low + self.part, len(rows)))
            loss, value = self._density(rows[part], drawn["copy"][part])
            total[0] += value * (share := (part.stop - low) / len(rows))
            (loss * share).backward()
        for low in range(0, count, self.part):
            part = slice(low, min(low + self.part, count))
            loss, values = self._maps(drawn, part, physics)
            total[1:] += values * (share := (part.stop - low) / count)
            (loss * share).backward()
        torch.nn.utils.clip_grad_norm_(self.operator.parameters(), 10.0)
        last = max(self.chunks * r.steps - 1, 1)
        for group in self.optimizer.param_groups:
            group["lr"] = r.rate * 0.5 * (1 + math.cos(math.pi * min(self.history.steps / last, 1.0)))
        self.optimizer.step()
        with torch.no_grad():
            decay = min(r.average, (1 + self.history.steps) / (10 + self.history.steps))
            for n, p in self.operator.named_parameters():
                self.mean[n].lerp_(p, 1 - decay)
        h = self.history
        h.steps += 1
        h.density.append(float(total[0]))
        h.maps.append(float(total[1]))
        if physics:
            h.residual.append(float(total[2]))
        if not np.isfinite(total).all():
            raise CalibrationError(f"training: the loss is not finite at step {h.steps}; lower the rate ({r.rate:g}).")

    def _there(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        return self.samples[name][rows].to(self.device, self.operator.dtype)

    def _density(self, rows: torch.Tensor, copy: torch.Tensor) -> tuple[torch.Tensor, float]:
        op = self.operator
        chosen = {n: self.samples[n][rows, copy].to(self.device, op.dtype)
                  for n in ("features", "pivot", "spread", "images") if n in self.samples}  # fmt: skip
        mixture = op.density(chosen["features"], chosen.get("images"))
        centre, scale = op.standard(chosen["pivot"], chosen["spread"])
        loss = -mixture.log_density((self._there("z", rows) - centre) / scale).mean()
        return loss, float(loss.detach())

    def _maps(self, drawn: dict[str, torch.Tensor], part: slice, physics: bool) -> tuple[torch.Tensor, np.ndarray]:
        op, r, rows = self.operator, self.recipe, drawn["rows"][: len(drawn["which"])][part]
        net, places = op.surrogate, op.summary.places
        z, which = self._there("z", rows), drawn["which"][part].to(self.device)
        course = net.course(Scans(z, z, z, self._there("dose_days", rows), self._there("dose_amounts", rows)))
        day = self._there("days", rows).gather(1, which[:, None])[:, 0]
        voxels = drawn["voxels"][part]
        seen = self.samples["states"][rows, 1 + drawn["which"][part]].flatten(1).gather(1, voxels)
        seen = seen.to(self.device, op.dtype)
        size = (seen**2).mean() + 1e-6
        loss = ((net(z, course, day, places[voxels.to(self.device)]) - seen) ** 2).mean() / size
        values = np.array([float(loss.detach()), 0.0])
        if physics:
            step = net.maps.steps.to(op.dtype)
            near = (drawn["near"][part].to(self.device, op.dtype)) * step
            days = drawn["part"][part].to(self.device, op.dtype) * op.setting.last
            off = net.residual(z, course, days, places[drawn["inside"][part].to(self.device)] + near) * r.scale
            residual = (off**2).mean() / size
            values[1] = float(residual.detach())
            loss = loss + r.physics * residual
        return loss, values

    # The whole --------------------------------------------------------------------------------------------------------

    def run(self, chunks: Iterable[Chunk], checkpoint: str | Path | None = None, each: int = 50,
            progress: Callable[[str], None] | None = None) -> History:  # fmt: skip
        """Train on all chunks; the operator then has the running mean of its weights.

        Parameters
        ----------
        checkpoint : path, optional
            Written every `each` chunks; :meth:`resume` goes on from there.
        progress : callable, optional
            Receives a line every `each` chunks.
        """
        size = chunks.chunk if isinstance(chunks, Stream) else None
        threads = torch.get_num_threads()
        if self.device.type == "cpu":
            # The networks are too small for more, and production has the other cores.
            torch.set_num_threads(1)
        try:
            self._all(chunks, size, checkpoint, each, progress)
        finally:
            torch.set_num_threads(threads)
        self.finish()
        return self.history

    def _all(self, chunks: Iterable[Chunk], size: int | None, checkpoint: str | Path | None, each: int,
             progress: Callable[[str], None] | None) -> None:  # fmt: skip
        for chunk in chunks:
            began, size = time.process_time(), size or len(chunk.arrays["z"])
            self.take(chunk)
            for _ in range(self.recipe.steps):
                self.step()
            self.history.seconds += time.process_time() - began
            seen = chunk.first // size + 1
            if seen % each == 0:
                if checkpoint is not None:
                    self.save(checkpoint, seen)
                if progress is not None:
                    h, last = self.history, slice(-10 * self.recipe.steps, None)
                    progress(f"chunk {seen} of {self.chunks}: density {np.mean(h.density[last]):.3f}, maps "
                             f"{np.sqrt(np.mean(h.maps[last])):.4f}, {h.seconds:.0f} CPU-seconds")  # fmt: skip

    def finish(self) -> None:
        """Give the operator the running mean of its weights."""
        with torch.no_grad():
            for n, p in self.operator.named_parameters():
                p.copy_(self.mean[n])

    # Files ------------------------------------------------------------------------------------------------------------

    def save(self, path: str | Path, chunks: int) -> None:
        """Write a checkpoint after so many chunks."""
        kept = {n: v[: self.taken].clone() for n, v in self.samples.items()}
        self.operator.save(path, {
            "recipe": asdict(self.recipe), "total": self.chunks, "chunks": chunks, "mean": self.mean,
            "optimizer": self.optimizer.state_dict(), "samples": kept, "taken": self.taken,
            "generator": self.generator.get_state(), "history": asdict(self.history), "part": self.part,
        })  # fmt: skip

    def resume(self, path: str | Path) -> int:
        """Go on from a checkpoint; the number of the chunk to begin with (``Stream(..., begin=...)``).

        Raises
        ------
        CheckpointError
            If it is of another operator, or was trained by another recipe.
        """
        more: dict[str, Any] = self.operator.restore(path)
        if "optimizer" not in more:
            raise CheckpointError(f"{path}: an operator that has been trained to the end; nothing is left to resume.")
        own = asdict(self.recipe) | {"total": self.chunks}
        theirs = {**more["recipe"], "total": more["total"]}
        if differ := [k for k, v in own.items() if theirs.get(k) != v]:
            k = differ[0]
            raise CheckpointError(
                f"{path}: trained by another recipe ({', '.join(differ)} differ); {k} is {theirs.get(k)} there, here "
                f"{own[k]}. Resume with the same."
            )
        self.optimizer.load_state_dict(more["optimizer"])
        self.mean = {n: v.to(self.device) for n, v in more["mean"].items()}
        self.part, self.taken = more["part"], more["taken"]
        for name, values in more["samples"].items():
            self.samples[name] = torch.zeros(self.recipe.memory, *values.shape[1:], dtype=values.dtype)
            self.samples[name][: len(values)] = values.cpu()
        self.generator.set_state(more["generator"].cpu())
        self.history = History(**more["history"])
        return int(more["chunks"])


def _plain(arrays: Arrays) -> dict[str, torch.Tensor]:
    return {n: torch.tensor(arrays[n]) for n in ("z", "days", "states", "dose_days", "dose_amounts")}
