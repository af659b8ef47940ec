"""Scaling laws of mixture-of-experts models: Clark, Krajewski, Ludziejewski, Abnar.

Each law counts parameters its own way; the docstrings say which. Losses are nats per token.
"""

from dataclasses import dataclass

import numpy as np

from lm.scaling.allocation import Optimum
from lm.scaling.law import FittableLaw, minimise_on_log_grid, positive
from lm.scaling.parametric import ParametricLaw


def saturated_experts(experts, e_start, e_max):
    """E^: the effective number of experts, from E_start at one expert up to E_max.

    1 / E^ = 1 / (E - 1 + (1/E_start - 1/E_max)^-1) + 1 / E_max.
    """
    experts = np.asarray(experts, float)
    if not np.all(experts >= 1):
        raise ValueError(f"experts must be 1 or more, not {np.min(experts):g}")
    return 1 / (1 / (experts - 1 + 1 / (1 / e_start - 1 / e_max)) + 1 / e_max)


@dataclass(frozen=True)
class ClarkLaw(FittableLaw):
    """log10 L = a log10 N + b log10 E^ + c log10 N log10 E^ + d (Clark et al. 2022, 2202.01169).

    N: parameters of the dense model the experts were added to; trained on 130B tokens throughout.
    """

    a: float
    b: float
    c: float
    d: float
    e_start: float
    e_max: float
    source: str = ""

    def loss(self, params, experts):
        n = np.log10(positive(params, "params"))
        e = np.log10(saturated_experts(experts, self.e_start, self.e_max))
        return 10 ** (self.a * n + self.b * e + self.c * n * e + self.d)

    def effective_dense_params(self, params, experts):
        """N-bar, their "effective parameter count": the dense model of the same loss."""
        n = np.log10(positive(params, "params"))
        e = np.log10(saturated_experts(experts, self.e_start, self.e_max))
        e_one = np.log10(self.e_start)
        return 10 ** (
            (self.a * n + self.b * (e - e_one) + self.c * n * e) / (self.a + self.c * e_one)
        )

    @property
    def cutoff_params(self) -> float:
        """The size above which more experts no longer lower the loss: b + c log10 N = 0."""
        return 10 ** (-self.b / self.c)

    def optimum(self, params, max_experts):
        """The number of experts, up to `max_experts`, of least loss at size `params`."""
        helps = positive(params, "params") < self.cutoff_params
        return np.where(helps, np.asarray(max_experts, float), 1.0)


_CLARK = "Clark et al. 2022, Table 3, "
CLARK_S_BASE = ClarkLaw(-0.082, -0.108, 0.009, 1.104, 1.847, 314.478, _CLARK + "S-BASE")
CLARK_RL_R = ClarkLaw(-0.083, -0.126, 0.012, 1.111, 1.880, 469.982, _CLARK + "RL-R")
CLARK_HASH = ClarkLaw(-0.087, -0.136, 0.012, 1.157, 4.175, 477.741, _CLARK + "Hash")


@dataclass(frozen=True)
class KrajewskiLaw(FittableLaw):
    """L = c + (g / G^gamma + a) / N^alpha + b / D^beta (Krajewski et al. 2024, 2402.07871).

    N: non-embedding parameters with all experts, at expansion rate 64. G: granularity, how many
    times finer an expert is than the dense feed-forward layer.
    """

    a: float
    alpha: float
    b: float
    beta: float
    g: float
    gamma: float
    c: float
    source: str = ""

    EXPANSION = 64  # no annotation: a fact of the fit, not a constant of it
    FLOPS_PER_WEIGHT, FLOPS_PER_ROUTER_WEIGHT, ASPECT = 6, 14, 64  # c_f, c_r, d_model / n_blocks

    def loss(self, params, tokens, granularity):
        size = self.g / positive(granularity, "granularity") ** self.gamma + self.a
        return (
            self.c
            + size / positive(params, "params") ** self.alpha
            + self.b / positive(tokens, "tokens") ** self.beta
        )

    def total_params(self, d_model):
        """N of a model of width `d_model` and d_model/64 blocks: d^2 (8 E + 4) per block."""
        d_model = positive(d_model, "d_model")
        return d_model**2 * (8 * self.EXPANSION + 4) * d_model / self.ASPECT

    def flops_per_token(self, d_model, granularity):
        """(12 d^2 c_f + d E G c_r) n_blocks: the router is what granularity costs."""
        d_model = positive(d_model, "d_model")
        weights = 12 * d_model**2 * self.FLOPS_PER_WEIGHT
        router = d_model * self.EXPANSION * np.asarray(granularity) * self.FLOPS_PER_ROUTER_WEIGHT
        return (weights + router) * d_model / self.ASPECT

    def optimum(self, flops, granularity=None) -> tuple[Optimum, np.ndarray]:
        """(optimum, granularity) of least loss; granularity: given or the best of 1 .. 256."""
        flops = positive(flops, "flops")
        choices = 2.0 ** np.arange(9) if granularity is None else np.atleast_1d(granularity)
        grain = np.asarray(choices, float).reshape(-1, *[1] * flops.ndim)

        def tokens(d_model):
            return flops / self.flops_per_token(d_model, grain)

        d_model = minimise_on_log_grid(
            lambda d: self.loss(self.total_params(d), tokens(d), grain),
            np.full(np.broadcast_shapes(grain.shape, flops.shape), 16.0),
            1e7,
        )
        losses = self.loss(self.total_params(d_model), tokens(d_model), grain)
        best = np.argmin(losses, axis=0)[None]

        def pick(x):
            return np.take_along_axis(np.broadcast_to(x, losses.shape), best, axis=0)[0]

        params = pick(self.total_params(d_model))
        return Optimum(flops, params, pick(tokens(d_model)), pick(losses)), pick(grain)


