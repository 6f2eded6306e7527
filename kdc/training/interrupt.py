"""Stopping a run between two steps, where everything can be saved, and not inside one."""

from __future__ import annotations

import signal
import threading


class Stop:
    """Within it, Ctrl-C and SIGTERM do not break off a step but are `asked` for.

    A second Ctrl-C does break off. Outside the main thread, where Python handles no signals, and
    while `active` is False, everything is as usual.
    """

    def __init__(self, active: bool = True):
        self.asked: int | None = None
        self._active = active and threading.current_thread() is threading.main_thread()
        self._before: dict[int, object] = {}

    def __enter__(self) -> Stop:
        if self._active:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before.clear()

    def _ask(self, number: int, frame) -> None:
        if self.asked is not None and number == signal.SIGINT:
            raise KeyboardInterrupt("stopped at once; the last checkpoint stays")
        self.asked = number

    def leave(self, said: str) -> None:
        """Stop as the signal would have: `KeyboardInterrupt`, or `SystemExit` after SIGTERM."""
        if self.asked == signal.SIGTERM:
            raise SystemExit(128 + signal.SIGTERM)
        raise KeyboardInterrupt(said)
