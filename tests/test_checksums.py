"""What storage may do to a folder's files, and that it is found."""

import json

import pytest

from lm import checksums

CONTENTS = {"small": b"x", "empty": b"", "below/large": bytes(range(256)) * 12_345}


@pytest.fixture
def folder(tmp_path):
    for name, content in CONTENTS.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    checksums.write(tmp_path)
    return tmp_path


def test_what_is_as_it_was_has_no_fault(folder):
    (folder / "later").write_text("not of the folder when it was checked")
    assert checksums.fault(folder) is None
    found = json.loads((folder / checksums.NAME).read_text())["files"]
    assert {name: n_bytes for name, (n_bytes, _) in found.items()} == {
        name: len(content) for name, content in CONTENTS.items()
    }


@pytest.mark.parametrize("name", CONTENTS)
def test_missing_and_truncated_files_are_named(folder, name):
    (folder / name).unlink()
    assert checksums.fault(folder) == f"{name} is missing"
    (folder / name).write_bytes(CONTENTS[name][:-1] or b"longer")
    assert checksums.fault(folder).startswith(f"{name} has ")


def test_a_folder_where_a_file_was_is_a_fault(folder):
    (folder / "small").unlink()
    (folder / "small").mkdir()
    assert checksums.fault(folder).startswith("small")


@pytest.mark.parametrize("name", ["small", checksums.NAME])
def test_any_flipped_bit_is_found(folder, name):
    content = (folder / name).read_bytes()
    for bit in range(0, 8 * len(content), 7):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        (folder / name).write_bytes(flipped)
        assert checksums.fault(folder), f"bit {bit}"


def test_a_list_that_is_gone_cut_or_no_list_is_a_fault(folder):
    for content in ("", "{", "[]", "{}", '{"schema": 1, "files": 3}', "\xff"):
        (folder / checksums.NAME).write_text(content, "latin-1")
        assert checksums.fault(folder).startswith(checksums.NAME)
    (folder / checksums.NAME).unlink()
    assert checksums.fault(folder) == f"{checksums.NAME} is missing"
