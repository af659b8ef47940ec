"""Compiled peaks of large decoders on TPU slices, and what published runs reach of the roofline.

python -m experiments.tpu_fit.run              # compiles what results/fit.csv lacks: minutes each
python -m experiments.tpu_fit.run --published  # arithmetic alone: results/published.csv
"""

import csv
import io
import json
import math
import subprocess
import sys
from pathlib import Path

from absl import flags

from lm import arithmetic, command
from lm.config import MESH_AXES
from lm.config_file import load
from lm.estimate.roofline import roofline
from lm.hardware import GIB, topology

RESULTS = Path(__file__).parent / "results"
FLAGS = flags.FlagValues()
flags.DEFINE_bool("published", False, "only the published runs", flag_values=FLAGS)

_ZERO3 = ("mesh.zero=3", "train.loss_chunk=1024")
_SEQUENCE = ("mesh.sequence_sharded=True", *_ZERO3)
_DOTS = "model.remat=dots_with_no_batch_dims"
_STUDY = ("mesh.zero=3", "train.loss_chunk=256")
# Config, topology, rows of the batch (0: the config's), settings.
CASES = (
    ("configs/llama3.py:8b", "v5e:16x16", 768, ("mesh.model=1", *_ZERO3)),
    ("configs/llama3.py:8b", "v5p:4x4x4", 128, ("mesh.model=1", _DOTS, *_ZERO3)),
    ("configs/llama3.py:70b", "v5p:8x8x8", 256, ("mesh.model=2", _DOTS, *_SEQUENCE)),
    ("configs/llama3.py:405b", "v5p:4x4x8", 64, ("mesh.model=2", *_SEQUENCE)),
    ("configs/llama3.py:8b", "v6e:16x16", 1024, ("mesh.model=1", *_ZERO3)),
    ("configs/llama3.py:8b", "v5e:4x4", 64, ("mesh.model=1", *_ZERO3)),
    ("configs/isoflop_tpu.py", "v5e:2x4", 0, ("train.accumulation=2", *_STUDY)),
    ("configs/isoflop_tpu.py", "v5p:4x8x8", 0, _STUDY),
)

# MaxText's runs with their published settings: full rematerialisation, or nearly so (on v6e some
# outputs are offloaded and the rest is computed again), but for the 128B, which keeps projections.
# From its pages "Optimized models tiering" (tokens a second) and configs/{v5e,v5p}/README (MFU),
# with the settings of its configs/v5e/64b.sh, configs/v5p/128b.sh, configs/v5p/llama2_70b.sh and
# benchmarks/maxtext_trillium_model_configs.py.
_BASE = ("model.feed_forward=gelu", "model.vocab_size=32000", "data.seq_len=2048",
         "model.scan_layers=True", "model.dtype=bfloat16", "model.d_model=8192",
         "model.n_layers=64", "model.head_width=256", "mesh.zero=3")  # fmt: skip
_64B = ("model.n_heads=64", "model.n_kv_heads=64", "model.d_ff=28672", "model.remat=full")
_128B = ("model.n_heads=128", "model.n_kv_heads=128", "model.d_ff=57344", _DOTS)
_LLAMA = ("mesh.zero=3", "mesh.model=1")
_LLAMA2 = ("model.vocab_size=32000", "data.seq_len=4096")
# Name, config, topology, rows, settings, tokens a second and chip or None, MFU.
PUBLISHED = (
    ("64B", "configs/base.py", "v5e:16x16", 512, (*_BASE, *_64B), None, 0.599),
    ("128B", "configs/base.py", "v5p:4x4x8", 128, (*_BASE, *_128B, "mesh.model=8"), None, 0.6868),
    ("Llama 2 70B", "configs/llama3.py:70b", "v5p:8x8x8", 2048, (*_LLAMA, *_LLAMA2), 692, 0.654),
    ("Llama 3.1 8B", "configs/llama3.py:8b", "v6e:16x16", 1024, _LLAMA, 7207, 0.4546),
    ("Llama 3.1 70B", "configs/llama3.py:70b", "v6e:16x16", 1024, _LLAMA, 960, 0.5033),
    ("Llama 3.1 405B", "configs/llama3.py:405b", "2*v6e:16x16", 512,
     ("mesh.zero=3", "mesh.model=4", "mesh.replica=2"), 123, 0.3855),
)  # fmt: skip


