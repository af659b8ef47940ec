"""How a config is given: ``--config=FILE[:argument]`` and ``--config.section.key=value``.

Config files are small Python functions ``get_config(argument)`` under ``configs/`` that start from
``configs/base.py`` (which is made from the defaults of ``lm/config.py``) and change what they need.
"""

import ast
import inspect
import re
import runpy
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ml_collections
from absl import flags

from lm.command import OVERRIDES, BadInput, nearest
from lm.config import Config, from_config_dict


def load(spec: str, overrides: Sequence[str] = ()) -> Config:
    """The config of ``FILE.py[:argument]`` with ``overrides`` such as ``"model.d_model=32"``.

    The file defines ``get_config()``, or ``get_config(argument)``, and returns a ``ConfigDict``.
    Raises ``BadInput`` for whatever is wrong with either.
    """
    path, _, argument = spec.partition(":")
    given = _get_config(path, [argument] if argument else [])
    if not isinstance(given, ml_collections.ConfigDict):
        raise BadInput(f"{path}: get_config must return a ConfigDict, not {type(given).__name__}")
    for override in overrides:
        _override(given, override)
    return from_config_dict(given)


def _get_config(path: str, arguments: list[str]) -> Any:
    if not Path(path).is_file():
        known = ", ".join(sorted(str(p) for p in Path("configs").glob("[!_]*.py")))
        raise BadInput(f"--config={path}: no such file" + (f"; here are {known}" if known else ""))
    folder = str(Path(path).resolve().parent.parent)
    sys.path.insert(0, folder)  # so that `from configs import base` works from anywhere
    try:
        get_config = runpy.run_path(path).get("get_config")
        if get_config is None:
            raise BadInput(f"{path}: has no get_config()")
        parameters = inspect.signature(get_config).parameters.values()
        needed = sum(p.default is p.empty for p in parameters)
        if not needed <= len(arguments) <= len(parameters):
            takes = "needs an argument, as" if needed else "takes no argument:"
            example = f"{path}:ARGUMENT" if needed else path
            raise BadInput(f"--config={':'.join([path, *arguments])}: {takes} {example}")
        return get_config(*arguments)
    except BadInput:
        raise
    except (Exception, SystemExit) as error:
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
        where = f"{path}, line {lines[-1]}" if lines else path
        # ml_collections prints a locked section in full; its "Did you mean" is what helps.
        message = re.sub(r"Other fields present: .*(?=Did you mean)", "", str(error))
        raise BadInput(f"{where}: {type(error).__name__}: {message}") from error
    finally:
        sys.path.remove(folder)


def _override(config: ml_collections.ConfigDict, override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals:
        raise BadInput(f"--config.{key}: must be written --config.{key}=VALUE")
    sections = {"": config} | dict(_sections(config))
    known = [f"{path}.{name}".strip(".") for path in sections for name in sections[path]]
    known = [name for name in known if name not in sections]
    section, _, name = key.rpartition(".")
    holder = sections.get(section, config)
    if key in sections:
        raise BadInput(f"--config.{key}: a section; set one of {', '.join(sections[key])} in it")
    if key not in known:
        hint = nearest(key, known)
        raise BadInput(f"--config.{key}: unknown key{hint} (known: {', '.join(holder)})")
    value: Any = text
    if not isinstance(holder[name], str):
        try:
            value = ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
        except (SyntaxError, ValueError):
            pass  # stays text, which `from_config_dict` refuses by name
    with holder.ignore_type():
        holder[name] = value


def _sections(holder: ml_collections.ConfigDict, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every section and its dotted name, those within others too."""
    for name in holder:
        if hasattr(holder[name], "keys"):
            yield path + name, holder[name]
            yield from _sections(holder[name], f"{path}{name}.")


def define_config_flag(flag_values: flags.FlagValues) -> None:
    """Adds ``--config=FILE[:argument]`` and its ``--config.section.key=value`` to a command."""
    flags.DEFINE_string(
        "config",
        None,
        "Config file, as configs/tiny.py or configs/isoflop_cpu.py:quick.",
        flag_values=flag_values,
    )
    flags.DEFINE_multi_string(
        OVERRIDES,
        [],
        "Settings that replace the file's; written --config.section.key=value.",
        flag_values=flag_values,
    )


def config_from_flags(flag_values: flags.FlagValues) -> Config:
    """The validated config that ``--config`` and its overrides describe. Raises ``BadInput``."""
    if flag_values.config is None:
        raise BadInput("--config is missing; as --config=configs/tiny.py")
    return load(flag_values.config, flag_values[OVERRIDES].value)