KRAJEWSKI2024 = KrajewskiLaw(
    18.1,
    0.115,
    30.8,
    0.147,
    2.1,
    0.58,
    0.47,
    "Krajewski et al. 2024, MoE with expansion rate 64",
)
KRAJEWSKI2024_DENSE = ParametricLaw(0.47, 16.3, 26.7, 0.126, 0.127, "Krajewski et al. 2024, dense")


@dataclass(frozen=True)
class LudziejewskiLaw(FittableLaw):
    """L = a E^^delta N^(alpha + gamma ln E^) + b E^^omega D^(beta + zeta ln E^) + c (2502.05172).

    N: active parameters, embeddings apart. alpha and beta are negative, as in the paper's text;
    copies on the web that lost the fraction bar print them positive.
    """

    a: float
    alpha: float
    delta: float
    gamma: float
    b: float
    beta: float
    omega: float
    zeta: float
    c: float
    e_start: float
    e_max: float
    source: str = ""

    def at_experts(self, experts) -> ParametricLaw:
        """The Chinchilla law of a number of experts: L = m N^mu + n D^nu + c (their Table 4)."""
        e = saturated_experts(experts, self.e_start, self.e_max)
        return ParametricLaw(
            E=self.c,
            A=self.a * e**self.delta,
            B=self.b * e**self.omega,
            alpha=-(self.alpha + self.gamma * np.log(e)),
            beta=-(self.beta + self.zeta * np.log(e)),
            source=f"{self.source}, at {experts} experts",
        )

    def loss(self, active_params, tokens, experts):
        law = self.at_experts(experts)
        return law.loss(positive(active_params, "active_params"), positive(tokens, "tokens"))

    def optimum(self, flops, experts) -> Optimum:
        """Least loss with 6 N_active D = `flops` at a number of experts."""
        return self.at_experts(experts).optimum(positive(flops, "flops"))

    def learning_rate(self, active_params, experts):
        """Their tuned rule: exp(8.39 - 0.81 ln N_active - 0.25 ln E)."""
        n, e = np.log(positive(active_params, "active_params")), np.log(np.asarray(experts, float))
        return np.exp(8.39 - 0.81 * n - 0.25 * e)


LUDZIEJEWSKI2025 = LudziejewskiLaw(
    a=35.91,
    alpha=-0.1889,
    delta=-0.2285,
    gamma=0.0098,
    b=35.98,
    beta=-0.1775,
    omega=0.5529,
    zeta=-0.0259,
    c=1.3637,
    e_start=2.0732,
    e_max=290.4521,
    source="Ludziejewski et al. 2025, Table 3",
)


@dataclass(frozen=True)
class AbnarLaw(FittableLaw):
    """L = a/N^alpha + b/D^beta + c/(1-S)^lambda + d/((1-S)^delta N^gamma) + e (Abnar et al. 2025).

    N: total parameters; S: sparsity, the share of inactive ones (arXiv:2501.12370).
    """

    a: float
    alpha: float
    b: float
    beta: float
    c: float
    lam: float
    d: float
    delta: float
    gamma: float
    e: float
    source: str = ""

    def loss(self, params, tokens, sparsity):
        active = 1 - np.asarray(sparsity, float)
        if not np.all((active > 0) & (active <= 1)):
            raise ValueError("sparsity must be in [0, 1)")
        params = positive(params, "params")
        return (
            self.a / params**self.alpha
            + self.b / positive(tokens, "tokens") ** self.beta
            + self.c / active**self.lam
            + self.d / (active**self.delta * params**self.gamma)
            + self.e
        )

    def optimum(self, flops, sparsity) -> Optimum:
        """Least loss with 6 (1 - S) N D = `flops`: total parameters N and tokens D.

        Active parameters are taken as (1 - S) N, embeddings and router included.
        """
        flops, sparsity = np.broadcast_arrays(positive(flops, "flops"), np.asarray(sparsity, float))
        per_param_token = 6 * (1 - sparsity)
        params = minimise_on_log_grid(
            lambda n: self.loss(n, flops / (per_param_token * n), sparsity),
            np.full(flops.shape, 1e4),
            1e18,
        )
        tokens = flops / (per_param_token * params)
        return Optimum(flops, params, tokens, self.loss(params, tokens, sparsity))


ABNAR2025 = AbnarLaw(
    a=16612.5,
    alpha=0.5962,
    b=5455.67,
    beta=0.3954,
    c=0.4598,
    lam=-0.1666,
    d=17.26,
    delta=0.1603,
    gamma=0.1595,
    e=0.94,
    source="Abnar et al. 2025, arXiv:2501.12370",
)
