"""The FEniCS worker: its protocol, its life and death, and what it says when something is missing."""

import io
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import biomodel as bm
from biomodel.domain import Domain
from biomodel.errors import GeometryError, SolverError
from biomodel.fenics._worker.protocol import MAGIC, Closed, ProtocolError, read_frame, write_frame
from biomodel.fenics.mesh import BoxMesh
from biomodel.fenics.pool import close_workers, pool
from biomodel.fenics.process import CACHE, PYTHON, Worker, find_interpreter
from biomodel.fenics.solver import simulate_many
from biomodel.parameters import NumpyOps
from biomodel.schedule import Schedule
from biomodel.solvers.base import Context
from biomodel.tape import record
from biomodel.terms import NoGrowth
from fenics_here import require_fenics

# --- protocol (without FEniCS) ----------------------------------------------------------------------------------------


def test_a_frame_comes_back_as_it_went():
    stream = io.BytesIO()
    arrays = {"u": np.arange(6.0).reshape(2, 3).T, "kind": np.array([1, 2], np.int8), "none": np.zeros((0, 3)),
              "number": np.array(2.5)}  # fmt: skip
    write_frame(stream, {"do": "run", "x": 0.1}, arrays)
    write_frame(stream, {"do": "quit"})
    stream.seek(0)
    header, found = read_frame(stream)
    assert header == {"do": "run", "x": 0.1}
    for name, a in arrays.items():
        np.testing.assert_array_equal(found[name], a)
        assert found[name].dtype == a.dtype and found[name].shape == a.shape
    assert read_frame(stream) == ({"do": "quit"}, {})
    with pytest.raises(Closed):
        read_frame(stream)


def test_what_is_no_frame_is_refused():
    with pytest.raises(ProtocolError, match="found"):
        read_frame(io.BytesIO(b"Hello, I am a library that prints."))
    with pytest.raises(ProtocolError, match="type"):
        write_frame(io.BytesIO(), {}, {"x": np.array([{}], object)})
    forged = io.BytesIO()
    write_frame(forged, {}, {"x": np.zeros(2)})
    with pytest.raises(ProtocolError, match="object"):
        read_frame(io.BytesIO(forged.getvalue().replace(b'"float64"', b' "object"')))
    with pytest.raises(ProtocolError, match="too long"):
        read_frame(io.BytesIO(MAGIC + b"\xff" * 8))


# --- the rest needs FEniCS --------------------------------------------------------------------------------------------


@pytest.fixture
def fenics():
    require_fenics()


@pytest.fixture
def fresh(fenics, monkeypatch):
    """No idle workers before and after, so that changes of the environment count."""
    close_workers()
    yield monkeypatch
    close_workers()


def interpreter(folder, lines):
    """An interpreter that does something first."""
    path = Path(folder, "python3")
    path.write_text(f'#!/bin/sh\n{lines}\nexec {find_interpreter()} "$@"\n')
    path.chmod(0o755)
    return str(path)


def space(domain=None, degree=1):
    mesh = BoxMesh().make(domain or Domain.box((1, 4, 5)))
    request = {"do": "space", "key": "here", "degree": degree}
    return mesh, (request, {"points": mesh.points, "cells": mesh.cells, "edges": mesh.edges})


def simulation(shape=(1, 8, 9), **options):
    model = bm.ReactionDiffusion(bm.Logistic(), bm.Isotropic(), [bm.Chemotherapy("paclitaxel")])
    schedule = Schedule.weekly("paclitaxel", 3.3, 4, 80, "mg/m^2")
    built = bm.FenicsSolver(**options).build(model, Domain.box(shape), schedule)
    return built, np.random.default_rng(0).random(shape) * 0.8


