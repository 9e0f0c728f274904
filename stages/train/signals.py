"""SIGTERM and Ctrl-C while training: the step in hand is finished and saved, then the process ends as asked.

A second signal of the same kind ends it at once; what an earlier checkpoint holds is kept.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Which signal asked to stop, or 0."""

    signum: int = 0

    def end(self) -> None:
        """End the process as the signal would: KeyboardInterrupt (exit code 130) or exit code 143."""
        if self.signum == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + self.signum)


@contextmanager
def stop_at_a_step(say: Callable[[str], None]) -> Iterator[StopRequest]:
    """Within the block a signal only sets the request; the loop looks at it after each step."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request  # only the main thread may handle signals
        return
    before = {signum: signal.getsignal(signum) for signum in SIGNALS}

    def note(signum: int, frame: FrameType | None) -> None:
        request.signum = request.signum or signum
        signal.signal(signum, before[signal.Signals(signum)])
        name = signal.Signals(signum).name
        say(f"{name}: finishing this step and writing a checkpoint; once more ends at once")

    for signum in SIGNALS:
        if before[signum] not in (signal.SIG_IGN, None):
            signal.signal(signum, note)
    try:
        yield request
    finally:
        for signum, handler in before.items():
            if handler is not None:
                signal.signal(signum, handler)
