"""Makers of training samples that cost nothing, for tests of streaming; in a module, so that they travel."""

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Toy:
    """Random numbers that depend on seed and number; `slow` seconds per chunk, one of which may go wrong."""

    name: str = "toy"
    slow: float = 0.0
    wrong: int = -1

    def warm(self):
        pass

    def seconds(self):
        return 0.0

    def make(self, seed, indices):
        time.sleep(self.slow)
        if self.wrong in indices:
            raise ValueError(f"sample {self.wrong} of {self.name} cannot be made")
        return {"x": np.stack([np.random.default_rng([seed, i]).random(3) for i in indices])}


@dataclass(frozen=True)
class Dying(Toy):
    """The process ends, as if killed, at one of its samples: the first time, or always where there is no `mark`."""

    mark: str = ""

    def make(self, seed, indices):
        if 20 in indices and not (self.mark and Path(self.mark).exists()):
            if self.mark:
                Path(self.mark).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().make(seed, indices)
