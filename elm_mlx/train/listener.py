"""Whoever a run is told to as it goes.

Knows what is told, and by its name alone what a report is: a command that shows runs imports this, and is not to wait
for MLX before it can say what options it has.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from elm_mlx.train.journal import Report


class Listener:
    """This one does nothing with what it is told."""

    def doing(self, what: str) -> None:
        """What is being done that may take a while and is no update."""

    def resumed(self, step: int) -> None:
        """The run goes on after so many updates."""

    def ready(self, seconds: float, left: int) -> None:
        """How many seconds an update is going to take, by a trial, and how many updates are left."""

    def report(self, report: Report) -> None:
        """An update or a validation."""

    def stopping(self) -> None:
        """Someone wants to end the run. Told from another thread, whatever the run is at."""
