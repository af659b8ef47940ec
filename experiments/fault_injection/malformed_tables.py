"""Run tables, curves and laws that are damaged or cannot be."""

import csv
import io
import json
import random
from collections.abc import Iterator
from pathlib import Path

from experiments.fault_injection.malformed_configs import Case
from lm.scaling.published import named_law

NUMBERS = ("params", "tokens", "flops", "loss")


def make_tables(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Makes a study's tables from a known law and fits them; yields calls that must be accepted."""
    law, noise = named_law("besiroglu2024").law, random.Random(0)
    runs, curves = [], []
    for flops in (1e18, 3e18, 1e19, 3e19):
        best = law.optimum(flops).params
        for i in range(7):
            params = round(float(best) * 4 ** ((i - 3) / 3))
            tokens = flops / (6 * params)
            loss = float(law.loss(params, tokens)) + noise.gauss(0, 0.005)
            name = f"c{flops:.0e}-{i}"
            run = {"run_id": name, "params": params, "tokens": tokens, "flops": flops}
            runs.append(run | {"loss": loss, "tokenizer": "bytes", "status": "done"})
            for done in (0.1, 0.3, 0.6, 0.8, 0.9, 1.0):
                at = float(law.loss(params, tokens * done)) + 0.2 * (1 - done) ** 2
                point = {"run_id": name, "tokens": tokens * done, "flops": flops * done}
                curves.append(point | {"train_loss": at, "validation_loss": at})
    (folder / "tables").mkdir()
    (folder / "tables/runs.csv").write_text(as_text(runs))
    (folder / "tables/curves.csv").write_text(as_text(curves))
    fit = ["--bootstrap=20", "--approaches=parametric", f"--out={folder / 'fit'}"]
    yield "lm.fit", [f"--runs={folder / 'tables'}", *fit]
    yield "lm.plan", [f"--law={folder / 'fit/law.json'}", "--flops=1e20"]


def as_text(rows: list[dict]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def table(change):
    """A class: runs.csv (or curves.csv beside it) as ``change(draw, rows) -> (rows, names)``."""

    def make(draw, folder, inputs):
        rows = list(csv.DictReader(io.StringIO((inputs / "tables/runs.csv").read_text())))
        changed, names = change(draw, rows)
        text = changed if isinstance(changed, bytes | str) else as_text(changed)
        return fitted(folder, text, names)

    return make


def raw(change):
    """A class: the bytes of runs.csv as ``change(draw, lines) -> (bytes, names)``."""

    def make(draw, folder, inputs):
        lines = (inputs / "tables/runs.csv").read_bytes().splitlines(keepends=True)
        return fitted(folder, *change(draw, lines))

    return make


def fitted(folder: Path, text: str | bytes, names: str) -> Case:
    """The fit of a table of that content."""
    path = folder / "table.csv"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return Case("lm.fit", [f"--runs={path}", f"--out={folder / 'fit'}"], names)


def one_number(*values: str):
    """A number of one row replaced."""

    def change(draw, rows):
        row, name = draw.choice(rows), draw.choice(NUMBERS)
        row[name] = draw.choice(values)
        return rows, name

    return table(change)


def without(*columns: str):
    return table(
        lambda draw, rows: (
            [{k: v for k, v in row.items() if k not in columns} for row in rows],
            columns[0],
        )
    )


def cut(draw, lines):
    """Within the last row, before its last field."""
    last = draw.randrange(1, len(lines))
    end = draw.randrange(1, lines[last].rindex(b","))
    return b"".join(lines[:last]) + lines[last][:end], f" {last + 1}: "


def more_or_fewer_fields(draw, lines):
    row = draw.randrange(1, len(lines))
    fields = lines[row].split(b",")
    lines[row] = b",".join(fields[:-2] if draw.random() < 0.5 else [fields[0], *fields])
    lines[row] = lines[row].rstrip(b"\n") + b"\n"
    return b"".join(lines), f" {row + 1}: "


def header_twice(draw, lines):
    names = lines[0].split(b",")
    name = draw.choice(names[1:5])
    names[names.index(draw.choice([n for n in names[:5] if n != name]))] = name
    return b",".join(names) + b"".join(lines[1:]), name.decode()


def with_bytes(*inserted: bytes):
    def change(draw, lines):
        row = draw.randrange(1, len(lines))
        place = lines[row].index(b",") + 2  # within a number
        lines[row] = lines[row][:place] + draw.choice(inserted) + lines[row][place:]
        return b"".join(lines), ""

    return raw(change)


def swapped(draw, rows):
    other = draw.choice(NUMBERS[:3])
    for row in rows:
        row["loss"], row[other] = row[other], row["loss"]
    return rows, "params"


def twice(draw, rows):
    again = dict(draw.choice(rows))
    if draw.random() < 0.5:
        again["run_id"] += "-again"
    return [*rows, again], "duplicated"


def curves(draw, folder, inputs):
    """Curves that are broken beside a table that is not."""
    tables = folder / "tables"
    tables.mkdir()
    (tables / "runs.csv").write_bytes((inputs / "tables/runs.csv").read_bytes())
    rows = list(csv.DictReader(io.StringIO((inputs / "tables/curves.csv").read_text())))
    kind = draw.randrange(4)
    names = ("tokens", "train_loss", "run_id", "fields")[kind]
    if kind == 0:
        draw.choice(rows)["tokens"] = draw.choice(("-5", "nan", "some"))
    elif kind == 1:
        draw.choice(rows)["train_loss"] = "low"
    elif kind == 2:
        rows = [{"run": row.pop("run_id"), **row} for row in rows]
    text = as_text(rows)
    (tables / "curves.csv").write_text(text[: text.rindex(",")] if kind == 3 else text)
    return Case("lm.fit", [f"--runs={tables}", f"--out={folder / 'fit'}"], names)


def not_there(draw, folder, inputs):
    (folder / "empty").mkdir()
    path = folder / draw.choice(("none.csv", "empty", "none/runs.csv"))
    return Case("lm.fit", [f"--runs={path}", f"--out={folder / 'fit'}"], str(path))


def column_flags(draw, folder, inputs):
    given, names = draw.choice(
        (("params=size", "size"), ("params", "params"), ("=", "="), ("loss=params,loss=", "loss="))
    )
    runs, out = f"--runs={inputs / 'tables/runs.csv'}", f"--out={folder / 'fit'}"
    return Case("lm.fit", [runs, out, f"--columns={given}"], names)


TABLES = {
    "text in a number": one_number("many", "1,5", "--", "1e", "0x10", "12 000"),
    "not finite": one_number("inf", "-inf", "nan", "1e400"),
    "empty or not above zero": one_number("", "0", "-1e9", "-0.0"),
    "cut": raw(cut),
    "without loss": without("loss"),
    "without two of three": without("params", "tokens"),
    "a name twice in the header": raw(header_twice),
    "more or fewer fields": raw(more_or_fewer_fields),
    "bytes that are not UTF-8": with_bytes(b"\xff", b"\xe9"),
    "NUL": with_bytes(b"\0"),
    "another encoding": raw(lambda draw, lines: (b"".join(lines).decode().encode("utf-16"), "")),
    "empty": raw(lambda draw, lines: (b"", "empty")),
    "a header alone": raw(lambda draw, lines: (lines[0], "no rows")),
    "semicolons": raw(lambda draw, lines: (b"".join(lines).replace(b",", b";"), "")),
    "columns swapped": table(swapped),
    "a run twice": table(twice),
    "tokenizers mixed": table(
        lambda draw, rows: ([draw.choice(rows).update(tokenizer="gpt2") or rows, "tokenizer"])
    ),
    "nothing done": table(
        lambda draw, rows: ([row | {"status": "diverged"} for row in rows], "status")
    ),
    "FLOPs in petaFLOP": table(
        lambda draw, rows: ([row | {"flops": float(row["flops"]) / 1e15} for row in rows], "flops")
    ),
    "a field without end": table(
        lambda draw, rows: ([rows[0] | {"run_id": "a" * 200_000}, *rows[1:]], "table.csv")
    ),
    "too few": table(lambda draw, rows: (rows[: draw.randint(1, 2)], "no approach")),
    "binary": raw(lambda draw, lines: (b"\x89PNG\r\n\x1a\n" + draw.randbytes(400), "table.csv")),
    "curves": curves,
    "not there": not_there,
    "column flags": column_flags,
}


def law(change):
    """A class: law.json as ``change(draw, content) -> bytes``, planned with or compared with."""

    def make(draw, folder, inputs):
        path = folder / "law.json"
        path.write_bytes(change(draw, (inputs / "fit/law.json").read_bytes()))
        if draw.random() < 0.5:
            runs = [f"--runs={inputs / 'tables'}", "--bootstrap=0", f"--out={folder / 'fit'}"]
            return Case("lm.fit", [*runs, f"--compare={path}"], "law.json")
        return Case("lm.plan", [f"--law={path}", "--flops=1e20"], "law.json")

    return make


def parametric(draw, content: bytes) -> bytes:
    """A constant of the parametric law that is none."""
    parsed = json.loads(content)
    constants = parsed["approaches"]["parametric"]
    constants[draw.choice(("A", "B", "alpha", "beta"))] = draw.choice(("1", None, -1, 0, [2]))
    return json.dumps(parsed).encode()


def entry(*path: str, values: tuple):
    """An entry replaced by one of ``values``."""

    def change(draw, content):
        parsed = json.loads(content)
        holder = parsed
        for key in path[:-1]:
            holder = holder[key]
        holder[path[-1]] = draw.choice(values)
        return json.dumps(parsed).encode()

    return law(change)


LAWS = {
    "cut": law(lambda draw, text: text[: draw.randrange(1, len(text) - 3)]),
    "empty": law(lambda draw, text: b""),
    "not UTF-8": law(lambda draw, text: text[:9] + b"\xff" + text[9:]),
    "NUL": law(lambda draw, text: text[:9] + b"\0" + text[9:]),
    "a list": law(lambda draw, text: b"[" + text + b"]"),
    "nesting without end": law(lambda draw, text: b"[" * 100_000),
    "approaches": entry("approaches", values=(None, {}, [], 3, {"parametric": 3})),
    "constants": law(parametric),
    "draws": entry("approaches", "parametric", "draws", values=([[1, 2]], [3], [["a"] * 5])),
    "range": entry("flops_range", values=([1], "wide", [None, 1], {"lowest": 1})),
}
