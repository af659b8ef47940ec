"""The compiled step: several optimizer steps a dispatch, on any mesh."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from lm import hosts
from lm.config import Config
from lm.data import Batch
from lm.model import Decoder, choose_kernel, head_cross_entropy, lora
from lm.model.moe import Routing, auxiliary_loss, no_routing, shift_balance_bias
from lm.sharding import batch_shards, held, lay, layout, named_sharding, placed, stored_shardings
from lm.train import pipeline
from lm.train.clock import COMPILE, Clock
from lm.train.optimizer import adamw, apply_updates, update_if
from lm.train.schedule import Schedule, learning_rate


class State(NamedTuple):
    """All that training carries from step to step; a random key follows from ``step``."""

    step: jax.Array  # int32, optimizer steps done
    params: Any
    moments: Any  # optax's state, of the parameters that are trained


class Metrics(NamedTuple):
    """Of one optimizer step; arrays of steps_per_dispatch entries."""

    loss: jax.Array  # nats a token: cross-entropy alone
    gradient_norm: jax.Array  # before clipping
    learning_rate: jax.Array
    skipped: jax.Array  # bool: loss or gradient was not finite, and the state stayed as it was
    routing: Routing | None  # of the layers with experts; the mean over micro-batches


class Program:
    """What is compiled for one shape of model: ``init``, ``train`` and ``nats``, on one mesh.

    Args:
      config: model, optimizer, accumulation and steps_per_dispatch are read; what differs between
        runs of one shape (lengths, rates, seeds) is an argument of ``train``.
      mesh: with the axes of ``lm.sharding.mesh``; an abstract one can be lowered for, not run on.

    Raises ``BadInput`` where the model does not divide over the mesh, or names an attention kernel
    that can't do what it asks there.
    """

    def __init__(self, config: Config, mesh: Mesh | AbstractMesh):
        self.config, self.mesh = config, mesh
        self.clock = Clock()  # of the run that it is used by
        self.decoder = Decoder(config.model, config.data.seq_len)
        self.optimizer = adamw(config.optimizer)
        boxed = jax.eval_shape(self._init, jax.random.key(0))
        self.abstract_state = nn.meta.unbox(boxed)
        self.layout = layout(config, mesh)
        m = config.model
        with placed(mesh, self.layout):  # refused here, not at the first step
            choose_kernel(
                *(m.attention_kernel, config.data.seq_len),
                *(m.head_width, m.dtype, m.attention_soft_cap),
            )
        everywhere = NamedSharding(mesh, PartitionSpec())
        self.state_sharding = State(
            everywhere,
            stored_shardings(boxed.params, mesh, self.layout.params),
            stored_shardings(boxed.moments, mesh, self.layout.moments),
        )
        trained = lora.trained(boxed.params, m.lora)
        self.gradient_sharding = stored_shardings(trained, mesh, self.layout.gradients)
        self.moment_sharding = stored_shardings(trained, mesh, self.layout.moments)
        # Run once and 0.1 s long, so LLVM's optimiser would cost more than it saves.
        on_cpu = isinstance(mesh, Mesh) and mesh.devices.flat[0].platform == "cpu"
        self._run_init = self._compile(
            lambda key: nn.meta.unbox(self._init(key)),
            out_shardings=self.state_sharding,
            compiler_options={"xla_backend_optimization_level": 0} if on_cpu else None,
        )
        outputs = (self.state_sharding, everywhere)
        self._train_options = {"donate_argnums": 0, "out_shardings": outputs}
        self._run_train = self._compile(self._train, **self._train_options)
        self._run_nats = self._compile(self._nats, out_shardings=everywhere)
        self._run_token_nats = self._compile(self._token_nats, out_shardings=everywhere)

    @staticmethod
    def key(config: Config) -> tuple:
        """Configs of equal keys can share one ``Program``."""
        o, t = config.optimizer, config.train
        optimizer = (o.schedule, o.weight_decay, o.beta1, o.beta2, o.eps, o.clip_norm)
        return (
            *(config.model, config.data.seq_len, config.mesh),
            *(optimizer, t.accumulation, t.loss_chunk, t.steps_per_dispatch),
        )

    def _compile(self, function: Callable, **options) -> Callable:
        """``jax.jit`` under the mesh and the axes' table, compiled ahead to know its time."""
        # A fresh jit per program: the layout is no part of jit's cache key.
        jitted, executables = jax.jit(function, **options), {}

        def call(*args):
            leaves, tree = jax.tree.flatten(args)
            signature = (tree, tuple((x.shape, x.dtype) for x in leaves))
            if signature not in executables:
                compiling = self.clock.on(COMPILE)
                with compiling, jax.set_mesh(self.mesh), placed(self.mesh, self.layout):
                    executables[signature] = jitted.lower(*args).compile()
                hosts.agree(lambda: None)  # gloo gives up on a process that compiles for longer
            return executables[signature](*args)

        return call

    def _init(self, key: jax.Array) -> State:
        params = self.decoder.init(key, jnp.zeros((1, 1), jnp.int32))["params"]
        moments = self.optimizer.init(lora.trained(params, self.config.model.lora))
        return State(jnp.zeros((), jnp.int32), params, moments)

    def init(self, seed: int) -> State:
        """The state before the first step, born sharded."""
        return self._run_init(jax.random.key(seed))

    def train(
        self, state: State, batches: Batch, n_steps: int, schedule: Schedule
    ) -> tuple[State, Metrics]:
        """Runs the first ``n_steps`` of ``batches``, which ``put`` gave. ``state`` is donated."""
        schedule = Schedule(*(np.float32(x) for x in schedule))
        return self._run_train(state, batches, np.int32(n_steps), schedule)

    def lower_train(self, sequences: int, platform: str | None = None) -> jax.stages.Lowered:
        """``train`` on batches of ``sequences`` rows, lowered from shapes alone: nothing is made.

        For a mesh of devices it can be compiled, also where they are only described and not there.
        For an abstract mesh it is lowered to be read, for TPUs where no ``platform`` is given.
        """
        data = self.config.data
        lay = named_sharding(self.mesh, self.layout, None, "batch", "positions")
        shape = (self.config.train.steps_per_dispatch, sequences, data.seq_len)
        tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=lay)
        weights = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=lay)
        documents = (weights, tokens, tokens) if data.keeps_apart else ()
        state = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            *(self.abstract_state, self.state_sharding),
        )
        schedule = Schedule(*(np.float32(0) for _ in Schedule._fields))
        abstract = isinstance(self.mesh, AbstractMesh)
        platform = platform or ("tpu" if abstract else None)
        under = jax.sharding.use_abstract_mesh if abstract else jax.set_mesh
        with under(self.mesh), placed(self.mesh, self.layout):
            traced = jax.jit(self._train, **self._train_options).trace(
                state, Batch(tokens, tokens, *documents), np.int32(1), schedule
            )
            return traced.lower(lowering_platforms=platform and (platform,))

    def rows(self, n: int) -> np.ndarray:
        """Those of a batch's ``n`` rows that this process's devices hold, and so it has to read."""
        return held(named_sharding(self.mesh, self.layout, "batch"), n)

    def put(self, batch: Batch) -> Batch:
        """A batch (B, T), or one a step (n, B, T), laid over the mesh.

        Each process gives the rows that ``rows`` names, in order.
        """
        *steps, here, _ = batch.inputs_BT.shape
        shards = batch_shards(self.mesh)
        n = here * shards // len(self.rows(shards))
        rows, axis = self.rows(n), len(steps)
        logical = (*(None for _ in steps), "batch", "positions")
        sharding = named_sharding(self.mesh, self.layout, *logical)
        return jax.tree.map(lambda x: lay(x, rows, n, axis, sharding), batch)

    def nats(self, params: Any, batch: Batch) -> jax.Array:
        """The sum of nats over a batch that ``put`` gave."""
        return self._run_nats(params, batch)

    def token_nats(self, params: Any, batch: Batch) -> jax.Array:
        """The nats of each target of a batch that ``put`` gave, times its weight; (B, T)."""
        return self._run_token_nats(params, batch)

    def _token_nats(self, params, batch: Batch) -> jax.Array:
        # The sum's derivative by their weights, whatever mesh, chunks or stages it is summed in.
        weights_BT = batch.weights_BT
        if weights_BT is None:
            weights_BT = jnp.ones(batch.targets_BT.shape)
        nats = jax.grad(
            lambda weights_BT: self._nats(params, batch._replace(weights_BT=weights_BT))
        )
        return weights_BT * nats(weights_BT)

    def _nats(self, params, batch: Batch) -> jax.Array:
        return self._nats_and_routing(params, batch, None)[0]

    def _nats_and_routing(self, params, batch: Batch, key) -> tuple[jax.Array, Routing | None]:
        """The sum of nats, and the routing of each layer with experts; ``key`` in training."""
        if (stages := self.mesh.shape["stage"]) > 1:
            return pipeline.nats(self.config, self.decoder, stages, params, batch, key)
        apply = partial(self.decoder.apply, {"params": params})
        x_BTD, routing = apply(
            *(batch.inputs_BT, batch.segments_BT, batch.positions_BT),
            method="hidden",
            rngs=None if key is None else {"jitter": key},
        )
        nats = head_cross_entropy(
            *(x_BTD, apply(method="unembedding"), batch.targets_BT, batch.weights_BT),
            soft_cap=self.config.model.logit_soft_cap,
            chunk=self.config.train.loss_chunk,
        )
        return nats, routing

    def _lay(self, tree: Any, shardings: Any) -> Any:
        """Pins where a tree of the step lies; nothing to pin on one device."""
        return tree if self.mesh.size == 1 else jax.lax.with_sharding_constraint(tree, shardings)

    def _mean_gradient(self, state: State, batch: Batch) -> tuple[jax.Array, Routing | None, Any]:
        """Nats a token, the routing, and the gradient of both losses.

        Nats are summed over micro-batches and divided once by the count of tokens; what routing is
        charged for is the mean over micro-batches of what each one's statistics say.
        """
        params, moe, key = state.params, self.config.model.moe, None
        if moe.n_experts and moe.jitter:  # of the step alone, so that a resumed run has the same
            key = jax.random.fold_in(jax.random.key(0), state.step)
        # A pipeline has its micro-batches inside.
        n = 1 if self.mesh.shape["stage"] > 1 else self.config.train.accumulation
        count = (
            jnp.float32(batch.targets_BT.size)
            if batch.weights_BT is None
            else jnp.maximum(jnp.sum(batch.weights_BT), 1.0)
        )

        def objective(trained, batch, key):
            nats, routing = self._nats_and_routing(lora.whole(params, trained), batch, key)
            loss, routing = nats / count, jax.tree.map(lambda x: x / n, routing)
            return loss + auxiliary_loss(moe, routing), (loss, routing)

        gradient_of = jax.grad(objective, has_aux=True)
        trained = lora.trained(params, self.config.model.lora)
        if n == 1:
            gradient, (loss, routing) = gradient_of(trained, batch, key)
            return loss, routing, gradient

        def add(total, micro):
            gradient, aux = gradient_of(trained, *micro)
            total, gradient = jax.tree.map(jnp.add, total, (aux, gradient))
            return (total, self._lay(gradient, self.gradient_sharding)), None

        zero = (
            (jnp.float32(0), no_routing(self.config.model)),
            jax.tree.map(jnp.zeros_like, trained),
        )
        keys = None if key is None else jax.random.split(key, n)
        micro = pipeline.micro_batches(batch, n), keys
        ((loss, routing), gradient), _ = jax.lax.scan(add, zero, micro)
        return loss, routing, gradient

    def _step(self, state: State, batch: Batch, schedule: Schedule) -> tuple[State, Metrics]:
        config, moe = self.config.optimizer, self.config.model.moe
        # At the start too: XLA would else keep the parameters as the loop's last operation left
        # them, split as the optimizer's state, and gather each layer's in every pass.
        state = self._lay(state, self.state_sharding)
        loss, routing, gradient = self._mean_gradient(state, batch)
        # From ZeRO's first stage on, a device updates its part of the optimizer's state alone.
        gradient = self._lay(gradient, self.moment_sharding)
        trained = lora.trained(state.params, self.config.model.lora)
        norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        direction, moments = update_if(finite, config, gradient, state.moments, trained)
        rate = learning_rate(schedule, state.step, config.schedule)
        trained = apply_updates(
            trained, direction, rate, schedule.matrix_scale, config.weight_decay
        )
        params = lora.whole(state.params, trained)
        if moe.n_experts and moe.bias_rate and not self.config.model.lora.rank:
            params = shift_balance_bias(self.config.model, params, routing.load_E)
        params = jax.tree.map(lambda new, old: jnp.where(finite, new, old), params, state.params)
        metrics = Metrics(loss, norm, rate, ~finite, routing)
        return self._lay(State(state.step + 1, params, moments), self.state_sharding), metrics

    def _train(self, state: State, batches: Batch, n_steps: jax.Array, schedule: Schedule):
        length = self.config.train.steps_per_dispatch

        def body(i, carry):
            state, metrics = carry
            batch = jax.tree.map(lambda x: x[i], batches)
            state, new = self._step(state, batch, schedule)
            return state, jax.tree.map(lambda m, x: m.at[i].set(x), metrics, new)

        zeros = jnp.zeros(length, jnp.float32)
        skipped = jnp.zeros(length, bool)
        metrics = Metrics(zeros, zeros, zeros, skipped, no_routing(self.config.model, length))
        # A loop of traced length, so that a run's last, shorter dispatch is the same program.
        return jax.lax.fori_loop(0, n_steps, body, (state, metrics))
