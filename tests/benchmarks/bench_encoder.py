"""Encoders of imaging studies: what a step costs, and whether pretraining helps where labels are few. All is virtual.

Step: 96 x 96 x 48 voxels, batch 4, four volumes each (three phases and an ADC map), of pretraining with both of its
losses; seconds, memory, and the share of the time spent waiting for data, on the CPU, and on a GPU where there is one
(there with bfloat16, too). With --files, volumes are read from compressed files by the threads that make the batches.

Labels: predict log k, the rate at which contrast leaves a tumour (`tests/virtual_studies.py`), from 16 labelled
patients; 120 further ones are there without labels. R² on 60 patients that no method has seen:

- table: ridge regression on what a reader measures (enhancement early and late, their ratio, size), with the penalty
  chosen by leave-one-out.
- encoder: the same small encoder, fine-tuned from random weights and after pretraining; and the pretrained one with its
  weights frozen. All have the same steps and learning rates, which no result was used to choose.

Run: python tests/benchmarks/bench_encoder.py [--step] [--labels] [--seeds 3] [--steps 3] [--files]
"""

import argparse
import os
import resource
import sys
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from sklearn.linear_model import RidgeCV  # noqa: E402
from sklearn.pipeline import make_pipeline  # noqa: E402
from sklearn.preprocessing import StandardScaler  # noqa: E402

from biomodel.imaging.encoder import Encoder, EncoderSettings  # noqa: E402
from biomodel.imaging.encoder_loop import Loop  # noqa: E402
from biomodel.imaging.encoder_study import Scan, Study  # noqa: E402
from biomodel.imaging.encoder_training import FineTuning, Pretraining, fine_tune, pretrain  # noqa: E402
from virtual_studies import cohort, table  # noqa: E402

SMALL = EncoderSettings(features=(8, 16), width=32, heads=4, layers=1)
UNLABELLED, LABELLED, TEST = 120, 16, 60
BEFORE = Pretraining(Loop(steps=120, batch=6, rate=3e-3), block=4, hidden=0.4)
AFTER = FineTuning(Loop(steps=100, batch=8, rate=3e-3))


class Files:
    """Studies on disk, read when they are asked for."""

    def __init__(self, folder, studies):
        self.paths = []
        for number, one in enumerate(studies):
            scan = one.scans[0]
            self.paths.append(Path(folder) / f"{number}.npz")
            np.savez_compressed(self.paths[-1], dce=scan.dce, adc=scan.adc, mask=scan.mask > 0)

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, number):
        with np.load(self.paths[number]) as held:
            return Study(str(number), [Scan(0.0, held["dce"], (-10.0, 90.0, 300.0), held["adc"], None, held["mask"])])


def steps(count, files):
    rng = np.random.default_rng(0)
    shape = (48, 96, 96)
    mask = np.zeros(shape, bool)
    mask[16:32, 30:60, 30:60] = True
    studies = []
    for number in range(4):
        dce = (1 + rng.random((3, *shape))).astype(np.float32)
        adc = (1e-3 * (1 + 0.1 * rng.standard_normal(shape))).astype(np.float32)
        studies.append(Study(f"S{number}", [Scan(0.0, dce, (-10.0, 90.0, 300.0), adc, None, mask)]))
    kinds = [("cpu", None)]
    if torch.cuda.is_available():
        kinds = [("cuda", None), ("cuda", torch.bfloat16), *kinds]
    print(f"{'device':>8}{'numbers':>10}{'data':>8}{'s / step':>10}{'CPU s':>8}{'memory':>9}{'waiting':>9}")
    with tempfile.TemporaryDirectory() as folder:
        for device, precision in kinds:
            for where, held in [("memory", studies), *([("files", Files(folder, studies))] if files else [])]:
                encoder = Encoder(EncoderSettings())
                loop = Loop(steps=1, batch=4, device=device, precision=precision)
                pretrain(encoder, held, Pretraining(loop))  # the first step is slower
                if device == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                cpu = time.process_time()
                outcome = pretrain(encoder, held, Pretraining(replace(loop, steps=count, ahead=2)))
                cpu = time.process_time() - cpu
                peak = (torch.cuda.max_memory_allocated() if device == "cuda"
                        else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)  # fmt: skip
                seconds = outcome.seconds / count
                name = "float32" if precision is None else "bfloat16"
                print(f"{device:>8}{name:>10}{where:>8}{seconds:10.2f}{cpu / count:8.2f}{peak / 2**30:6.1f} GB"
                      f"{outcome.share_waiting:9.1%}", flush=True)  # fmt: skip


def r2(found, true):
    return 1 - float(((found - true) ** 2).sum() / ((true - true.mean()) ** 2).sum())


def labels(seeds):
    free, _ = cohort(10_000, UNLABELLED)
    test, known = cohort(30_000, TEST)
    began = time.process_time()
    learned = Encoder(SMALL)
    outcome = pretrain(learned, free, BEFORE)
    print(f"pretraining: {time.process_time() - began:.0f} CPU-seconds, loss {np.mean(outcome.losses[:10]):.3f} to "
          f"{np.mean(outcome.losses[-10:]):.3f}, waiting {outcome.share_waiting:.1%}", flush=True)  # fmt: skip
    rows = {"table": [], "from random weights": [], "pretrained": [], "pretrained, frozen": []}
    seconds = []
    for seed in range(seeds):
        few, given = cohort(1000 * (seed + 1), LABELLED)
        ridge = make_pipeline(StandardScaler(), RidgeCV(np.logspace(-3, 3, 25))).fit(table(few), given[:, 0])
        rows["table"].append(r2(ridge.predict(table(test)), known[:, 0]))
        for name, encoder, frozen in (
            ("from random weights", Encoder(SMALL, seed=seed), False),
            ("pretrained", Encoder(SMALL), False),
            ("pretrained, frozen", Encoder(SMALL), True),
        ):
            if name != "from random weights":
                encoder.load_state_dict(learned.state_dict())
            settings = replace(AFTER, frozen=frozen, loop=replace(AFTER.loop, seed=seed))
            began = time.process_time()
            predictor, _ = fine_tune(encoder, few, given, settings)
            seconds.append(time.process_time() - began)
            rows[name].append(r2(predictor.predict(test, 16)[:, 0], known[:, 0]))
        print(f"seed {seed}: " + ", ".join(f"{n} {v[-1]:.2f}" for n, v in rows.items()), file=sys.stderr, flush=True)
    print(f"R² of log k on {TEST} patients after {LABELLED} labels, mean (least to most) of {seeds} draws of labels; "
          f"{np.mean(seconds):.0f} CPU-seconds per fine-tuning")  # fmt: skip
    for name, found in rows.items():
        print(f"  {name:22}{np.mean(found):6.2f} ({min(found):.2f} to {max(found):.2f})")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--step", action="store_true")
    parser.add_argument("--labels", action="store_true")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--files", action="store_true")
    given = parser.parse_args()
    warnings.simplefilter("default")
    both = not (given.step or given.labels)
    if given.step or both:
        steps(given.steps, given.files)
    if given.labels or both:
        labels(given.seeds)


if __name__ == "__main__":
    main()
