"""What a config costs before it runs: parameters, FLOPs, bytes; whether it fits a slice, how fast.

    python -m lm.estimate --config=configs/llama3.py:8b
    python -m lm.estimate --config=configs/llama3.py:8b --topology=v5e:16x16
    python -m lm.estimate --config=configs/llama3.py:8b --topology=v5p:4x4x4 --search --json

With --topology the real train step is compiled for those chips (no TPU is needed, but libtpu is:
the `tpu` extra), which takes minutes. Where it does not fit, the nearest config that does is looked
for and compiled too. --nocompile gives the arithmetic's word alone, at once. A study's largest run
is estimated.
"""

import json
import sys

from absl import flags

from lm import arithmetic, command
from lm.command import BadInput
from lm.config import MESH_AXES, Config, replace
from lm.config_file import config_from_flags, define_config_flag
from lm.estimate.compiled import Compiled, CompileError, compile_step
from lm.hardware import Topology, topology

FLAGS = flags.FlagValues()
define_config_flag(FLAGS)
flags.DEFINE_string("topology", None, "as v5e:16x16, v5p:8x8x8, 2*v6e:16x16", flag_values=FLAGS)
flags.DEFINE_bool("search", False, "the fastest mesh and largest batch", flag_values=FLAGS)
flags.DEFINE_bool("compile", True, "compile for --topology, or only calculate", flag_values=FLAGS)
flags.DEFINE_bool("json", False, "print JSON", flag_values=FLAGS)
for name, default, meaning in (
    ("sequences", None, "rows of the batch; the config's on --topology, else one a device group"),
    ("attempts", 4, "configs that are compiled at most when one that fits is looked for"),
    ("cache_batch", 1, "sequences of the KV cache"),
    ("cache_seq_len", None, "tokens a sequence of the KV cache; data.seq_len where not given"),
):
    flags.DEFINE_integer(
        name, default, meaning, lower_bound=0 if name == "attempts" else 1, flag_values=FLAGS
    )


def main() -> int:
    config = largest_run(config_from_flags(FLAGS))
    on = topology(FLAGS.topology) if FLAGS.topology else None
    if FLAGS.search and on is None:
        raise BadInput("--search needs --topology, as --topology=v5e:16x16")
    try:
        result = estimate(config, on)
    except CompileError as error:
        print(f"error: {error}", file=sys.stderr)
        return command.FAILED
    if FLAGS.json:
        print(json.dumps(result, indent=2))
    else:
        from lm.estimate.report import print_estimate

        print_estimate(result)
    return command.DONE


def largest_run(config: Config) -> Config:
    """A study's run with the most parameters: its top budget's, by its prior; else itself."""
    sweep = config.sweep
    if not sweep.budgets:
        return config
    from lm.sweep import grid

    growth = (sweep.budgets[-1] / sweep.budgets[0]) ** sweep.prior_exponent
    top = {"budgets": sweep.budgets[-1:], "first_optimum": sweep.first_optimum * growth}
    runs = [run.config for run in grid.plan(replace(config, sweep=top), {})[0].runs]
    return max(runs, key=lambda run: arithmetic.parameters(run.model).total)


def estimate(config: Config, on: Topology | None) -> dict:
    """What `--json` prints. Raises ``BadInput``."""
    from lm.estimate import search
    from lm.estimate.memory import device_memory, fuses_attention
    from lm.estimate.roofline import ASSUMPTIONS, roofline
    from lm.sharding import axis_sizes
    from lm.train.recipe import resolve

    mesh = config.mesh
    if on is None:  # the fewest devices that the mesh allows, and a row for each
        sizes = {axis: max(1, getattr(mesh, axis)) for axis in MESH_AXES}
        sequences = sizes["replica"] * sizes["data"] * config.train.accumulation
    else:
        sizes = dict(zip(MESH_AXES, axis_sizes(mesh, on.n_chips), strict=True))
        sequences = resolve(config, sizes["replica"] * sizes["data"]).sequences
    sequences = FLAGS.sequences or sequences
    result = _counts(config)
    result["mesh"] = sizes | {"zero": mesh.zero}
    result["sequences"] = sequences
    memory = device_memory(config, sizes, sequences, fuses_attention(config, sizes))
    result["memory"] = memory._asdict() | {"total": memory.total}
    if on is None:
        return result

    compile = None
    if FLAGS.compile:

        def compile(config: Config, sequences: int) -> Compiled:
            print(f"compiling for {on.name} ...", file=sys.stderr, flush=True)
            return compile_step(config, on, sequences)

    result |= {"topology": on.name, "chips": on.n_chips, "hbm_bytes_per_chip": on.chip.hbm_bytes}
    result |= {"assumptions": ASSUMPTIONS}
    if FLAGS.search:
        found = search.best(config, on, compile, FLAGS.attempts)
        return result | {"search": found and _candidate(*found)}
    first = compile(config, sequences) if compile else None
    time = roofline(config, on, sizes, sequences, fuses_attention(config, sizes))
    result |= _verdict(first, memory.total, on) | {"roofline": time and _time(time)}
    if not result["fits"]:
        ratio = first.peak_bytes / memory.total if first else 1.0
        found = search.nearest(config, on, sequences, compile, ratio, FLAGS.attempts)
        result["nearest"] = found and _candidate(*found)
    return result


def _counts(config: Config) -> dict:
    model, seq_len = config.model, config.data.seq_len
    count = arithmetic.parameters(model, seq_len)
    cache = {"batch": FLAGS.cache_batch, "seq_len": FLAGS.cache_seq_len or seq_len}
    return {
        "schema": 1,
        "config": config.name,
        "params": int(count.total),
        "active_params": int(count.active),
        "non_embedding_params": int(count.non_embedding),
        "flops_per_token": {
            name: float(arithmetic.flops_per_token(model, seq_len, name))
            for name in arithmetic.FLOPS_CONVENTIONS
        },
        "kv_cache_bytes": cache | {"bytes": int(arithmetic.kv_cache_bytes(model, **cache))},
        "optimizer_bytes": int(arithmetic.optimizer_bytes(count.total)),
    }


def _verdict(compiled, estimated: float, on: Topology) -> dict:
    if compiled is None:
        return {
            "compiled": False,
            "peak_bytes_per_chip": int(estimated),
            "fits": estimated <= on.chip.hbm_bytes,
        }
    return {
        "compiled": True,
        "peak_bytes_per_chip": int(compiled.peak_bytes),
        "fits": compiled.fits,
        "compile_seconds": round(compiled.compile_seconds, 1),
        "collectives": [
            c._asdict() | {"sent_bytes": int(c.sent_bytes)} for c in compiled.collectives
        ],
    }


def _time(roofline) -> dict:
    return roofline._asdict() | {"limit": roofline.limit}


def _candidate(candidate, compiled) -> dict:
    on = topology(FLAGS.topology)
    verdict = _verdict(compiled, candidate.bytes, on)
    told = {"changes": candidate.changes, "sequences": candidate.sequences}
    return told | verdict | {"roofline": _time(candidate.roofline)}


if __name__ == "__main__":
    sys.exit(command.run(main, FLAGS, __doc__))
