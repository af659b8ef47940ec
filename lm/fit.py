"""From run tables to laws: law.json, figures and one self-contained report.html.

    python -m lm.fit --runs=runs/isoflop_cpu --out=runs/isoflop_cpu
    python -m lm.fit --runs=points.csv --columns='params=Model Size,flops=Training FLOP' \\
        --drop_highest_loss=5 --out=refit
    python -m lm.fit --runs=ours --out=fits/ours --compare=theirs/law.json

Fits Chinchilla's three approaches, each with bootstrap intervals, checks them on runs they did not
see, recounts them under other conventions of N and C, and prints the exponents beside the rows of
Chinchilla's Table 2 and Kaplan's. An approach that the table cannot support is refused by name; the
others go on. A table from elsewhere needs `loss` and any two of `params`, `tokens`, `flops`. Tables
and curves exported from W&B and TensorBoard are read too (see lm/scaling/exported.py).
"""

import dataclasses
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from absl import flags
from rich.console import Console

from lm import command
from lm.command import BadInput, one_of
from lm.report.comparison import compare, read_law_file
from lm.report.expert_loads import read_expert_loads
from lm.report.study import APPROACH_NAMES, Study, column
from lm.report.terminal import print_exponents
from lm.scaling import (
    AllocationFit,
    CannotFit,
    CurveTable,
    RunTable,
    exponents_by_accounting,
    fit_envelope,
    fit_isoflop,
    fit_parametric,
    leave_highest_out,
    leave_top_budget_out,
    read_runs,
    recount,
)
from lm.scaling.accounting import FLOPS_CONVENTIONS, PARAMS_CONVENTIONS
from lm.scaling.exported import exported_columns, read_any_curves
from lm.scaling.parametric import HOFFMANN_STARTS

APPROACHES = tuple(APPROACH_NAMES)
HIGHEST_OUT = (0, 1, 3, 5, 8)  # how many of the highest losses are left out in turn
AS_IN_THE_TABLE = "as in the table"

_NUMBERS = re.compile(r"\[\s*((?:[-+.\de]+|null)(?:,\s*(?:[-+.\de]+|null))*)\s*\]")  # a flat list

FLAGS = flags.FlagValues()
flags.DEFINE_list(
    "runs", None, "run tables: CSV files, or folders holding runs.csv", flag_values=FLAGS
)
flags.DEFINE_string("out", None, "folder for law.json, report.html, figures/", flag_values=FLAGS)
flags.DEFINE_list("approaches", list(APPROACHES), "which to fit", flag_values=FLAGS)
flags.DEFINE_list(
    "accounting",
    [],
    f"recount N as one of {', '.join(PARAMS_CONVENTIONS)} and C as one of"
    f" {', '.join(FLOPS_CONVENTIONS)} before fitting, e.g. non_embedding,kaplan; needs the shapes",
    flag_values=FLAGS,
)
flags.DEFINE_integer(
    "bootstrap", 4000, "draws behind the intervals", lower_bound=0, flag_values=FLAGS
)
flags.DEFINE_integer(
    "drop_highest_loss", 0, "leave out the K highest losses", lower_bound=0, flag_values=FLAGS
)
flags.DEFINE_list("columns", [], "renames, ours=theirs: 'params=N,loss=val'", flag_values=FLAGS)
flags.DEFINE_list(
    "curves",
    [],
    "training curves, where they are not curves.csv beside the runs; exports too",
    flag_values=FLAGS,
)
flags.DEFINE_enum("loss_unit", "nats", ["nats", "bits"], "of loss, per token", flag_values=FLAGS)
flags.DEFINE_string(
    "compare", None, "a law.json, or a run table fitted likewise", flag_values=FLAGS
)
flags.DEFINE_enum(
    "estimator", "parabola", ["parabola", "cubic", "akima"], "of Approach 2", flag_values=FLAGS
)
flags.DEFINE_list(
    "budgets",
    [],
    "of Approach 2: their FLOPs; or the column that names them; or the tolerance that groups FLOPs",
    flag_values=FLAGS,
)
flags.DEFINE_float(
    "window", None, "Approach 2 keeps N within this factor of the best", flag_values=FLAGS
)
flags.DEFINE_enum(
    "interval", "residual", ["residual", "pairs"], "bootstrap of Approaches 2, 3", flag_values=FLAGS
)
flags.DEFINE_integer("seed", 0, "of the bootstrap", flag_values=FLAGS)


def main() -> int | None:
    if not FLAGS.runs:
        raise BadInput("--runs is missing; as --runs=runs/isoflop_cpu")
    command.check_folder("--out", FLAGS.out, "fits")
    out = Path(FLAGS.out)
    console, progress = Console(), Console(stderr=True)
    with progress.status("reading") as status:

        def say(what: str) -> None:
            status.update(what)

        path, other = Path(FLAGS.compare or ""), None
        if path.suffix == ".json":  # before the fits, which take their time
            other = read_law_file(path)
        study = _study(FLAGS.runs, FLAGS.curves, say)
        if FLAGS.compare:
            say(f"comparing with {FLAGS.compare}")
            other = other or _study([path], [], say).law
            comparison = compare(study.law, other, FLAGS.compare, FLAGS.seed)
            study = dataclasses.replace(study, comparison=comparison)
        say("drawing")
        write(study, out)
    print_exponents(study, console)
    console.print(f"[dim]{out / 'law.json'}  {out / 'report.html'}", highlight=False)


