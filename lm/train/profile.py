"""An XProf trace of chosen steps."""

import re
import sys
from pathlib import Path
from typing import Any

from lm.command import BadInput


def profile_range(text: str) -> tuple[int, int]:
    """(10, 20) of "10:20". Raises ``BadInput`` for anything else."""
    found = re.fullmatch(r"(\d+):(\d+)", text)
    if not found or not int(found[1]) < int(found[2]):
        raise BadInput(f"--profile={text}: must be FIRST:LAST, two steps, as 10:20")
    return int(found[1]), int(found[2])


class Profile:
    """Traces what the devices and the host do between two steps into ``workdir``/profile.

    Steps are counted as done: 10:20 are the ten after the tenth. What is compiled within is traced
    too, so the first dispatch is better left out.
    """

    def __init__(self, workdir: Path, steps: tuple[int, int] | None):
        self._folder, self._under_way = workdir / "profile", False
        self.steps = steps or ()  # at which dispatches have to end

    def check(self, n_steps: int) -> None:
        """Raises ``BadInput`` where a run of ``n_steps`` does not have the steps."""
        if self.steps and self.steps[1] > n_steps:
            raise BadInput(
                f"--profile={self.steps[0]}:{self.steps[1]}: must lie within the run's steps,"
                f" 0:{n_steps}"
            )

    def go_on(self, step: int) -> None:
        """Of a run that begins at ``step``; says so where that is too late for a trace.

        That is no error: the command of a run that was pre-empted is given again as it was.
        """
        if self.steps and step > self.steps[0]:
            print(
                f"no trace: the run goes on from step {step}, beyond --profile's {self.steps[0]}",
                file=sys.stderr,
            )
            self.steps = ()

    def before(self, step: int, state: Any) -> None:
        """Of a dispatch that begins at ``step``: so may the trace."""
        if step in self.steps[:1] and not self._under_way:
            import jax  # here: a command's flags are read without it

            jax.block_until_ready(state)
            jax.profiler.start_trace(str(self._folder))
            self._under_way = True

    def after(self, step: int, state: Any) -> None:
        """Of a dispatch that ends at ``step``: so may the trace."""
        if step in self.steps[1:]:
            import jax

            jax.block_until_ready(state)
            self.close()

    def close(self) -> None:
        """Writes a trace that is under way."""
        if self._under_way:
            import jax

            self._under_way = False
            jax.profiler.stop_trace()
