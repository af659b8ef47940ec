"""Tokens a second of the training step against PyTorch's, and whether both learn the same.

    python experiments/throughput/run.py [--rounds=3] [--threads=2] [--clock=wall|cpu]

Every measurement is a process of its own, with the same threads, allocator settings and tunables;
the sides take turns and the median over rounds counts. Needs the extra ``compare``
(``pip install -e '.[compare]'``) and a C++ compiler for ``torch.compile``. Writes
``results/throughput.json`` and the table in README.md.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from absl import flags

from lm import command
from lm.command import BadInput, write_atomically

HERE = Path(__file__).resolve().parent
# d_model, layers, heads, kv heads, d_ff, vocabulary, batch, sequence -> the ratio to reach
TARGETS = {
    "32,2,2,2,88,256,16,128": 1.35,
    "64,4,4,2,176,256,16,128": 1.2,
    "128,6,8,4,344,256,16,128": 1.1,
    "256,8,8,4,688,1024,16,256": 1.1,
}
SIDES = {"eager": "torch_side.py", "compile": "torch_side.py", "lm": "lm_side.py"}
LOSS_STEPS = 50
LOSS_TOLERANCE = 1e-3  # relative, at every one of the steps
BEGIN, END = "<!-- table: written by run.py -->\n", "<!-- end of table -->"

FLAGS = flags.FlagValues()
flags.DEFINE_integer("rounds", 3, "processes a side and shape", 1, flag_values=FLAGS)
flags.DEFINE_integer("threads", 2, "cores and threads of each side", 1, flag_values=FLAGS)
flags.DEFINE_string("shapes", ";".join(TARGETS), "shapes, separated by ;", flag_values=FLAGS)
flags.DEFINE_enum("clock", "wall", ["wall", "cpu"], "which seconds a step", flag_values=FLAGS)
flags.DEFINE_string("out", str(HERE / "results"), "folder of throughput.json", flag_values=FLAGS)
flags.DEFINE_bool("readme", True, "write the table into README.md", flag_values=FLAGS)


def environment(threads: int) -> dict[str, str]:
    """The same for both sides; huge pages are glibc's (Linux)."""
    root = str(HERE.parents[1])
    return {
        **os.environ,
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]),
    }


def process(script: str, shape: str, weights: Path, mode: str, threads: int, loss_steps: int):
    """One measurement, or None for ``weights``. Raises ``RuntimeError`` with the side's error."""
    arguments = [f"--shape={shape}", f"--weights={weights}", f"--mode={mode}"]
    arguments += [f"--threads={threads}", f"--loss_steps={loss_steps}"]
    done = subprocess.run(
        [sys.executable, str(HERE / script), *arguments],
        env=environment(threads),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{script} {' '.join(arguments)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(shape: str, rounds: int, threads: int, clock: str, sides=tuple(SIDES)) -> dict:
    """Measures ``sides`` in turns. The row of the table for ``shape``."""
    seconds = {side: [] for side in sides}
    first_call, losses = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights.npz"
        process("torch_side.py", shape, weights, "weights", threads, 0)
        for i in range(rounds):
            for side in sides:
                loss_steps = 0 if i else LOSS_STEPS
                result = process(SIDES[side], shape, weights, side, threads, loss_steps)
                seconds[side].append(result[f"{clock}_step_seconds"])
                if i == 0:
                    losses[side] = result["losses"]
                    first_call[side] = round(result["first_call_seconds"], 2)
                print(f"{shape} {side}: {1e3 * seconds[side][-1]:.2f} ms a step", flush=True)
    sizes = list(map(int, shape.split(",")))
    tokens = sizes[6] * sizes[7]
    tokens_per_second = {side: tokens / median(seconds[side]) for side in sides}
    best = max(tokens_per_second[side] for side in sides if side != "lm")
    ours = losses.pop("lm")
    return {
        "shape": shape,
        "tokens_per_second": {side: round(value) for side, value in tokens_per_second.items()},
        "step_seconds": seconds,
        "ratio": round(tokens_per_second["lm"] / best, 3),
        "target": TARGETS.get(shape),
        "largest_loss_difference": max(
            abs(a - b) / a for theirs in losses.values() for a, b in zip(theirs, ours, strict=True)
        ),
        "first_and_last_loss": [ours[0], ours[-1]],
        "first_call_seconds": first_call,
    }


def table(rows: list[dict]) -> str:
    """The rows as Markdown."""
    lines = [
        "| d, layers, heads, kv, ff, vocabulary, batch, sequence | PyTorch eager | compiled "
        "| `lm` | ratio | to reach | largest loss difference |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        eager, compiled, ours = (
            f"{row['tokens_per_second'][side]:,}" if side in row["tokens_per_second"] else "-"
            for side in ("eager", "compile", "lm")
        )
        lines.append(
            f"| {row['shape'].replace(',', ', ')} | {eager} | {compiled} | {ours} "
            f"| **{row['ratio']:.2f}** | {row['target'] or '-'} "
            f"| {row['largest_loss_difference']:.1e} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int | None:
    missing = [name for name in ("torch", "transformers") if not importlib.util.find_spec(name)]
    if missing:
        raise BadInput(f"{' and '.join(missing)}: not installed; pip install -e '.[compare]'")
    for shape in FLAGS.shapes.split(";"):
        if len(shape.split(",")) != 8 or not shape.replace(",", "").isdigit():
            raise BadInput(f"--shapes: {shape!r} is not eight whole numbers separated by commas")
    load = os.getloadavg()[0]
    rows = [
        compare(shape, FLAGS.rounds, FLAGS.threads, FLAGS.clock)
        for shape in FLAGS.shapes.split(";")
    ]
    summary = {
        "schema": 1,
        "threads": FLAGS.threads,
        "clock": FLAGS.clock,
        "rounds": FLAGS.rounds,
        "load_average_before": round(load, 2),
        "versions": {name: importlib.import_module(name).__version__ for name in ("torch", "jax")},
        "rows": rows,
    }
    write_atomically(Path(FLAGS.out) / "throughput.json", json.dumps(summary, indent=1) + "\n")
    print(table(rows), end="")
    if FLAGS.readme:
        readme = HERE / "README.md"
        before, rest = readme.read_text().split(BEGIN)
        write_atomically(readme, before + BEGIN + table(rows) + END + rest.split(END)[1])
    worst = max(row["largest_loss_difference"] for row in rows)
    if worst > LOSS_TOLERANCE:
        print(f"losses differ by {worst:.1e}, more than {LOSS_TOLERANCE}", file=sys.stderr)
        return command.FAILED
    return None


if __name__ == "__main__":
    sys.exit(command.run(main, FLAGS, __doc__))
