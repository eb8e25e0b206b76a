"""The worker: reads requests from standard input and writes answers to standard output, until the input ends.

Run as ``python DIRECTORY`` (or ``mpirun -n N python DIRECTORY``) by an interpreter that has dolfinx; the directory is
loaded as a package of its own, so that nothing else of the project gets onto that interpreter's path.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import queue
import resource
import shutil
import sys
import sysconfig
import tempfile
import threading
import time
import traceback

HERE = os.path.dirname(os.path.abspath(__file__))


def package():
    """This directory as the package ``tumorcast_worker``."""
    name = "tumorcast_worker"
    spec = importlib.util.spec_from_file_location(
        name, os.path.join(HERE, "__init__.py"), submodule_search_locations=[HERE]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return name


def private_streams():
    """Standard input and output for frames alone; whatever else prints goes to standard error."""
    reading, writing = os.fdopen(os.dup(0), "rb", buffering=1 << 16), os.fdopen(os.dup(1), "wb", buffering=1 << 16)
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    return reading, writing


def writable_cache() -> str | None:
    """Point the cache of compiled forms at a folder of this interpreter's own; what is wrong with it, or None."""
    base = os.environ.get("TUMORCAST_FENICS_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache"), "tumorcast", "fenics"
    )
    # Two installations of one Python version would otherwise share, and spoil, each other's libraries.
    mark = f"{sys.implementation.cache_tag}-{sys.prefix.strip(os.sep).replace(os.sep, '-')}"
    folder = os.path.join(base, mark)
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        return f"{folder}: {error.strerror}"
    os.environ["XDG_CACHE_HOME"] = folder
    return None


def missing_compiler() -> str | None:
    """What is missing to compile forms, or None."""
    compiler = (os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc").split()[0]
    if shutil.which(compiler) is None:
        return f"no C compiler ({compiler})"
    header = os.path.join(sysconfig.get_path("include"), "Python.h")
    if not os.path.exists(header):
        return f"no {header}"
    return None


def watch_parent() -> None:
    """End this process when the one that started it is gone."""
    parent = os.getppid()

    def watch():
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def reader(stream, protocol) -> queue.Queue:
    """Requests as they arrive; when the stream ends nobody wants an answer any more, so the process ends at once."""
    requests: queue.Queue = queue.Queue()

    def read():
        try:
            while True:
                requests.put(protocol.read_frame(stream))
        except Exception:
            # Whoever started this process may have been killed, and then cannot remove its folder.
            shutil.rmtree(os.environ.get("TUMORCAST_WORKER_FOLDER", ""), ignore_errors=True)
            os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    return requests


def words(error: BaseException) -> str:
    """An error with the last lines of where it happened."""
    lines = traceback.format_exception_only(type(error), error)
    where = traceback.extract_tb(error.__traceback__)[-1:]
    return "".join(lines).strip() + "".join(f" (in {os.path.basename(f.filename)}, {f.name})" for f in where)


def main() -> None:
    """Serve until the input ends."""
    receiving, sending = private_streams()
    watch_parent()
    name = package()
    protocol = importlib.import_module(f"{name}.protocol")
    outer = os.environ.get("OMPI_COMM_WORLD_RANK") or os.environ.get("PMI_RANK") or "0"

    def send(header, arrays=None):
        try:
            protocol.write_frame(sending, header, arrays)
        except OSError:
            os._exit(0)

    def refuse(kind: str, text: str):
        if outer == "0":
            send({"error": {"kind": kind, "text": text}})
        sys.exit(3)

    found = {"python": sys.executable, "version": sys.version.split()[0], "compiler": missing_compiler() or ""}
    wrong = writable_cache()
    if wrong:
        refuse("cache", wrong)
    try:
        import dolfinx
        from mpi4py import MPI
    except BaseException as error:  # a broken installation fails in many ways, SystemExit among them
        refuse("import", words(error))
    found.update(dolfinx=dolfinx.__version__, ranks=MPI.COMM_WORLD.size, cache=os.environ["XDG_CACHE_HOME"])
    numbers = dolfinx.__version__.split(".")
    if int(numbers[0]) == 0 and int(numbers[1]) < 5:
        refuse("old", dolfinx.__version__)
    try:
        server_module = importlib.import_module(f"{name}.server")
        failed = importlib.import_module(f"{name}.stepping").Failed
    except BaseException as error:
        refuse("import", words(error))
    serve(MPI.COMM_WORLD, server_module.Server, failed, reader(receiving, protocol) if outer == "0" else None, send,
          found)  # fmt: skip


def serve(comm, server_class, failed, requests, send, found) -> None:
    """Answer requests, which rank 0 receives and hands to the others."""
    root = comm.rank == 0
    server = server_class(comm, (lambda share: send({"progress": share})) if root else (lambda share: None))
    if root:
        send({"hello": found})
    while True:
        request, arrays = share(comm, requests.get() if root else None)
        if request["do"] == "quit":
            return
        began = time.monotonic()
        try:
            header, back = server.answer(request, arrays)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            answer = ({"answer": header, "seconds": time.monotonic() - began, "peak_kilobytes": peak}, back)
        except failed as error:
            answer = ({"error": {"kind": error.kind, "text": str(error)}}, {})
        except Exception as error:
            traceback.print_exc()
            kind = "compile" if "ompil" in words(error) or missing_compiler() else "failed"
            answer = ({"error": {"kind": kind, "text": words(error)}}, {})
            if comm.size > 1:
                # The other ranks may wait for this one inside a collective call.
                if root:
                    send(*answer)
                comm.Abort(3)
        if root:
            send(*answer)


def share(comm, request):
    """One request on all ranks; those that wait do so without keeping a core busy."""
    if comm.size == 1:
        return request
    barrier = comm.Ibarrier()
    while not barrier.Test():
        time.sleep(0.001)
    return comm.bcast(request)


if __name__ == "__main__":
    main()
