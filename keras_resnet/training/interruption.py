"""Why a run ends early: a signal, or a loss that is no number."""

import signal
import threading


class TrainingDivergedError(ArithmeticError):
    """The loss is no longer a finite number."""

    def __init__(self, what: str, step: int):
        super().__init__(
            f"{what} at step {step}: the run diverged, and this step is not "
            "saved; lower recipe.learning_rate or lengthen "
            "recipe.warmup_steps, and begin in another work directory"
        )


class Interrupted(BaseException):
    """A signal asked the run to stop, and everything is saved.

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
        can_raise: Whether to raise at once while there is nothing to save, as
            in the first minutes of a large network.

    Attributes:
        received: The signal, or None.
        saved_at: The step of the checkpoint while nothing came after it.
    """

    def __init__(self, can_raise: bool = True):
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
        self.received = number
        if self.can_raise and self.saved_at is not None:
            raise Interrupted(number, self.saved_at)

    def note_saved(self, step: int) -> None:
        """Tells that everything up to a step is saved."""
        self.saved_at = step
        if self.received is not None:  # while there was nothing to say yet
            self._note(self.received, None)

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)
