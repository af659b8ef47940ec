"""The edge of every command: exit codes, single lines, atomic files."""

import errno
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from absl import flags

from lm import command
from lm.command import BadInput
from lm.config_file import config_from_flags, define_config_flag

ROOT = Path(__file__).parents[1]


@pytest.fixture
def call(capsys):
    """``call(main, *arguments) -> (exit code, stdout, stderr)`` with --size and --config flags."""
    flag_values = flags.FlagValues()
    flags.DEFINE_integer("size", 3, "How many.", lower_bound=1, flag_values=flag_values)
    flags.DEFINE_string("runs", None, "Which.", flag_values=flag_values)
    define_config_flag(flag_values)

    def call(main, *arguments):
        code = command.run(
            lambda: main(flag_values), flag_values, "What it does.", ["x", *arguments]
        )
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_returns_mains_exit_code(call):
    assert call(lambda flags: None) == (0, "", "")
    assert call(lambda flags: command.PREEMPTED)[0] == 75
    assert call(lambda flags: print(flags.size, flags.runs), "--size=5", "--runs", "a b") == (
        0,
        "5 a b\n",
        "",
    )


def test_help_is_0_and_names_every_flag(call):
    for spelling in ("--help", "-h"):
        code, out, err = call(lambda flags: 1 / 0, spelling)
        assert code == 0 and err == ""
        assert out.startswith("What it does.") and "--size" in out and "--config" in out


@pytest.mark.parametrize(
    "argument, says",
    [
        ("--siz=3", "unknown flag --siz; did you mean 'size'?"),
        ("--size=many", "flag --size=many: invalid literal"),
        ("--size=0", "flag --size=0: 0 is not a positive integer"),
        ("--size", "Missing value for flag --size"),
        ("size=3", "unexpected argument 'size=3'; flags look like --name=value"),
    ],
)
def test_bad_flags_are_2_and_one_line(call, argument, says):
    code, out, err = call(lambda flags: 1 / 0, argument)
    assert (code, out) == (2, "") and says in err
    assert err.startswith("error: ") and err.count("\n") == 1


def test_bad_input_is_2_and_one_line(call):
    def main(flags):
        raise BadInput("given\n  this,\n  allowed that")

    assert call(main) == (2, "", "error: given this, allowed that\n")


def test_a_failure_is_no_bad_input(call):
    with pytest.raises(ZeroDivisionError):
        call(lambda flags: 1 / 0)


def test_a_full_disk_is_1_and_one_line(call):
    def main(flags):
        raise OSError(errno.ENOSPC, "No space left on device", "runs/law.json")

    assert call(main) == (1, "", "error: No space left on device: runs/law.json\n")
    with pytest.raises(OSError, match="Connection refused"):
        call(lambda flags: (_ for _ in ()).throw(OSError(errno.ECONNREFUSED, "Connection refused")))


def test_flags_of_an_earlier_call_are_forgotten(call, monkeypatch):
    show = lambda flags: print(flags.size, config_from_flags(flags).model.d_model)  # noqa: E731
    monkeypatch.chdir(ROOT)
    assert call(show, "--size=5", "--config.model.d_model=48", "--config=configs/base.py") == (
        0,
        "5 48\n",
        "",
    )
    assert call(show, "--config=configs/base.py") == (0, "3 64\n", "")
    code, _, err = call(show)
    assert code == 2 and err == "error: --config is missing; as --config=configs/tiny.py\n"


def test_a_command_without_a_config_knows_no_overrides(capsys):
    flag_values = flags.FlagValues()
    assert command.run(lambda: 1 / 0, flag_values, "", ["x", "--config.model.d_model=3"]) == 2
    assert "unknown flag --config.model.d_model" in capsys.readouterr().err


