"""The process of a production lane: makes the chunks it is asked for until its pipe closes.

`pinn.amortised.streaming` runs this file with a file descriptor as its argument, not `multiprocessing`, so that scripts
need no main guard and notebooks work. It imports nothing but what its makers need.
"""

from __future__ import annotations

import contextlib
import pickle
import signal
import sys
import time
import traceback
from multiprocessing.connection import Connection


def serve(pipe: Connection) -> None:
    """Answer ``(chunk, maker, seed, indices)`` with ``("chunk", number, arrays, spent)``, None with the end.

    `spent` are seconds: the chunk's (clock and CPU, with processes beside), and those waited for the request.
    """
    makers = pickle.loads(pipe.recv_bytes())  # sent by the process that started this one
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)  # parallelism is by processes
    for maker in makers:
        maker.warm()
    pipe.send(("ready",))
    while True:
        waited = time.monotonic()
        request = pipe.recv()
        began = time.monotonic()
        if request is None:
            return
        number, which, seed, indices = request
        maker = makers[which]
        cpu = time.process_time() + maker.seconds()
        arrays = maker.make(seed, indices)
        spent = (time.monotonic() - began, time.process_time() + maker.seconds() - cpu, began - waited)
        pipe.send(("chunk", number, arrays, spent))


def main() -> None:
    """Serve on the pipe whose descriptor is the first argument."""
    # The terminal's Ctrl-C is for the process that trains; asked to end, this one ends as usual and with it FEniCS.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    pipe = Connection(int(sys.argv[1]))
    try:
        serve(pipe)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        # Nobody is there any more.
        sys.exit(0)
    except Exception:
        with contextlib.suppress(OSError):
            pipe.send(("error", traceback.format_exc(limit=-3)))
        sys.exit(1)


if __name__ == "__main__":
    main()
