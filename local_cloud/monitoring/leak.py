"""Runs a program that loses memory on command, as one with a real leak would.

    python -m local_cloud.monitoring.leak 20 model_api.py --serve --port 8000

SIGUSR1: from now on 20 MiB a second are lost. SIGUSR2: no more, and all is given back.
"""

from __future__ import annotations

import runpy
import signal
import sys
import threading
import time

MIB = 1 << 20
PIECE_S = 0.1


def main(argv: list[str]) -> None:
    """The rate in MiB a second, then the program and its arguments."""
    piece = int(float(argv[0]) * PIECE_S * MIB)
    lost: list[bytes] = []
    leaking = threading.Event()

    def leak() -> None:
        while leaking.wait():
            lost.append(b"\1" * piece)  # zeros would not take memory before they change
            time.sleep(PIECE_S)

    def stop(*_: object) -> None:
        leaking.clear()
        lost.clear()

    signal.signal(signal.SIGUSR1, lambda *_: leaking.set())
    signal.signal(signal.SIGUSR2, stop)
    threading.Thread(target=leak, daemon=True).start()
    sys.argv = argv[1:]
    runpy.run_path(argv[1], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
