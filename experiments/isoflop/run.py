"""The full study: the main sweep, Kaplan's settings, elsewhere, smaller models; then what they say.

    python -m lm.data --config=configs/isoflop_cpu.py:full
    python -m experiments.isoflop.run --workdir=runs/isoflop [--kinds=main,batch] [--norun]

Trains what is missing by ``lm.sweep``, so that the same command goes on after an interruption, and
writes ``results/full/`` and ``report.html``. ``--kinds`` trains these only and writes nothing;
``--norun`` only analyses, and leaves out kinds that are not there whole. Three and a half hours of
two cores.
"""

import csv
import json
import os
import platform
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from absl import flags

from experiments.isoflop import analysis, figures, page, study
from experiments.results import as_csv
from lm import command, fit
from lm.command import BadInput, one_of, write_atomically
from lm.config_file import load
from lm.report.study import plain
from lm.scaling import RunTable, read_runs
from lm.sweep.grid import ladder as shapes_of

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
KEPT = (  # of the kinds beside the main one; the main one's table is kept whole
    "kind run_id status budget seed params non_embedding_params tokens flops loss d_model n_layers"
    " n_heads n_kv_heads d_ff head_width vocab_size tied seq_len batch_tokens learning_rate"
    " warmup_tokens epochs wall_seconds step_seconds"
).split()
ELSEWHERE = {
    "English bytes, four budgets": "same",  # the main study at the others' budgets
    "Python source, four budgets": "python_source",
    "English BPE of 512, four budgets": "bpe512",
}

FLAGS = flags.FlagValues()
flags.DEFINE_string("workdir", None, "folder of the sweeps", flag_values=FLAGS)
flags.DEFINE_list("kinds", [], "train these only (all)", flag_values=FLAGS)
flags.DEFINE_bool("run", True, "train what is missing", flag_values=FLAGS)
flags.DEFINE_integer("workers", 2, "runs at once", 1, flag_values=FLAGS)
flags.DEFINE_string("data_dir", "data", "where lm.data put the corpora", flag_values=FLAGS)
flags.DEFINE_integer("bootstrap", 4000, "draws behind the intervals", 1, flag_values=FLAGS)


def train(kind: str, workdir: Path) -> None:
    """Every run of a kind that is missing, by ``lm.data``'s and ``lm.sweep``'s own resuming."""
    config = [f"--config=experiments/isoflop/study.py:{kind}"]
    config.append(f"--config.data.data_dir={Path(FLAGS.data_dir).resolve()}")
    if kind == "python_source":
        config.append(f"--config.data.files={write_python_source(workdir)}")
    if kind == "smaller":
        widths = ",".join(map(str, smaller_widths(read_runs(workdir / "main"))))
        config.append(f"--config.sweep.widths=({widths})")
    sweep = [f"--workdir={workdir / kind}", "--backend=processes", f"--workers={FLAGS.workers}"]
    environment = {**os.environ, "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    for arguments in (["lm.data", *config], ["lm.sweep", *config, *sweep]):
        told = subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, env=environment)
        if told.returncode:  # it has said why
            sys.exit(told.returncode)


def write_python_source(workdir: Path) -> Path:
    """Python's own library, one document a file, in ``workdir``/python_source.jsonl."""
    path, library = workdir / "python_source.jsonl", Path(sysconfig.get_paths()["stdlib"])
    if not path.exists():
        sources = [p for p in library.rglob("*.py") if "site-packages" not in p.parts]
        texts = (p.read_text(encoding="utf-8", errors="ignore") for p in sorted(sources))
        write_atomically(path, "".join(json.dumps({"text": text}) + "\n" for text in texts if text))
    return path


def smaller_widths(main: RunTable) -> list[int]:
    """The widths nearest the main study's optimum, half and a quarter of it."""
    rungs = shapes_of(load(f"{HERE / 'study.py'}:main"))
    optimum = float(fit.fit_isoflop(main, bootstrap=0).optimal_params(study.SMALLER_BASE))
    sizes = np.log([rung.params for rung in rungs])
    nearest = [int(np.argmin(abs(sizes - np.log(optimum / k)))) for k in (1, 2, 4)]
    return sorted(rungs[i].model.d_model for i in nearest)


def read_kinds(workdir: Path) -> dict[str, RunTable]:
    """The runs of the kinds whose sweeps have ended; the main one's must have."""
    kinds = [kind for kind in study.KINDS if kind not in study.ADDED]
    ended = [
        kind
        for kind in kinds
        if all((folder / "calls.jsonl").exists() for folder in folders(workdir, kind))
    ]
    if "main" not in ended:
        raise BadInput(f"{workdir}: the main sweep is not there whole; run without --norun first")
    for kind in kinds:
        if kind not in ended:
            print(f"{kind}: left out, its sweep has not ended")
    return {kind: read_runs(folders(workdir, kind)) for kind in ended}


def folders(workdir: Path, kind: str) -> list[Path]:
    """Where the runs of a kind are: its own sweep's, and of what was added to it."""
    added = [name for name, (to, *_) in study.ADDED.items() if to == kind]
    return [workdir / each for each in (kind, *added)]


