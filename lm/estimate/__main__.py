"""What a config costs before it runs: parameters, FLOPs, bytes; whether it fits a slice, how fast.

    python -m lm.estimate --config=configs/llama3.py:8b
    python -m lm.estimate --config=configs/llama3.py:8b --topology=v5e:16x16
    python -m lm.estimate --config=configs/llama3.py:8b --topology=v5p:4x4x4 --search --json
    python -m lm.estimate --config=configs/isoflop_gpu.py --chip=h100 --chips=8 --mfu=0.4

With --topology the real train step is compiled for those chips (no TPU is needed, but libtpu is:
the `tpu` extra), which takes minutes. Where it does not fit, the nearest config that does is looked
for and compiled too. --nocompile gives the arithmetic's word alone, at once. Other chips, as GPUs,
are given by --chip and --chips: what they must hold and how long they take at an --mfu.

Of a study the largest run is estimated, and what all its runs cost together.
"""

import json
import math
import sys

from absl import flags

from lm import arithmetic, command
from lm.command import BadInput, one_of
from lm.config import MESH_AXES, Config
from lm.config_file import config_from_flags, define_config_flag
from lm.estimate.compiled import Compiled, CompileError, compile_step
from lm.hardware import HBM_BYTES, PEAK_FLOPS, Topology, topology

FLAGS = flags.FlagValues()
define_config_flag(FLAGS)
flags.DEFINE_string("topology", None, "as v5e:16x16, v5p:8x8x8, 2*v6e:16x16", flag_values=FLAGS)
flags.DEFINE_bool("search", False, "the fastest mesh and largest batch", flag_values=FLAGS)
flags.DEFINE_bool("compile", True, "compile for --topology, or only calculate", flag_values=FLAGS)
flags.DEFINE_bool("json", False, "print JSON", flag_values=FLAGS)
flags.DEFINE_string("chip", None, f"without --topology: {', '.join(PEAK_FLOPS)}", flag_values=FLAGS)
flags.DEFINE_float(
    "mfu", None, "share of the peak; the roofline's, or without one 0.4", flag_values=FLAGS
)
flags.DEFINE_float(
    "price_per_chip_hour", None, "dollars; from you, never guessed", flag_values=FLAGS
)
for name, default, meaning in (
    ("chips", None, "how many of --chip"),
    ("sequences", None, "rows of the batch; the config's on --topology, else one a device group"),
    ("attempts", 4, "configs that are compiled at most when one that fits is looked for"),
    ("cache_batch", 1, "sequences of the KV cache"),
    ("cache_seq_len", None, "tokens a sequence of the KV cache; data.seq_len where not given"),
):
    flags.DEFINE_integer(
        name, default, meaning, lower_bound=0 if name == "attempts" else 1, flag_values=FLAGS
    )


def main() -> int:
    from lm.estimate.study import largest_run, training

    study = config_from_flags(FLAGS)
    on = topology(FLAGS.topology) if FLAGS.topology else None
    chip, chips = _chips(on)
    if FLAGS.search and on is None:
        raise BadInput("--search needs --topology, as --topology=v5e:16x16")
    try:
        result = estimate(largest_run(study), on, chip, chips)
    except CompileError as error:
        print(f"error: {error}", file=sys.stderr)
        return command.FAILED
    if not (FLAGS.search or FLAGS.sequences):  # whose batch is one run's
        price = FLAGS.price_per_chip_hour
        result["training"] = training(study, chip, chips, on, mfu=FLAGS.mfu, price=price)
    if FLAGS.json:
        print(json.dumps(result, indent=2))
    else:
        from lm.estimate.report import print_estimate

        print_estimate(result)
    return command.DONE


def _chips(on: Topology | None) -> tuple[str | None, int]:
    """The name of the chips and how many there are; (None, 0) where no flag says."""
    if FLAGS.mfu is not None and not 0 < FLAGS.mfu <= 1:
        raise BadInput(f"--mfu={FLAGS.mfu:g}: is a share of the peak, above 0 and at most 1")
    price = FLAGS.price_per_chip_hour
    if price is not None and not 0 < price < math.inf:
        raise BadInput(f"--price_per_chip_hour={price:g}: must be above 0 and finite")
    given = [FLAGS.chip, FLAGS.chips]
    if on is not None:
        if given != [None, None]:
            raise BadInput("--topology says which chips and how many: give no --chip or --chips")
        return on.chip_name, on.n_chips
    if None in given:
        if given != [None, None] or FLAGS.mfu or price:
            raise BadInput("give --chip with --chips, as --chip=h100 --chips=8, or --topology")
        return None, 0
    one_of("--chip", FLAGS.chip, list(PEAK_FLOPS))
    return FLAGS.chip, FLAGS.chips


