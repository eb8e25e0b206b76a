"""A worker process: found, started, asked, and ended cleanly."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from biomodel.errors import NotFiniteError, SolverError
from biomodel.fenics._worker.protocol import ProtocolError, read_frame, write_frame

__all__ = ["INSTALL", "PYTHON", "Worker", "find_interpreter"]

#: Environment variable that names the interpreter which has dolfinx, and the one that names the cache of its forms.
PYTHON, CACHE = "TUMORCAST_FENICS_PYTHON", "TUMORCAST_FENICS_CACHE"
INSTALL = (
    "Debian and Ubuntu, as root: apt-get install --no-install-recommends python3-dolfinx gcc python3-dev; "
    "conda: conda install -c conda-forge fenics-dolfinx mpich gcc, then name its python in TUMORCAST_FENICS_PYTHON; "
    "Docker: dolfinx/dolfinx:stable"
)
WORKER = Path(__file__).resolve().parent / "_worker"
#: Variables that would lead the system's interpreter to libraries built for another.
STRIPPED = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "PYTHONSTARTUP", "PYTHONUSERBASE")
#: Where the worker, its compiler and Open MPI put what is temporary.
SESSION_FOLDERS = (
    "TMPDIR", "OMPI_MCA_orte_tmpdir_base", "OMPI_MCA_btl_vader_backing_directory", "PRTE_MCA_prte_tmpdir_base",
)  # fmt: skip
#: Most bytes of a dead worker's last words that are shown.
LAST_WORDS = 1500

Request = tuple[Mapping[str, Any], Mapping[str, np.ndarray]]
Answer = tuple[dict[str, Any], dict[str, np.ndarray]]


class _Died(Exception):
    """The worker is gone; its last words."""


class _Unknown(Exception):
    """The worker does not have what the request refers to."""


def environment() -> dict[str, str]:
    """The worker's environment: the caller's without what belongs to the caller's interpreter."""
    kept = {k: v for k, v in os.environ.items() if k not in STRIPPED}
    # One thread, as parallelism is by processes; a fixed hash seed, as dolfinx 0.5 names some forms by hash order and
    # would compile them again.
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0", "PYTHONUNBUFFERED": "1"}


@functools.lru_cache(maxsize=8)
def _has_dolfinx(python: str) -> bool:
    look = "import importlib.util as u, sys; sys.exit(u.find_spec('dolfinx') is None)"
    try:
        done = subprocess.run([python, "-c", look], env=environment(), stdin=subprocess.DEVNULL, capture_output=True,
                              timeout=60)  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def candidates() -> list[str]:
    """Interpreters that may have dolfinx, in the order in which they are tried."""
    named = os.environ.get(PYTHON)
    if named:
        return [named]
    found = ["/usr/bin/python3"]
    for folder in (os.environ.get("CONDA_PREFIX"),):
        if folder:
            found.append(str(Path(folder, "bin", "python")))
    on_path = shutil.which("python3")
    found += [p for p in (on_path, sys.executable) if p]
    return list(dict.fromkeys(found))


def find_interpreter() -> str:
    """The interpreter that runs workers: the one named by `TUMORCAST_FENICS_PYTHON`, or the first that has dolfinx.

    Raises
    ------
    SolverError
        With the commands that install FEniCS, if there is none.
    """
    named = os.environ.get(PYTHON)
    for python in candidates():
        if _has_dolfinx(python):
            return python
    if named:
        raise SolverError(
            f"{PYTHON} names {named!r}, which is no Python interpreter with dolfinx. Install it there, or name "
            f"another. {INSTALL}."
        )
    raise SolverError(f"FEniCS was not found: none of {', '.join(candidates())} can import dolfinx. {INSTALL}.")


