"""What a token costs at its position, and tokens a second beside transformers.

    pip install -e '.[compare]'
    python -m experiments.decode_speed.run --out=experiments/decode_speed/results/results.json

A minute on a two-core CPU machine, most of it compilation; timings want it idle. Each
time is the least of many short ones, taken by turns.
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from lm import arithmetic, command
from lm.command import BadInput, write_atomically
from lm.config import Config, MeshConfig, ModelConfig, replace
from lm.generate.decode import SMALLEST_ROOM, Generator
from lm.generate.sampling import Sampling
from lm.interop import pieces, to_transformers, write_folder
from lm.model import Decoder
from lm.model.loss import logits
from lm.sharding import make_mesh
from lm.train.step import Program

FLAGS = flags.FlagValues()
flags.DEFINE_integer("rounds", 5, "Times that each is measured.", 1, flag_values=FLAGS)
flags.DEFINE_integer("threads", 2, "Of transformers; ours has every core's.", 1, flag_values=FLAGS)
flags.DEFINE_string("out", None, "Where to write the JSON; none by default.", flag_values=FLAGS)

CONFIG = replace(
    Config(
        # With as many heads for keys as for queries, a cached value costs as many bytes a FLOP as a
        # weight does: both of arithmetic's ratios agree.
        model=ModelConfig(
            vocab_size=512, d_model=256, n_layers=4, n_heads=4, n_kv_heads=4, d_ff=704
        ),
        mesh=MeshConfig(data=1),
    ),
    data={"seq_len": 4096},
)
DEPTHS = (2, 4, 8)  # layers; weights and the cache at 2,048 are 16, 31 and 60 MB
NEAR, FAR = 128, 2048  # positions
TOKENS = 24  # timed before each of them
UNCACHED = (128, 256, 512)
PROMPT, WRITTEN = 64, 192  # tokens, beside transformers


def prompt(n: int) -> list[int]:
    """The same ``n`` tokens each time."""
    return np.random.default_rng(0).integers(0, 500, n).tolist()


def microseconds_per_token(generator: Generator, position: int) -> float:
    """Of the tokens just before ``position``; the least of the pieces of a dispatch."""
    every, ends = 4, []
    for _ in generator.stream([prompt(position - TOKENS)], TOKENS, every=every):
        ends.append(time.perf_counter())
    return min(b - a for a, b in zip(ends, ends[1:], strict=False)) / every * 1e6


def uncached(params) -> dict[int, float]:
    """Microseconds of a token for which the whole text so far is computed again."""
    decoder = Decoder(CONFIG.model, CONFIG.data.seq_len)

    @jax.jit
    def next_token(params, tokens_BT):
        x_BTD, _ = decoder.apply({"params": params}, tokens_BT, method="hidden")
        unembedding_DV = decoder.apply({"params": params}, method="unembedding")
        return jnp.argmax(logits(x_BTD[:, -1:], unembedding_DV))

    found = {}
    for n in UNCACHED:
        tokens_BT = jnp.array([prompt(n)])
        next_token(params, tokens_BT).block_until_ready()
        times = []
        for _ in range(2 * FLAGS.rounds):
            started = time.perf_counter()
            next_token(params, tokens_BT).block_until_ready()
            times.append(time.perf_counter() - started)
        found[n] = round(min(times) * 1e6, 1)
    return found


def by_position(n_layers: int, mesh) -> dict:
    """Time over position, with room for twice ``FAR``, and near with as little as there can be."""
    config = replace(CONFIG, model={"n_layers": n_layers})
    params = Program(config, mesh).init(0).params
    ample, tight = (
        Generator(config, params, positions, mesh, Sampling(temperature=0))
        for positions in (2 * FAR, SMALLEST_ROOM)
    )
    times: dict[str, list[float]] = {"near": [], "far": [], "near_with_little_room": []}
    for _ in range(FLAGS.rounds):
        times["near"].append(microseconds_per_token(ample, NEAR))
        times["far"].append(microseconds_per_token(ample, FAR))
        times["near_with_little_room"].append(microseconds_per_token(tight, NEAR))
    least = {name: round(min(found), 1) for name, found in times.items()}
    model = config.model
    weights = arithmetic.weight_bytes(arithmetic.parameters(model).blocks_and_head, 4)
    bytes_, flops = (
        [weights + arithmetic.kv_cache_bytes(model, 1, n, "float32") for n in (NEAR, FAR)],
        [arithmetic.flops_per_token(model, n) / 3 for n in (NEAR, FAR)],
    )
    ratios = {"bytes": bytes_[1] / bytes_[0], "flops": flops[1] / flops[0]}
    measured = least["far"] / least["near"]
    return {
        "microseconds_per_token": least,
        "ratio": round(measured, 3),
        "ratio_by_arithmetic": {name: round(x, 3) for name, x in ratios.items()},
        "over_arithmetic": round(measured / max(ratios.values()), 3),
        "cache_positions": {str(n): ample._room(n) for n in (NEAR, FAR)},
    }


def beside_transformers(params, mesh) -> dict:
    """Tokens a second of both on the same weights and prompt, greedy, by turns."""
    try:
        import torch
        import transformers
    except ImportError as error:
        raise BadInput(f"{error.name} is not here; pip install -e '.[compare]'") from error
    torch.set_num_threads(FLAGS.threads)
    with tempfile.TemporaryDirectory() as folder:
        config = to_transformers(CONFIG.model, CONFIG.data.seq_len)
        config |= {"bos_token_id": None, "eos_token_id": None}
        write_folder(Path(folder), config, pieces(CONFIG.model, params), {})
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    ours = Generator(CONFIG, params, PROMPT + WRITTEN, mesh, Sampling(temperature=0))
    given, inputs = prompt(PROMPT), torch.tensor([prompt(PROMPT)])

    def write_theirs() -> list[int]:
        options = dict(max_new_tokens=WRITTEN, min_new_tokens=WRITTEN, do_sample=False)
        with torch.inference_mode():
            mask = torch.ones_like(inputs)
            return theirs.generate(inputs, attention_mask=mask, **options)[0, PROMPT:].tolist()

    def write_ours() -> list[int]:
        return ours([given], WRITTEN)[0].tokens

    if write_ours() != write_theirs():  # which also compiles
        raise RuntimeError("the two write different tokens")
    seconds: dict = {write_ours: [], write_theirs: []}
    for _ in range(FLAGS.rounds):
        for write, times in seconds.items():
            started = time.perf_counter()
            write()
            times.append(time.perf_counter() - started)
    rates = {write: [WRITTEN / t for t in times] for write, times in seconds.items()}
    return {
        "ours": round(statistics.median(rates[write_ours]), 1),
        "transformers": round(statistics.median(rates[write_theirs]), 1),
        "ratio": round(statistics.median(a / b for a, b in zip(*rates.values(), strict=True)), 2),
        "same_tokens": True,
        "versions": {
            "jax": jax.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def main() -> None:
    mesh = make_mesh(CONFIG.mesh, jax.devices()[:1])
    params = Program(CONFIG, mesh).init(0).params
    result = {
        "model": {"parameters": int(arithmetic.parameters(CONFIG.model).total), "d_model": 256},
        "cached_by_layers": {str(n): by_position(n, mesh) for n in DEPTHS},
        "uncached_microseconds_per_token": uncached(params),
        "tokens_per_second": beside_transformers(params, mesh),
    }
    print(json.dumps(result, indent=1))
    if FLAGS.out:
        write_atomically(FLAGS.out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(command.run(main, FLAGS, __doc__))
