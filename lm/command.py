"""The edge of every command: bad input becomes one clear line, and errors become exit codes.

Exit codes: 0 done (and ``--help``), 1 a failure, 2 bad input (nothing was written), 75 pre-empted.
"""

import contextlib
import difflib
import errno
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags, logging

DONE, FAILED, BAD_INPUT, PREEMPTED = 0, 1, 2, 75
DISK_TROUBLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
OVERRIDES = "config_overrides"  # the flag that collects every --config.section.key=value


class BadInput(ValueError):
    """What the user gave cannot be used. One line: what was given, what is allowed."""


class InUse(BadInput):
    """Another process trains in the run's folder."""


class Preempted(KeyboardInterrupt):
    """A signal ended the run, and its state is saved: the same command goes on from there."""


def run(
    main: Callable[[], int | None] | Mapping[str, Callable[[], int | None]],
    flag_values: flags.FlagValues,
    doc: str | None,
    argv: Sequence[str] | None = None,
) -> int:
    """Parses ``argv`` (default: the process's own), calls ``main`` and returns the exit code.

    Of a command with verbs, ``main`` maps each of them to its function.

    Flags live in a ``FlagValues`` of the command's own, so that two can be imported together.
    """
    argv = list(sys.argv if argv is None else argv)
    logging.set_verbosity(logging.WARNING)
    logging.use_absl_handler()
    # absl's log lines on a terminal would tear the progress bar; warnings and errors stay.
    flag_values.unparse_flags()  # forget an earlier call in this process
    if any(arg in ("--help", "-h", "-help") for arg in argv[1:]):
        print((doc or "").strip())
        print("\nFlags:")
        print(flag_values.get_help(include_special_flags=False).strip("\n"))
        return DONE
    try:
        if OVERRIDES in flag_values:
            argv = [re.sub(r"^--?config\.", f"--{OVERRIDES}=", arg) for arg in argv]
        if isinstance(main, Mapping):
            main = _verb(argv, main)
        extra = flag_values(argv)[1:]
        if extra:
            raise BadInput(
                f"unexpected argument {extra[0]!r}; flags look like --name=value, see --help"
            )
        code = main() or DONE
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader has seen enough, as `| head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except BadInput as error:
        return _refuse(str(error))
    except flags.UnrecognizedFlagError as error:
        names = [name for name in flag_values if name != error.flagname]
        return _refuse(f"unknown flag --{error.flagname}{nearest(error.flagname, names)}")
    except flags.Error as error:
        return _refuse(str(error))
    except OSError as error:
        if not (told := disk_trouble(error)):
            raise
        print(f"error: {told}", file=sys.stderr)
        return FAILED


def disk_trouble(error: BaseException) -> str:
    """What to tell, in place of a traceback, where the disk and no fault of ours caused it."""
    if not isinstance(error, OSError) or error.errno not in DISK_TROUBLE:
        return ""
    return f"{error.strerror}: {error.filename or 'while writing'}"


def _verb(
    argv: list[str], verbs: Mapping[str, Callable[[], int | None]]
) -> Callable[[], int | None]:
    """The function of the verb, which is taken out of ``argv``."""
    one_of("the first argument", argv[1] if len(argv) > 1 else "", list(verbs))
    return verbs[argv.pop(1)]


def _refuse(message: str) -> int:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return BAD_INPUT


def nearest(word: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` where a known word is close to ``word``, else an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def one_of(what: str, given: object, allowed: Sequence[object]) -> None:
    """Raises ``BadInput`` unless ``given`` is one of ``allowed``."""
    if given not in allowed:
        hint = nearest(given, map(str, allowed)) if isinstance(given, str) else ""
        raise BadInput(f"{what} = {given!r}: must be one of {', '.join(map(str, allowed))}{hint}")


def check_folder(flag: str, given: str | None, example: str) -> None:
    """Raises ``BadInput`` unless ``given`` is a folder, a URL, or could become a folder."""
    if not given:
        raise BadInput(f"{flag} is missing; as {flag}={example}")
    if "://" not in given:
        there = next(p for p in (Path(given), *Path(given).absolute().parents) if p.exists())
        if not there.is_dir():
            raise BadInput(f"{flag}={given}: {there} is a file; a folder is needed")


def json_object(path: str | os.PathLike, text: str | bytes | None = None) -> dict[str, Any]:
    """The object that a JSON file holds; ``text`` where it was read already.

    Raises ``BadInput`` naming ``path``.
    """
    try:
        content = json.loads(Path(path).read_text("utf-8") if text is None else text)
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise BadInput(f"{path}: must hold an object, not {type(content).__name__}")
    return content


@contextlib.contextmanager
def folder_atomically(path: str | os.PathLike) -> Iterator[Path]:
    """An empty folder to write in, which becomes ``path`` at the end, or vanishes at an error.

    Raises ``BadInput`` where ``path`` is there already and not an empty folder, or can be none.
    """
    path = Path(path)
    try:
        if path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise BadInput(f"{path}: is there already; give a new folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        if disk_trouble(error):
            raise
        raise BadInput(f"{path}: no folder can be made there ({error.strerror})") from error
    try:
        yield temporary
        os.chmod(temporary, 0o755)
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextlib.contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """Lets an error of the disk tell ``path``: of a file that is open it names none."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def write_atomically(path: str | os.PathLike, content: str | bytes) -> None:
    """Writes ``content`` so that ``path`` holds either its old content or all of the new one.

    Raises ``OSError`` (a full disk, a folder that may not be written) with the old content intact.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with naming(path), os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
