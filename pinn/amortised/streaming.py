"""Training samples from concurrent processes, made while the operator trains.

Lanes are processes that each hold one or several makers (:mod:`pinn.amortised.makers`). A thread hands out chunks of
consecutive samples and takes in what comes back; never more than `window` chunks are under way or waiting, so that
production stops when training is slower. Who makes a chunk follows from its number alone, and chunks are given out in
order: the same seed gives the same samples in the same order, whatever the processes' speed.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path

import numpy as np

from biomodel.errors import SolverError
from pinn.amortised.makers import Arrays, Maker

WORKER = Path(__file__).with_name("stream_worker.py")
#: Chunks that a process is given ahead, so that it need not wait for the next.
AHEAD = 2
#: Seconds that processes have to end when asked, and to become ready.
PATIENCE, START = 5.0, 300.0


class StreamError(SolverError):
    """Production of training samples has failed."""


@dataclass(frozen=True, eq=False)
class Lane:
    """Processes of one kind.

    Parameters
    ----------
    makers : sequence of Maker
        What each process can make; with several it makes one after the other.
    count : int
        Processes.
    """

    makers: Sequence[Maker]
    count: int = 1


@dataclass(frozen=True, eq=False)
class Chunk:
    """Consecutive samples: number of the first, who made them, and arrays whose first axis are the samples."""

    first: int
    maker: str
    arrays: Arrays


@dataclass(eq=False)
class Spent:
    """What one process has done: chunks, seconds busy by the clock and by the CPU, seconds idle; times restarted."""

    name: str
    chunks: int = 0
    busy: float = 0.0
    cpu: float = 0.0
    idle: float = 0.0
    restarts: int = 0


@dataclass(eq=False)
class Usage:
    """Utilisation of production and training, by the clock, from the moment all processes are ready.

    Attributes
    ----------
    wall : float
        Seconds from the first request for a chunk to the last chunk's end of use.
    training, waiting : float
        Seconds in which the consumer used chunks, and waited for one.
    lanes : list of Spent
    """

    wall: float = 0.0
    training: float = 0.0
    waiting: float = 0.0
    lanes: list[Spent] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The table, one line per process."""
        wall = max(self.wall, 1e-9)
        found = [f"{'process':28s}{'chunks':>7s}{'busy s':>9s}{'CPU s':>8s}{'idle s':>8s}{'in use':>8s}"]
        for lane in self.lanes:
            idle = max(0.0, wall - lane.busy)
            again = f" ({lane.restarts} restarts)" if lane.restarts else ""
            found.append(f"{lane.name + again:28s}{lane.chunks:7d}{lane.busy:9.2f}{lane.cpu:8.2f}{idle:8.2f}"
                         f"{min(lane.busy / wall, 1):8.0%}")  # fmt: skip
        found.append(f"{'training':35s}{self.training:9.2f}{'':8s}{self.waiting:8.2f}{self.training / wall:8.0%}")
        return found


