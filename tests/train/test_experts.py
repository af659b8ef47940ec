"""What a run tells of its experts."""

import numpy as np
import pytest
from absl import logging

from lm.config import ModelConfig, MoeConfig
from lm.model.moe import Routing
from lm.train.experts import ExpertWatch

MODEL = ModelConfig(n_layers=4, moe=MoeConfig(n_experts=3, top_k=1, every=2, dead_after=2))


def routing(*steps):
    """Of a dispatch of some steps, each with the load of two layers of three experts."""
    load = np.array(steps, np.float32)
    return Routing(
        *(np.full(load.shape[:2], i) for i in range(2)), load, *(np.ones(load.shape[:2]),) * 2
    )


def test_an_expert_without_tokens_is_warned_of_once_by_name(monkeypatch):
    logged = []
    monkeypatch.setattr(logging, "warning", logged.append)
    watch = ExpertWatch(MODEL)
    all_have, two_dead = [[0.3, 0.3, 0.4]] * 2, [[0.3, 0.3, 0.4], [0.0, 1.0, 0.0]]
    steps = routing(two_dead, all_have, two_dead, two_dead, two_dead)
    warnings = [watch.see(steps, i) for i in range(5)]
    said = ["layer 3: no token for experts 0, 2 in 2 steps"]
    assert warnings == [[], [], [], said, []]
    assert logged == said


def test_the_logs_entries_are_lists_over_the_layers_with_experts():
    watch, steps = ExpertWatch(MODEL), routing(*[[[0.25, 0.25, 0.5], [0.0, 1.0, 0.0]]] * 2)
    for i in range(2):
        watch.see(steps, i)
    entries = watch.entries(steps, 1)
    assert entries["expert_load"] == [[0.25, 0.25, 0.5], [0.0, 1.0, 0.0]]
    assert entries["load_max_over_mean"] == pytest.approx([1.5, 3.0])
    assert entries["dead_experts"] == [0, 2]
    assert entries["load_balancing_loss"] == [0, 0] and entries["router_z_loss"] == [1, 1]
