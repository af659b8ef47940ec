"""Loss spikes: a loss far above what those before it let expect. Plain numbers."""

import math
from collections.abc import Sequence

WINDOW = 100  # losses that the expectation looks back on
LEAST = 32  # losses before the first that can be a spike
SPIKE_COUNTS_AS = 2.0  # deviations above the mean
FLOOR = 0.005  # of the mean loss: the least deviation that is reckoned with


class Spikes:
    """Follows a run's losses by their mean and deviation, weighted exponentially.

    One above the threshold counts there as one somewhat above the mean: spikes must not hide the
    next, but a new plateau must be expected in the end.

    Args:
      deviations: standard deviations above the mean from which a loss is a spike; 0: none is.
      carried: of the run's earlier part, what ``carried`` gave.
    """

    def __init__(self, deviations: float, carried: Sequence[float] = (0, 0.0, 0.0, False)):
        self.deviations = deviations
        self.n, self.mean, self.variance, self.above = carried

    def carried(self) -> list[float]:
        """What the expectation is made of."""
        return [self.n, self.mean, self.variance, self.above]

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
        # Of all losses at first (Welford 1962), then of a sliding window (West 1979).
        self.n = min(self.n + 1, WINDOW)
        change = (loss - self.mean) / self.n
        self.variance = (1 - 1 / self.n) * (self.variance + (loss - self.mean) * change)
        self.mean += change
        return expected if began else None
