"""An optimizer step with experts against the dense one of equal active FLOPs, on CPU.

    python experiments/throughput/moe.py [--rounds=5] [--threads=2] [--clock=wall|cpu]

Eight experts of half the dense layer's width, a token visits two, capacity factor 1.25: so the
products of full slots cost 1.25 times the dense layer's, and the optimizer has four times as many
feed-forward weights. Each measurement is a process of its own, in turns. Writes
``results/moe.json`` and the table in README.md.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median

from absl import flags

from lm import command
from lm.command import write_atomically

HERE = Path(__file__).resolve().parent
# d_model, layers, heads, kv heads, d_ff, vocabulary, batch, sequence
SHAPES = ("64,4,4,2,176,256,16,128", "128,6,8,4,344,256,16,128", "256,8,8,4,688,1024,16,256")
N_EXPERTS, TOP_K, CAPACITY_FACTOR = 8, 2, 1.25
ALLOWED = 1.6  # times the dense step
BEGIN, END = "<!-- experts: written by moe.py -->\n", "<!-- end of experts -->"

FLAGS = flags.FlagValues()
flags.DEFINE_integer("rounds", 5, "processes a side and shape", 1, flag_values=FLAGS)
flags.DEFINE_integer("threads", 2, "cores and threads", 1, flag_values=FLAGS)
flags.DEFINE_string("shapes", ";".join(SHAPES), "shapes, separated by ;", flag_values=FLAGS)
flags.DEFINE_enum("clock", "wall", ["wall", "cpu"], "which seconds a step", flag_values=FLAGS)
flags.DEFINE_string("out", str(HERE / "results"), "folder of moe.json", flag_values=FLAGS)
flags.DEFINE_bool("readme", True, "write the table into README.md", flag_values=FLAGS)


def side(shape: str, experts: bool, threads: int) -> dict:
    """One measurement in this process."""
    if hasattr(os, "sched_setaffinity"):  # XLA takes its number of threads from it
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    import numpy as np
    from common import Shape, batches, measure

    from lm import arithmetic
    from lm.config import Config, DataConfig, ModelConfig, MoeConfig, TrainConfig
    from lm.data import Batch
    from lm.sharding import make_mesh
    from lm.train.schedule import Schedule
    from lm.train.step import Program

    shape = Shape(*map(int, shape.split(",")))
    moe = MoeConfig(
        n_experts=N_EXPERTS, top_k=TOP_K, granularity=TOP_K,
        dispatch="capacity", capacity_factor=CAPACITY_FACTOR,
    )  # fmt: skip
    model = ModelConfig(
        **{name: getattr(shape, name) for name in Shape._fields[:6]},
        moe=moe if experts else MoeConfig(),
    )
    config = Config(
        model=model,
        data=DataConfig(seq_len=shape.seq_len),
        train=TrainConfig(steps_per_dispatch=shape.steps_per_call),
    )
    program = Program(config, make_mesh(config.mesh))
    state, schedule = program.init(0), Schedule(1e-3, 1.0, 0.0, 0.0, 0.0, 1.0)
    data_NBT = batches(shape)[: shape.steps_per_call]
    batch = program.put(Batch(data_NBT[..., :-1], data_NBT[..., 1:]))

    def train(n: int) -> list[float]:
        nonlocal state
        state, metrics = program.train(state, batch, n, schedule)
        return np.asarray(metrics.loss)[:n].tolist()

    result = measure(train, shape.steps_per_call, 0)
    flops = arithmetic.flops_per_token(model, shape.seq_len)
    return result | {"flops_per_token": flops, "params": arithmetic.parameters(model).total}


def process(shape: str, experts: bool, threads: int) -> dict:
    """One measurement in a process of its own."""
    code = f"import json, moe; print(json.dumps(moe.side({shape!r}, {experts}, {threads})))"
    path = os.pathsep.join([str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment, "PYTHONPATH": path},
        capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{shape} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(shape: str, rounds: int, threads: int, clock: str) -> dict:
    """The row of the table for ``shape``."""
    seconds, last = {"dense": [], "experts": []}, {}
    for _ in range(rounds):
        for name in seconds:
            last[name] = process(shape, name == "experts", threads)
            seconds[name].append(last[name][f"{clock}_step_seconds"])
            print(f"{shape} {name}: {1e3 * seconds[name][-1]:.2f} ms a step", flush=True)
    return {
        "shape": shape,
        "step_seconds": seconds,
        "ratio": round(median(seconds["experts"]) / median(seconds["dense"]), 3),
        "flops_ratio": last["experts"]["flops_per_token"] / last["dense"]["flops_per_token"],
        "params_ratio": last["experts"]["params"] / last["dense"]["params"],
    }


def table(rows: list[dict]) -> str:
    """The rows as Markdown."""
    lines = [
        "| d, layers, heads, kv, ff, vocabulary, batch, sequence | dense, ms | experts, ms | ratio"
        " | allowed | exact FLOPs | parameters |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        dense, experts = (1e3 * median(row["step_seconds"][name]) for name in ("dense", "experts"))
        lines.append(
            f"| {row['shape'].replace(',', ', ')} | {dense:.1f} | {experts:.1f}"
            f" | **{row['ratio']:.2f}** | {ALLOWED} | {row['flops_ratio']:.3f} x"
            f" | {row['params_ratio']:.1f} x |"
        )
    return "\n".join(lines) + "\n"


def main() -> int | None:
    load = os.getloadavg()[0]
    rows = [
        compare(shape, FLAGS.rounds, FLAGS.threads, FLAGS.clock)
        for shape in FLAGS.shapes.split(";")
    ]
    summary = {
        "schema": 1, "threads": FLAGS.threads, "clock": FLAGS.clock, "rounds": FLAGS.rounds,
        "load_average_before": round(load, 2), "rows": rows,
    }  # fmt: skip
    write_atomically(Path(FLAGS.out) / "moe.json", json.dumps(summary, indent=1) + "\n")
    print(table(rows), end="")
    if FLAGS.readme:
        readme = HERE / "README.md"
        before, rest = readme.read_text().split(BEGIN)
        write_atomically(readme, before + BEGIN + table(rows) + END + rest.split(END)[1])
    return command.FAILED if max(row["ratio"] for row in rows) > ALLOWED else None


if __name__ == "__main__":
    sys.exit(command.run(main, FLAGS, __doc__))
