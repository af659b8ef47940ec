"""One decoder on many meshes of 8 simulated devices: what is the same, what is split, what is sent.

    python -m experiments.sharding.run [--only=SUBSTRING] [--out=DIR]

Writes equality.csv, bytes.csv, collectives.csv and bubbles.csv, and their tables into README.md.
"""

import csv
import io
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before jax is imported

import jax
import numpy as np
from absl import flags

from lm import command
from lm.command import write_atomically
from lm.config import Config, MeshConfig, ModelConfig, OptimizerConfig, replace
from lm.data import Batch
from lm.estimate.collectives import Collective, collectives
from lm.sharding import make_mesh
from lm.sharding.pipeline import assignment, bubble_share, n_iterations
from lm.train.schedule import Schedule
from lm.train.step import Program, State

HERE = Path(__file__).resolve().parent
DEVICES, STEPS, ROWS = 8, 20, 16
SCHEDULE = Schedule(0.003, 1.0, 4.0, 10.0, 10.0, 0.1)

# Fewer key/value heads than `model` has devices where that is 4 or 8.
BASE = replace(
    Config(
        model=ModelConfig(
            vocab_size=64,
            d_model=32,
            n_layers=8,
            n_heads=8,
            n_kv_heads=2,
            d_ff=48,
            scan_layers=True,
        ),
        optimizer=OptimizerConfig(schedule="wsd", clip_norm=0.0, weight_decay=0.1),
        mesh=MeshConfig(data=1),
    ),
    data={"seq_len": 16, "respect_documents": True},
    train={"steps_per_dispatch": STEPS, "batch_tokens": float(16 * ROWS)},
)
SHOWN = (  # of the collectives, in README.md
    *("data 8", "data 8, zero 1", "data 8, zero 2", "data 8, zero 3", "data 4 x model 2"),
    *("data 2 x model 4, sequence-sharded", "context 4", "stage 4", "stage 4, 2 rounds"),
    "experts over data, data 4 x model 2",
)
EXPERTS = {"moe": {"n_experts": 4, "top_k": 2}}  # balanced by a loss of each micro-batch


def staged(mesh: dict, accumulation: int, **sections: Any) -> dict[str, dict]:
    return {"mesh": mesh, "train": {"accumulation": accumulation}, **sections}


# What differs from one device that holds all and sums over nothing.
CASES: dict[str, dict[str, dict]] = {
    "data 8": {"mesh": {"data": 8}},
    "data 8, zero 1": {"mesh": {"data": 8, "zero": 1}},
    "data 8, zero 2": {"mesh": {"data": 8, "zero": 2}},
    "data 8, zero 3": {"mesh": {"data": 8, "zero": 3}},
    "replica 2 x data 4, zero 3": {"mesh": {"replica": 2, "data": 4, "zero": 3}},
    "model 8": {"mesh": {"model": 8}},
    "data 4 x model 2": {"mesh": {"data": 4, "model": 2}},
    "data 2 x model 4": {"mesh": {"data": 2, "model": 4}},
    "data 2 x model 4, sequence-sharded": {
        "mesh": {"data": 2, "model": 4, "sequence_sharded": True}
    },
    "context 4": {"mesh": {"context": 4}},
    "data 2 x context 2 x model 2, zero 3": {
        "mesh": {"data": 2, "context": 2, "model": 2, "zero": 3}
    },
    "stage 2": staged({"stage": 2}, 4),
    "stage 4": staged({"stage": 4}, 8),
    "stage 2, 2 rounds": staged({"stage": 2, "rounds": 2}, 4),
    "stage 4, 2 rounds": staged({"stage": 4, "rounds": 2}, 8),
    "stage 2 x data 2 x model 2": staged({"stage": 2, "data": 2, "model": 2}, 4),
    "stage 2 x data 2 x model 2, 2 rounds, zero 3, sequence-sharded, full remat": staged(
        {"stage": 2, "data": 2, "model": 2, "rounds": 2, "zero": 3, "sequence_sharded": True},
        *(4,),
        model={"remat": "full"},
    ),
    "stage 2 x data 2 x context 2, zero 2": staged(
        {"stage": 2, "data": 2, "context": 2, "zero": 2}, 2
    ),
    "accumulation 2": {"train": {"accumulation": 2}},
    "accumulation 4": {"train": {"accumulation": 4}},
    "data 4, accumulation 4, zero 2": staged({"data": 4, "zero": 2}, 4),
    "remat full": {"model": {"remat": "full"}},
    "remat dots": {"model": {"remat": "dots"}},
    "remat dots_with_no_batch_dims": {"model": {"remat": "dots_with_no_batch_dims"}},
    "remat offload": {"model": {"remat": "offload"}},
    "unrolled": {"model": {"scan_layers": False}},
    "loss_chunk 4": {"train": {"loss_chunk": 4}},
    "data 2 x model 4, loss_chunk 4": {
        "mesh": {"data": 2, "model": 4},
        "train": {"loss_chunk": 4},
    },
    "experts over model, data 4 x model 2, zero 3": {
        "mesh": {"data": 4, "model": 2, "zero": 3},
        "model": EXPERTS,
    },
    "experts over data, data 4 x model 2": {
        "mesh": {"data": 4, "model": 2, "experts": "data"},
        "model": EXPERTS,
    },
    "experts over model, stage 2 x data 2 x model 2": staged(
        {"stage": 2, "data": 2, "model": 2}, 4, model=EXPERTS
    ),
}

