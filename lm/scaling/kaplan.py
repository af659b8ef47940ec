"""Kaplan et al. 2020 (arXiv:2001.08361): the power laws before Chinchilla, constants as printed.

N is non-embedding parameters, as there. Compute is in FLOPs; the paper's unit is the PF-day.
"""

from dataclasses import dataclass

import numpy as np

from lm.scaling.allocation import Optimum
from lm.scaling.law import FLOPS_PER_PARAM_TOKEN, FittableLaw, positive

PF_DAY = 8.64e19  # 1e15 FLOP/s for 24 h


@dataclass(frozen=True)
class PowerLaw(FittableLaw):
    """L(x) = (x_c / x)^exponent: one resource scarce, the others not (equations 1.1 to 1.3)."""

    x_c: float
    exponent: float
    source: str = ""

    def loss(self, x):
        return (self.x_c / positive(x, "x")) ** self.exponent

    def x_for_loss(self, loss):
        """How much of the resource reaches `loss`."""
        return self.x_c * positive(loss, "loss") ** (-1 / self.exponent)


L_OF_N = PowerLaw(8.8e13, 0.076, "Kaplan et al. 2020, eq. 1.1: L(N), non-embedding parameters")
L_OF_D = PowerLaw(5.4e13, 0.095, "Kaplan et al. 2020, eq. 1.2: L(D), tokens, early stopping")
L_OF_C = PowerLaw(1.6e7 * PF_DAY, 0.057, "Kaplan et al. 2020, Table 5: naive L(C), fixed batch")
# Table 5; Figure 1 of the same paper prints 2.3e8.
L_OF_C_MIN = PowerLaw(3.1e8 * PF_DAY, 0.050, "Kaplan et al. 2020, eq. 1.3: L(C_min)")


@dataclass(frozen=True)
class KaplanLaw(FittableLaw):
    """L(N, D) = [(N_c/N)^(alpha_N/alpha_D) + D_c/D]^alpha_D (equation 1.5), to convergence."""

    N_c: float = 6.4e13
    D_c: float = 1.8e13
    alpha_N: float = 0.076
    alpha_D: float = 0.103
    source: str = "Kaplan et al. 2020, Table 2: joint fit of L(N, D)"

    def loss(self, params, tokens):
        size_term = (self.N_c / positive(params, "params")) ** (self.alpha_N / self.alpha_D)
        return (size_term + self.D_c / positive(tokens, "tokens")) ** self.alpha_D

    def optimum(self, flops) -> Optimum:
        """Least loss with 6 N D = `flops`; closed form, N ~ C^(alpha_D / (alpha_N + alpha_D)).

        This is not the paper's 0.73 (`KaplanAllocation`), which stops short of convergence.
        """
        flops = positive(flops, "flops")
        p = self.alpha_N / self.alpha_D
        per_param = p * self.N_c**p * flops / (FLOPS_PER_PARAM_TOKEN * self.D_c)
        params = per_param ** (1 / (1 + p))
        tokens = flops / (FLOPS_PER_PARAM_TOKEN * params)
        return Optimum(flops, params, tokens, self.loss(params, tokens))

    def tokens_against_overfitting(self, params, allowed: float = 0.02):
        """The D that keeps overfitting below `allowed` of the loss (equation 4.4: 5e3 N^0.74).

        delta L = [1 + (N/N_c)^(alpha_N/alpha_D) D_c/D]^alpha_D - 1, solved for D.
        """
        size_term = (positive(params, "params") / self.N_c) ** (self.alpha_N / self.alpha_D)
        return self.D_c * size_term / ((1 + allowed) ** (1 / self.alpha_D) - 1)


