"""A small model learns to answer: all of its parameters trained, or LoRA's adapters alone.

    python -m experiments.fine_tuning.run --out=experiments/fine_tuning/results/results.json

Two to three minutes on a two-core CPU machine.
"""

import dataclasses
import json
import random
import sys
from pathlib import Path

import jax
from absl import flags

from lm import arithmetic, command
from lm.checkpoint import load_config, load_params
from lm.command import write_atomically
from lm.config import Config, DataConfig, MeshConfig, ModelConfig, replace
from lm.data import open_dataset, open_template, open_tokenizer
from lm.generate.decode import Generator
from lm.generate.sampling import Sampling
from lm.score import score
from lm.sharding import make_mesh
from lm.train.loop import train
from lm.train.step import Program

FLAGS = flags.FlagValues()
flags.DEFINE_string("workdir", "runs/fine_tuning", "Where the runs go.", flag_values=FLAGS)
flags.DEFINE_float("scale", 1.0, "Of every run's length.", flag_values=FLAGS)
flags.DEFINE_string("out", None, "Where to write the JSON; none by default.", flag_values=FLAGS)

MODEL = ModelConfig(vocab_size=264, d_model=64, n_layers=3, n_heads=4, n_kv_heads=2, d_ff=176)
TASKS = {"upper": str.upper, "reverse": lambda word: word[::-1], "double": lambda word: word * 2}
BASE_TOKENS, TUNING_TOKENS = 3e6, 1e6
RATES = {"base": 0.003, "all parameters": 0.001, "LoRA": 0.01}
RANK = 8
ASKED = 100  # questions that no training has seen


def words(n: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return ["".join(draw.choices("abcdefghij", k=draw.randrange(3, 6))) for _ in range(n)]


def write_data(folder: Path) -> tuple[DataConfig, DataConfig]:
    """Text in which the tasks are done without being asked for, and conversations that ask."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(2_000):
        pairs = (f"{name} {w} {do(w)}" for w in words(6, i) for name, do in TASKS.items())
        lines.append(json.dumps({"text": "; ".join(pairs)}))
    write_atomically(folder / "text.jsonl", "\n".join(lines))
    talks = []
    for i, word in enumerate(words(3_000, seed=10_000)):
        name = list(TASKS)[i % len(TASKS)]
        talks.append(json.dumps({"prompt": f"{name} {word}", "response": TASKS[name](word)}))
    write_atomically(folder / "talk.jsonl", "\n".join(talks))
    shared = {"seq_len": 96, "data_dir": str(folder / "data")}
    text = DataConfig(
        "text", files=str(folder / "text.jsonl"), validation_tokens=16_384 // 96 * 96, **shared
    )
    talk = DataConfig("chat", files=str(folder / "talk.jsonl"), validation_tokens=2_400, **shared)
    return text, talk


def run_of(name: str, data: DataConfig, tokens: float, base: Path | None, rank: int = 0) -> Config:
    config = Config(name=name, model=MODEL, data=data, mesh=MeshConfig(data=1))
    return replace(
        config,
        model={"lora": {"rank": rank}},
        optimizer={"learning_rate": RATES[name]},
        train={
            "tokens": tokens * FLAGS.scale,
            "batch_tokens": 32 * 96.0,
            "init_from": str(base or ""),
        },
    )


def answers(workdir: Path) -> float:
    """The share of questions, each on a word of its own, whose answer is right to the letter."""
    config, mesh = load_config(workdir), make_mesh(MeshConfig(data=1), jax.devices()[:1])
    tokenizer = open_tokenizer(config.data)
    template = open_template(config.data, tokenizer)
    seen = {*words(3_000, seed=10_000)}
    new = [word for word in words(1_000, seed=20_000) if word not in seen][:ASKED]
    asked = [(list(TASKS)[i % len(TASKS)], word) for i, word in enumerate(new)]
    texts = [
        template.render([{"role": "user", "content": f"{name} {word}"}], prompt=True)
        for name, word in asked
    ]
    generator = Generator(
        *(config, load_params(workdir, config, mesh), 96, mesh, Sampling(temperature=0)),
        stop=[tokenizer.end_of_text],
    )
    found = generator([tokenizer.encode_marked(text)[0].tolist() for text in texts], 16)
    right = [
        tokenizer.decode(completion.tokens) == TASKS[name](word)
        for completion, (name, word) in zip(found, asked, strict=True)
    ]
    return sum(right) / len(right)


def losses(workdir: Path, text: DataConfig, talk: DataConfig) -> dict[str, float]:
    """Nats a token of the held-out answers, and of the held-out text."""
    config, found = load_config(workdir), {}
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    params = load_params(workdir, config, mesh)
    for name, data in (("answer_loss", talk), ("text_loss", text)):
        dataset = open_dataset(data)
        program = Program(dataclasses.replace(config, data=data), mesh)
        nats = score(
            lambda batch, program=program: program.nats(params, batch),
            map(program.put, dataset.validation(32)),
            dataset.token_bytes,
        )
        found[name] = round(nats.loss, 4)
    return found


def main() -> None:
    workdir = Path(FLAGS.workdir)
    text, talk = write_data(workdir / "texts")
    base = workdir / "base"
    train(run_of("base", text, BASE_TOKENS, None), base)
    runs = {
        "all parameters": run_of("all parameters", talk, TUNING_TOKENS, base),
        "LoRA": run_of("LoRA", talk, TUNING_TOKENS, base, RANK),
    }
    result = {"before": losses(base, text, talk) | {"right": answers(base)}}
    for name, config in runs.items():
        folder = workdir / name.replace(" ", "_").lower()
        done = train(config, folder)
        count = arithmetic.parameters(config.model)
        trained = int(count.adapters or count.total)
        result[name] = losses(folder, text, talk) | {
            "right": answers(folder),
            "trained_parameters": trained,
            "adam_bytes": 8 * trained,
            "flops": done["flops"],
            "seconds": round(done["wall_seconds"], 1),
        }
    print(json.dumps(result, indent=1))
    if FLAGS.out:
        write_atomically(FLAGS.out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(command.run(main, FLAGS, __doc__))