FLAGS = flags.FlagValues()
flags.DEFINE_string("only", "", "of the cases those whose name has this", flag_values=FLAGS)
flags.DEFINE_string("out", str(HERE / "results"), "folder of the tables", flag_values=FLAGS)


class Run(NamedTuple):
    """STEPS steps of one case."""

    losses: np.ndarray
    gradient: Any  # of the first step, from Adam's first moment; on the host, layers stacked
    program: Program
    hlo: str  # the compiled step


def batches() -> Batch:
    """STEPS batches with ragged masks and two documents in most rows."""
    draw, t = np.random.default_rng(0), BASE.data.seq_len
    vocab = BASE.model.vocab_size
    # Every token's successor is certain but for one in ten: there is something to learn.
    noise = draw.random((STEPS, ROWS, t + 1)) < 0.1
    tokens = np.where(noise, draw.integers(0, vocab, noise.shape), 0)
    tokens[..., 0] = draw.integers(0, vocab, noise.shape[:2])
    for i in range(1, t + 1):
        after = (5 * tokens[..., i - 1] + 3) % vocab
        tokens[..., i] = np.where(noise[..., i], tokens[..., i], after)
    tokens = tokens.astype(np.int32)
    weights = (draw.random((STEPS, ROWS, t)) < 0.6).astype(np.float32)
    weights[:, 0] = 0  # a row with nothing to predict
    steps = np.broadcast_to(np.arange(t, dtype=np.int32), weights.shape)
    border = draw.integers(1, t + 1, (STEPS, ROWS, 1))
    segments = (steps >= border).astype(np.int32)
    positions = np.where(segments == 1, steps - border, steps).astype(np.int32)
    return Batch(tokens[..., :-1], tokens[..., 1:], weights, segments, positions)


def stacked(params: dict) -> dict:
    """Unrolled layers as a scan has them."""
    if "layers" in params:
        return params
    layers = [params[name] for name in sorted(params) if name.startswith("layer_")]
    outside = {name: tree for name, tree in params.items() if not name.startswith("layer_")}
    return {**outside, "layers": jax.tree.map(lambda *leaves: np.stack(leaves), *layers)}


def unstacked(params: dict) -> dict:
    outside = {name: tree for name, tree in params.items() if name != "layers"}
    layer = {
        f"layer_{i}": jax.tree.map(lambda x, i=i: x[i], params["layers"])
        for i in range(BASE.model.n_layers)
    }
    return {**outside, **layer}


def run(case: dict[str, dict]) -> Run:
    """Trains a case from the start that its seed gives on any mesh."""
    config = replace(BASE, **case)
    fixed = config.mesh
    n = fixed.replica * fixed.stage * fixed.data * fixed.context * fixed.model
    mesh = make_mesh(fixed, jax.devices()[:n])
    program = Program(config, mesh)
    state = program.init(seed=1)
    if not config.model.scan_layers:  # unrolled layers draw other numbers
        scanned = Program(replace(config, model={"scan_layers": True}), mesh).init(seed=1)
        state = state._replace(params=unstacked(scanned.params))
    train = program.lower_train(ROWS).compile()
    schedule = Schedule(*(np.float32(x) for x in SCHEDULE))
    given = batches()
    state, first = train(state, program.put(given), np.int32(1), schedule)
    mean = jax.device_get(state.moments[1].mu)
    gradient = jax.tree.map(lambda mu: mu / (1 - config.optimizer.beta1), mean)
    rest = jax.tree.map(lambda x: np.roll(x, -1, axis=0), given)
    state, others = train(state, program.put(rest), np.int32(STEPS - 1), schedule)
    losses = np.concatenate([first.loss[:1], others.loss[: STEPS - 1]])
    return Run(losses, stacked(gradient), program, train.as_text())


def reference(case: dict[str, dict]) -> dict[str, dict]:
    """What a case must equal, on one device: {} but where there is a loss of each micro-batch."""
    if "moe" not in case.get("model", {}):
        return {}
    return {"model": EXPERTS, "train": case.get("train", {})}


