"""SIGTERM and SIGINT, which stop a run after its state is saved."""

import signal
import threading


class Interrupted(BaseException):
    """A signal stopped the run, and everything is saved.

    Attributes:
        signal_number: The signal, 15 (SIGTERM) or 2 (SIGINT).
        step: The step of the checkpoint.
    """

    def __init__(self, signal_number: int, step: int):
        super().__init__(f"stopped at step {step}; the state is saved")
        self.signal_number = signal_number
        self.step = step


class Signals:
    """Notes SIGTERM and SIGINT, so that a run can save before it stops.

    Args:
        can_raise: Whether to raise at once if everything is saved, as in the
            first minutes of a large network.

    Attributes:
        received: The first signal, or None.
        saved_at: The step of the checkpoint if no step followed it.
    """

    def __init__(self, can_raise: bool):
        self.can_raise = can_raise
        self.received: int | None = None
        self.saved_at: int | None = None

    def __enter__(self):
        self.before = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self.before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number, frame):
        if self.received is None:  # only the first one counts
            self.received = number
            self._stop_if_saved()

    def _stop_if_saved(self):
        if self.can_raise and self.saved_at is not None:
            raise Interrupted(self.received, self.saved_at)

    def note_saved(self, step: int) -> None:
        """Notes that everything up to a step is saved."""
        self.saved_at = step
        if self.received is not None:  # before the first step was known
            self._stop_if_saved()

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)