def read(
    paths: Sequence[str | Path],
    curves: Sequence[str | Path] = (),
    columns: dict[str, str] | None = None,
    loss_unit: str = "nats",
) -> tuple[RunTable, CurveTable | None]:
    """Run tables with their curves: those of `curves`, else each curves.csv beside a table."""
    paths = [Path(path) for path in paths]
    runs = read_runs(paths, exported_columns(paths, columns or {}), loss_unit)
    beside = [(path if path.is_dir() else path.parent) / "curves.csv" for path in paths]
    found = [Path(path) for path in curves] or [path for path in beside if path.exists()]
    return runs, read_any_curves(found, runs) if found else None


def fit(
    runs: RunTable,
    curves: CurveTable | None = None,
    *,
    approaches: Sequence[str] = APPROACHES,
    accounting: Sequence[str] = (),
    bootstrap: int = 4000,
    drop_highest_loss: int = 0,
    budgets: str | float | Sequence[float] | None = None,
    estimator: str = "parabola",
    window: float | None = None,
    interval: str = "residual",
    seed: int = 0,
    progress: Callable[[str], None] = lambda what: None,
) -> Study:
    """Fits, recounts and checks a table; `study.law` is the content of law.json.

    accounting: at most one convention of N and one of C; the other then is blocks_and_head or 6nd.
    Raises BadInput for impossible settings, and where no approach at all can be fitted.
    """
    for approach in approaches:
        one_of("approach", approach, APPROACHES)
    if window is not None and not window > 1:
        raise BadInput(f"window = {window:g}: a factor above 1, as 6 for N/6 to 6 N")
    runs, curves, conventions = _recounted(runs, curves, accounting)
    runs, curves = _without_highest(runs, curves, drop_highest_loss)

    def envelope(bootstrap: int) -> AllocationFit:
        if curves is None:
            raise CannotFit("no_curves", "Approach 1 needs training curves (curves.csv)")
        return fit_envelope(curves, bootstrap=bootstrap, seed=seed)

    def isoflop(table: RunTable, bootstrap: int = 0) -> AllocationFit:
        return fit_isoflop(
            table, budgets=budgets, estimator=estimator, window=window,
            bootstrap=bootstrap, interval=interval, seed=seed,
        )  # fmt: skip

    def parametric(table: RunTable, bootstrap: int = 0, starts=HOFFMANN_STARTS) -> AllocationFit:
        return fit_parametric(
            table, bootstrap=bootstrap, starts=starts, interval=interval, seed=seed
        )

    fitters = {
        "envelope": envelope,
        "isoflop": lambda draws: isoflop(runs, draws),
        "parametric": lambda draws: parametric(runs, draws),
    }
    fits, refused = {}, {}
    for approach in (name for name in APPROACHES if name in approaches):
        progress(f"fitting {approach}")
        try:
            fits[approach] = fitters[approach](bootstrap)
        except CannotFit as error:
            refused[approach] = str(error)
    if not fits:
        reasons = "; ".join(f"{name} ({reason})" for name, reason in refused.items())
        raise BadInput(f"no approach can be fitted to these {len(runs)} runs: {reasons}")

    refits = {"isoflop": isoflop}
    if "parametric" in fits:
        # Refits are many: they start where the fit ended and from a fiftieth of the grid.
        law = fits["parametric"].law
        end = [np.log(law.A), np.log(law.B), np.log(max(law.E, 1e-9)), law.alpha, law.beta]
        starts = np.vstack([end, HOFFMANN_STARTS[::50]])
        refits["parametric"] = lambda table: parametric(table, starts=starts)
    refits = {name: refit for name, refit in refits.items() if name in fits}
    progress("checking on runs left out")
    checks = _check(runs, refits)
    progress("recounting")
    by = next(iter(refits), "")
    exponents, no_exponents = [], "neither Approach 2 nor Approach 3 was fitted"
    try:
        if by:
            few = min(bootstrap, 1000)
            recounted_fit = (lambda table: isoflop(table, few)) if by == "isoflop" else refits[by]
            exponents, no_exponents = exponents_by_accounting(runs, recounted_fit), ""
    except (BadInput, CannotFit) as error:
        no_exponents = str(error)
    return Study(
        runs=runs,
        curves=curves,
        fits=fits,
        refused=refused,
        accounting=conventions,
        exponents=exponents,
        exponents_by=by,
        no_exponents=no_exponents,
        **checks,
    )


