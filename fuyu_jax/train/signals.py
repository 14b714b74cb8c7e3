"""SIGTERM and SIGINT end a run at the next step, with a checkpoint; a second one at once."""

import signal
from typing import Any


class StopSignal:
    """While it is entered, notes the first signal that asks to stop.

    number: the signal; 0 as long as there is none.
    """

    def __init__(self) -> None:
        self.number = 0
        self._old: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        try:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._old[number] = signal.signal(number, self._catch)
        except ValueError:
            pass  # not the main thread (a notebook's, a test's): signals are not ours
        return self

    def _catch(self, number: int, frame: Any) -> None:
        if self.number:
            raise KeyboardInterrupt
        self.number = number

    def __exit__(self, *error: Any) -> None:
        for number, handler in self._old.items():
            # Not set from Python (JAX's notice of preemption is not): it cannot be set again.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
