"""Between a run's folder and a Hugging Face folder."""

import json
from pathlib import Path
from typing import Any

import jax
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import save_file

from lm import arithmetic
from lm.checkpoint import (
    CHECKPOINT_SCHEMA,
    SCHEMA,
    Checkpoints,
    claim,
    context,
    load_config,
    load_params,
)
from lm.command import BadInput, json_object, write_atomically
from lm.config import Config, LoraConfig, MeshConfig, replace, to_dict, typed
from lm.data import chat, open_template, open_tokenizer
from lm.data.chat import end_of_turn
from lm.data.tokenizers import JsonTokenizer, Tokenizer
from lm.interop import tokenizer as tokenizers
from lm.interop.families import from_transformers, to_transformers
from lm.interop.folder import COMPANIONS, Folder, cast, write_folder
from lm.interop.gguf_file import GgufFile
from lm.interop.tensors import load, pieces
from lm.model.lora import NAMES, merged
from lm.sharding import make_mesh

GENERATION = "generation_config.json"  # of a Hugging Face folder
MARKS = ("bos_token_id", "eos_token_id")  # there, and in config.json


def import_weights(
    given: Path, workdir: Path, dtype: str = "float32", scan_layers: bool = False
) -> dict[str, Any]:
    """Makes ``workdir``, which is empty, a run's folder with the weights of ``given``.

    Args:
      given: a Hugging Face folder, or a GGUF file.
      dtype: of the computation.
      scan_layers: stack the layers' parameters, for a scan.

    Returns the run's result, of the status `imported`. Raises ``BadInput`` where anything does not
    fit.
    """
    source = GgufFile(given) if given.is_file() else Folder(given)
    model, positions = from_transformers(source.config)
    companions = source.companions()
    if "tokenizer.json" not in companions:
        raise BadInput(f"{given}: has no tokenizer.json; transformers' save_pretrained writes one")
    said = json_object(given / GENERATION, companions.get(GENERATION, b"{}"))
    marks = {key: source.config[key] for key in MARKS if source.config.get(key) is not None}
    for key, mark in (*marks.items(), *((key, said.get(key)) for key in MARKS)):
        if mark is not None:
            typed(mark if isinstance(mark, list) else [mark], tuple[int, ...], f"{given}: {key}")
    if not marks.keys() <= said.keys():
        companions[GENERATION] = json.dumps(marks | said).encode()
    for name, content in companions.items():
        (workdir / name).write_bytes(content)
    path = (workdir if given.is_file() else given) / "tokenizer.json"
    tokenizer = JsonTokenizer(path)
    chat.open_template(str(path), tokenizer)
    if tokenizer.vocab_size > model.vocab_size:
        raise BadInput(
            f"{given}: the tokenizer has {tokenizer.vocab_size} ids, the embedding"
            f" {model.vocab_size}: must be at least as many"
        )
    config = replace(
        Config(name=given.stem, model=model),
        model={"dtype": dtype, "scan_layers": scan_layers},
        data={"seq_len": positions, "tokenizer": "tokenizer.json"},
    )
    return _save(workdir, config, load(source, config, host()), "imported")


def merge_weights(workdir: Path, to: Path) -> dict[str, Any]:
    """Makes ``to``, which is empty, a run's folder of the same function without adapters.

    Returns the run's result, of the status `merged`. Raises ``BadInput`` where ``workdir`` has no
    adapters.
    """
    config = load_config(workdir)
    if not config.model.lora.rank:
        raise BadInput(f"{workdir}: has no adapters (model.lora.rank = 0)")
    for name in COMPANIONS:
        if (workdir / name).exists():
            (to / name).write_bytes((workdir / name).read_bytes())
            config = replace(config, data={"tokenizer": "tokenizer.json"})
    params = merged(load_params(workdir, config, host()), config.model.lora)
    plain = replace(
        config,
        model={"lora": to_dict(LoraConfig())},
        train={"init_from": "", "loss_chunk": 0},  # which need not divide the context
        data={"seq_len": context(workdir)},
    )
    return _save(to, plain, params, "merged")


