"""The compiled step: several optimizer steps a dispatch, on any mesh of ``data`` and ``model`` axes."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lm.config import Config
from lm.data import Batch
from lm.model import Decoder, cross_entropy
from lm.sharding import named_sharding, rules
from lm.train.optimizer import adamw, apply_updates
from lm.train.schedule import Schedule, learning_rate


class State(NamedTuple):
    """All that training carries from step to step."""

    step: jax.Array  # int32, optimizer steps done
    params: Any
    moments: Any  # optax's state


class Metrics(NamedTuple):
    """Of one optimizer step; arrays of steps_per_dispatch entries."""

    loss: jax.Array  # nats a token
    gradient_norm: jax.Array  # before clipping
    learning_rate: jax.Array


class Program:
    """What is compiled for one shape of model and batch: ``init``, ``train`` and nothing else.

    Args:
      config: model, optimizer and accumulation are read; lengths and rates are arguments of ``train``.
      mesh: with axes ``data`` and ``model``.
    """

    def __init__(self, config: Config, mesh: Mesh):
        self.config, self.mesh = config, mesh
        self.decoder = Decoder(config.model, config.data.seq_len)
        self.optimizer = adamw(config.optimizer)
        abstract = jax.eval_shape(self._init, jax.random.key(0))
        specs = nn.get_partition_spec(abstract)
        self.state_sharding = nn.logical_to_mesh_sharding(specs, mesh, rules())
        self.batch_sharding = named_sharding(mesh, None, "batch", "sequence")
        self._compiled_init = self._jit(
            lambda key: nn.meta.unbox(self._init(key)), out_shardings=self.state_sharding
        )
        self._compiled_train = self._jit(
            self._train, donate_argnums=0, out_shardings=(self.state_sharding, None)
        )

    def _jit(self, function: Callable, **options) -> Callable:
        # A fresh jit per program: logical rules are no part of jit's cache key.
        jitted = jax.jit(function, **options)

        def call(*args):
            with jax.set_mesh(self.mesh), nn.logical_axis_rules(rules()):
                return jitted(*args)

        call.jitted = jitted
        return call

    def _init(self, key: jax.Array) -> State:
        params = self.decoder.init(key, jnp.zeros((1, 1), jnp.int32))["params"]
        return State(jnp.zeros((), jnp.int32), params, self.optimizer.init(params))

    def init(self, seed: int) -> State:
        """The state before the first step, born sharded."""
        return self._compiled_init(jax.random.key(seed))

    def train(
        self, state: State, batches: Batch, n_steps: int, schedule: Schedule
    ) -> tuple[State, Metrics]:
        """Runs the first ``n_steps`` of ``batches`` (leading axis: step). ``state`` is donated."""
        return self._compiled_train(state, self.put(batches), n_steps, schedule)

    def put(self, batches: Batch) -> Batch:
        """This host's rows of ``batches`` (n, B, T) as global arrays on the mesh."""
        return jax.tree.map(
            partial(jax.make_array_from_process_local_data, self.batch_sharding), batches
        )

    def _nats(self, params, batch: Batch) -> jax.Array:
        logits_BTV = self.decoder.apply(
            {"params": params}, batch.inputs_BT, batch.segments_BT, batch.positions_BT
        )
        return cross_entropy(logits_BTV, batch.targets_BT, batch.weights_BT)

    def _mean_gradient(self, params, batch: Batch) -> tuple[jax.Array, Any]:
        """Loss in nats a token and its gradient: sums over micro-batches, divided once by the count."""
        n = self.config.train.accumulation
        count = (
            jnp.float32(batch.targets_BT.size)
            if batch.weights_BT is None
            else jnp.maximum(jnp.sum(batch.weights_BT), 1.0)
        )
        value_and_grad = jax.value_and_grad(lambda p, b: self._nats(p, b) / count)
        if n == 1:
            return value_and_grad(params, batch)
        # Strided, so that every micro-batch spans all data shards.
        micro = jax.tree.map(lambda x: x.reshape(-1, n, *x.shape[1:]).swapaxes(0, 1), batch)

        def add(total, batch):
            return jax.tree.map(jnp.add, total, value_and_grad(params, batch)), None

        zero = jax.tree.map(jnp.zeros_like, (jnp.float32(0), params))
        return jax.lax.scan(add, zero, micro)[0]

    def _step(self, state: State, batch: Batch, schedule: Schedule) -> tuple[State, Metrics]:
        config = self.config.optimizer
        loss, gradient = self._mean_gradient(state.params, batch)
        direction, moments = self.optimizer.update(gradient, state.moments, state.params)
        rate = learning_rate(schedule, state.step, config.schedule)
        params = apply_updates(
            state.params, direction, rate, schedule.matrix_scale, config.weight_decay
        )
        metrics = Metrics(loss, optax.global_norm(gradient), rate)
        return State(state.step + 1, params, moments), metrics

    def _train(self, state: State, batches: Batch, n_steps: jax.Array, schedule: Schedule):
        length = self.config.train.steps_per_dispatch

        def body(i, carry):
            state, metrics = carry
            batch = jax.tree.map(lambda x: x[i], batches)
            state, new = self._step(state, batch, schedule)
            return state, jax.tree.map(lambda m, x: m.at[i].set(x), metrics, new)

        metrics = Metrics(*(jnp.zeros(length, jnp.float32) for _ in Metrics._fields))
        # A loop of traced length, so that a run's last, shorter dispatch is the same program.
        return jax.lax.fori_loop(0, n_steps, body, (state, metrics))


def replicated(mesh: Mesh) -> NamedSharding:
    """On every device in full."""
    return NamedSharding(mesh, PartitionSpec())
