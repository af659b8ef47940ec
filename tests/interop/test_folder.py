"""Safetensors on disk: one file or several, three dtypes, damage."""

import json
import pickle
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lm.command import BadInput
from lm.interop import Folder, write_folder
from lm.interop.folder import DTYPES, INDEX

DRAW = np.random.default_rng(0)
ARRAYS = {
    name: DRAW.normal(size=shape).astype(np.float32)
    for name, shape in {"a": (40, 10), "b.weight": (10,), "c": (3, 2), "d": (20, 20)}.items()
}
CONFIG = {"architectures": ["LlamaForCausalLM"]}


def pieces(arrays=ARRAYS):
    return {name: (x.shape, lambda x=x: x) for name, x in arrays.items()}


@pytest.mark.parametrize("shard_bytes", [2**31, 1700, 1], ids=["one", "two", "four"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_written_is_read(dtype, shard_bytes, tmp_path):
    companions = {"tokenizer.json": b"{}", "generation_config.json": b"[]"}
    write_folder(tmp_path, CONFIG, pieces(), companions, dtype, shard_bytes)
    (tmp_path / "README.md").write_text("")
    folder = Folder(tmp_path)
    assert folder.config == CONFIG | {"torch_dtype": dtype} and folder.companions() == companions
    assert folder.tensors.keys() == ARRAYS.keys()
    for name, x in ARRAYS.items():
        assert folder.tensors[name] == (
            x.shape,
            {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype],
        )
        whole = folder.read(name, tuple(slice(0, n) for n in x.shape))
        np.testing.assert_array_equal(whole, x.astype(DTYPES[dtype]))
        assert whole.dtype == DTYPES[dtype]
    part = folder.read("a", (slice(3, 7), slice(2, 5)))
    np.testing.assert_array_equal(part, ARRAYS["a"][3:7, 2:5].astype(DTYPES[dtype]))


def test_files_hold_no_more_than_they_may_and_the_index_says_where(tmp_path):
    write_folder(tmp_path, CONFIG, pieces(), {}, shard_bytes=1700)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files == [f"model-{i:05}-of-00002.safetensors" for i in (1, 2)]
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == 4 * sum(x.size for x in ARRAYS.values())
    for name, file in index["weight_map"].items():
        held = load_file(tmp_path / file)
        assert name in held and (len(held) == 1 or sum(x.nbytes for x in held.values()) <= 1700)


def test_float16_does_not_overflow_unnoticed(tmp_path):
    large = {"a": np.array([1e5], np.float32)}
    with pytest.raises(BadInput, match="tensor a: holds values beyond the range of float16"):
        write_folder(tmp_path, CONFIG, pieces(large), {}, "float16")
    write_folder(tmp_path, CONFIG, pieces(large), {}, "bfloat16")


def test_what_is_missing_or_damaged_is_told_by_file(tmp_path):
    def refusal(path):
        with pytest.raises(BadInput) as refused:
            Folder(path)
        assert "\n" not in str(refused.value)
        return str(refused.value)

    (tmp_path / "x").mkdir()
    write_folder(tmp_path / "x", CONFIG, pieces(), {})

    def copy(name):
        return shutil.copytree(tmp_path / "x", tmp_path / name)

    assert "config.json: cannot be read" in refusal(tmp_path / "nowhere")
    (copy("json") / "config.json").write_text("{")
    assert "config.json: not JSON" in refusal(tmp_path / "json")
    (copy("list") / "config.json").write_text("[]")
    assert "config.json: must hold an object" in refusal(tmp_path / "list")
    (copy("gone") / "model.safetensors").unlink()
    assert "model.safetensors: is missing" in refusal(tmp_path / "gone")
    content = (copy("cut") / "model.safetensors").read_bytes()
    for length in (4, 100, len(content) - 10):
        (tmp_path / "cut" / "model.safetensors").write_bytes(content[:length])
        assert "model.safetensors: truncated or damaged" in refusal(tmp_path / "cut")
    (copy("shard") / INDEX).write_text(json.dumps({"weight_map": {"a": "y.safetensors"}}))
    assert "y.safetensors: is missing" in refusal(tmp_path / "shard")
    save_file({"z": ARRAYS["a"]}, tmp_path / "shard" / "y.safetensors")
    assert Folder(tmp_path / "shard").tensors.keys() == {"z"}  # as the files have it


@pytest.mark.parametrize("name", ["../other.safetensors", "/tmp/other.safetensors"])
def test_an_index_that_points_outside_is_refused(name, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    save_file({"a": ARRAYS["a"]}, tmp_path / "other.safetensors")
    (folder / "config.json").write_text("{}")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(BadInput, match="is not a file of this folder"):
        Folder(folder)


@pytest.mark.parametrize("weights", [None, ["a"], {"a": 3}, {"a": ["x.safetensors"]}], ids=str)
def test_an_index_of_no_files_is_refused(weights, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weights}))
    with pytest.raises(BadInput, match=f"{INDEX}: weight_map.* must be of type"):
        Folder(tmp_path)


def test_pickled_weights_are_no_weights(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    with pytest.raises(BadInput, match="model.safetensors: is missing"):
        Folder(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "pytorch_model.bin"}}))
    with pytest.raises(BadInput, match="pytorch_model.bin: truncated or damaged"):
        Folder(tmp_path)
