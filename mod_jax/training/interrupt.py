"""Ctrl-C and SIGTERM during training: the step in progress is finished and saved."""

import signal
import sys
import threading
from types import FrameType
from typing import Any, Self

import jax

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """Training was stopped by a signal; the message says how it goes on."""


class Interrupts:
    """Notes the first signal instead of dying from it; a second one acts at once.

    A signal can come between the two halves of a step, of which the first gives away the state's
    buffers. So nothing is raised where it arrives. If several processes train together, a signal to
    one of them would leave the others waiting, so there all signals act at once.

    Attributes:
      received: Whether a signal has come.
    """

    def __init__(self) -> None:
        self.received = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        in_main_thread = threading.current_thread() is threading.main_thread()
        if in_main_thread and jax.process_count() == 1:
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        # The handlers from before may ignore the next one, as in a background job of a shell.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        print(
            "\nstopping: the step in progress is finished and saved; again to stop at once",
            file=sys.stderr,
        )

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def __exit__(self, *_) -> None:
        self._restore()
