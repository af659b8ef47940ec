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

_FULL, _DOTS = "model.remat=full", "model.remat=dots_with_no_batch_dims"
_ONE = ("mesh.model=1", "train.accumulation=1")
# Config, topology, rows of the batch (0: the config's), settings.
CASES = (
    ("configs/llama3.py:8b", "v5e:16x16", 768, (_FULL, *_ONE)),
    ("configs/llama3.py:8b", "v5p:4x4x4", 128, (_DOTS, *_ONE)),
    ("configs/llama3.py:70b", "v5p:8x8x8", 1024, (_FULL, *_ONE)),
    ("configs/llama3.py:405b", "v5p:4x4x8", 64, (_FULL, "mesh.model=2", "train.accumulation=1")),
    ("configs/llama3.py:8b", "v6e:16x16", 1024, (_FULL, *_ONE)),
    ("configs/llama3.py:8b", "v5e:4x4", 64, (_FULL, *_ONE)),
    ("configs/isoflop_tpu.py:1e20", "v5e:2x4", 0, ("train.accumulation=1",)),
    ("configs/isoflop_tpu.py", "v5p:4x8x8", 0, ("train.accumulation=1",)),
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
_LLAMA = (_FULL, *_ONE, "train.loss_chunk=0")
_LLAMA2 = ("model.vocab_size=32000", "data.seq_len=4096")
# Name, config, topology, rows, settings, tokens a second and chip or None, MFU.
PUBLISHED = (
    ("64B", "configs/base.py", "v5e:16x16", 512, (*_BASE, *_64B), None, 0.599),
    ("128B", "configs/base.py", "v5p:4x4x8", 128, (*_BASE, *_128B, "mesh.model=8"), None, 0.6868),
    ("Llama 2 70B", "configs/llama3.py:70b", "v5p:8x8x8", 2048, (*_LLAMA, *_LLAMA2), 692, 0.654),
    ("Llama 3.1 8B", "configs/llama3.py:8b", "v6e:16x16", 1024, _LLAMA, 7207, 0.4546),
    ("Llama 3.1 70B", "configs/llama3.py:70b", "v6e:16x16", 1024, _LLAMA, 960, 0.5033),
    ("Llama 3.1 405B", "configs/llama3.py:405b", "2*v6e:16x16", 512,
     (*_LLAMA, "mesh.model=4", "mesh.replica=2"), 123, 0.3855),
)  # fmt: skip


def main() -> int:
    write("published.csv", [published_row(*run) for run in PUBLISHED])
    if FLAGS.published:
        return command.DONE
    path = RESULTS / "fit.csv"
    old = {(row["config"], row["topology"], row["settings"]): row for row in _read(path)}
    rows = []
    for spec, slices, sequences, settings in CASES:  # the arithmetic anew, the compiler's once
        known = old.get((spec, slices, " ".join(settings)))
        compiled = known and {name: known[name] for name in COMPILED}
        row = arithmetic_row(spec, slices, sequences, settings)
        rows.append(row | (compiled or compiled_columns(spec, slices, sequences, settings)))
        write("fit.csv", rows + [row for key, row in old.items() if key not in _keys(rows)])
    return command.DONE


def _read(path: Path) -> list[dict]:
    return list(csv.DictReader(path.open())) if path.exists() else []


def _keys(rows: list[dict]) -> set[tuple]:
    return {(row["config"], row["topology"], row["settings"]) for row in rows}


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


def _estimate(spec, slices, sequences, settings, *more: str) -> dict:
    arguments = [f"--config={spec}", f"--topology={slices}", "--json", "--attempts=0", *more]
    arguments += [f"--config.{setting}" for setting in settings]
    arguments += [f"--sequences={sequences}"] if sequences else []
    given = [sys.executable, "-m", "lm.estimate", *arguments]
    return json.loads(subprocess.run(given, stdout=subprocess.PIPE, check=True).stdout)


def arithmetic_row(spec, slices, sequences, settings) -> dict:
    """What `lm.estimate` says of one case at once."""
    found = _estimate(spec, slices, sequences, settings, "--nocompile")
    time = found["roofline"]
    mesh = found["mesh"]
    zero = mesh.pop("zero")
    return {
        "config": spec,
        "run": found["config"],
        "topology": slices,
        "settings": " ".join(settings),
        "mesh": " x ".join(f"{axis} {n}" for axis, n in mesh.items() if n > 1) + f", zero {zero}",
        "sequences": found["sequences"],
        "predicted_step_seconds": round(time["step_seconds"], 2),
        "predicted_tokens_per_second_per_chip": round(time["tokens_per_second"] / found["chips"]),
        "predicted_mfu": round(time["mfu"], 3),
        "limit": time["limit"],
        "hbm_gib": round(found["hbm_bytes_per_chip"] / GIB, 2),
        "estimated_gib": round(found["memory"]["total"] / GIB, 2),
    }


COMPILED = ("compiled_gib", "fits", "collectives", "compile_seconds")


def compiled_columns(spec, slices, sequences, settings) -> dict:
    """What libtpu's compiler says of one case, after minutes."""
    print(f"{spec} on {slices}: {' '.join(settings)}", flush=True)
    found = _estimate(spec, slices, sequences, settings)
    return {
        "compiled_gib": round(found["peak_bytes_per_chip"] / GIB, 2),
        "fits": found["fits"],
        "collectives": "; ".join(
            f"{c['kind']} over {'+'.join(c['axes'])} {c['sent_bytes'] / GIB:.1f} GiB"
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
