"""Eight simulated devices for every test, and a small real corpus of text."""

import os
import random
import signal

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before jax is imported

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_enable_compilation_cache", False)  # a test compiles what it tests

# A shell's background jobs ignore it, and what they start with them.
signal.signal(signal.SIGINT, signal.default_int_handler)

WORDS = "the of and to in a that is was he for it with as his on be at by i had not are but".split()


@pytest.fixture(scope="module")
def quick_compilation():
    """For modules of many programs that run once each: it is compilation that they wait for."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="session")
def text_data(tmp_path_factory):
    """A ``DataConfig`` over sixty small documents of words, 64 tokens a window."""
    from lm.config import DataConfig

    folder = tmp_path_factory.mktemp("corpus")
    draw = random.Random(0)
    for i in range(60):
        text = " ".join(draw.choice(WORDS) for _ in range(draw.randrange(100, 400)))
        (folder / f"{i:02}.txt").write_text(text)
    return DataConfig(
        corpus="text",
        files=str(folder / "*.txt"),
        seq_len=64,
        validation_tokens=1_024,
        data_dir=str(tmp_path_factory.mktemp("data")),
    )


@pytest.fixture(scope="session")
def known_law_tables(tmp_path_factory):
    """A folder with runs.csv and curves.csv drawn from a known law, and that law.

    Five budgets of 6 N D FLOPs, decoders within a factor 6 of the optimum, 0.2 % noise, and one
    diverged run.
    Curves lie above the law until their last tenth, as a decaying learning rate has it.
    """
    import csv

    import numpy as np

    from lm.arithmetic import model_columns, parameters
    from lm.scaling import ParametricLaw

    law = ParametricLaw(E=0.9, A=12.0, B=60.0, alpha=0.33, beta=0.36)
    noise = np.random.default_rng(0)
    shared = {
        "flops_convention": "6nd", "vocab_size": 256, "seq_len": 128, "tied": 0,
        "schedule": "cosine", "corpus": "pd_english", "tokenizer": "bytes", "seed": 0,
        "status": "done",
    }  # fmt: skip
    runs, curves = [], []
    for flops in (1e11, 3e11, 1e12, 3e12, 1e13):
        best = law.optimum(flops).params
        for width in (16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128):
            shape = {"d_model": width, "n_layers": max(1, width // 16), "n_heads": width // 8}
            shape["n_kv_heads"] = shape["n_heads"]
            params = int(parameters(model_columns(vocab_size=256, **shape)).blocks_and_head)
            if not best / 6 < params < best * 6:
                continue
            tokens = flops / (6 * params)
            loss = float(law.loss(params, tokens) * np.exp(0.002 * noise.standard_normal()))
            name = f"c{flops:.0e}-d{width}".replace("+", "")
            runs.append({
                "run_id": name, "params": params, "tokens": tokens, "flops": flops, "loss": loss,
                "budget": flops, "batch_tokens": 2048, **shape, **shared,
            })  # fmt: skip
            for done in np.append(np.geomspace(0.01, 0.85, 20), np.linspace(0.86, 1, 20)):
                above = 0.5 * max(0, 1 - done) ** 2
                at = float(
                    law.loss(params, tokens * done) + above + loss - law.loss(params, tokens)
                )
                curves.append({
                    "run_id": name, "tokens": tokens * done, "flops": flops * done,
                    "train_loss": at + 0.01 * noise.standard_normal(), "validation_loss": at,
                })  # fmt: skip
    runs.append(runs[-1] | {"run_id": "c1e13-d999", "loss": "nan", "status": "diverged"})
    folder = tmp_path_factory.mktemp("known_law")
    for name, rows in (("runs", runs), ("curves", curves)):
        with open(folder / f"{name}.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    return folder, law