class _Process:
    """One process of a lane."""

    def __init__(self, lane: Lane, offset: int, name: str):
        self.lane, self.offset = lane, offset
        self.spent = Spent(name)
        self.outstanding: list[int] = []
        self.start()

    def start(self) -> None:
        """Start the process and send it its makers."""
        self.pipe, theirs = Pipe()
        paths = [p for p in sys.path if p]
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(WORKER), str(theirs.fileno())], pass_fds=[theirs.fileno()],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)}, stdin=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        theirs.close()
        self.ready, self.outstanding, self.since = False, [], time.monotonic()
        try:
            message = pickle.dumps(list(self.lane.makers))
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            self.kill()
            raise StreamError(
                f"{self.spent.name}: its makers cannot be sent to another process ({error}). Define their classes in a "
                "module, not in a function or a notebook's cell."
            ) from error
        with contextlib.suppress(OSError):  # a process that has died at once is noticed when its pipe is read
            self.pipe.send_bytes(message)

    def kill(self) -> None:
        """End the process at once."""
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(2)
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.pipe.close()

    @property
    def death(self) -> str:
        """How the process ended."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(2)
        code = self.process.poll()
        if code is None:
            return "closed its pipe"
        if code >= 0:
            return f"ended with code {code}"
        why = " (by somebody, or because memory ran out)" if code == -signal.SIGKILL else ""
        return f"was ended by signal {signal.Signals(-code).name}{why}"


class Stream:
    """Training samples in order, made by other processes while they are used.

    Parameters
    ----------
    lanes : sequence of Lane
        One lane with both makers is one process that alternates; two lanes are two processes at the same time.
    samples : int
        How many in all; the last chunk may be shorter.
    seed : int
    chunk : int
        Samples made at once.
    shares : sequence of float, optional
        Part of the chunks that each maker makes, in the order of the lanes' makers; equal parts by default.
    window : int
        Most chunks under way or waiting. It should cover the time that the slowest maker needs for a chunk.
    restarts : int
        How often a process that died is started again, over all processes, before production fails.
    begin : int
        Number of the first chunk: a resumed training goes on there.

    Examples
    --------
    ::

        with Stream([Lane([TorchMaker(setting)]), Lane([FenicsMaker(setting)])], 2000, seed=1, shares=(0.9, 0.1)) as s:
            for chunk in s:
                ...
        print(*s.usage.lines(), sep="\\n")
    """

    def __init__(self, lanes: Sequence[Lane], samples: int, seed: int, chunk: int = 16,
                 shares: Sequence[float] | None = None, window: int = 64, restarts: int = 2,
                 begin: int = 0):  # fmt: skip
        self.makers: list[Maker] = [m for lane in lanes for m in lane.makers]
        shares = tuple(shares) if shares is not None else (1.0,) * len(self.makers)
        if not self.makers or min((lane.count for lane in lanes), default=0) < 1:
            raise StreamError("Stream: no maker, or a lane without processes; expected at least one of each.")
        if len(shares) != len(self.makers) or min(shares) < 0 or sum(shares) <= 0:
            raise StreamError(
                f"Stream: shares {shares} for {len(self.makers)} makers; expected one number from 0 each."
            )
        if min(samples, chunk, window) < 1:
            raise StreamError(f"Stream: samples {samples}, chunk {chunk}, window {window}; expected at least 1 each.")
        self.lanes, self.samples, self.seed, self.chunk, self.window = list(lanes), samples, seed, chunk, window
        self.count = -(-samples // chunk)
        self.makes = _assigned(shares, self.count)
        self.left = restarts
        self.begin = begin
        self.usage = Usage()
        self._processes: list[_Process] = []

    # Life -------------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the processes and wait until all have done what is slow the first time."""
        if self._processes:
            return
        self._lock = threading.Condition()
        self._made: dict[int, Chunk] = {}
        self._wanted = list(range(self.begin, self.count))
        self._next, self._error, self._ending, self._going = self.begin, "", False, False
        self._woken, self._wake = Pipe(duplex=False)
        offset = 0
        try:
            for lane in self.lanes:
                names = "+".join(m.name for m in lane.makers)
                for number in range(lane.count):
                    name = f"{names} {number + 1}" if lane.count > 1 else names
                    self._processes.append(_Process(lane, offset, name))
                offset += len(lane.makers)
        except BaseException:
            self.close()
            raise
        self.usage.lanes = [p.spent for p in self._processes]
        self._thread = threading.Thread(target=self._serve, name="stream", daemon=True)
        self._thread.start()
        # Whoever forgets to close it: the processes end with the object, and with this process by their pipes.
        self._finalizer = weakref.finalize(self, _end, self._processes)
        with self._lock:
            self._lock.wait_for(lambda: self._error or all(p.ready for p in self._processes), START)
        if self._error or not all(p.ready for p in self._processes):
            error = self._error or f"processes were not ready after {START:g} s"
            self.close()
            raise StreamError(f"production did not start: {error}")

    def close(self) -> None:
        """End all processes; chunks not yet used are dropped."""
        if not self._processes:
            return
        with self._lock:
            self._ending = True
        if hasattr(self, "_thread"):
            self._nudge()
            self._thread.join(PATIENCE)
        _end(self._processes)
        self._processes = []
        self._woken.close()
        self._wake.close()

    def __enter__(self) -> Stream:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pids(self) -> list[int]:
        """Process numbers of the processes that run."""
        return [p.process.pid for p in self._processes]

    # Chunks -----------------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Chunk]:
        """Chunks in order.

        Raises
        ------
        StreamError
            If production fails; it names the process, the samples and the reason.
        """
        self.start()
        with self._lock:
            self._going = True
        self._nudge()
        began = time.monotonic()
        for number in range(self.begin, self.count):
            asked = time.monotonic()
            with self._lock:
                self._lock.wait_for(partial(self._settled, number))
                if number not in self._made:
                    error = self._error
                    break
                chunk = self._made.pop(number)
                self._next = number + 1
            self._nudge()
            self.usage.waiting += (given := time.monotonic()) - asked
            yield chunk
            self.usage.training += time.monotonic() - given
            self.usage.wall = time.monotonic() - began
        else:
            return
        self.close()
        raise StreamError(error)

    def _settled(self, number: int) -> bool:
        return number in self._made or bool(self._error)

    # The thread -------------------------------------------------------------------------------------------------------

    def _nudge(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._wake.send_bytes(b"")

    def _serve(self) -> None:
        while True:
            with self._lock:
                if self._ending or self._error:
                    return
                if self._going:
                    self._hand_out()
                pipes: dict[Connection, _Process] = {p.pipe: p for p in self._processes}
            for ready in wait([*pipes, self._woken], timeout=1.0):
                if ready is self._woken:
                    with contextlib.suppress(EOFError, OSError):
                        self._woken.recv_bytes()
                    continue
                process = pipes[ready]  # type: ignore[index]
                try:
                    message = process.pipe.recv()
                except (EOFError, OSError):
                    message = None
                with self._lock:
                    if self._ending:
                        return
                    self._take(process, message)
                    self._lock.notify_all()

    def _hand_out(self) -> None:
        last = self._next + self.window
        for process in self._processes:
            span = range(process.offset, process.offset + len(process.lane.makers))
            while process.ready and len(process.outstanding) < AHEAD:
                number = next((c for c in self._wanted if c < last and self.makes[c] in span), None)
                if number is None:
                    break
                self._wanted.remove(number)
                process.outstanding.append(number)
                indices = list(self._indices(number))
                with contextlib.suppress(OSError):  # a dead process is noticed when its pipe is read
                    process.pipe.send((number, self.makes[number] - process.offset, self.seed, indices))

    def _indices(self, number: int) -> range:
        return range(number * self.chunk, min((number + 1) * self.chunk, self.samples))

    def _take(self, process: _Process, message: tuple | None) -> None:
        if message is None:
            self._died(process)
        elif message[0] == "ready":
            process.ready = True
        elif message[0] == "error":
            # The same samples would fail again.
            self._error = f"{process.spent.name} failed{self._doing(process)}:\n{message[1].rstrip()}"
        else:
            _, number, arrays, (busy, cpu, idle) = message
            process.outstanding.remove(number)
            spent = process.spent
            spent.chunks, spent.busy, spent.cpu = spent.chunks + 1, spent.busy + busy, spent.cpu + cpu
            spent.idle += idle
            self._made[number] = Chunk(number * self.chunk, self.makers[self.makes[number]].name, arrays)

    def _doing(self, process: _Process) -> str:
        if not process.outstanding:
            return " while it started" if not process.ready else ""
        at = self._indices(process.outstanding[0])
        return f" while it made samples {at[0]} to {at[-1]}"

    def _died(self, process: _Process) -> None:
        text = f"{process.spent.name}: process {process.process.pid} {process.death}{self._doing(process)}"
        if self.left < 1 or not process.ready:
            again = "" if process.ready else "; a process that dies while it starts is not started again"
            self._error = f"{text}; {process.spent.restarts} restarts before{again}."
            return
        self.left -= 1
        self._wanted = sorted([*self._wanted, *process.outstanding])
        process.spent.restarts += 1
        process.kill()
        try:
            process.start()
        except (StreamError, OSError) as error:
            self._error = f"{text}, and could not be started again: {error}"


def _assigned(shares: Sequence[float], count: int) -> np.ndarray:
    """Which maker makes each chunk, (count,): the one furthest behind its share."""
    weight, given, found = np.asarray(shares, float) / sum(shares), np.zeros(len(shares)), np.zeros(count, int)
    for c in range(count):
        found[c] = int(np.argmax(np.where(weight > 0, weight * (c + 1) - given, -np.inf)))
        given[found[c]] += 1
    return found


def _end(processes: list[_Process]) -> None:
    """Ask all processes to end, wait a little, and end those that do not."""
    for p in processes:
        with contextlib.suppress(OSError, ValueError):
            p.pipe.send(None)
        with contextlib.suppress(OSError):
            p.pipe.close()
    until = time.monotonic() + PATIENCE
    for p in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            p.process.wait(max(0.05, until - time.monotonic()))
        if p.process.poll() is None:
            p.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                p.process.wait(2)
        if p.process.poll() is None:
            p.process.kill()
            p.process.wait()


__all__ = ["Chunk", "Lane", "Spent", "Stream", "StreamError", "Usage"]
