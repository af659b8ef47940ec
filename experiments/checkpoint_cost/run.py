"""What checkpoints cost: of a step's time, and at a restart.

    python -m experiments.checkpoint_cost.run [--steps=1200] [--out=FOLDER]

Needs 5 GB of memory and 1.3 GB on the temporary folder's disk; four minutes on two idle cores.
Writes ``checkpoint_cost.json``, and without ``--out`` the table in README.md.
"""

import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import jax
import numpy as np
from absl import flags

from lm import checksums, command
from lm.arithmetic import parameters
from lm.checkpoint import Checkpoints, abstract_like, claim
from lm.command import BadInput, write_atomically
from lm.config import Config, replace
from lm.sharding import make_mesh
from lm.train.device import description
from lm.train.loop import train
from lm.train.step import Program, State

HERE = Path(__file__).resolve().parent
INTERVAL = 100  # steps
MODEL = {"vocab_size": 1024, "d_model": 256, "n_layers": 8, "n_heads": 8, "d_ff": 688}
BEGIN, END = "<!-- table: written by run.py -->\n", "<!-- end of table -->"
WORDS = "the of and to in that it is was for as with be by on not he his but at are this".split()

FLAGS = flags.FlagValues()
flags.DEFINE_integer("steps", 1200, "of the run, a multiple of 200, from 400", flag_values=FLAGS)
flags.DEFINE_string("out", str(HERE / "results"), "folder of the results", flag_values=FLAGS)


def main() -> None:
    if FLAGS.steps < 400 or FLAGS.steps % (2 * INTERVAL):
        raise BadInput(f"--steps={FLAGS.steps}: must be a multiple of {2 * INTERVAL}, from 400")
    with tempfile.TemporaryDirectory() as folder:
        found = {
            "schema": 1,
            "device": description(),
            "cpus": len(os.sched_getaffinity(0)),
            "load_average": os.getloadavg()[0],  # of others, before
            "saving": saving(Path(folder, "saving"), FLAGS.steps),
            "restoring": restoring(Path(folder, "restoring")),
        }
    out = Path(FLAGS.out)
    write_atomically(out / "checkpoint_cost.json", json.dumps(found, indent=1) + "\n")
    print(rows := table(found))
    if out.resolve() == HERE / "results":
        readme = HERE / "README.md"
        before, _, rest = readme.read_text().partition(BEGIN)
        after = rest.partition(END)[2]
        write_atomically(readme, f"{before}{BEGIN}{rows}\n{END}{after}")


def table(found: dict) -> str:
    """Of the README."""
    saved, restored = found["saving"], found["restoring"]
    parts = restored["parts"]
    with_one, without = (
        f"{median(saved[name]):.1f} s ({min(saved[name]):.1f} to {max(saved[name]):.1f})"
        for name in ("seconds_with_a_checkpoint", "seconds_without")
    )
    cost, cpu_cost = (
        f"{saved[name]:+.1%} (standard error {saved[f'{name}_error']:.1%})"
        for name in ("cost", "cpu_cost")
    )
    rows = (
        ("", "measured", "required"),
        ("---", "---", "---"),
        (f"{INTERVAL} steps with a checkpoint of {saved['bytes'] / 1e6:.0f} MB", with_one, ""),
        (f"{INTERVAL} steps without", without, ""),
        ("**cost, of step time**", f"**{cost}**", "at most 5 %"),
        ("the same of CPU time", cpu_cost, ""),
        ("CPU time of a checkpoint alone", f"{saved['alone_cpu_cost']:.1%}", ""),
        (
            f"**restore of {restored['params'] / 1e6:.0f} M parameters,"
            f" {restored['bytes'] / 1e9:.2f} GB, cold**",
            f"**{restored['cold_seconds']:.1f} s**",
            "at most 5 s",
        ),
        ("the same, warm", f"{restored['warm_seconds']:.1f} s", ""),
        ("of that: checksums", f"{parts['verify_warm_seconds']:.1f} s", ""),
        ("of that: to the devices", f"{parts['read_and_place_warm_seconds']:.1f} s", ""),
        ("its bytes alone, from the disk", f"{parts['read_cold_seconds']:.1f} s", ""),
        ("writing it", f"{restored['write_seconds']:.1f} s", ""),
    )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def saving(folder: Path, n_steps: int) -> dict:
    """Seconds of ``INTERVAL`` steps with a checkpoint at their begin, and without one, in turn.

    A real run of ``lm.train`` saves at every second interval's begin. The first interval, with the
    start, does not count.
    """
    config = replace(
        Config(),
        model=MODEL,
        data={"corpus": "text", "files": str(text(folder / "text")), "seq_len": 64},
        train={
            **{"batch_tokens": 16 * 64.0, "tokens": n_steps * 16 * 64.0, "tensorboard": False},
            **{"checkpoint_every": 2 * INTERVAL, "steps_per_dispatch": 5, "log_every": 20},
        },
    )
    config = replace(config, data={"data_dir": str(folder / "data"), "validation_tokens": 2_048})
    saved, ends = folder / "run" / "checkpoints", {}

    def progress(at) -> None:
        ends[at.step] = time.perf_counter(), time.process_time()
        newest = at.step - at.step % (2 * INTERVAL)
        if at.step % (2 * INTERVAL) == INTERVAL and newest and not (saved / str(newest)).exists():
            raise BadInput(f"step {newest} is still being written after {INTERVAL} steps")

    train(config, folder / "run", progress=progress)

    def took(clock: int, saving: bool) -> list[float]:
        begins = range((2 if saving else 3) * INTERVAL, n_steps, 2 * INTERVAL)
        return [ends[step + INTERVAL][clock] - ends[step][clock] for step in begins]

    wall, cpu = (ratio(took(clock, True), took(clock, False)) for clock in (0, 1))
    steps_cpu = median(took(1, False))
    return {
        "params": parameters(config.model, config.data.seq_len).total,
        "bytes": sum(path.stat().st_size for path in files(saved / str(n_steps))),
        "interval_steps": INTERVAL,
        "seconds_with_a_checkpoint": took(0, True),
        "seconds_without": took(0, False),
        "cost": wall[0] - 1,
        "cost_error": wall[1],
        "cpu_cost": cpu[0] - 1,
        "cpu_cost_error": cpu[1],
        "alone_cpu_cost": median(alone(folder / str(i), config) for i in range(5)) / steps_cpu,
    }


