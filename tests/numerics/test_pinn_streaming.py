"""Training samples from other processes: the same in any case, in order, and nothing left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from fenics_here import require_fenics
from pinn.amortised.makers import STEP, FenicsMaker, TorchMaker
from pinn.amortised.streaming import Lane, Stream, StreamError
from toy_makers import Dying, Toy
from virtual_cohort import setting


def gone(pids):
    """Whether all these processes have ended (a zombie has)."""
    for _ in range(100):
        left = []
        for pid in pids:
            try:
                state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
            except OSError:
                continue
            if state != "Z":
                left.append(pid)
        if not left:
            return True
        time.sleep(0.1)
    return False


def test_samples_are_those_of_seed_and_number_in_order_whoever_makes_them():
    with Stream([Lane([Toy("quick")]), Lane([Toy("late", slow=0.05)])], 100, 3, chunk=8, shares=(3, 1)) as stream:
        pids = stream.pids
        chunks = list(stream)
    assert [c.first for c in chunks] == list(range(0, 100, 8))
    assert (np.concatenate([c.arrays["x"] for c in chunks]) == Toy().make(3, range(100))["x"]).all()
    makers = [c.maker for c in chunks]
    assert makers.count("late") == 3 and makers.count("quick") == 10
    assert gone(pids)
    # One process with both makers gives the same, and so does a stream that goes on from a later chunk.
    with Stream([Lane([Toy("quick"), Toy("late")])], 100, 3, chunk=8, shares=(3, 1), begin=5) as stream:
        again = list(stream)
    assert [c.maker for c in again] == makers[5:]
    assert all((a.arrays["x"] == b.arrays["x"]).all() for a, b in zip(again, chunks[5:], strict=True))


def test_production_and_use_overlap_and_both_are_accounted_for():
    with Stream([Lane([Toy(slow=0.05)])], 64, 0, chunk=8) as stream:
        for _ in stream:
            time.sleep(0.05)
    usage = stream.usage
    # One after the other they would take 0.8 s.
    assert usage.training > 0.35 and usage.lanes[0].busy > 0.35
    assert usage.wall < 0.9 * (usage.training + usage.lanes[0].busy)
    assert usage.wall == pytest.approx(usage.training + usage.waiting, abs=0.05)
    assert "toy" in usage.lines()[1] and "training" in usage.lines()[-1]


def test_never_more_than_the_window_is_made_ahead():
    with Stream([Lane([Toy()])], 400, 0, chunk=4, window=6) as stream:
        chunks = iter(stream)
        next(chunks)
        time.sleep(0.3)
        assert stream.usage.lanes[0].chunks == 7


def test_a_killed_process_is_replaced_and_nothing_is_missing(tmp_path):
    with Stream([Lane([Dying("mortal", mark=str(tmp_path / "died"))])], 40, 3, chunk=8) as stream:
        chunks = list(stream)
    assert (np.concatenate([c.arrays["x"] for c in chunks]) == Toy().make(3, range(40))["x"]).all()
    assert stream.usage.lanes[0].restarts == 1 and "1 restart" in stream.usage.lines()[1]


def test_a_process_that_dies_again_and_again_is_an_error_that_says_where():
    with pytest.raises(StreamError, match=r"mortal.*SIGKILL.*samples 16 to 23; 1 restarts before"):
        with Stream([Lane([Dying("mortal")])], 40, 3, chunk=8, restarts=1) as stream:
            list(stream)
    with pytest.raises(StreamError, match=r"samples 24 to 31:\n(.|\n)*sample 30 of wrong cannot be made"):
        with Stream([Lane([Toy("wrong", wrong=30)])], 40, 3, chunk=8) as stream:
            pids = stream.pids
            list(stream)
    assert gone(pids)


def test_makers_that_cannot_travel_are_refused_before_anything_starts():
    class Local(Toy):
        pass

    with pytest.raises(StreamError, match="in a module"), Stream([Lane([Local()])], 8, 0):
        pass
    with pytest.raises(StreamError, match="shares"):
        Stream([Lane([Toy()])], 8, 0, shares=(1, 1))
    with pytest.raises(StreamError, match="no maker"):
        Stream([], 8, 0)
    with pytest.raises(StreamError, match="at least 1"):
        Stream([Lane([Toy()])], 0, 0)


def test_processes_end_with_the_one_that_trains():
    code = (
        "from pinn.amortised.streaming import Lane, Stream\nfrom toy_makers import Toy\nimport sys, time\n"
        "stream = Stream([Lane([Toy(slow=0.01)], 2)], 10000, 0)\nchunks = iter(stream)\nnext(chunks)\n"
        "print(*stream.pids, flush=True)\ntime.sleep(60)"
    )
    trains = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )  # fmt: skip
    with trains:
        pids = [int(p) for p in trains.stdout.readline().split()]
        assert len(pids) == 2
        trains.send_signal(signal.SIGKILL)
    assert gone(pids)


def test_both_solvers_make_the_same_patients_and_steps_are_short_enough():
    require_fenics()
    cohort = setting()
    quick, other = TorchMaker(cohort).make(1, range(12)), FenicsMaker(cohort).make(1, range(3))
    finer = TorchMaker(cohort, step=STEP / 4).make(1, range(12))
    for name in quick:
        if name != "states":
            assert np.array_equal(quick[name][:3], other[name]), name

    def relative(a, b):
        return np.sqrt(((a - b) ** 2).sum((2, 3, 4)) / (b**2).sum((2, 3, 4))).max()

    assert relative(quick["states"], finer["states"]) < 1e-3
    assert relative(other["states"], quick["states"][:3]) < 1.5e-2  # two grids that differ by their own errors
    assert quick["states"].shape == (12, 3, *cohort.domain.shape) and quick["dose_days"].shape == (12, 1, 6)


@pytest.mark.slow
def test_fenics_and_torch_stream_at_the_same_time():
    require_fenics()
    cohort = setting()
    lanes = [Lane([TorchMaker(cohort)]), Lane([FenicsMaker(cohort)])]
    with Stream(lanes, 48, 5, chunk=4, shares=(2, 1)) as stream:
        chunks = list(stream)
        pids = stream.pids
    assert {c.maker for c in chunks} == {"TorchSolver", "FenicsSolver"}
    for chunk in chunks[:3]:
        maker = (TorchMaker if chunk.maker == "TorchSolver" else FenicsMaker)(cohort)
        again = maker.make(5, range(chunk.first, chunk.first + 4))
        assert all(np.array_equal(again[n], chunk.arrays[n]) for n in again)
    assert all(lane.cpu > 0 for lane in stream.usage.lanes)
    assert gone(pids)
