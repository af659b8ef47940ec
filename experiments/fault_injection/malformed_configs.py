"""Configs that are broken: as Python, as a function, in a key, a type, a range, or together."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lm.config import Config, to_config_dict

COMMANDS = ("lm.train", "lm.data", "lm.sweep", "lm.estimate")
WRONG_TYPES = {
    bool: ("2", "None", "'perhaps'", "0.5"),
    int: ("'many'", "1.5", "None", "True", "[1]", "{}"),
    float: ("'much'", "None", "True", "(1.0,)", "{}", "1j"),
    str: ("3", "None", "2.5", "True", "('a',)"),
    tuple: ("5", "'text'", "('a',)", "None", "True", "[[]]"),
}
OUT_OF_RANGE = {
    **dict.fromkeys(("model.d_model", "model.n_layers", "model.n_heads", "model.d_ff"), (0, -8)),
    **dict.fromkeys(("model.vocab_size", "model.n_kv_heads", "model.moe.top_k"), (0, -1)),
    **dict.fromkeys(("model.sliding_window", "model.head_width", "train.evaluate_every"), (-1,)),
    **dict.fromkeys(("data.seq_len", "data.validation_tokens", "train.accumulation"), (0, -64)),
    **dict.fromkeys(("optimizer.learning_rate", "optimizer.eps", "train.tokens"), (0, -0.1)),
    **dict.fromkeys(("optimizer.beta1", "optimizer.beta2"), (1, -0.5, 1.5)),
    **dict.fromkeys(("optimizer.final_fraction", "optimizer.decay_fraction"), (-0.1, 1.01)),
    **dict.fromkeys(("train.steps_per_dispatch", "train.log_every", "train.batch_tokens"), (0, -1)),
    **dict.fromkeys(("train.checkpoint_every",), (-2, -100)),
    **dict.fromkeys(("train.seed",), (-1, 2**64, 10**30)),
    **dict.fromkeys(("mesh.data", "mesh.model", "mesh.stage"), (0, -2)),
    **dict.fromkeys(("mesh.zero",), (4, -1)),
    **dict.fromkeys(("sweep.sizes", "sweep.seeds", "sweep.first_optimum"), (0, -1)),
    **dict.fromkeys(("sweep.spread",), (1, 0)),
    **dict.fromkeys(("model.moe.jitter", "model.rope_scaling.factor"), (-0.5,)),
}
CHOICES = (
    *("model.feed_forward", "model.norm", "model.position", "model.remat", "model.dtype"),
    *("model.quantization", "model.attention_kernel", "model.norm_position", "model.moe.routing"),
    *("model.moe.gate", "model.moe.dispatch", "model.rope_scaling.kind", "mesh.experts"),
    *("optimizer.schedule", "optimizer.learning_rate_rule", "optimizer.warmup_rule"),
    *("train.batch_rule",),
)
# Each setting would do alone; what the line must name, and the settings.
CONTRADICTIONS = (
    ("n_kv_heads", {"model.n_heads": 4, "model.n_kv_heads": 3}),
    ("n_heads", {"model.d_model": 30, "model.n_heads": 4}),
    ("head_width", {"model.head_width": 7}),
    ("sliding_window", {"model.sliding_window": 65}),
    ("loss_chunk", {"train.loss_chunk": 48}),
    ("sweep.branches", {"sweep.branches": True}),
    ("decay_fraction", {"optimizer.schedule": "wsd", "optimizer.decay_fraction": 1}),
    ("mesh", {"mesh.data": -1, "mesh.model": -1}),
    ("data.files", {"data.corpus": "pd_english"}),
    ("data.mixture", {"data.mixture": (("text:*.txt", 1.0),)}),
    ("top_k", {"model.moe.n_experts": 2, "model.moe.top_k": 3}),
    ("first_dense", {"model.moe.n_experts": 2, "model.moe.first_dense": 9}),
    ("granularity", {"model.moe.n_experts": 2, "model.moe.granularity": 7}),
    ("expert_choice", {"model.moe.routing": "expert_choice", "model.moe.dispatch": "ragged"}),
    ("rope_scaling", {"model.rope_scaling.kind": "linear", "model.position": "none"}),
    ("original_positions", {"model.rope_scaling.kind": "yarn"}),
    ("short_factors", {"model.rope_scaling.short_factors": (1.0,)}),
    ("sweep.budgets", {"sweep.budgets": (2e9, 1e9)}),
    ("sweep.widths", {"sweep.widths": (16, 12)}),
    ("sweep.widths", {"sweep.widths": (8, 13)}),
)
SOURCES = {
    "no get_config": "def get_configs():\n    return None\n",
    "not a function": "get_config = 7\n",
    "returns nothing": "def get_config():\n    pass\n",
    "returns a dict": "def get_config():\n    return {'model': {'d_model': 32}}\n",
    "needs two arguments": "def get_config(width, depth):\n    return None\n",
    "raises": "def get_config():\n    return 1 / 0\n",
    "imports what is not there": "import no_such_module\n",
    "ends the process": "def get_config():\n    raise SystemExit(0)\n",
    "never returns": "def get_config():\n    return get_config()\n",
    "json": '{"model": {"d_model": 32}}\n',
    "a class's instance": "class A:\n    pass\ndef get_config():\n    return A()\n",
    "empty": "",
    "comments": "# nothing\n\n",
}


class Case(NamedTuple):
    """A command's call that must be refused by a line that holds ``names``."""

    command: str
    arguments: list[str]
    names: str


