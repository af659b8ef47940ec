"""What a run tells of its experts: entries of its log, and a warning of those without tokens."""

from typing import Any

import numpy as np
from absl import logging

from lm import hosts
from lm.config import ModelConfig
from lm.model.moe import Routing


class ExpertWatch:
    """Follows the routing of a run's layers step by step, from what ``carried`` gave before."""

    def __init__(self, model: ModelConfig, carried: list[list[int]] | None = None):
        self.layers, self.dead_after = model.moe_layers, model.moe.dead_after
        self.idle_LE = np.zeros((len(self.layers), model.moe.n_experts), int)  # steps, until now
        self.idle_LE += np.array(carried or 0)

    def carried(self) -> list[list[int]]:
        """For how many steps each expert of each layer has had no token."""
        return self.idle_LE.tolist()

    def see(self, routing: Routing, i: int) -> list[str]:
        """Takes in the ``i``-th of the steps of ``routing``; warns, and returns the warnings.

        An expert is warned of once, when it has had no token for ``model.moe.dead_after`` steps.
        """
        self.idle_LE = np.where(np.asarray(routing.load_E[i]) > 0, 0, self.idle_LE + 1)
        warnings = []
        for layer, idle_E in zip(self.layers, self.idle_LE, strict=True):
            if (dead := np.flatnonzero(idle_E == self.dead_after)).size:
                experts = f"expert{'s' if dead.size > 1 else ''} {', '.join(map(str, dead))}"
                warnings.append(f"layer {layer}: no token for {experts} in {self.dead_after} steps")
                if hosts.is_first():
                    logging.warning(warnings[-1])
        return warnings

    def entries(self, routing: Routing, i: int) -> dict[str, Any]:
        """Of the log's line of that step: lists over the layers with experts, in order."""
        load_LE = np.asarray(routing.load_E[i])
        return {
            "load_balancing_loss": np.asarray(routing.balance_loss[i]).tolist(),
            "router_z_loss": np.asarray(routing.z_loss[i]).tolist(),
            "router_entropy": np.asarray(routing.entropy[i]).tolist(),
            "dropped_share": np.asarray(routing.dropped[i]).tolist(),
            "load_max_over_mean": (load_LE.max(1) * load_LE.shape[1]).tolist(),
            "dead_experts": (self.idle_LE >= self.dead_after).sum(1).tolist(),
            "expert_load": load_LE.astype(float)
            .round(5)
            .tolist(),  # a list over the layer's experts
        }