def estimate(config: Config, on: Topology | None, chip: str | None, chips: int) -> dict:
    """What `--json` prints, but for "training". Raises ``BadInput``."""
    from lm.estimate import search
    from lm.estimate.roofline import ASSUMPTIONS

    result = _counts(config)
    if chip is None:
        # The fewest devices that the mesh allows, and a row for each.
        sizes = {axis: max(1, getattr(config.mesh, axis)) for axis in MESH_AXES}
        rows = sizes["replica"] * sizes["data"] * config.train.accumulation
        return result | _on_mesh(config, sizes, FLAGS.sequences or rows)
    result |= {"chips": chips, "hbm_bytes_per_chip": HBM_BYTES[chip]}
    if on is None:
        found = _on_mesh(config, *_placed(config, chips))
        return result | {"chip": chip} | found | _verdict(None, found["memory"]["total"], chip)

    compile = None
    if FLAGS.compile:

        def compile(config: Config, sequences: int) -> Compiled:
            print(f"compiling for {on.name} ...", file=sys.stderr, flush=True)
            return compile_step(config, on, sequences)

    result |= {"topology": on.name, "assumptions": ASSUMPTIONS}
    if FLAGS.search:
        found = search.best(config, on, compile, FLAGS.attempts)
        return result | {"search": found and _candidate(*found, on)}
    return result | _as_it_is(config, on, compile)


def _placed(config: Config, chips: int) -> tuple[dict[str, int], int]:
    """The mesh axes' sizes and the rows of a batch. What the step refuses is refused here too."""
    from jax.sharding import AbstractMesh, AxisType

    from lm.sharding import axis_sizes
    from lm.train.recipe import resolve
    from lm.train.step import Program

    sizes = dict(zip(MESH_AXES, axis_sizes(config.mesh, chips), strict=True))
    shards = sizes["replica"] * sizes["data"]
    rows = FLAGS.sequences or resolve(config, shards).sequences
    if rows % (shards * config.train.accumulation):
        raise BadInput(
            f"--sequences={rows}: must be a multiple of the mesh's replica x data, {shards},"
            f" times train.accumulation = {config.train.accumulation}"
        )
    types = (AxisType.Auto,) * len(sizes)
    Program(config, AbstractMesh(tuple(sizes.values()), MESH_AXES, axis_types=types))
    return sizes, rows


def _as_it_is(config: Config, on: Topology, compile) -> dict:
    """What the config costs on the topology; where it does not fit, the nearest that does too."""
    from lm.estimate import search
    from lm.estimate.memory import fuses_attention
    from lm.estimate.roofline import roofline

    sizes, rows = _placed(config, on.n_chips)
    result = _on_mesh(config, sizes, rows)
    estimated = result["memory"]["total"]
    compiled = compile(config, rows) if compile else None
    time = roofline(config, on, sizes, rows, fuses_attention(config, sizes))
    result |= _verdict(compiled, estimated, on.chip_name) | {"roofline": time and _time(time)}
    if not result["fits"]:
        ratio = compiled.peak_bytes / estimated if compiled else 1.0
        found = search.nearest(config, on, rows, compile, ratio, FLAGS.attempts)
        result["nearest"] = found and _candidate(*found, on)
    return result


def _on_mesh(config: Config, sizes: dict[str, int], sequences: int) -> dict:
    from lm.estimate.memory import device_memory, fuses_attention

    memory = device_memory(config, sizes, sequences, fuses_attention(config, sizes))
    return {
        "mesh": sizes | {"zero": config.mesh.zero},
        "sequences": sequences,
        "memory": memory._asdict() | {"total": memory.total},
    }


def _counts(config: Config) -> dict:
    model, seq_len = config.model, config.data.seq_len
    count = arithmetic.parameters(model, seq_len)
    trained = count.adapters or count.total
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
        "optimizer_bytes": int(arithmetic.optimizer_bytes(trained) + 4 * (count.total - trained)),
    }


def _verdict(compiled, estimated: float, chip: str) -> dict:
    if compiled is None:
        return {
            "compiled": False,
            "peak_bytes_per_chip": int(estimated),
            "fits": estimated <= HBM_BYTES[chip],
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


def _candidate(candidate, compiled, on: Topology) -> dict:
    from lm.sharding import axis_sizes

    config, sequences = candidate.config, candidate.sequences
    sizes = dict(zip(MESH_AXES, axis_sizes(config.mesh, on.n_chips), strict=True))
    told = {"changes": candidate.changes} | _on_mesh(config, sizes, sequences)
    told |= _verdict(compiled, candidate.bytes, on.chip_name)
    return told | {"roofline": _time(candidate.roofline)}


if __name__ == "__main__":
    sys.exit(command.run(main, FLAGS, __doc__))