def main() -> int:
    write("published.csv", [published_row(*run) for run in PUBLISHED])
    if FLAGS.published:
        return command.DONE
    path = RESULTS / "fit.csv"
    rows = list(csv.DictReader(path.open())) if path.exists() else []
    done = {(row["config"], row["topology"], row["settings"]) for row in rows}
    for case in CASES:
        spec, on, _, settings = case
        if (spec, on, " ".join(settings)) not in done:
            rows.append(compiled_row(*case))
            write("fit.csv", rows)
    return command.DONE


def sizes_of(config, on) -> dict[str, int]:
    from lm.sharding import axis_sizes

    return dict(zip(MESH_AXES, axis_sizes(config.mesh, on.n_chips), strict=True))


def published_row(name, spec, slices, sequences, settings, tokens_per_second, mfu) -> dict:
    """A published run beside the roofline's bound of its settings."""
    config, on = load(spec, settings), topology(slices)
    bound = roofline(config, on, sizes_of(config, on), sequences)
    flops = arithmetic.flops_per_token(config.model, config.data.seq_len)
    reached = tokens_per_second or mfu * on.chip.peak_flops / flops
    most = sequences * config.data.seq_len / bound.bound_seconds / on.n_chips
    return {
        "run": name,
        "topology": slices,
        "published_mfu": mfu,
        "tokens_per_second_per_chip": round(reached, 1),
        "bound_tokens_per_second_per_chip": round(most, 1),
        "share": round(reached / most, 3),
    }


def share(chip: str) -> float:
    """The geometric mean of the published runs' shares of the bound on a chip."""
    rows = [published_row(*run) for run in PUBLISHED if topology(run[2]).chip_name == chip]
    return math.exp(sum(math.log(row["share"]) for row in rows) / len(rows))


def compiled_row(spec, slices, sequences, settings) -> dict:
    """What `lm.estimate` says of one case, compiled."""
    print(f"{spec} on {slices}: {' '.join(settings)}", flush=True)
    arguments = [f"--config.{setting}" for setting in settings]
    arguments += [f"--sequences={sequences}"] if sequences else []
    given = [sys.executable, "-m", "lm.estimate", f"--config={spec}", f"--topology={slices}"]
    done = subprocess.run(
        [*given, "--json", "--attempts=0", *arguments], stdout=subprocess.PIPE, check=True
    )
    found = json.loads(done.stdout)
    time = found["roofline"]
    mesh = " x ".join(f"{axis} {n}" for axis, n in found["mesh"].items() if n > 1)
    return {
        "config": spec,
        "run": found["config"],
        "topology": slices,
        "settings": " ".join(settings),
        "mesh": mesh,
        "sequences": found["sequences"],
        "estimated_gib": round(found["memory"]["total"] / GIB, 2),
        "compiled_gib": round(found["peak_bytes_per_chip"] / GIB, 2),
        "hbm_gib": round(found["hbm_bytes_per_chip"] / GIB, 2),
        "fits": found["fits"],
        "predicted_step_seconds": round(time["step_seconds"], 3),
        "predicted_mfu": round(time["mfu"], 3),
        "limit": time["limit"],
        "collectives": "; ".join(
            f"{c['kind']} over {'+'.join(c['axes'])}: {c['sent_bytes'] / GIB:.1f} GiB"
            for c in found["collectives"]
            if c["sent_bytes"] > 0.05 * GIB
        ),
        "compile_seconds": found["compile_seconds"],
    }


def write(name: str, rows: list[dict]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    command.write_atomically(RESULTS / name, text.getvalue())


if __name__ == "__main__":
    sys.exit(command.run(main, FLAGS, __doc__))