def running(pid):
    """Whether a process runs (one that ended but was not waited for does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone(pid, seconds=10.0):
    end = time.monotonic() + seconds
    while running(pid) and time.monotonic() < end:
        time.sleep(0.05)
    return not running(pid)


def test_ufl_and_numpy_replay_the_same_numbers(fenics):
    """All terms of the package and a law of the test's own, as one tape each, evaluated by FEniCS at the nodes."""

    def own(u, p, c, ops):
        return ops.where((u > 0.5) & (c.drug_map < 0.9) | (u < 0.1), ops.exp(-u) * abs(u - 1), ops.sqrt(u + 1) / 3**u)

    growth = [bm.Exponential(), bm.Logistic(), bm.Gompertz(), NoGrowth()]
    drug = bm.Chemotherapy("paclitaxel", map="drug_map", resistant=bm.LogitNormal(0.2, 1.0))
    mixed = bm.Combination(("paclitaxel", "doxorubicin"))
    agents = ("paclitaxel", "doxorubicin", "therapy")
    terms = (*growth, bm.TissueDiffusion(("a", "b")), bm.Isotropic(), drug, mixed, bm.Systemic())
    p = {f"{i}{q.name}": q.typical for i, t in enumerate(terms) for q in t.parameters}

    def everything(u, p, c, ops):
        found = [own(u, p, c, ops)]
        for i, t in enumerate(terms):
            values = {q.name: p[f"{i}{q.name}"] for q in t.parameters}
            if isinstance(t, (bm.TissueDiffusion, bm.Isotropic)):
                found.append(t.coefficient(u, values, c, ops))
            else:
                c.map = c.drug_map
                found.append(t.rate(u, values, c, ops))
        return found

    tape = record(everything, list(p), ["a", "b", "drug_map"], agents)
    mesh, made = space()
    rng = np.random.default_rng(1)
    fields = {n: rng.random(len(mesh.points)) for n in ("a", "b", "drug_map")}
    u = np.concatenate(([-0.1, 0.0, 1.0, 1.2], rng.random(len(mesh.points) - 4)))
    amounts = {w: dict.fromkeys(agents, v) for w, v in (("level", 0.7), ("exposure", 2.0))}
    exact = everything(u, p, Context(**fields, **amounts), NumpyOps)
    scalars = {f"p.{n}": v for n, v in p.items()} | {f"{w}.{a}": v for w, each in amounts.items()
                                                     for a, v in each.items()}  # fmt: skip
    request = {"do": "evaluate", "space": "here", "tape": tape.json(), "scalars": scalars}
    with pool().worker() as worker:
        _, found = worker.ask((request, {"node:u": u, **{f"node:c.{n}": v for n, v in fields.items()}}), [made])
    for value, own_value in zip(found["values"], exact, strict=True):
        np.testing.assert_allclose(value, np.broadcast_to(own_value, u.shape), rtol=1e-13, atol=1e-15)


def test_an_interpreter_that_prints_does_no_harm(fresh, tmp_path):
    fresh.setenv(PYTHON, interpreter(tmp_path, "echo Welcome; echo 'to this machine' >&2"))
    built, u0 = simulation()
    assert torch.isfinite(built({}, u0, [5.0])).all()


def test_no_fenics_says_how_to_install_it(monkeypatch):
    monkeypatch.setenv(PYTHON, "/bin/false")
    with pytest.raises(SolverError, match=r"(?s)/bin/false.*apt-get install .*python3-dolfinx.*conda.*Docker"):
        Worker().start()


@pytest.mark.parametrize("module,words", [
    ("__version__ = '0.4.1'", r"dolfinx 0\.4\.1 is too old"),
    ("raise ImportError('libpetsc.so.3: cannot open')", r"does not work: .*libpetsc\.so"),
    ("import os; os.write(2, b'Segmentation'); os.kill(os.getpid(), 11)", r"(?s)while it started.*SIGSEGV"),
])  # fmt: skip
def test_a_fenics_that_is_old_or_broken_is_told(fresh, tmp_path, module, words):
    (tmp_path / "dolfinx").mkdir()
    (tmp_path / "dolfinx" / "__init__.py").write_text(module)
    fresh.setenv(PYTHON, interpreter(tmp_path, f"export PYTHONPATH={tmp_path}"))
    worker = Worker()
    with pytest.raises(SolverError, match=words):
        worker.start()
    assert worker.pid is None


