"""Work in chunks that become smaller where memory runs out, and on the CPU where the smallest are too large."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

T = TypeVar("T")

#: Points at once to begin with, and at least.
MOST, LEAST = 16_384, 32


class OutOfMemoryWarning(UserWarning):
    """Memory ran out: the work goes on in smaller chunks, or on the CPU, and takes longer."""


@dataclass(eq=False)
class Chunks:
    """How many points go through a network at once; what was learned by running out of memory is kept.

    Attributes
    ----------
    size : int
    """

    size: int = MOST

    def over(self, function: Callable[[torch.Tensor], T], points: torch.Tensor) -> list[T]:
        """`function` of the points (n, k), chunk after chunk.

        Raises
        ------
        torch.OutOfMemoryError
            If the smallest chunk is too large for the CPU.
        """
        found, at = [], 0
        while at < len(points):
            try:
                found.append(function(points[at : at + self.size]))
            except torch.OutOfMemoryError:
                if self.size <= LEAST:
                    raise
                self.size = max(LEAST, min(self.size, len(points)) // 2)
                warnings.warn(
                    f"out of memory on {points.device}: going on with {self.size} points at once.",
                    OutOfMemoryWarning,
                    stacklevel=2,
                )
                continue
            at += self.size
        return found


def on_cpu_when_full(work: Callable[[torch.device], T], device: torch.device) -> T:
    """`work` on a device, and once more on the CPU if that runs out of memory even with the smallest chunks."""
    try:
        return work(device)
    except torch.OutOfMemoryError:
        if device.type == "cpu":
            raise
        torch.cuda.empty_cache()
        warnings.warn(
            f"out of memory on {device} with the smallest chunks: starting again on the CPU, which takes longer.",
            OutOfMemoryWarning,
            stacklevel=2,
        )
        return work(torch.device("cpu"))
