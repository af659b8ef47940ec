"""With a compiler that is a function here: what the search does with its answers."""

import pytest

from lm.command import BadInput
from lm.config import Config, replace
from lm.estimate.compiled import Compiled
from lm.estimate.search import REMAT, _candidate, best, nearest
from lm.hardware import GIB, topology

V5E = topology("v5e:4x4")
LARGE = {
    "vocab_size": 32_768, "d_model": 2_048, "n_layers": 16, "n_heads": 16, "n_kv_heads": 8,
    "d_ff": 5_632, "scan_layers": True, "dtype": "bfloat16",
}  # fmt: skip
CONFIG = replace(
    Config(),
    model=LARGE,
    data={"seq_len": 2_048},
    train={"batch_tokens": 64 * 2_048.0, "steps_per_dispatch": 1},
)


class Compiler:
    """Says of every config what `verdict` makes of the estimate; remembers what it was asked."""

    def __init__(self, verdict):
        self.verdict, self.asked = verdict, []

    def __call__(self, config, sequences):
        self.asked.append((config, sequences))
        return Compiled(self.verdict(config, sequences), V5E.chip.hbm_bytes, [], 1.0)


def fits(*_):
    return GIB


def test_the_nearest_change_is_one_setting_where_one_suffices():
    candidate, compiled = nearest(CONFIG, V5E, 64, Compiler(fits))
    assert len(candidate.changes) == 1 and compiled.fits
    assert candidate.sequences == 64 and candidate.bytes <= V5E.chip.hbm_bytes
    assert candidate.config != CONFIG and candidate.config.train.batch_tokens == 64 * 2_048


def test_of_as_many_changes_it_is_the_fastest():
    found = nearest(CONFIG, V5E, 32, None)[0]
    others = [{"model.remat": remat} for remat in REMAT]
    others += [{"train.accumulation": n} for n in (2, 4)] + [{"mesh.zero": z} for z in (1, 2, 3)]
    fit = [
        candidate.roofline.bound_seconds
        for candidate in (_candidate(CONFIG, V5E, 32, changes) for changes in others)
        if candidate and candidate.changes and candidate.bytes <= V5E.chip.hbm_bytes
    ]
    assert len(fit) > 1 and found.roofline.bound_seconds == min(fit)


def test_what_the_compiler_refuses_is_not_proposed_and_corrects_the_rest():
    """It needs 1.5 times the estimate; so what the arithmetic found to fill the chip is not."""
    estimated = []

    def verdict(config, sequences):
        estimated.append(config)
        return 20 * GIB if len(estimated) == 1 else GIB

    compiler = Compiler(verdict)
    candidate, _ = nearest(CONFIG, V5E, 64, compiler)
    assert len(compiler.asked) == 2 and candidate.config == compiler.asked[1][0]
    first = nearest(CONFIG, V5E, 64, None)[0]
    assert compiler.asked[0][0] == first.config and candidate.bytes < first.bytes


def test_a_known_ratio_of_compiled_to_estimated_bytes_is_applied():
    plain, doubled = (nearest(CONFIG, V5E, 64, None, ratio)[0] for ratio in (1.0, 2.0))
    assert 2 * doubled.bytes <= V5E.chip.hbm_bytes < 2 * plain.bytes


def test_no_more_is_compiled_than_allowed():
    compiler = Compiler(lambda *_: 99 * GIB)
    assert nearest(CONFIG, V5E, 64, compiler, attempts=2) is None
    assert len(compiler.asked) <= 2
    assert nearest(CONFIG, V5E, 64, compiler, attempts=0) is None


def test_nothing_fits_where_a_chip_cannot_hold_its_share():
    huge = replace(CONFIG, model={"n_layers": 1_600})
    assert nearest(huge, V5E, 64, None) is None and best(huge, V5E, None) is None


def test_what_the_compiler_cannot_do_is_passed_over():
    def refuse(config, sequences):
        raise BadInput("not that")

    assert nearest(CONFIG, V5E, 64, refuse) is None
    assert best(CONFIG, V5E, refuse) is None


def test_the_best_fills_the_chip_and_divides_over_the_mesh():
    candidate, compiled = best(CONFIG, V5E, None)
    assert compiled is None
    assert 0.6 * V5E.chip.hbm_bytes < candidate.bytes <= V5E.chip.hbm_bytes
    mesh = candidate.config.mesh
    assert candidate.sequences % (16 // mesh.model) == 0
    assert candidate.config.train.batch_tokens == candidate.sequences * 2_048
    one_more = candidate.sequences + 16 // mesh.model
    nearby = nearest(candidate.config, V5E, one_more, None)
    assert nearby is None or nearby[0].changes  # one row more a device does not fit as it is


def test_a_compiler_that_needs_less_gets_a_larger_batch():
    half = Compiler(lambda config, sequences: sizes[config])
    sizes = Halved()
    candidate, compiled = best(CONFIG, V5E, half)
    assert candidate.sequences > best(CONFIG, V5E, None)[0].sequences
    assert compiled.fits and len(half.asked) <= 4


class Halved(dict):
    """Half the estimate, by config."""

    def __missing__(self, config):
        from lm.config import MESH_AXES
        from lm.estimate.memory import device_memory
        from lm.sharding import axis_sizes

        sizes = dict(zip(MESH_AXES, axis_sizes(config.mesh, 16), strict=True))
        return device_memory(config, sizes, int(config.train.batch_tokens) // 2_048).total / 2


def test_a_search_ends_when_the_compiler_agrees():
    compiler = Compiler(lambda config, sequences: 2 * Halved()[config])
    candidate, compiled = best(CONFIG, V5E, compiler)
    assert len(compiler.asked) == 1 and candidate.config == compiler.asked[0][0]
    assert compiled.peak_bytes == pytest.approx(candidate.bytes)