def command(python: str, ranks: int) -> list[str]:
    """The command line of a worker, under mpirun if it has several ranks."""
    alone = [python, str(WORKER)]
    if ranks == 1:
        return alone
    beside = Path(python).resolve().with_name("mpirun")
    mpirun = str(beside) if beside.exists() else shutil.which("mpirun")
    if mpirun is None:
        raise SolverError(f"FenicsSolver: ranks={ranks} needs mpirun, which is not on the path; use ranks=1.")
    options = ["-n", str(ranks)]
    kind = subprocess.run([mpirun, "--version"], env=environment(), stdin=subprocess.DEVNULL, capture_output=True,
                          text=True)  # fmt: skip
    if "Open MPI" in kind.stdout:
        # Ranks that wait give their core to those that compute, as there may be fewer cores than ranks.
        options += ["--bind-to", "none", "--oversubscribe", "--mca", "mpi_yield_when_idle", "1"]
        if os.geteuid() == 0:
            options.append("--allow-run-as-root")
    return [mpirun, *options, *alone]


class Worker:
    """One worker process, started when first asked.

    Parameters
    ----------
    ranks : int
        MPI processes; more than one run under mpirun.
    """

    def __init__(self, ranks: int = 1):
        self.ranks = ranks
        self.hello: dict[str, Any] = {}
        #: Seconds that workers of this object have computed, and the most memory of one (of its first rank), bytes.
        self.seconds, self.peak = 0.0, 0.0
        self._process: subprocess.Popen | None = None
        self._words: BinaryIO | None = None
        self._folder: Path | None = None

    @property
    def pid(self) -> int | None:
        """Process number of the worker (of mpirun, with several ranks), or None when it does not run."""
        return self._process.pid if self._process is not None else None

    # Life ------------------------------------------------------------------------------------------------------------

    def start(self) -> dict[str, Any]:
        """Start the process; what it says of itself (dolfinx, python, cache, compiler, ranks).

        Raises
        ------
        SolverError
            If there is no FEniCS, it is broken or too old, its cache cannot be written, or MPI refuses.
        """
        if self._process is not None:
            return self.hello
        python = find_interpreter()
        self._words = tempfile.TemporaryFile()
        # MPI's shared segments and session files go where they are removed with the worker, however it ends.
        self._folder = Path(tempfile.mkdtemp(prefix="tumorcast-fenics-"))
        try:
            self._process = subprocess.Popen(
                command(python, self.ranks), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._words,
                # Alone, Open MPI would start a daemon, which may outlive a killed worker.
                env={**environment(), "OMPI_MCA_ess_singleton_isolated": "1",
                     "TUMORCAST_WORKER_FOLDER": str(self._folder),
                     **dict.fromkeys(SESSION_FOLDERS, str(self._folder))},
                cwd="/", start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            self._clear()
            raise SolverError(f"{python}: the FEniCS worker could not be started ({error.strerror}).") from error
        try:
            header, _ = self._receive(None, skip=LAST_WORDS)
        except _Died as death:
            self._clear()
            hint = ""
            if "allow-run-as-root" in str(death) or "as root" in str(death):
                hint = " MPI refuses to run as root; run as another user, or use ranks=1."
            raise SolverError(f"{python}: the FEniCS worker ended while it started.{hint} It said:\n{death}") from None
        self.hello = header["hello"]
        return self.hello

    def close(self) -> None:
        """End the process."""
        if self._process is None:
            return
        with contextlib.suppress(OSError, ValueError):
            write_frame(cast(BinaryIO, self._process.stdin), {"do": "quit"})
        with contextlib.suppress(OSError, ValueError):
            cast(BinaryIO, self._process.stdin).close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(3)
        self.kill()

    def kill(self) -> None:
        """End the process at once, whatever it does."""
        if self._process is not None:
            if self._process.poll() is None and self.ranks > 1:
                # mpirun ends its ranks when asked to end, not when it is killed.
                self._process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(3)
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._clear()

    def _clear(self) -> None:
        if self._process is not None:
            for stream in (self._process.stdin, self._process.stdout):
                with contextlib.suppress(OSError):
                    if stream is not None:
                        stream.close()
        if self._words is not None:
            self._words.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._process, self._words, self._folder = None, None, None

    # Talk ------------------------------------------------------------------------------------------------------------

    def ask(self, request: Request, setup: Sequence[Request] = (),
            progress: Callable[[float], None] | None = None) -> Answer:  # fmt: skip
        """Ask for something.

        Parameters
        ----------
        request : (header, arrays)
        setup : sequence of (header, arrays)
            What the request builds on, sent when the worker does not have it (any more).
        progress : callable, optional
            Receives the share that is done.

        Returns
        -------
        header, arrays

        Raises
        ------
        SolverError
            With the worker's own words. A worker that dies is started once more before that.
        """
        for attempt in (0, 1):
            try:
                self.start()
                try:
                    return self._exchange(request, progress)
                except _Unknown:
                    for part in setup:
                        self._exchange(part, None)
                    return self._exchange(request, progress)
            except _Died as death:
                self.kill()
                if attempt:
                    raise SolverError(f"the FEniCS worker died twice during one request. It said:\n{death}") from None
            except _Unknown as missing:
                raise SolverError(f"the FEniCS worker does not know {missing}; this is a bug.") from None
            except SolverError:
                raise
            except BaseException:
                # Interrupted in the middle of a frame: what comes next on the pipe is no beginning.
                self.kill()
                raise
        raise AssertionError("unreachable")

    def _exchange(self, request: Request, progress) -> Answer:
        assert self._process is not None
        try:
            write_frame(cast(BinaryIO, self._process.stdin), *request)
        except OSError:
            raise _Died(self._last_words()) from None
        header, arrays = self._receive(progress)
        self.seconds += header["seconds"]
        self.peak = max(self.peak, 1024.0 * header["peak_kilobytes"])
        return header["answer"], arrays

    def _receive(self, progress, skip: int = 0) -> Answer:
        assert self._process is not None
        while True:
            try:
                header, arrays = read_frame(cast(BinaryIO, self._process.stdout), skip)
            except (ProtocolError, OSError, ValueError) as error:
                raise _Died(self._last_words(error)) from None
            if "progress" in header:
                if progress is not None:
                    progress(header["progress"])
                continue
            if "error" in header:
                self._raise(**header["error"])
            return header, arrays

    def _raise(self, kind: str, text: str) -> None:
        if kind == "unknown":
            raise _Unknown(text)
        if kind == "not finite":
            raise NotFiniteError(f"FEniCS: {text}; the parameters are too extreme for this model and mesh.")
        if kind == "compile":
            raise SolverError(
                f"FEniCS could not compile a form ({self.hello.get('compiler') or 'see below'}). It needs a C compiler "
                f"and the headers of its Python: apt-get install gcc python3-dev. It said: {text}"
            )
        if kind in ("import", "old", "cache"):
            self.kill()
        if kind == "cache":
            raise SolverError(
                f"FEniCS needs a folder for compiled forms that it can write, but not so {text}. Name one in {CACHE}."
            )
        if kind == "old":
            raise SolverError(f"dolfinx {text} is too old; expected 0.5 or newer. {INSTALL}.")
        if kind == "import":
            raise SolverError(f"FEniCS is installed but does not work: {text}. Install it anew. {INSTALL}.")
        raise SolverError(f"FEniCS: {text}")

    def _last_words(self, error: BaseException | None = None) -> str:
        assert self._process is not None and self._words is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        code = self._process.poll()
        how = "it still runs, but its output is no answer" if code is None else f"it ended with code {code}"
        if code is not None and code < 0:
            how = f"it was ended by signal {signal.Signals(-code).name}"
            if code == -signal.SIGKILL:
                how += " (by somebody, or because memory ran out)"
        self._words.seek(0, os.SEEK_END)
        self._words.seek(max(0, self._words.tell() - LAST_WORDS))
        said = self._words.read().decode(errors="replace").strip()
        detail = f" ({error})" if isinstance(error, ProtocolError) and code is None else ""
        return f"{said}\n[{how}{detail}]".strip()
