"""How many steps a dispatch takes: as many as end soon enough for a signal."""

import time

from lm.train.clock import COMPILE, Clock

# A signal waits for one or two dispatches, and has to be acted on before it is enforced.
LONGEST_DISPATCH_SECONDS = 5.0


class Pace:
    """Follows how fast steps are. ``steps``: of the next dispatch, at most.

    One, until the first has told; then as many as fit, up to ``most``. At most twice as many as
    before: a dispatch that was over before the host looked, or compiled beside, seems to take less
    than it does.
    """

    def __init__(self, most: int, clock: Clock):
        self._most, self._clock = most, clock
        self.steps = 1

    def start(self) -> None:
        """The devices begin to compute now."""
        self._began = time.perf_counter(), self._clock.seconds()[COMPILE]

    def lap(self, n: int) -> float:
        """Seconds, but for compilations, of the dispatch of ``n`` steps that has ended now."""
        began, compiling = self._began
        self.start()
        now, compiled = self._began
        seconds = now - began - (compiled - compiling)
        fit = LONGEST_DISPATCH_SECONDS * n / seconds
        self.steps = max(1, int(min(self._most, 2 * self.steps, fit)))
        return seconds
