"""A Hugging Face folder: config.json, safetensors in one file or several, the tokenizer's files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lm.command import BadInput, json_object
from lm.config import typed

INDEX = "model.safetensors.index.json"
# What goes along with the weights: read by transformers, and of these tokenizer.json by us.
COMPANIONS = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("chat_template.jinja", "generation_config.json"),
)
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
SHARD_BYTES = 2**31  # of one file, which is held in memory while it is written


class Folder:
    """A folder to read from; a ``tensors.Source``.

    Raises ``BadInput`` naming the file that is missing or damaged.
    """

    def __init__(self, path: Path):
        self.path = path
        self.config = json_object(path / "config.json")
        if (path / INDEX).exists():
            told = f"{path / INDEX}: weight_map"
            file_of = typed(json_object(path / INDEX).get("weight_map"), dict, told)
            files = sorted(set(typed(list(file_of.values()), tuple[str, ...], told)))
            for name in files:
                if Path(name).name != name:
                    raise BadInput(f"{path / INDEX}: {name!r} is not a file of this folder")
        else:
            files = ["model.safetensors"]
        self.tensors: dict[str, tuple[tuple[int, ...], str]] = {}
        self._file_of: dict[str, Any] = {}
        for name in files:
            for tensor in (file := _open(path / name)).keys():
                part = file.get_slice(tensor)
                self.tensors[tensor] = (tuple(part.get_shape()), part.get_dtype())
                self._file_of[tensor] = file

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A part of a tensor, in its own dtype; the rest of the file stays on disk."""
        return self._file_of[name].get_slice(name)[index]

    def companions(self) -> dict[str, bytes]:
        """The content of the COMPANIONS that are there."""
        there = [path for name in COMPANIONS if (path := self.path / name).exists()]
        if folders := [path for path in there if path.is_dir()]:
            raise BadInput(f"{folders[0]}: is a folder; a file is needed")
        return {path.name: path.read_bytes() for path in there}


def _open(path: Path) -> Any:
    if not path.exists():
        raise BadInput(f"{path}: is missing")
    try:
        return safe_open(path, "np")
    except (SafetensorError, OSError) as error:
        raise BadInput(f"{path}: truncated or damaged ({error})") from error


def write_folder(
    folder: Path,
    config: dict[str, Any],
    pieces: dict[str, tuple[tuple[int, ...], Callable[[], np.ndarray]]],
    companions: dict[str, bytes],
    dtype: str = "float32",
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes what ``Folder`` and ``transformers.AutoModelForCausalLM.from_pretrained`` read.

    Args:
      config: config.json's content.
      pieces: of every tensor the shape, and a call that gives it.
      dtype: one of DTYPES.

    Raises ``BadInput`` for a weight beyond the range of ``dtype``.
    """
    for name, content in companions.items():
        (folder / name).write_bytes(content)
    width = np.dtype(DTYPES[dtype]).itemsize
    bytes_of = {name: int(np.prod(shape)) * width for name, (shape, _) in pieces.items()}
    shards: list[list[str]] = [[]]
    for name, size in bytes_of.items():
        if shards[-1] and sum(bytes_of[n] for n in shards[-1]) + size > shard_bytes:
            shards.append([])
        shards[-1].append(name)
    files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        files = ["model.safetensors"]
    for file, names in zip(files, shards, strict=True):
        tensors = {name: cast(dtype, name, pieces[name][1]()) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(bytes_of.values())},
            "weight_map": {
                n: file for file, names in zip(files, shards, strict=True) for n in names
            },
        }
        (folder / INDEX).write_text(json.dumps(index, indent=1))
    written = config | {"torch_dtype": dtype}
    (folder / "config.json").write_text(json.dumps(written, indent=1))


def cast(dtype: str, name: str, piece: np.ndarray) -> np.ndarray:
    """A tensor in one of DTYPES. Raises ``BadInput`` for values beyond its range."""
    with np.errstate(over="ignore"):
        result = piece.astype(DTYPES[dtype])
    if not np.isfinite(result.astype(np.float32)).all() and np.isfinite(piece).all():
        raise BadInput(f"tensor {name}: holds values beyond the range of {dtype}; use bfloat16")
    return result