@dataclass(frozen=True)
class CriticalBatch:
    """B_crit(L) = B* / L^(1/alpha_B) tokens: where time and compute efficiency trade evenly."""

    b_star: float = 2.1e8
    alpha_B: float = 0.21
    source: str = "Kaplan et al. 2020, equation 1.4"

    def tokens(self, loss):
        return self.b_star * positive(loss, "loss") ** (-1 / self.alpha_B)

    def min_steps(self, steps, batch_tokens, loss):
        """S_min = S / (1 + B_crit/B): the steps a batch >> B_crit would need (equation 5.4)."""
        return np.asarray(steps, float) / (1 + self.tokens(loss) / positive(batch_tokens, "batch"))

    def min_flops(self, flops, batch_tokens, loss):
        """C_min = C / (1 + B/B_crit): the compute a batch << B_crit would need (equation 5.5)."""
        return np.asarray(flops, float) / (1 + positive(batch_tokens, "batch") / self.tokens(loss))


@dataclass(frozen=True)
class LearningCurve(FittableLaw):
    """L(N, S_min) = (N_c/N)^alpha_N + (S_c/S_min)^alpha_S (equation 1.6)."""

    N_c: float = 6.5e13
    alpha_N: float = 0.077
    S_c: float = 2.1e3
    alpha_S: float = 0.76
    source: str = "Kaplan et al. 2020, Table 3: L(N, S_min)"

    def loss(self, params, min_steps):
        size_term = (self.N_c / positive(params, "params")) ** self.alpha_N
        return size_term + (self.S_c / positive(min_steps, "min_steps")) ** self.alpha_S

    def compute_exponent(self, batch: CriticalBatch = CriticalBatch()) -> float:
        """alpha_C^min = 1 / (1/alpha_S + 1/alpha_B + 1/alpha_N): L ~ C_min^-this (equation 6.4)."""
        return 1 / (1 / self.alpha_S + 1 / batch.alpha_B + 1 / self.alpha_N)

    def optimum(self, flops, batch: CriticalBatch = CriticalBatch()) -> Optimum:
        """Least loss at C_min = 6 N B_crit(L) S_min (appendix B.1); `tokens` = C_min / 6N.

        At the optimum the step term is f = alpha_N / alpha_S of the size term, so that
        L = (1 + f) (N_c/N)^alpha_N: training stops about 10 % above the converged loss.
        """
        flops = positive(flops, "flops")
        f = self.alpha_N / self.alpha_S
        # C_min = 6 N (B*/L^(1/aB)) S_c (f (N_c/N)^aN)^(-1/aS) is a pure power of N; solve for it.
        power = 1 + self.alpha_N / batch.alpha_B + self.alpha_N / self.alpha_S
        at_one = (
            FLOPS_PER_PARAM_TOKEN
            * batch.b_star
            * self.S_c
            * ((1 + f) * self.N_c**self.alpha_N) ** (-1 / batch.alpha_B)
            * (f * self.N_c**self.alpha_N) ** (-1 / self.alpha_S)
        )
        params = (flops / at_one) ** (1 / power)
        loss = (1 + f) * (self.N_c / params) ** self.alpha_N
        return Optimum(flops, params, flops / (FLOPS_PER_PARAM_TOKEN * params), loss)


@dataclass(frozen=True)
class KaplanAllocation:
    """The empirical optimum: N = 1.3e9 C_min^0.73 with C_min in PF-days (Table 6), L(C_min).

    D = C / 6N. The paper's own D = 2e10 C^0.27 is rounded apart: with it 6 N D = 1.81 C.
    """

    coefficient: float = 1.3e9
    a: float = 0.73
    source: str = "Kaplan et al. 2020, Table 6 (non-embedding parameters), loss from L(C_min)"

    def optimum(self, flops) -> Optimum:
        flops = positive(flops, "flops")
        params = self.coefficient * (flops / PF_DAY) ** self.a
        tokens = flops / (FLOPS_PER_PARAM_TOKEN * params)
        return Optimum(flops, params, tokens, L_OF_C_MIN.loss(flops))

    def batch_tokens(self, flops):
        """B = 2.0e6 C_min^0.24 tokens (Table 6)."""
        return 2.0e6 * (positive(flops, "flops") / PF_DAY) ** 0.24

    def min_steps(self, flops):
        """S_min = 5.4e3 C_min^0.03 (Table 6)."""
        return 5.4e3 * (positive(flops, "flops") / PF_DAY) ** 0.03