def test_a_cache_that_cannot_be_written_is_told(fresh, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    fresh.setenv(CACHE, str(blocked))
    with pytest.raises(SolverError, match=rf"(?s)cannot|can write.*{blocked}.*{CACHE}"):
        Worker().start()


def test_a_missing_compiler_is_told(fresh, tmp_path):
    fresh.setenv(CACHE, str(tmp_path / "forms"))
    fresh.setenv(PYTHON, interpreter(tmp_path, "export CC=/nonexistent/cc"))
    built, u0 = simulation()
    with pytest.raises(SolverError, match=r"(?s)could not compile.*no C compiler.*apt-get install gcc"):
        built({}, u0, [5.0])


def test_an_mpi_that_refuses_root_is_told(fresh, tmp_path):
    fresh.setenv(PYTHON, interpreter(tmp_path, ""))
    (tmp_path / "mpirun").write_text("#!/bin/sh\necho mpirun has detected an attempt to run as root. >&2\nexit 1\n")
    (tmp_path / "mpirun").chmod(0o755)
    with pytest.raises(SolverError, match=r"(?s)refuses to run as root.*ranks=1.*detected an attempt"):
        Worker(2).start()


def test_variables_of_the_callers_interpreter_do_not_reach_the_worker(fresh, tmp_path):
    (tmp_path / "numpy.py").write_text("raise ImportError('the wrong numpy')")
    for name in ("PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "VIRTUAL_ENV"):
        fresh.setenv(name, str(tmp_path))
    worker = Worker()
    try:
        assert worker.start()["dolfinx"]
    finally:
        worker.close()


def test_a_compilation_that_was_killed_does_not_block_the_next(fresh, tmp_path):
    """What it leaves is a source without a library, for which FFCx would wait and then give up."""
    fresh.setenv(CACHE, str(tmp_path))
    built, u0 = simulation()
    first = built({}, u0, [5.0])
    close_workers()
    libraries = [p for p in tmp_path.rglob("*") if p.suffix in (".so", ".o", ".cached")]
    assert len(libraries) > 2
    for path in libraries:
        path.unlink()
    assert float((simulation()[0]({}, u0, [5.0]) - first).abs().max()) == 0


def test_progress_is_reported(fenics):
    built, u0 = simulation((6, 30, 30), rtol=1e-6)
    seen = []
    built({}, u0, [60.0], plan=built.fixed_plan([60.0], [600]), progress=seen.append)
    assert len(seen) >= 2 and seen == sorted(seen) and 0 < seen[0] < 1


def test_an_interrupted_run_ends_its_worker_and_the_next_one_works(fresh):
    built, u0 = simulation((6, 30, 30))
    plan = built.fixed_plan([60.0], [120])
    with pool().worker() as worker:
        pid = worker.start() and worker.pid

    def interrupt(share):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        built({}, u0, [60.0], plan=plan, progress=interrupt)
    assert gone(pid)
    small, start = simulation()
    assert torch.isfinite(small({}, start, [5.0])).all()


def kill_during(built, u0, plan, times=1):
    """Run, and kill the worker (the first ones that appear) while it computes; the result or the error."""
    outcome, killed = [], []

    def run():
        try:
            outcome.append(built({}, u0, [60.0], plan=plan, progress=lambda share: busy.set()))
        except SolverError as error:
            outcome.append(error)

    busy = threading.Event()
    thread = threading.Thread(target=run)
    with pool().worker() as worker:
        worker.start()
    thread.start()
    for _ in range(times):
        assert busy.wait(60)
        killed.append(worker.pid)
        os.kill(worker.pid, signal.SIGKILL)
        busy.clear()
    thread.join(120)
    assert not thread.is_alive() and all(gone(pid) for pid in killed)
    return outcome[0]


def test_a_killed_worker_is_started_again_once(fresh):
    built, u0 = simulation((6, 30, 30))
    plan = built.fixed_plan([60.0], [600])
    whole = built({}, u0, [60.0], plan=plan)
    assert float((kill_during(built, u0, plan) - whole).abs().max()) < 1e-12
    error = kill_during(built, u0, plan, times=2)
    assert isinstance(error, SolverError) and "died twice" in str(error) and "SIGKILL" in str(error)


@pytest.mark.slow
def test_twenty_kills_leave_nothing_behind(fresh, tmp_path):
    """At any moment: while starting, compiling, computing or answering."""
    fresh.setenv("TMPDIR", str(tmp_path))
    fresh.setattr("tempfile.tempdir", None)
    fresh.setenv(CACHE, str(tmp_path / "forms"))
    built, u0 = simulation((6, 20, 20))
    plan = built.fixed_plan([60.0], [100])
    rng, pids, results, errors = np.random.default_rng(0), set(), [], 0
    for n in range(20):
        if n % 5 == 4:
            shutil.rmtree(tmp_path / "forms", ignore_errors=True)
            close_workers()
        outcome = []

        def run(outcome=outcome):
            try:
                outcome.append(built({}, u0, [60.0], plan=plan))
            except SolverError as error:
                outcome.append(error)

        with pool().worker() as worker:
            pass
        thread = threading.Thread(target=run)
        thread.start()
        time.sleep(float(rng.uniform(0.0, 2.5)))
        if worker.pid is not None:
            pids.add(worker.pid)
            os.kill(worker.pid, signal.SIGKILL)
        thread.join(120)
        assert not thread.is_alive()
        if isinstance(outcome[0], SolverError):
            errors += 1
            assert "SIGKILL" in str(outcome[0])
        else:
            results.append(outcome[0])
    whole = built({}, u0, [60.0], plan=plan)
    assert all(float((u - whole).abs().max()) < 1e-12 for u in results)
    close_workers()
    print(f"20 kills: {len(results)} correct results, {errors} errors")
    assert all(gone(pid) for pid in pids)
    assert [p.name for p in tmp_path.iterdir() if p.name != "forms"] == []


def test_a_worker_ends_with_the_process_that_started_it(fresh, tmp_path):
    """Also when that is killed in the middle of a computation, and cannot clean up."""
    script = (
        "import numpy as np, biomodel as bm\n"
        "from biomodel.fenics.pool import pool\n"
        "model = bm.ReactionDiffusion(bm.Logistic(), bm.Isotropic())\n"
        "built = bm.FenicsSolver().build(model, bm.Domain.box((20, 30, 30)), bm.Schedule())\n"
        "with pool().worker() as worker: print(worker.start() and worker.pid, flush=True)\n"
        "plan = built.fixed_plan([900.0], [5000])\n"
        "built({}, np.full((20, 30, 30), 0.1), [900.0], plan=plan, progress=lambda s: print('busy', flush=True))\n"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    caller = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment)
    pid = int(caller.stdout.readline())
    assert caller.stdout.readline() == "busy\n" and running(pid)
    caller.kill()
    caller.wait()
    caller.stdout.close()
    assert gone(pid)
    assert list(tmp_path.iterdir()) == []


def test_two_ranks_give_the_same_field(fresh):
    """With equal steps and a tight solver; ranks end with their mpirun, and with a killed one."""
    found = []
    for ranks in (1, 2):
        built, u0 = simulation((4, 9, 10), linear_rtol=1e-12, ranks=ranks)
        u0 = torch.tensor(u0, requires_grad=True)
        u = built({}, u0, [10.0, 30.0], plan=built.fixed_plan([10.0, 30.0], [10, 20]))
        (u**2).sum().backward()
        found.append((u.detach(), u0.grad))
    for one, two in zip(*found, strict=True):
        assert float((one - two).norm() / one.norm()) < 1e-8
    with pool(2).worker() as worker:
        mpirun = worker.pid
    ranks = [int(p) for p in Path(f"/proc/{mpirun}/task/{mpirun}/children").read_text().split()]
    assert len(ranks) == 2
    os.kill(mpirun, signal.SIGKILL)
    assert all(gone(pid) for pid in (mpirun, *ranks))


def test_a_derivative_survives_its_worker(fresh):
    built, u0 = simulation()
    linear = built.linearise({}, u0, [5.0], built.fixed_plan([5.0], [4]))
    direction = torch.ones(1, 1, *u0.shape, dtype=torch.float64)
    before = linear.push(direction)
    close_workers()
    assert float((linear.push(direction) - before).abs().max()) < 1e-14


def test_many_simulations_run_on_several_workers(fresh):
    built, u0 = simulation((4, 16, 16))
    runs = [(built, {"growth.k": k}, u0, [30.0]) for k in (0.02, 0.05, 0.1, 0.2)]
    bad = (built, {}, np.full(u0.shape, np.nan), [30.0])
    futures = simulate_many([*runs, bad], workers=2)
    went_on = sum(not f.done() for f in futures)
    assert went_on > 0
    for run, future in zip(runs, futures, strict=False):
        assert float((future.result(120) - built(*run[1:])).abs().max()) < 1e-12
    with pytest.raises(SolverError, match="NaN"):
        futures[-1].result(120)
    with pytest.raises(SolverError, match="workers is 0"):
        simulate_many(runs, workers=0)


def test_bad_input_is_told_before_anything_runs():
    domain = Domain.box((1, 4, 5))
    model = bm.ReactionDiffusion(bm.Logistic(), bm.TissueDiffusion(("a", "b")))
    with pytest.raises(SolverError, match="needs the field"):
        bm.FenicsSolver().build(model, domain, Schedule())
    with pytest.raises(SolverError, match=r"(?s)'a' has shape \(1, 4, 4\).*resample"):
        bm.FenicsSolver().build(model, domain, Schedule(), {"a": np.ones((1, 4, 4)), "b": np.ones((1, 4, 5))})
    with pytest.raises(SolverError, match="'b' has NaN"):
        bm.FenicsSolver().build(model, domain, Schedule(), {"a": np.ones((1, 4, 5)), "b": np.full((1, 4, 5), np.nan)})
    with pytest.raises(SolverError, match="one simulation per patient"):
        bm.FenicsSolver().build(bm.ReactionDiffusion(), domain, [Schedule(), Schedule()])
    built = bm.FenicsSolver().build(bm.ReactionDiffusion(), domain, Schedule())
    u0 = np.full(domain.shape, 0.2)
    for u, times, words in (
        (np.zeros((1, 4, 4)), [5.0], "initial state: shape"), (u0 * np.nan, [5.0], "NaN"),
        (u0, [np.inf], "finite days"), (u0, [5.0, 3.0], "increase"), (u0, [-1.0], "not lie before day 0"),
    ):  # fmt: skip
        with pytest.raises(SolverError, match=words):
            built({}, u, times, plan=built.fixed_plan(times, [1] * len(times)) if np.isfinite(times).all() else None)
    for options, words in (({"degree": 3}, "degree"), ({"rtol": 2.0}, "rtol"), ({"ranks": 0}, "ranks")):
        with pytest.raises(SolverError, match=words):
            bm.FenicsSolver(**options)
    with pytest.raises(SolverError, match="refine"):
        BoxMesh(0)
    with pytest.raises(GeometryError, match="single point"):
        BoxMesh().make(Domain.point())


def test_extreme_parameters_are_an_error_not_a_field(fenics):
    built, u0 = simulation()
    with pytest.raises(SolverError, match="too extreme|too fast|not finite"):
        built({"growth.k": torch.tensor(1e7)}, u0, [60.0], plan=built.fixed_plan([60.0], [1]))
    endless = bm.ReactionDiffusion(bm.Exponential(), bm.Isotropic())
    grown = bm.FenicsSolver().build(endless, Domain.box((1, 3, 4)), Schedule())
    with pytest.raises(SolverError, match="not finite"):
        grown({"growth.k": torch.tensor(30.0)}, np.full((1, 3, 4), 0.5), [60.0], plan=grown.fixed_plan([60.0], [4]))