def alone(folder: Path, config: Config) -> float:
    """CPU seconds of one checkpoint while nothing trains: opened, copied, written, closed."""
    claim(folder, config)
    _, state = drawn_state(config)
    began = time.process_time()
    checkpoints = Checkpoints(folder)
    checkpoints.save(1, state, {})
    checkpoints.close()
    return time.process_time() - began


def drawn_state(config: Config) -> tuple[State, State]:
    """Shapes, and random numbers in their place."""
    program = Program(config, make_mesh(config.mesh))
    abstract = abstract_like(program.abstract_state, program.state_sharding)
    draw = np.random.default_rng(0)

    def drawn(x: jax.ShapeDtypeStruct) -> jax.Array:
        values = draw.standard_normal(x.shape, np.float32).astype(x.dtype)
        return jax.device_put(values, x.sharding)

    return abstract, jax.tree.map(drawn, abstract)


def ratio(these: list[float], those: list[float], draws: int = 4000) -> tuple[float, float]:
    """Of the medians, and its standard error, by resampling both."""
    rng = np.random.default_rng(0)
    drawn = [np.median(rng.choice(times, (draws, len(times))), axis=1) for times in (these, those)]
    return float(np.median(these) / np.median(those)), float(np.std(drawn[0] / drawn[1]))


def text(folder: Path) -> Path:
    """Files of random words; what is learnt makes no difference to the time."""
    folder.mkdir(parents=True)
    draw = random.Random(0)
    for i in range(64):
        (folder / f"{i}.txt").write_text(" ".join(draw.choices(WORDS, k=2_000)))
    return folder / "*.txt"


def restoring(folder: Path) -> dict:
    """Seconds until the state of a decoder of 100 M parameters is back, and their parts."""
    config = replace(
        Config(),
        model={
            **{"vocab_size": 20_000, "d_model": 768, "n_layers": 10, "n_heads": 12},
            **{"n_kv_heads": 12, "d_ff": 2_048},
        },
        data={"seq_len": 1_024},
    )
    abstract, state = drawn_state(config)
    claim(folder, config)
    checkpoints = Checkpoints(folder)
    write = seconds(lambda: (checkpoints.save(1, state, {}), checkpoints.close()))
    checkpoints = Checkpoints(folder)
    step = folder / "checkpoints" / "1"

    def restore() -> None:
        checkpoints = Checkpoints(folder)
        found, _ = checkpoints.restore(abstract)
        jax.block_until_ready(found)
        checkpoints.close()
        assert np.array_equal(jax.tree.leaves(found)[-1], jax.tree.leaves(state)[-1])

    def place() -> None:
        jax.block_until_ready(checkpoints._read(1, abstract, meta=True))

    def read() -> None:
        buffer = bytearray(1 << 20)
        for path in files(step):
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass

    def verify() -> None:
        assert checksums.fault(step) is None

    def cold(call: Callable[[], None]) -> float:
        forget(step)
        return seconds(call)

    return {
        "params": parameters(config.model, config.data.seq_len).total,
        "bytes": sum(path.stat().st_size for path in files(step)),
        "write_seconds": write,
        # From the disk, the page cache being empty of these files; and from the page cache.
        "cold_seconds": median(cold(restore) for _ in range(3)),
        "warm_seconds": median(seconds(restore) for _ in range(3)),
        "parts": {
            "read_cold_seconds": cold(read),
            "read_warm_seconds": seconds(read),
            "verify_warm_seconds": seconds(verify),
            "read_and_place_warm_seconds": seconds(place),
        },
    }


def seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def forget(folder: Path) -> None:
    """Takes the files out of the page cache, where the system lets a user do so."""
    for path in files(folder):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def files(folder: Path) -> list[Path]:
    """All those below."""
    return [path for path in folder.rglob("*") if path.is_file()]


if __name__ == "__main__":
    sys.exit(command.run(main, FLAGS, __doc__))
