"""A stage that a cluster stops: it ends its step and writes a checkpoint before it obeys."""

from __future__ import annotations

import logging
import os
import signal
import threading
from typing import Any

from transformers import TrainerCallback

from alignment.ranks.place import LOGS

log = logging.getLogger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGUSR2)
"""What clusters send some time before they kill: Slurm and Kubernetes the first, submitit the second."""
_SECONDS = 25.0
"""How long the step may take; Slurm and Kubernetes kill after 30 seconds if nobody has set another time."""
_OWN_SECONDS = 7.0
"""The same where our own launcher waits for the ranks."""


class CheckpointAtStop(TrainerCallback):
    """Keeps a signal to stop until the running step has a checkpoint; the same once more is obeyed at once.

    The handler that was there before decides what to do then. It comes after `Checkpoints`, which marks a checkpoint as
    whole.
    """

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}
        self._asked: dict[int, threading.Timer] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the handlers in the place of those that are there."""
        # No other thread may set a handler, and a stage without checkpoints has nothing to wait for.
        if args.save_strategy != "no" and threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                if callable(signal.getsignal(number)):
                    self._before[number] = signal.signal(number, self._ask)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Have the step saved; a log precedes every checkpoint."""
        if self._asked and not control.should_training_stop:
            control.should_save = control.should_log = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Obey, now that the checkpoint is whole."""
        self._obey()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Obey after the last step, which has no checkpoint."""
        self.close()
        self._obey()

    def close(self) -> None:
        """Put the handlers back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: Any) -> None:
        if number in self._asked:
            self._obey()
            return
        again = threading.Timer(_OWN_SECONDS if LOGS in os.environ else _SECONDS, os.kill, (os.getpid(), number))
        again.daemon = True
        again.start()
        self._asked[number] = again

    def _obey(self) -> None:
        asked, self._asked = self._asked, {}
        for timer in asked.values():
            timer.cancel()
        for number in asked:
            log.info("Stopped by %s.", signal.Signals(number).name)
            self._before[number](number, None)