def write(study: Study, out: str | Path, more: Sequence[str] = ()) -> None:
    """Writes figures/*.svg, law.json and, last, report.html into the folder `out`.

    more: sections of the page, HTML, after its checks.
    """
    # Imported here: matplotlib takes a second that a refusal need not wait for.
    from lm.report import figures, page

    out = Path(out)
    drawn = figures.figures(study.fits, study.runs, study.curves, study.experts)
    text = page.page(study, drawn, more)
    law = json.dumps(study.law, indent=1, allow_nan=False, ensure_ascii=False)
    law = _NUMBERS.sub(lambda match: "[" + " ".join(match[1].split()) + "]", law)
    for name, svg in drawn.items():
        command.write_atomically(out / "figures" / f"{name}.svg", svg)
    command.write_atomically(out / "law.json", law + "\n")
    command.write_atomically(out / "report.html", text)


def _study(paths, curves, progress) -> Study:
    """The study of the tables at `paths`, by the flags."""
    columns = dict(_pair(text) for text in FLAGS.columns)
    runs, curves = read(paths, curves, columns, FLAGS.loss_unit)
    study = fit(
        runs,
        curves,
        approaches=FLAGS.approaches,
        accounting=FLAGS.accounting,
        bootstrap=FLAGS.bootstrap,
        drop_highest_loss=FLAGS.drop_highest_loss,
        budgets=_budgets(FLAGS.budgets),
        estimator=FLAGS.estimator,
        window=FLAGS.window,
        interval=FLAGS.interval,
        seed=FLAGS.seed,
        progress=progress,
    )
    return dataclasses.replace(study, experts=read_expert_loads(paths, runs))


def _budgets(texts: list[str]) -> str | float | list[float] | None:
    """--budgets as Approach 2 takes it: a column, a tolerance below 1, or the FLOPs themselves."""
    try:
        numbers = [float(text) for text in texts]
    except ValueError:
        if len(texts) > 1:
            raise BadInput(f"--budgets={','.join(texts)}: one column, or numbers only") from None
        return texts[0]
    if len(numbers) == 1 and not 0 < numbers[0] < 1:
        raise BadInput(f"--budgets={texts[0]}: one number is a tolerance, between 0 and 1")
    return numbers[0] if len(numbers) == 1 else numbers or None


def _pair(text: str) -> tuple[str, str]:
    ours, equals, theirs = text.partition("=")
    if not (ours and equals and theirs):
        raise BadInput(f"--columns={text!r}: renames look like ours=theirs, as params=N")
    return ours.strip(), theirs.strip()


def _recounted(runs, curves, accounting):
    """(runs, curves, names of the conventions) under `accounting`; unchanged where it is empty."""
    if not accounting:
        # Tables of lm.sweep count blocks and head, and name how they count FLOPs.
        flops = column(runs, "flops_convention")
        ours = isinstance(flops, str) and flops in FLOPS_CONVENTIONS
        params = "blocks_and_head" if ours else AS_IN_THE_TABLE
        return runs, curves, {"params": params, "flops": flops if ours else AS_IN_THE_TABLE}
    for name in accounting:
        one_of("accounting", name, (*PARAMS_CONVENTIONS, *FLOPS_CONVENTIONS))
    params = [name for name in accounting if name in PARAMS_CONVENTIONS]
    flops = [name for name in accounting if name in FLOPS_CONVENTIONS]
    if max(len(params), len(flops)) > 1:
        raise BadInput(f"accounting = {','.join(accounting)}: one convention of N and one of C")
    names = {"params": (params or ["blocks_and_head"])[0], "flops": (flops or ["6nd"])[0]}
    recounted = recount(runs, **names)
    if curves is not None:
        row = {name: i for i, name in enumerate(runs.run_id)}
        rows = np.array([row[name] for name in curves.run_id])
        curves = dataclasses.replace(
            curves,
            params=recounted.params[rows],
            flops=curves.flops * (recounted.flops / runs.flops)[rows],
        )
    return recounted, curves, names


def _without_highest(runs, curves, k):
    """The table and its curves without the k highest losses, which `excluded` then names."""
    if k == 0:
        return runs, curves
    if k >= len(runs):
        raise BadInput(f"drop_highest_loss = {k}: the table has only {len(runs)} runs")
    order = np.argsort(-runs.loss, kind="stable")
    dropped = tuple(
        f"{runs.run_id[i]}: loss {runs.loss[i]:.3f}, among the {k} highest" for i in order[:k]
    )
    kept = runs.where(np.sort(order[k:]))
    kept = dataclasses.replace(kept, excluded=(*runs.excluded, *dropped))
    return kept, curves.of(kept) if curves else None


def _check(runs: RunTable, refits) -> dict[str, dict]:
    """Each fit without its highest losses, and without its top budget; or why not."""
    highest_out, held_out, unchecked = {}, {}, {}
    for name, refit in refits.items():
        highest_out[name] = []
        for k in (k for k in HIGHEST_OUT if k < len(runs)):
            try:
                highest_out[name] += leave_highest_out(runs, refit, (k,))
            except CannotFit as error:
                unchecked[f"{name}, {k} highest losses out"] = str(error)
        try:
            held_out[name] = leave_top_budget_out(runs, refit)
        except CannotFit as error:
            unchecked[f"{name}, top budget out"] = str(error)
    return {"highest_out": highest_out, "held_out": held_out, "unchecked": unchecked}


if __name__ == "__main__":
    sys.exit(command.run(main, FLAGS, __doc__))
