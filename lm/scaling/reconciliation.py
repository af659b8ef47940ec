"""Why Kaplan said 0.73 and Chinchilla 0.50: Pearce & Song 2024 (arXiv:2406.12907).

Kaplan counted non-embedding parameters N_E and the compute of those, C_E = 6 N_E D, at sizes where
embeddings are most of a model. Chinchilla's law in total parameters, seen through
N_T = N_E + gamma N_E^(1/3), then looks like a steeper power of C_E.
"""

from dataclasses import dataclass

import numpy as np

from lm.scaling.allocation import Optimum
from lm.scaling.law import positive
from lm.scaling.parametric import BESIROGLU2024, ParametricLaw

# Their simulation of Kaplan's study: 768 to 1.5e9 non-embedding parameters, and the budgets
# at which the frontier is read.
KAPLAN_SIZES = np.logspace(2.9, 9.2, 20)
NON_EMBEDDING_FLOPS = np.logspace(12.95, 20.7, 100)
TOTAL_FLOPS = np.logspace(14, 20.7, 100)


@dataclass(frozen=True)
class NonEmbeddingView:
    """A law in total parameters, observed in non-embedding parameters and compute.

    gamma: embedding parameters are gamma N_E^(1/3); 47491 is their value, for a vocabulary of
    32,000 and d_model / n_layers = 39.2.
    """

    law: ParametricLaw = BESIROGLU2024
    gamma: float = 47491.0
    source: str = "Pearce & Song 2024"

    def total_params(self, non_embedding_params):
        n = positive(non_embedding_params, "non_embedding_params")
        return n + self.gamma * np.cbrt(n)

    def loss(self, non_embedding_params, tokens):
        return self.law.loss(self.total_params(non_embedding_params), tokens)

    def optimal_tokens(self, non_embedding_params):
        """The D at which N_E is the best size for its own 6 N_E D, from dL = 0 along that curve.

        alpha A N_T^(-alpha-1) dN_T/dN_E N_E = beta B D^-beta, with dN_T/dN_E = 1 + gamma/3
        N_E^(-2/3).
        """
        n = positive(non_embedding_params, "non_embedding_params")
        law = self.law
        slope = n + self.gamma / 3 * np.cbrt(n)
        size_side = law.alpha * law.A * self.total_params(n) ** (-law.alpha - 1) * slope
        return (law.beta * law.B / size_side) ** (1 / law.beta)

    def flops(self, non_embedding_params):
        """C_E = 6 N_E D of the optimal run of this size."""
        return (
            6 * positive(non_embedding_params, "params") * self.optimal_tokens(non_embedding_params)
        )

    def local_exponent(self, non_embedding_params):
        """d log N_E / d log C_E at each size; not monotone: it peaks near 1e6 parameters."""
        n = positive(non_embedding_params, "non_embedding_params")
        step = 1e-4
        rise = np.log(self.flops(n * np.exp(step))) - np.log(self.flops(n * np.exp(-step)))
        return 2 * step / rise

    def frontier(self, flops, sizes=KAPLAN_SIZES, total: bool = False) -> Optimum:
        """The best of a handful of `sizes` (N_E) at each of `flops`: what a sweep would observe.

        total=False: flops and params are non-embedding, as Kaplan counted; True: of the whole
        model.
        """
        flops = positive(flops, "flops")[:, None]
        counted = self.total_params(sizes) if total else positive(sizes, "sizes")
        losses = self.loss(sizes, flops / (6 * counted))
        best = np.argmin(losses, axis=1)
        params = counted[best]
        return Optimum(flops[:, 0], params, flops[:, 0] / (6 * params), losses.min(axis=1))

    def fitted_exponent(self, sizes=KAPLAN_SIZES, total: bool = False) -> float:
        """The slope of log N against log C over that frontier: Pearce & Song's "local fit"."""
        flops = TOTAL_FLOPS if total else NON_EMBEDDING_FLOPS
        best = self.frontier(flops, sizes, total)
        return float(np.polyfit(np.log(flops), np.log(best.params), 1)[0])

    def fitted_loss_exponent(self, sizes=KAPLAN_SIZES) -> float:
        """The slope of log L against log C_E over the frontier (Kaplan printed -0.057)."""
        best = self.frontier(NON_EMBEDDING_FLOPS, sizes)
        return float(np.polyfit(np.log(best.flops), np.log(best.loss), 1)[0])

    def exponent_limits(self) -> tuple[float, float]:
        """The slopes for N_E -> 0, beta / (alpha/3 + beta), and N_E -> infinity, the law's a."""
        return self.law.beta / (self.law.alpha / 3 + self.law.beta), self.law.a

    def optimum(self, non_embedding_flops) -> Optimum:
        """The best (N_E, D) for 6 N_E D = `non_embedding_flops`, inverting C_E by bisection."""
        flops = positive(non_embedding_flops, "non_embedding_flops")
        low, high = np.zeros_like(flops), np.full_like(flops, np.log(1e20))
        for _ in range(100):
            middle = (low + high) / 2
            below = self.flops(np.exp(middle)) < flops
            low, high = np.where(below, middle, low), np.where(below, high, middle)
        params = np.exp(low)
        tokens = flops / (6 * params)
        return Optimum(flops, params, tokens, self.loss(params, tokens))