def test_in_a_process_of_its_own(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
            import sys
            from absl import flags
            from lm import command
            from lm.config_file import config_from_flags, define_config_flag
            FLAGS = flags.FlagValues()
            define_config_flag(FLAGS)
            sys.exit(command.run(lambda: print(config_from_flags(FLAGS).name), FLAGS, __doc__))
        """)
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def run(*arguments):
        result = subprocess.run(
            [sys.executable, script, *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        return result.returncode, result.stdout, result.stderr

    config = f"--config={ROOT}/configs/tiny.py"
    assert run(config) == (0, "tiny\n", "")
    code, out, err = run(config, "--config.model.d_modle=3")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(
        "error: --config.model.d_modle: unknown key; did you mean 'model.d_model'"
    )


def test_nearest_and_one_of():
    assert command.nearest("d_modle", ["d_model", "n_heads"]) == "; did you mean 'd_model'?"
    assert command.nearest("zzz", ["d_model"]) == ""
    command.one_of("x", "a", ("a", "b"))
    with pytest.raises(BadInput, match="x = 'c': must be one of a, b$"):
        command.one_of("x", "c", ("a", "b"))
    with pytest.raises(BadInput, match="x = 3: must be one of 1, 2$"):
        command.one_of("x", 3, (1, 2))


def test_a_folder_may_be_new_but_no_file_and_not_beneath_one(tmp_path):
    (tmp_path / "file").touch()
    for given in (tmp_path, tmp_path / "new/er", "gs://bucket/study", "new"):
        command.check_folder("--out", str(given), "fits")
    for given, says in (
        (None, "--out is missing; as --out=fits"),
        ("", "--out is missing"),
        (f"{tmp_path}/file", "file is a file; a folder is needed"),
        (f"{tmp_path}/file/below", "file is a file; a folder is needed"),
    ):
        with pytest.raises(BadInput, match=says):
            command.check_folder("--out", given, "fits")


@pytest.mark.parametrize(
    "content, says",
    [
        (b"", "not JSON"),
        (b'{"a": 1', "not JSON"),
        (b'{"a": "\xff"}', "not JSON"),
        (b"\0\0", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"a": ' + b"7" * 5_000 + b"}", "not JSON"),
        (b"[1]", "must hold an object, not list"),
    ],
)
def test_damaged_json_is_refused_naming_the_file(content, says, tmp_path):
    path = tmp_path / "held.json"
    with pytest.raises(BadInput, match="held.json: cannot be read"):
        command.json_object(path)
    path.write_text('{"a": 1}')
    assert command.json_object(path) == {"a": 1}
    path.write_bytes(content)
    with pytest.raises(BadInput, match=f"held.json: {says}"):
        command.json_object(path)


def test_files_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "folder" / "law.json"
    command.write_atomically(path, "old")
    assert path.read_text() == "old" and (path.stat().st_mode & 0o777) == 0o644

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="law.json"):
        patched.setattr(os, "fsync", full_disk)
        command.write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in path.parent.iterdir()] == ["law.json"]
    command.write_atomically(path, b"\x00new")
    assert path.read_bytes() == b"\x00new"


def test_a_folder_is_written_whole_or_not_at_all(tmp_path):
    with command.folder_atomically(tmp_path / "a" / "b") as folder:
        (folder / "x").write_text("1")
        assert not (tmp_path / "a" / "b").exists()
    assert (tmp_path / "a" / "b" / "x").read_text() == "1"
    with pytest.raises(BadInput, match="is there already"):
        with command.folder_atomically(tmp_path / "a" / "b"):
            pass
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError), command.folder_atomically(tmp_path / "empty") as folder:
        (folder / "x").write_text("1")
        raise OSError
    assert list((tmp_path / "empty").iterdir()) == []
    assert {path.name for path in tmp_path.iterdir()} == {"a", "empty"}
    with command.folder_atomically(tmp_path / "empty") as folder:
        (folder / "x").write_text("1")
    assert (tmp_path / "empty" / "x").exists()


def test_a_command_with_verbs(capsys):
    flag_values = flags.FlagValues()
    flags.DEFINE_integer("size", 3, "How many.", flag_values=flag_values)
    verbs = {"grow": lambda: flag_values.size, "shrink": lambda: -flag_values.size}

    def call(*arguments):
        return command.run(verbs, flag_values, "What it does.", ["x", *arguments])

    assert call("grow", "--size=4") == 4 and call("shrink") == -3
    assert call("--help") == 0
    capsys.readouterr()
    for arguments, says in (
        (["grwo"], "'grwo': must be one of grow, shrink; did you mean 'grow'?"),
        ([], "the first argument = '': must be one of grow, shrink"),
        (["--size=4", "grow"], "must be one of grow, shrink"),
        (["grow", "shrink"], "unexpected argument 'shrink'"),
    ):
        assert call(*arguments) == 2
        error = capsys.readouterr().err
        assert says in error and error.count("\n") == 1


def test_a_reader_that_leaves_early_is_no_error():
    command_line = f"{sys.executable} -m lm.plan --tables | head -1"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command_line], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0 and done.stderr == ""
