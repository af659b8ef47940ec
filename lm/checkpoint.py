"""A run's folder: whose it is, whether it is done, and its checkpoints.

``config.json`` says whose; ``result.json`` is written last, so that its presence means done.
"""

import json
import socket
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lm import config as configuration
from lm.command import BadInput, json_object, write_atomically
from lm.model import Decoder
from lm.sharding import layout, stored_shardings

SCHEMA = 1


def claim(workdir: Path, config: configuration.Config, force: bool = False) -> dict | None:
    """Makes ``workdir`` this config's own; returns the result where the run is done already.

    Raises ``BadInput`` where the folder holds another config's run, naming the keys that differ,
    unless ``force``, which continues under the new config.
    """
    path = workdir / "config.json"
    wanted = configuration.to_dict(config)
    if path.exists():
        found = json_object(path).get("config")
        changed = list(configuration.differences(found, wanted))
        if changed and not force:
            raise BadInput(
                f"{workdir} holds a run of another config ({'; '.join(changed)}):"
                " use another --workdir, or --force"
            )
        result = workdir / "result.json"
        if result.exists() and not changed:
            return json_object(result)
        result.unlink(missing_ok=True)
    write_atomically(path, json.dumps({"schema": SCHEMA, "config": wanted}, indent=1))
    return None


def check_shared(workdir: Path) -> None:
    """Raises ``BadInput`` where this host doesn't see the folder that process 0 has claimed."""
    if not (workdir / "config.json").exists():
        raise BadInput(
            f"{workdir}: {socket.gethostname()} doesn't see what process 0 wrote there; checkpoints"
            " need a folder that all hosts share (or train.checkpoint_every = -1)"
        )


def load_config(workdir: Path) -> configuration.Config:
    """The config a run folder was trained with. Raises ``BadInput`` where there is none.

    A folder with a tokenizer.json of its own, as imported weights have, reads text with that.
    """
    path = workdir / "config.json"
    if not path.exists():
        raise BadInput(f"{workdir}: no run here (config.json is missing)")
    config = configuration.read_config(path)
    tokenizer = workdir / "tokenizer.json"
    if tokenizer.exists():
        config = configuration.replace(config, data={"tokenizer": str(tokenizer)})
    return config


def load_params(workdir: Path, config: configuration.Config, mesh: Mesh) -> Any:
    """The decoder's parameters in the newest checkpoint of a run folder, laid over ``mesh``.

    Of ``config``, which is the folder's own, where they lie and how they are computed with may be
    changed. Raises ``BadInput`` where there is no checkpoint.
    """
    if not (workdir / "checkpoints").is_dir():
        raise BadInput(f"{workdir}: holds no checkpoint")
    checkpoints = Checkpoints(workdir)
    try:
        params = checkpoints.restore_params(abstract_params(config, mesh))
    finally:
        checkpoints.close()
    if params is None:
        raise BadInput(f"{workdir}: holds no checkpoint")
    return params


class Checkpoints:
    """The newest training states and one kept for ever, by Orbax: asynchronous, atomic, sharded.

    A state restores onto any mesh: the abstract state says where its arrays shall lie.
    """

    def __init__(self, workdir: Path, kept_step: int | None = None, newest: int = 2):
        # Here, as it takes a second that a run without checkpoints saves.
        import orbax.checkpoint as ocp
        from orbax.checkpoint.checkpoint_managers import preservation_policy as policies

        self._ocp = ocp
        self._manager = ocp.CheckpointManager(
            (workdir / "checkpoints").absolute(),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(
                    [policies.LatestN(newest), policies.CustomSteps([kept_step])]
                ),
                enable_async_checkpointing=True,
            ),
        )

    def save(self, step: int, state: Any, meta: dict) -> None:
        """Starts writing; arrays are copied before this returns, so they may be donated."""
        self._manager.save(
            step,
            args=self._ocp.args.Composite(
                state=self._ocp.args.StandardSave(state), meta=self._ocp.args.JsonSave(meta)
            ),
        )

    def restore(self, abstract: Any, step: int | None = None) -> tuple[Any, dict] | None:
        """(state, meta) of ``step`` (default: the newest complete one), or None where missing.

        ``abstract`` gives shapes, dtypes and shardings.
        """
        step = self._manager.latest_step() if step is None else step
        if step not in self._manager.all_steps():
            return None
        restored = self._manager.restore(
            step,
            args=self._ocp.args.Composite(
                state=self._ocp.args.StandardRestore(abstract), meta=self._ocp.args.JsonRestore()
            ),
        )
        return restored.state, restored.meta

    def restore_params(self, abstract: Any) -> Any:
        """The parameters alone of the newest complete state, or None where there is none."""
        step = self._manager.latest_step()
        if step is None:
            return None
        item = {"params": abstract}
        arguments = self._ocp.checkpoint_utils.construct_restore_args(item)
        state = self._ocp.args.PyTreeRestore(item, restore_args=arguments, partial_restore=True)
        restored = self._manager.restore(step, args=self._ocp.args.Composite(state=state))
        return restored.state["params"]

    def close(self) -> None:
        """Waits for writes under way."""
        self._manager.wait_until_finished()
        self._manager.close()


def abstract_params(config: configuration.Config, mesh: Mesh) -> Any:
    """The decoder's parameters as shapes and dtypes that lie over ``mesh`` as the config has it."""
    if mesh.shape["stage"] == 1:  # elsewhere the run may have gone round a pipeline
        config = configuration.replace(config, mesh={"rounds": 1})
    decoder = Decoder(config.model, config.data.seq_len)
    inputs = jnp.zeros((1, 1), jnp.int32)
    boxed = jax.eval_shape(decoder.init, jax.random.key(0), inputs)["params"]
    shardings = stored_shardings(boxed, mesh, layout(config, mesh).params)
    return abstract_like(nn.meta.unbox(boxed), shardings)


def abstract_like(tree: Any, shardings: Any) -> Any:
    """``tree``'s shapes and dtypes lying as ``shardings`` say, for ``Checkpoints.restore``."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
    )
