"""Loss spikes: a loss far above what those before it let expect. Plain numbers."""

import math
from collections.abc import Sequence

WINDOW = 100  # losses that the expectation looks back on
LEAST = 32  # losses before the first that can be a spike
SPIKE_COUNTS_AS = 2.0  # deviations above the mean
FLOOR = 0.005  # of the mean loss: the least deviation that is reckoned with


class Spikes:
    """Follows a run's losses by their mean and deviation, weighted exponentially.

    The deviation is that between neighbours (von Neumann et al. 1941), to which the fall of the
    loss adds little. A loss above the threshold counts for the mean alone, as one somewhat above
    it: spikes must not hide the next, but a new plateau must be expected in the end.

    Args:
      deviations: standard deviations above the mean from which a loss is a spike; 0: none is.
      carried: of the run's earlier part, what ``carried`` gave.
    """

    def __init__(self, deviations: float, carried: Sequence[float] = ()):
        self.deviations = deviations
        known = carried or (0, 0.0, 0.0, 0.0, False)
        self.n, self.mean, self.variance, self.last, self.above = known

    def carried(self) -> list[float]:
        """What the expectation is made of."""
        return [self.n, self.mean, self.variance, self.last, self.above]

    def see(self, loss: float) -> float | None:
        """Takes in the next loss; where a spike begins, returns the loss that was expected.

        The losses that follow one above the threshold are of the same spike until one is below it.
        """
        expected, began = self.mean, False
        if self.n >= LEAST and self.deviations:
            deviation = max(math.sqrt(self.variance), FLOOR * abs(self.mean))
            threshold = self.mean + self.deviations * deviation
            began = loss > threshold and not self.above
            self.above = loss > threshold
            if self.above:
                loss = self.mean + SPIKE_COUNTS_AS * deviation
        # Over all losses at first, then as a sliding window.
        if self.n and not self.above:
            self.variance += ((loss - self.last) ** 2 / 2 - self.variance) / self.n
        self.n = min(self.n + 1, WINDOW)
        self.mean += (loss - self.mean) / self.n
        self.last = self.last if self.above else loss
        return expected if began else None
