"""Between a run's folder and a Hugging Face folder."""

import json
from pathlib import Path
from typing import Any

import jax

from lm import arithmetic
from lm.checkpoint import SCHEMA, Checkpoints, claim, load_config, load_params
from lm.command import BadInput, write_atomically
from lm.config import Config, MeshConfig, replace
from lm.data import open_tokenizer
from lm.data.tokenizers import JsonTokenizer
from lm.interop import tokenizer as tokenizers
from lm.interop.families import from_transformers, to_transformers
from lm.interop.folder import COMPANIONS, Folder, write_folder
from lm.interop.gguf_file import GgufFile
from lm.interop.tensors import load, pieces
from lm.sharding import make_mesh


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
    for name, content in companions.items():
        (workdir / name).write_bytes(content)
    tokenizer = JsonTokenizer((workdir if given.is_file() else given) / "tokenizer.json")
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
    params = load(source, config, host())
    claim(workdir, config)
    checkpoints = Checkpoints(workdir)
    checkpoints.save(0, {"params": params}, {"schema": SCHEMA})
    checkpoints.close()
    count = arithmetic.parameters(model, positions)
    result = {
        "schema": SCHEMA,
        "status": "imported",
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
    where no family of transformers computes what the model does.
    """
    config = load_config(workdir)
    written = to_transformers(config.model, config.data.seq_len)
    tokenizer = open_tokenizer(config.data)
    companions = {
        name: (workdir / name).read_bytes() for name in COMPANIONS if (workdir / name).exists()
    }
    companions = companions or tokenizers.companions(tokenizer, config.data.seq_len)
    written |= {"bos_token_id": None, "eos_token_id": tokenizer.end_of_text}
    params = load_params(workdir, config, host())
    write_folder(folder, written, pieces(config.model, params), companions, dtype)
    return written


def host() -> jax.sharding.Mesh:
    """One CPU device: to convert needs no accelerator."""
    return make_mesh(MeshConfig(), jax.devices("cpu")[:1])
