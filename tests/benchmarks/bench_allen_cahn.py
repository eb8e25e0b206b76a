"""Forward Allen-Cahn, the common test of physics-informed networks: error and CPU-seconds on one thread.

The set-up is that of JAX-PI (`tests/allen_cahn.py`); published are 5.4e-5 (Wang et al. 2023, arXiv:2308.08468) and
2.2e-5 (PirateNet, Wang et al. 2024, arXiv:2402.00326), both with large general networks on a GPU. Errors are relative
L2 on 512 points and 201 times, against a spectral solver whose own error is printed. The networks here are small and
see the closed-form flow of the reaction, which theirs do not; they are trained by Levenberg-Marquardt.

Run: python tests/benchmarks/bench_allen_cahn.py [--seeds 3]
"""

import argparse
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402
import torch  # noqa: E402

from allen_cahn import error, reference, solve  # noqa: E402

#: Units per layer, points, rounds and iterations of each.
SIZES = ((16, 1500, 3, 60), (24, 3000, 3, 60))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    begun = time.process_time()
    truth = reference()
    seconds = time.process_time() - begun
    coarser = reference(2048, 2e-3)
    change = np.linalg.norm(coarser - truth) / np.linalg.norm(truth)
    print(f"reference: changes by {change:.1e} on twice the step and half the modes; {seconds:.1f} CPU s", flush=True)
    print(f"{'weights':>8}{'seed':>6}{'relative L2':>13}{'CPU s':>8}")
    for hidden, count, rounds, iterations in SIZES:
        for seed in range(given.seeds):
            begun = time.process_time()
            network, w = solve(hidden, count, rounds, iterations, seed)
            seconds = time.process_time() - begun
            print(f"{network.count:8d}{seed:6d}{error(network, w, truth):13.1e}{seconds:8.1f}", flush=True)


if __name__ == "__main__":
    main()
