"""Workers kept alive between simulations: one is taken for each request and given back."""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

from biomodel.fenics.process import Worker

__all__ = ["close_workers", "pool", "run_concurrently"]


class Pool:
    """Workers with the same number of ranks. Every thread that asks at the same time gets its own."""

    def __init__(self, ranks: int):
        self.ranks = ranks
        self._lock = threading.Lock()
        self._idle: list[Worker] = []
        self._keep = 1
        self._owner = os.getpid()

    @contextmanager
    def worker(self) -> Iterator[Worker]:
        """Take an idle worker, or start one."""
        with self._lock:
            if self._owner != os.getpid():
                # After a fork the pipes belong to the parent.
                self._owner, self._idle = os.getpid(), []
            taken = self._idle.pop() if self._idle else Worker(self.ranks)
        try:
            yield taken
        finally:
            surplus = None
            with self._lock:
                if len(self._idle) < self._keep:
                    self._idle.append(taken)
                else:
                    surplus = taken
            if surplus is not None:
                surplus.close()

    def keep(self, more: int) -> None:
        """Keep that many more idle workers (fewer, if negative)."""
        with self._lock:
            self._keep += more
            surplus, self._idle = self._idle[self._keep :], self._idle[: self._keep]
        for worker in surplus:
            worker.close()

    def close(self) -> None:
        """End all idle workers."""
        with self._lock:
            idle, self._idle = self._idle, []
        if self._owner == os.getpid():
            for worker in idle:
                worker.close()


_pools: dict[int, Pool] = {}


def pool(ranks: int = 1) -> Pool:
    """The pool of workers with a number of ranks, shared by all solvers."""
    return _pools.setdefault(ranks, Pool(ranks))


def close_workers() -> None:
    """End all idle workers; the next request starts a new one."""
    for one in list(_pools.values()):
        one.close()


atexit.register(close_workers)


def run_concurrently(calls: Sequence[Callable[[], Any]], workers: int, ranks: int) -> list[Future]:
    """Start the calls, at most `workers` of them at once; their futures in order, without waiting."""
    shared = pool(ranks)
    shared.keep(workers - 1)
    executor = ThreadPoolExecutor(workers, thread_name_prefix="fenics")
    futures = [executor.submit(call) for call in calls]

    def settle():
        wait(futures)
        shared.keep(1 - workers)

    executor.submit(settle)
    executor.shutdown(wait=False)
    return futures
