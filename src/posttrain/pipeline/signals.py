"""Signals: the first asks a run to stop at its next step with its state saved, the second ends it at once."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Interrupted(Exception):
    """A signal asked the run to stop; its state is saved."""

    def __init__(self, signal: str) -> None:
        super().__init__(signal)
        self.signal = signal


@contextmanager
def signals() -> Iterator[Callable[[], str | None]]:
    """Within it SIGINT and SIGTERM are only noted; what is given says the name of the one that came."""
    seen: list[str] = []

    def handle(number: int, _frame: object) -> None:
        if seen:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        seen.append(signal.Signals(number).name)

    names = (signal.SIGINT, signal.SIGTERM)
    try:
        before = [signal.signal(name, handle) for name in names]
    except ValueError:  # not in the main thread: signals are somebody else's
        yield lambda: None
        return
    try:
        yield lambda: seen[0] if seen else None
    finally:
        for name, handler in zip(names, before, strict=True):
            signal.signal(name, handler)
