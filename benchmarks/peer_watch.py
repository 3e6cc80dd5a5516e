"""What watches a Trainer of transformers from outside: the moments between its steps, reading of data included."""

from typing import Any

from metering import Moment, moment, reset_peak
from transformers import TrainerCallback


class StepWatch(TrainerCallback):
    """start_mib: memory once everything is built; moments: before the first step and after each."""

    def __init__(self) -> None:
        self.start_mib = 0.0
        self.moments: list[Moment] = []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.start_mib = reset_peak()
        self.moments.append(moment())

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.moments.append(moment())