def largest_difference(found: Any, wanted: Any) -> float:
    """Of any leaf's entries, over that leaf's largest."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs if np.any(b))


def device_bytes(tree: Any) -> int:
    """What the first device holds of a tree of live arrays."""
    return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))


def gradient_of(program: Program) -> Any:
    """The live gradient of one batch, laid as the step leaves it."""
    batch = program.put(jax.tree.map(lambda x: x[:1], batches()))
    one = jax.tree.map(lambda x: x[0], batch)
    gradient = program._compile(
        lambda params, batch: program._mean_gradient(State(0, params, None), batch)
    )
    return gradient(program.init(seed=1).params, one)[-1]


def bytes_rows() -> list[dict]:
    """Bytes a device by ZeRO's stages, on 8; accumulating, so that gradients are held."""
    whole, rows = None, []
    for zero in range(4):
        case = staged({"data": DEVICES, "zero": zero}, 2)
        program = Program(replace(BASE, **case), make_mesh(MeshConfig(data=DEVICES)))
        state = program.init(seed=1)
        found = {
            "parameters": device_bytes(state.params),
            "optimizer": device_bytes(state.moments),
            "gradients": device_bytes(gradient_of(program)),
        }
        whole = whole or found
        shares = {f"{name}_share": round(n / whole[name], 4) for name, n in found.items()}
        rows.append({"zero": zero, **found, **shares})
    return rows


def sent(found: Run) -> list[Collective]:
    """What a device sends in one optimizer step, as compiled for these devices."""
    return collectives(found.hlo, dict(found.program.mesh.shape))


def collectives_rows(name: str, found: Run) -> list[dict]:
    return [
        {
            "case": name,
            "kind": c.kind,
            "axes": " x ".join(c.axes),
            "group_size": c.group_size,
            "count": c.count,
            "payload_bytes": c.payload_bytes,
            "sent_bytes": round(c.sent_bytes),
        }
        for c in sent(found)
    ]


def bubbles_rows() -> list[dict]:
    """Idle shares counted in the schedule that the pipeline executes, and by the formula."""
    rows = []
    for p, m, v in [
        *((2, 2, 1), (2, 8, 1), (4, 4, 1), (4, 8, 1), (4, 16, 1), (8, 8, 1), (8, 32, 1)),
        *((2, 2, 2), (2, 8, 2), (4, 4, 2), (4, 8, 2), (4, 16, 2), (8, 8, 4), (8, 32, 4)),
    ]:
        slots = [(i, s) for i in range(n_iterations(m, p, v)) for s in range(p)]
        idle = sum(not 0 <= assignment(i, s, m)[1] < v for i, s in slots)
        rows.append(
            {
                "schedule": "GPipe" if v == 1 else "circular",
                "stages": p,
                "micro_batches": m,
                "rounds": v,
                "counted": round(idle / len(slots), 6),
                "formula": round(bubble_share(m, p, v), 6),
            }
        )
    return rows


def compare(name: str, found: Run, wanted: Run) -> dict:
    """A row of the equality table."""
    losses = np.abs(found.losses - wanted.losses) / wanted.losses
    return {
        "case": name,
        "devices": found.program.mesh.size,
        "loss_after_20_steps": f"{found.losses[-1]:.6f}",
        "loss_difference": f"{losses.max():.1e}",
        "gradient_difference": f"{largest_difference(found.gradient, wanted.gradient):.1e}",
    }


def table(rows: list[dict]) -> str:
    """The rows as Markdown."""
    lines = [" | ".join(rows[0]), " | ".join("---" for _ in rows[0])]
    lines += [" | ".join(str(value) for value in row.values()) for row in rows]
    return "".join(f"| {line} |\n" for line in lines).replace("_", " ")


def write(out: Path, name: str, rows: list[dict]) -> None:
    """``name``.csv, and its table between its marks in README.md."""
    shown = [row for row in rows if name != "collectives" or row["case"] in SHOWN]
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(out / f"{name}.csv", text.getvalue())
    readme = HERE / "README.md"
    if out == HERE / "results":
        before, _, rest = readme.read_text().partition(f"<!-- {name}: written by run.py -->\n")
        _, end, after = rest.partition(f"<!-- end of {name} -->")
        mark = f"<!-- {name}: written by run.py -->\n"
        write_atomically(readme, before + mark + table(shown) + end + after)


def main() -> None:
    jax.config.update("jax_num_cpu_devices", DEVICES)
    out, wanted = Path(FLAGS.out), {}
    equality, traffic = [], []
    for name, case in {"1 device": {}, **CASES}.items():
        if FLAGS.only not in name and case:
            continue
        key = repr(reference(case))
        if key not in wanted:
            wanted[key] = run(reference(case))
        found = run(case) if case else wanted[key]
        equality.append(compare(name, found, wanted[key]))
        traffic += collectives_rows(name, found)
        print(*equality[-1].values(), sep=", ", flush=True)
    write(out, "equality", equality)
    if traffic:
        write(out, "collectives", traffic)
    write(out, "bytes", bytes_rows())
    write(out, "bubbles", bubbles_rows())


if __name__ == "__main__":
    sys.exit(command.run(main, FLAGS, __doc__))