def _save(workdir: Path, config: Config, params: Any, status: str) -> dict[str, Any]:
    claim(workdir, config)
    checkpoints = Checkpoints(workdir)
    checkpoints.save(0, {"params": params}, {"schema": CHECKPOINT_SCHEMA})
    checkpoints.close()
    count = arithmetic.parameters(config.model, config.data.seq_len)
    result = {
        "schema": SCHEMA,
        "status": status,
        "loss": None,
        "params": count.blocks_and_head,
        "total_params": count.total,
        "tokens": 0,
    }
    write_atomically(workdir / "result.json", json.dumps(result, indent=1))
    return result


def export_weights(workdir: Path, folder: Path, dtype: str = "float32") -> dict[str, Any]:
    """Writes the newest checkpoint of a run's folder as a Hugging Face folder.

    ``dtype`` is that of the stored weights. Returns config.json's content. Raises ``BadInput``
    where no family of transformers computes what the model does. Adapters are merged.
    """
    config = load_config(workdir)
    plain = replace(config, model={"lora": to_dict(LoraConfig())})
    result = workdir / "result.json"
    is_imported = result.exists() and json_object(result).get("status") == "imported"
    positions = config.data.seq_len if is_imported else context(workdir)  # as their file had it
    written = to_transformers(plain.model, positions)
    params = load_params(workdir, config, host())
    if config.model.lora.rank:
        params, config = merged(params, config.model.lora), plain
    tokenizer = open_tokenizer(config.data)
    companions = {
        name: (workdir / name).read_bytes() for name in COMPANIONS if (workdir / name).exists()
    }
    template = open_template(config.data, tokenizer) if config.data.has_chats else None
    companions = companions or tokenizers.companions(tokenizer, positions, template)
    ends = end_of_turn(template, tokenizer) if template else []
    generation = _generation(workdir, tokenizer, ends)
    companions |= {GENERATION: json.dumps(generation, indent=1).encode()}
    written |= {key: generation[key] for key in MARKS}
    write_folder(folder, written, pieces(config.model, params), companions, dtype)
    return written


def _generation(workdir: Path, tokenizer: Tokenizer, ends: list[int]) -> dict[str, Any]:
    """generation_config.json's content: the imported one, where what was trained ends a text too.

    Args:
      ends: tokens that end what the model has learned to answer.
    """
    path = Path(getattr(tokenizer, "path", workdir / "tokenizer.json")).parent / GENERATION
    given = json_object(path) if path.exists() else {}
    said = given.get("eos_token_id")
    if said is None or path.parent != workdir:
        others = said if isinstance(said, list) else [said]
        ids = dict.fromkeys([*ends, *others, tokenizer.end_of_text])
        said = [i for i in ids if i is not None]
    if isinstance(said, list) and len(said) == 1:
        (said,) = said
    return {"bos_token_id": None} | given | {"eos_token_id": said}


def export_adapters(workdir: Path, folder: Path, dtype: str = "float32") -> dict[str, Any]:
    """Writes the adapters of a run's folder alone, as the package peft reads them.

    They name the folder that they were trained on, not where it lies on this machine.

    Returns adapter_config.json's content. Raises ``BadInput`` where there are none.
    """
    config = load_config(workdir)
    lora = config.model.lora
    if not lora.rank:
        raise BadInput(f"{workdir}: has no adapters (model.lora.rank = 0)")
    flat = flatten_dict(load_params(workdir, config, host()))
    adapters = unflatten_dict({key: x for key, x in flat.items() if key[-1] in NAMES})
    found = {f"base_model.model.{k}": p for k, p in pieces(config.model, adapters).items()}
    written = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": Path(config.train.init_from).name or None,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "target_modules": sorted({name.split(".")[-3] for name in found}),
    }
    tensors = {name: cast(dtype, name, piece()) for name, (_, piece) in found.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(written, indent=1))
    return written


def host() -> jax.sharding.Mesh:
    """One CPU device: to convert needs no accelerator."""
    return make_mesh(MeshConfig(), jax.devices("cpu")[:1])