def summarise(tables: dict[str, RunTable], main: fit.Study, workdir: Path) -> dict:
    """All that the figures and the page show beyond ``main``'s own law.json."""
    draws = FLAGS.bootstrap
    shown = tables | {"same": analysis.at_budgets(tables["main"], study.BUDGETS)}
    elsewhere = [
        {"name": name} | analysis.exponent(shown[kind], analysis.AS_COUNTED, draws)
        for name, kind in ELSEWHERE.items()
        if kind in shown
    ]
    once_runs = analysis.without_repeats(tables["main"])
    once = fit.fit(once_runs, main.curves.of(once_runs), bootstrap=draws)
    planned = fit.fit(*fit.read([workdir / "main"]), bootstrap=0)
    smaller = []
    if "smaller" in tables:
        law, base = main.fits["parametric"], study.SMALLER_BASE
        smaller = analysis.over_training(tables["smaller"], law, base, min(draws, 1000))
    return plain(
        {
            "schema": 1,
            "python": platform.python_version(),
            "seed_scatter": analysis.seed_scatter(tables["main"]),
            "rms_log_residual": main.fits["parametric"].goodness["rms_log_residual"],
            "estimators": analysis.estimators(tables["main"], draws),
            "forms": analysis.forms(main),
            "repeated": analysis.repeated(tables["main"]),
            "without_repeats": {
                name: {"a": f.a, "interval95": f.a_interval95} for name, f in once.fits.items()
            },
            "without_wider": {name: f.a for name, f in planned.fits.items()},
            "without_each_budget": analysis.without_each_budget(tables["main"]),
            "held_out": analysis.held_out(main, draws),
            "ladder": analysis.ladder(tables, study.BUDGETS, draws),
            "elsewhere": elsewhere,
            "over_training": smaller,
            "cost": cost(workdir, tables),
        }
    )


def cost(workdir: Path, kinds: Iterable[str]) -> dict[str, dict]:
    """Of each kind's sweep: runs, FLOPs, hours of all workers, and the steps' share of them.

    By what the runs say of themselves, so that sweeps that were interrupted count whole.
    """
    found = {}
    for kind in kinds:
        rows = rows_of(folders(workdir, kind), "runs.csv")
        seconds = [float(row["step_seconds"]) for row in rows]
        walls = [float(row["wall_seconds"]) for row in rows]
        found[kind] = {
            "runs": len(rows),
            "diverged": [row["run_id"] for row in rows if row["status"] == "diverged"],
            "flops": sum(float(row["flops"]) for row in rows),
            "hours": sum(walls) / FLAGS.workers / 3600,
            "goodput": sum(seconds) / sum(walls),
        }
    return found


def write(tables: dict[str, RunTable], workdir: Path, results: Path, report: Path) -> None:
    """Tables, law.json, summary.json and the figures into ``results``; last the page."""
    runs, curves = fit.read(folders(workdir, "main"))
    main = fit.fit(runs, curves, bootstrap=FLAGS.bootstrap)
    summary = summarise(tables, main, workdir)
    drawn = {
        "exponents": figures.exponents(main, summary["elsewhere"]),
        "ladder": figures.ladder(summary["ladder"]),
        "held_out": figures.held_out(
            main, summary["held_out"], summary["forms"][-1]["constants_below_top"]
        ),
    }
    if smaller := summary["over_training"]:
        base = study.SMALLER_BASE
        drawn["over_training"] = figures.over_training(smaller, tables["smaller"], base)
    for name in ("runs.csv", "curves.csv"):
        write_atomically(results / name, as_csv(rows_of(folders(workdir, "main"), name)))
    if others := [kind for kind in tables if kind != "main"]:
        write_atomically(results / "other_runs.csv", other_runs(workdir, others))
    write_atomically(results / "summary.json", json.dumps(summary, indent=1) + "\n")
    fit.write(main, results, more=page.sections(summary, drawn))
    for name, text in drawn.items():
        write_atomically(results / "figures" / f"{name}.svg", text)
    os.replace(results / "report.html", report)


def other_runs(workdir: Path, kinds: Iterable[str]) -> str:
    """The runs of these kinds in one table."""
    rows = []
    for kind in kinds:
        found = [row | {"kind": kind} for row in rows_of(folders(workdir, kind), "runs.csv")]
        rows += [{name: row[name] for name in KEPT} for row in found]
    return as_csv(rows)


def rows_of(folders: Iterable[Path], name: str) -> list[dict[str, str]]:
    """The rows of a table that each of these folders has."""
    found = []
    for folder in folders:
        with (folder / name).open(newline="") as file:
            found += csv.DictReader(file)
    return found


def main() -> None:
    if not FLAGS.workdir:
        raise BadInput("--workdir is missing; as --workdir=runs/isoflop")
    for kind in FLAGS.kinds:
        one_of("--kinds", kind, study.KINDS)
    workdir = Path(FLAGS.workdir).resolve()
    if FLAGS.run:
        workdir.mkdir(parents=True, exist_ok=True)
        for kind in FLAGS.kinds or study.KINDS:
            train(kind, workdir)
    if not FLAGS.kinds:
        write(read_kinds(workdir), workdir, HERE / "results" / "full", HERE / "report.html")


if __name__ == "__main__":
    sys.exit(command.run(main, FLAGS, __doc__))
