"""The loop that trains encoders, whatever they are to learn: batches made ahead, accumulation, checkpoints, devices.

What happens in step n depends on the seed and on n alone, so a run that was stopped and resumed from a checkpoint ends
with the same weights as one that was not. Under torch's own launcher (``torchrun --nproc-per-node=2 script.py``) every
process takes its share of each batch and gradients are averaged.
"""

from __future__ import annotations

import os
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from biomodel.errors import InputError
from biomodel.files import atomic_write

__all__ = ["Loop", "MemoryWarning", "Outcome", "Task", "launched", "run"]

FORMAT = "tumorcast-encoder-training-1"


class MemoryWarning(UserWarning):
    """A device ran out of memory; training goes on with less at a time, or on the CPU."""


@dataclass(frozen=True)
class Loop:
    """How a training is run.

    Parameters
    ----------
    steps, batch : int
        Updates of the weights, and patients in each, over all processes.
    accumulate : int
        Parts into which a batch is divided on each device; gradients are added up.
    rate, decay : float
        Largest learning rate, reached after a tenth of the steps and falling to 0 as a cosine, and AdamW's decay.
    precision : torch.dtype, optional
        bfloat16 or float16 for mixed precision (of autocast; float16 with scaled losses); none by default.
    device : str, optional
        ``"cuda"`` where there is one and ``"cpu"`` elsewhere by default.
    workers, ahead : int
        Threads that make batches, and batches made ahead.
    every : int
        Steps between checkpoints, where a file is given.
    seed : int
    """

    steps: int = 200
    batch: int = 4
    accumulate: int = 1
    rate: float = 1e-3
    decay: float = 1e-4
    precision: torch.dtype | None = None
    device: str | None = None
    workers: int = 2
    ahead: int = 4
    every: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.steps, self.batch, self.accumulate, self.workers, self.ahead, self.every) < 1 or self.rate <= 0:
            raise InputError(f"Loop: {self}; expected positive numbers.")
        if self.precision not in (None, torch.bfloat16, torch.float16):
            raise InputError(f"Loop: precision {self.precision}; expected torch.bfloat16, torch.float16 or None.")

    def rng(self, step: int, rank: int) -> np.random.Generator:
        """All that is random in a step of one process."""
        return np.random.default_rng([self.seed, step, rank])

    def factor(self, step: int) -> float:
        """Part of the largest learning rate at a step."""
        rise = max(1, self.steps // 10)
        if step < rise:
            return (step + 1) / rise
        return 0.5 * (1 + float(np.cos(np.pi * (step - rise) / max(1, self.steps - rise))))


class Task(Protocol):
    """What is learned."""

    @property
    def module(self) -> nn.Module:
        """The network."""

    def groups(self, rate: float) -> list[dict[str, Any]]:
        """Parameters and their learning rates."""

    def batch(self, size: int, rng: np.random.Generator) -> Any:
        """All that a step needs of `size` patients, on the CPU; called in a thread. It has `to` and `part`."""

    def loss(self, batch: Any) -> Tensor:
        """Mean loss over the patients of a batch."""


@dataclass(frozen=True)
class Outcome:
    """How a training went.

    Attributes
    ----------
    losses : tuple of float
        Of every step of this run.
    seconds, waiting : float
        Wall time of the steps, and the part of it spent waiting for data; from the first batch on, which nothing can
        be done beside.
    device : str
        Where it ended.
    accumulate : int
        Parts of a batch at the end; more than asked for where memory ran out.
    """

    losses: tuple[float, ...]
    seconds: float
    waiting: float
    device: str
    accumulate: int

    @property
    def share_waiting(self) -> float:
        """Part of the time spent waiting for data, from 0 to 1."""
        return self.waiting / self.seconds if self.seconds else 0.0


def launched() -> tuple[int, int]:
    """Number of this process and how many there are; under torch's launcher it joins the group."""
    if not dist.is_initialized():
        if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            return 0, 1
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return dist.get_rank(), dist.get_world_size()


def run(task: Task, loop: Loop, checkpoint: str | PathLike[str] | None = None,
        progress: Callable[[int, float], None] | None = None, stop: int | None = None) -> Outcome:  # fmt: skip
    """Train; resume from the checkpoint where there is one.

    Parameters
    ----------
    checkpoint : path, optional
        Written every `loop.every` steps and at the end.
    progress : callable, optional
        Called with the number of steps done and the loss.
    stop : int, optional
        Stop after this step as if interrupted.

    Raises
    ------
    InputError
        If a batch cannot be shared among the processes, the checkpoint is of another training, or the loss is not
        finite.
    """
    rank, world = launched()
    if loop.batch % world:
        raise InputError(f"Loop: a batch of {loop.batch} for {world} processes; expected a multiple.")
    return _Run(task, loop, rank, world, None if checkpoint is None else Path(checkpoint)).go(progress, stop)


class _Run:
    def __init__(self, task: Task, loop: Loop, rank: int, world: int, path: Path | None):
        self.task, self.loop, self.rank, self.world, self.path = task, loop, rank, world, path
        self.size = loop.batch // world
        self.accumulate = min(loop.accumulate, self.size)
        default = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
        self.first = 0
        self._place(loop.device or default)
        if path is not None and path.exists():
            self._resume(path)
        if world > 1:
            for p in task.module.state_dict().values():
                dist.broadcast(p, 0)

    def _place(self, device: str) -> None:
        """Bring the network to a device, with an optimiser there."""
        self.device = torch.device(device)
        self.task.module.to(self.device)
        self.optimiser = torch.optim.AdamW(self.task.groups(self.loop.rate), self.loop.rate,
                                           weight_decay=self.loop.decay)  # fmt: skip
        self.rates = [g["lr"] for g in self.optimiser.param_groups]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.loop.precision is torch.float16)

    # Checkpoints ------------------------------------------------------------------------------------------------------

    def _identity(self) -> str:
        loop = self.loop
        return f"{type(self.task).__name__} {loop.steps} {loop.batch} {loop.rate} {loop.decay} {loop.seed} {self.world}"

    def _keep(self, step: int) -> None:
        if self.path is None or self.rank:
            return
        content = {"format": FORMAT, "identity": self._identity(), "step": step, "accumulate": self.accumulate,
                   "module": self.task.module.state_dict(), "optimiser": self.optimiser.state_dict(),
                   "scaler": self.scaler.state_dict()}  # fmt: skip
        with atomic_write(self.path) as temporary:
            torch.save(content, temporary)

    def _resume(self, path: Path) -> None:
        try:
            content = torch.load(path, map_location=self.device, weights_only=True)
        except Exception as error:  # whatever a damaged or foreign file provokes in the reader
            raise InputError(f"{path}: is no checkpoint ({type(error).__name__}); remove it to start anew.") from error
        found = content.get("format") if isinstance(content, dict) else None
        if found != FORMAT:
            raise InputError(f"{path}: format {found!r}; this version reads {FORMAT!r}. Remove it to start anew.")
        if content["identity"] != self._identity():
            raise InputError(
                f"{path}: a checkpoint of another training ({content['identity']}; this one is {self._identity()}). "
                "Give another file, or remove it to start anew."
            )
        try:
            self.task.module.load_state_dict(content["module"])
            self.optimiser.load_state_dict(content["optimiser"])
        except (RuntimeError, ValueError) as error:
            raise InputError(f"{path}: a checkpoint of another network ({error}).") from error
        self.scaler.load_state_dict(content["scaler"])
        self.first, self.accumulate = content["step"], max(self.accumulate, content["accumulate"])

    # Steps ------------------------------------------------------------------------------------------------------------

    def _batches(self, last: int) -> Iterator[tuple[Any, float]]:
        """Batches of the steps, made ahead in threads, and how long each was waited for."""
        with ThreadPoolExecutor(self.loop.workers, thread_name_prefix="encoder-data") as pool:
            pending: deque[Future] = deque()
            coming = self.first
            try:
                for _ in range(self.first, last):
                    while coming < last and len(pending) < self.loop.ahead:
                        pending.append(pool.submit(self.task.batch, self.size, self.loop.rng(coming, self.rank)))
                        coming += 1
                    began = time.perf_counter()
                    made = pending.popleft().result()
                    yield made, time.perf_counter() - began
            finally:
                for future in pending:
                    future.cancel()

    def _parts(self) -> list[tuple[int, int]]:
        edges = np.linspace(0, self.size, self.accumulate + 1).round().astype(int)
        return [(int(a), int(b)) for a, b in zip(edges[:-1], edges[1:], strict=True) if b > a]

    def _gradients(self, batch: Any) -> float:
        """Gradients of one batch, part by part; with less at a time where memory runs out."""
        while True:
            self.optimiser.zero_grad(set_to_none=True)
            try:
                return self._attempt(batch)
            except torch.OutOfMemoryError:
                pass
            # Outside of the except clause: its traceback would keep the tensors alive.
            self._smaller()

    def _attempt(self, batch: Any) -> float:
        total = 0.0
        cast = nullcontext() if self.loop.precision is None else torch.autocast(self.device.type, self.loop.precision)
        for first, last in self._parts():
            part = batch.part(first, last).to(self.device)
            with cast:
                loss = self.task.loss(part) * ((last - first) / self.size)
            if not bool(torch.isfinite(loss.detach())):
                raise InputError("encoder: the loss is not finite. Use a smaller rate, or no mixed precision.")
            self.scaler.scale(loss).backward()
            total += float(loss.detach())
        return total

    def _smaller(self) -> None:
        self.optimiser.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        short = self.device
        if self.accumulate < self.size:
            self.accumulate = min(2 * self.accumulate, self.size)
            text = f"batches are done in {self.accumulate} parts from now on"
        elif self.device.type != "cpu" and self.world == 1:
            text = "training goes on on the CPU, where it takes far longer"
            state = self.optimiser.state_dict()
            self._place("cpu")
            self.optimiser.load_state_dict(state)
        else:
            raise InputError(f"encoder: one patient alone does not fit into the memory of {short}. Crop or coarsen the "
                             "volumes.")  # fmt: skip
        warnings.warn(f"encoder: {short} ran out of memory; {text}.", MemoryWarning, stacklevel=4)

    def _average(self) -> None:
        """Mean of the gradients over all processes; what has none here counts as 0."""
        if self.world == 1:
            return
        own = [p for p in self.task.module.parameters() if p.requires_grad]
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in own])
        dist.all_reduce(flat)
        at = 0
        for p in own:
            p.grad = (flat[at : at + p.numel()] / self.world).reshape(p.shape)
            at += p.numel()

    def go(self, progress: Callable[[int, float], None] | None, stop: int | None) -> Outcome:
        last = self.loop.steps if stop is None else min(stop, self.loop.steps)
        losses, waiting = [], 0.0
        self.task.module.train()
        began = time.perf_counter()
        step = self.first
        for batch, waited in self._batches(last):
            if step == self.first:
                began, waited = time.perf_counter(), 0.0
            waiting += waited
            for group, rate in zip(self.optimiser.param_groups, self.rates, strict=True):
                group["lr"] = rate * self.loop.factor(step)
            losses.append(self._gradients(batch))
            self.scaler.unscale_(self.optimiser)
            self._average()
            nn.utils.clip_grad_norm_(self.task.module.parameters(), 1.0)
            self.scaler.step(self.optimiser)
            self.scaler.update()
            step += 1
            if step % self.loop.every == 0 and step < last:
                self._keep(step)
            if progress is not None and self.rank == 0:
                progress(step, losses[-1])
        if losses:
            self._keep(step)
        self.task.module.eval()
        return Outcome(tuple(losses), time.perf_counter() - began, waiting, str(self.device), self.accumulate)