def make_config(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Yields calls that must be accepted."""
    given = [f"--config={folder / 'config.py'}", *data(folder)]
    yield "lm.data", given
    yield "lm.estimate", given


def data(inputs: Path) -> list[str]:
    """The settings of the valid corpus."""
    files, store = inputs.parent / "data" / "*.txt", inputs.parent / "store"
    return [f"--config.data.files={files}", f"--config.data.data_dir={store}"]


def leaves(kind: type, holder: Any = None, path: str = "") -> list[str]:
    """Dotted names of all settings of a type."""
    found = []
    for name, value in (holder or to_config_dict(Config())).items():
        if hasattr(value, "items"):
            found += leaves(kind, value, f"{path}{name}.")
        elif type(value) is kind:
            found.append(path + name)
    return found


def call(draw: random.Random, folder: Path, inputs: Path, config: str, names: str, *more: str):
    """A command with the config file ``config``."""
    command = draw.choice(COMMANDS)
    workdir = [f"--workdir={folder / 'run'}"] if command in ("lm.train", "lm.sweep") else []
    return Case(command, [f"--config={config}", *workdir, *data(inputs), *more], names)


def source(draw, folder, inputs, text: str | bytes, names: str) -> Case:
    """A config file of that content."""
    path = folder / "config.py"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return call(draw, folder, inputs, str(path), names)


def settings(draw, folder, inputs, given: dict[str, str], names: str, in_file=None) -> Case:
    """The valid config with settings changed, in the file or by flags; values as Python."""
    if draw.random() < 0.5 if in_file is None else in_file:
        changes = "".join(f"    config.{key} = {value}\n" for key, value in given.items())
        text = (inputs / "config.py").read_text()
        return source(
            draw, folder, inputs, text.replace("    return config", changes + "    return config"),
            names,
        )  # fmt: skip
    more = [f"--config.{key}={value.strip(chr(39))}" for key, value in given.items()]
    return call(draw, folder, inputs, str(inputs / "config.py"), names, *more)


def wrong_type(draw, folder, inputs):
    kind = draw.choice(list(WRONG_TYPES))
    key, value = draw.choice(leaves(kind)), draw.choice(WRONG_TYPES[kind])
    # On the command line whatever is given to a text setting is text.
    in_file = True if kind is str else None
    return settings(draw, folder, inputs, {key: value}, key.split(".")[-1], in_file)


def unknown_key(draw, folder, inputs):
    known = [leaf for kind in WRONG_TYPES for leaf in leaves(kind)]
    key = draw.choice(known)
    place = draw.randrange(key.rfind(".") + 1, len(key))
    wrong = key[:place] + draw.choice("xyz") + key[place:]
    return settings(draw, folder, inputs, {wrong: "1"}, wrong.split(".")[-1])


def unknown_section(draw, folder, inputs):
    section = draw.choice(("modell", "optimiser", "training", "mash", "model.d_model", "data.moe"))
    return settings(draw, folder, inputs, {f"{section}.size": "1"}, section.split(".")[-1], False)


def not_finite(draw, folder, inputs):
    key, in_file = draw.choice(leaves(float)), draw.random() < 0.5
    value = draw.choice(("1e999", "-1e999", *(("float('nan')",) if in_file else ())))
    return settings(draw, folder, inputs, {key: value}, key.split(".")[-1], in_file)


def out_of_range(draw, folder, inputs):
    key = draw.choice(list(OUT_OF_RANGE))
    value = repr(draw.choice(OUT_OF_RANGE[key]))
    return settings(draw, folder, inputs, {key: value}, key.split(".")[-1])


def no_such_choice(draw, folder, inputs):
    key = draw.choice(CHOICES)
    value = draw.choice(("''", "'swigluu'", "'AUTO'", "'none '", "'fixxed'"))
    return settings(draw, folder, inputs, {key: value}, key)


def section_is_a_value(draw, folder, inputs):
    section = draw.choice(("model", "data", "train", "mesh", "model.moe", "sweep", "optimizer"))
    value = draw.choice(("3", "None", "()", "'all'"))
    return settings(draw, folder, inputs, {section: value}, section.split(".")[-1])


def contradiction(draw, folder, inputs):
    names, given = draw.choice(CONTRADICTIONS)
    return settings(draw, folder, inputs, {k: repr(v) for k, v in given.items()}, names)


def broken(change: Callable[[random.Random, bytes, int], bytes]) -> Callable:
    """A class: the valid source changed at a drawn place, such that it is not Python."""

    def make(draw, folder, inputs):
        text = (inputs / "config.py").read_bytes()
        while True:
            changed = change(draw, text, draw.randrange(len(text)))
            try:
                compile(changed, "config.py", "exec")
            except (SyntaxError, ValueError):  # of NUL
                return source(draw, folder, inputs, changed, "config.py")

    return make


def inserted(*choices: bytes) -> Callable:
    """A class: the valid source with one of these at a drawn place."""
    return broken(lambda draw, text, at: text[:at] + draw.choice(choices) + text[at:])


def random_bytes(draw, folder, inputs):
    return source(draw, folder, inputs, b"\x80" + draw.randbytes(300), "config.py")


def wrong_function(draw, folder, inputs):
    return source(draw, folder, inputs, SOURCES[draw.choice(list(SOURCES))], "config.py")


def argument_not_taken(draw, folder, inputs):
    spec = f"{inputs / 'config.py'}:{draw.choice(('quick', '8b', 'a:b', ' '))}"
    return call(draw, folder, inputs, spec, "takes no argument")


def no_file(draw, folder, inputs):
    (folder / "folder.py").mkdir()
    (folder / "round.py").symlink_to(folder / "round.py")
    path = draw.choice((folder / "folder.py", folder / "missing.py", folder / "round.py", ""))
    return call(draw, folder, inputs, str(path), str(path))


def half_an_override(draw, folder, inputs):
    key = draw.choice(("model.d_model", "model", "train.tokens", ""))
    more = f"--config.{key}{draw.choice(('', ' ', ' = 3'))}"
    return call(draw, folder, inputs, str(inputs / "config.py"), key, more)


def no_workdir(draw, folder, inputs):
    """Not given, empty, or a file in its place."""
    (folder / "file").write_text("mine")
    given = draw.choice(([], [""], [folder / "file"], [folder / "file" / "below"]))
    arguments = [f"--config={inputs / 'config.py'}", *data(inputs)]
    arguments += [f"--workdir={path}" for path in given]
    return Case(draw.choice(("lm.train", "lm.sweep")), arguments, "--workdir")


CLASSES = {
    "cut": broken(lambda draw, text, at: text[:at]),
    "scrambled": inserted(*(bytes([sign]) for sign in b"()[]{}'\"\\@$?:")),
    "not UTF-8": inserted(b"\xff\xfe", b"\xc3("),
    "NUL": inserted(b"\0"),
    **{
        function.__name__.replace("_", " "): function
        for function in (
            *(wrong_type, unknown_key, not_finite, out_of_range, contradiction, wrong_function),
            *(unknown_section, no_such_choice, section_is_a_value, random_bytes),
            *(argument_not_taken, no_file, half_an_override, no_workdir),
        )
    },
}
