"""The compute-optimal point of a parametric law under a table's own count of FLOPs."""

import numpy as np

from lm.scaling.table import RunTable


class Cost:
    """What a token costs as a function of N, by the table's own FLOPs, and the optimum under it.

    Under C = 6 N D, and any C proportional to N D, the optimum is in closed form. Elsewhere
    log(C / D) is a parabola in log N, and the optimum at each of nine FLOP values is found by
    bisection.
    """

    def __init__(self, runs: RunTable):
        self.flops = np.geomspace(runs.flops.min(), runs.flops.max(), 9)
        n, cost = np.log(runs.params), np.log(runs.flops / runs.tokens)
        self.factor = float(np.exp(np.median(cost - n)))  # 6 under C = 6 N D
        self.proportional = np.ptp(cost - n) < 0.02
        self.center, self.bounds = n.mean(), (n.min() - np.log(30), n.max() + np.log(30))
        self.parabola = np.polyfit(n - self.center, cost, 2)

    def optimum(self, law):
        """(N_opt, D_opt) at self.flops, (..., 9) each, of a law whose constants may be arrays."""
        names = ("A", "B", "alpha", "beta")
        A, B, alpha, beta = (np.asarray(getattr(law, name), float)[..., None] for name in names)
        if self.proportional:
            a, b, log_k_N, log_k_D = (
                np.asarray(value)[..., None] for value in self.allocation(law)
            )
            return np.exp(log_k_N) * self.flops**a, np.exp(log_k_D) * self.flops**b
        shape = np.broadcast_shapes(alpha.shape, self.flops.shape)
        low, high = (np.full(shape, bound) for bound in self.bounds)
        for _ in range(60):
            n = (low + high) / 2
            log_cost = np.polyval(self.parabola, n - self.center)
            slope = np.maximum(np.polyval(np.polyder(self.parabola), n - self.center), 0.05)
            # Where dL / dlog N < 0 at constant C: alpha A / N^alpha > slope beta B / D^beta.
            falling = np.log(alpha * A) - alpha * n > np.log(slope * beta * B) - beta * (
                np.log(self.flops) - log_cost
            )
            low, high = np.where(falling, n, low), np.where(falling, high, n)
        n = np.where((n > self.bounds[0] + 1e-6) & (n < self.bounds[1] - 1e-6), n, np.nan)
        return np.exp(n), self.flops / np.exp(np.polyval(self.parabola, n - self.center))

    def allocation(self, law):
        """a, b, log k_N, log k_D of a law whose constants may be arrays; nan outside the sizes."""
        if self.proportional:
            log_factor = np.log(self.factor)
            log_G = np.log(law.G)
            return law.a, law.b, log_G - law.a * log_factor, -log_G - law.b * log_factor
        log_flops = np.log(self.flops)
        x = log_flops - log_flops.mean()
        lines = []
        for values in map(np.log, self.optimum(law)):
            slope = values @ x / (x @ x)
            lines.append((slope, values.mean(-1) - slope * log_flops.mean()))
        (a, log_k_N), (b, log_k_D) = lines
        return a, b, log_k_N, log_k_D
