"""What a run starts from: a fresh state, one with another folder's parameters, or another run's."""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from lm import data, hosts
from lm.checkpoint import (
    Checkpoints,
    abstract_params,
    init_step,
    load_config,
    load_step,
    note_init_step,
)
from lm.command import BadInput
from lm.config import Config, differences, to_dict
from lm.data.tokenizers import Tokenizer
from lm.sharding import batch_shards
from lm.train.recipe import branch_step
from lm.train.step import Program, State

# Settings that say how, or in training alone.
MAY_DIFFER = ("dtype", "remat", "quantization", "attention_kernel", "lora")
MOE_MAY_DIFFER = (
    *("dispatch", "capacity_factor", "jitter", "dead_after"),
    *("balance_coefficient", "z_coefficient"),
)


def check(config: Config, tokenizer: Tokenizer) -> None:
    """Raises ``BadInput`` where ``train.init_from`` is no folder of this model's parameters.

    That is also where its tokenizer is another: every embedding would be another token's.
    """
    folder = Path(config.train.init_from)
    given = load_config(folder)
    told = f"train.init_from = {config.train.init_from!r}"
    if not list(folder.glob("checkpoints/[0-9]*")):
        raise BadInput(f"{told}: holds no checkpoint")
    if given.model.lora.rank and given.model.lora != config.model.lora:
        raise BadInput(
            f"{told}: has adapters of its own; `python -m lm.interop merge` adds them to its"
            " matrices, or model.lora can be the same"
        )
    old, new = (_function(c) for c in (given, config))
    # A short training on longer texts extends the reach of rotary positions, once.
    if given.model.rope_scaling.kind == "none":
        del old["model"]["rope_scaling"], new["model"]["rope_scaling"]
    if unlike := list(differences(old, new)):
        raise BadInput(f"{told}: is another model ({'; '.join(unlike)})")
    its = data.open_tokenizer(given.data)
    if its.fingerprint != tokenizer.fingerprint:
        where = getattr(its, "path", its.name)
        raise BadInput(
            f"{told}: its tokenizer is {its.name}, not {tokenizer.name}; set data.tokenizer ="
            f" {str(where)!r}"
        )


def _function(config: Config) -> dict:
    """What decides the parameters and what they compute."""
    model = {k: v for k, v in to_dict(config.model).items() if k not in MAY_DIFFER}
    model["moe"] = {k: v for k, v in model["moe"].items() if k not in MOE_MAY_DIFFER}
    learned = config.model.position == "learned"
    return {"model": model} | ({"data": {"seq_len": config.data.seq_len}} if learned else {})


def params(config: Config, mesh: Mesh, fresh: Any, workdir: Path) -> Any:
    """``fresh`` parameters with those of ``train.init_from``, laid over ``mesh``, in their place.

    They are those of its newest whole checkpoint when the run of ``workdir`` began, which notes the
    step: that folder may be trained in meanwhile. New adapters stay fresh. What is replaced is
    given back before the other is read. Raises ``BadInput`` where that checkpoint is gone.
    """
    folder = Path(config.train.init_from)
    lora = load_config(folder).model.lora
    of_folder = dataclasses.replace(config, model=dataclasses.replace(config.model, lora=lora))
    flat = flatten_dict(fresh)
    for key in flatten_dict(abstract_params(of_folder, mesh)):
        flat[key].delete()
    step, given = load_step(folder, of_folder, mesh, hosts.agree(lambda: init_step(workdir)))
    if hosts.is_first():
        note_init_step(workdir, step)
    return unflatten_dict(flat | flatten_dict(given))


def state(
    config: Config, program: Program, abstract: Any, start_from: str | Path | None, workdir: Path
) -> tuple[State, dict]:
    """The first state of ``workdir``'s run and what is known beside it; always the same.

    The state is fresh but for ``train.init_from``'s parameters. With ``start_from`` it is that
    run's where its decay began, at the rate that its rollbacks have left. Raises ``BadInput`` where
    that has no such checkpoint, or one of another run.
    """
    if start_from is not None:
        folder = Path(start_from)
        at = branch_step(load_config(folder), config, batch_shards(program.mesh))
        with contextlib.closing(Checkpoints(folder)) as checkpoints:
            found = checkpoints.restore(abstract, at)
        if found:
            first, meta = found
            return first, {name: meta.get(name, 0) for name in ("rollbacks", "skips")}
        if not checkpoints.damaged:
            raise BadInput(f"{folder}: holds no checkpoint of step {at} to branch from")
    # Also where all checkpoints are damaged: it costs time, and ends with the same numbers.
    fresh = program.init(config.train.seed)
    if not config.train.init_from:
        return fresh, {}
    return fresh._replace(params=params(config, program.mesh, fresh.params, workdir)), {}
