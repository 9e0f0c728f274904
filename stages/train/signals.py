"""SIGTERM, SIGHUP (a closed terminal) and Ctrl-C during training: the current step is finished and saved, then the process ends.

A second signal of the same kind ends the process at once; earlier checkpoints stay valid.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


class StopRequest:
    """The signal received, 0 if none."""

    signum: int = 0

    def end(self) -> None:
        """End the process as the signal would: by KeyboardInterrupt (exit code 130), or with 128 and its number (SIGTERM: 143)."""
        if self.signum == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + self.signum)


@contextmanager
def stop_at_a_step(log: Callable[[str], None]) -> Iterator[StopRequest]:
    """Within the context a signal only sets the request, which the training loop reads after each step."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request  # Python handles signals in the main thread only
        return
    before = {signum: signal.getsignal(signum) for signum in SIGNALS}

    def note(signum: int, frame: FrameType | None) -> None:
        request.signum = request.signum or signum
        signal.signal(signum, before[signal.Signals(signum)])
        name = signal.Signals(signum).name
        log(f"{name}: finishing this step and writing a checkpoint; a second {name} ends at once")

    for signum in SIGNALS:
        if before[signum] not in (signal.SIG_IGN, None):
            signal.signal(signum, note)
    try:
        yield request
    finally:
        for signum, handler in before.items():
            if handler is not None:
                signal.signal(signum, handler)
