"""End the processes that a benchmark started when it ends.

A benchmark does not handle SIGTERM. Python runs a handler only between two operations, and one attention call over a long
prompt takes minutes on a CPU. The signal therefore ends the process at once, and rows are written as soon as they are measured.
Nobody is left to end the workers, so each of them watches its parent.
"""

from __future__ import annotations

import os
import time
from threading import Thread

PERIOD = 0.2  # seconds between two looks


def end_with(parent: int) -> None:
    """End this process soon after the process ``parent``, which started it, has ended in whatever way."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PERIOD)
        os._exit(1)

    Thread(target=watch, daemon=True).start()
