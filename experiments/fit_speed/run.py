"""How long Approach 3 takes here and in plain scipy, on the same 240 points, in one run.

    python -m experiments.fit_speed.run [--scipy_share=0.1]

Every timing is a first call in this process: nothing is compiled, nothing is warm. The scipy side
is the usual notebook, `minimize(method="L-BFGS-B")` in a loop on the same objective, its tolerances
set to end at the same gradient norm (its defaults stop far short of it: the objective is of order
1e-3). `--scipy_share` runs that share of scipy's starts and draws and scales its seconds up.
"""

import json
import os
import sys
import time
from pathlib import Path

# Before numpy: scipy's 5 x 5 problems only lose by BLAS threads, ours use none.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
import scipy
from absl import flags
from rich.console import Console
from rich.table import Table
from scipy.optimize import minimize, nnls

from lm import command
from lm.command import BadInput, write_atomically

FLAGS = flags.FlagValues()
flags.DEFINE_float(
    "scipy_share", 1.0, "share of scipy's starts and draws", 1e-3, 1.0, flag_values=FLAGS
)
flags.DEFINE_string("out", None, "where to write the JSON; none by default", flag_values=FLAGS)

HERE = Path(__file__).parent
DATA = Path(os.environ.get("LM_PUBLISHED_RUNS", HERE.parents[2] / "shared" / "data"))
EPOCH = DATA / "epoch_chinchilla" / "svg_extracted_data.csv"
DELTA, DRAWS = 1e-3, 4000
OPTIONS = {"ftol": 0.0, "gtol": 1e-8, "maxiter": 1000, "maxfun": 10_000}


def main() -> int | None:
    if not EPOCH.exists():
        raise BadInput(f"no {EPOCH}: set LM_PUBLISHED_RUNS to the folder of published run tables")
    started = time.perf_counter()
    from lm.scaling import fit_parametric, read_runs
    from lm.scaling.objective import HOFFMANN_STARTS

    imported = time.perf_counter() - started
    runs = read_runs(EPOCH, columns={"params": "Model Size", "flops": "Training FLOP"})
    runs = runs.where(np.argsort(-runs.loss)[5:])
    rows = []

    def measure(what, ours, theirs):
        wall, cpu = time.perf_counter(), time.process_time()
        result = ours()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        rows.append({"what": what, "seconds": wall, "cpu_seconds": cpu, "result": result})
        for name, baseline in theirs.items():
            cpu = time.process_time()
            result = baseline()
            rows[-1][name] = (time.process_time() - cpu) * result.pop("scale", 1.0)
            rows[-1][f"{name}_result"] = result

    def ends(fit):
        return {
            "starts": fit.starts,
            "gradient_norm_below_1e-6": fit.converged,
            "at_best": fit.at_best,
            "objective": fit.objective,
        }

    measure(
        "4,500 starts",
        lambda: ends(fit_parametric(runs, bootstrap=0)),
        {
            "scipy": lambda: scipy_starts(runs, HOFFMANN_STARTS, analytic=True),
            "scipy_finite_differences": lambda: scipy_starts(runs, HOFFMANN_STARTS, analytic=False),
        },
    )
    best = fit_parametric(runs, starts=HOFFMANN_STARTS[7::90], bootstrap=0).law
    theta = np.array([np.log(best.A), np.log(best.B), np.log(best.E), best.alpha, best.beta])

    def bootstrap():
        fit = fit_parametric(runs, starts=theta[None], bootstrap=DRAWS, interval="pairs")
        return {"draws": len(fit.draws), "sd_alpha": float(fit.draws[:, 3].std())}

    measure("4,000 pairs bootstraps", bootstrap, {"scipy": lambda: scipy_bootstrap(runs, theta)})
    measure(
        "variable projection",
        lambda: {"a": fit_parametric(runs, method="variable_projection", bootstrap=0).a},
        {"scipy": lambda: scipy_variable_projection(runs)},
    )
    report = {
        "schema": 1,
        "cores": os.cpu_count(),
        "load_before": os.getloadavg()[1],
        "numpy": np.__version__,
        "scipy": scipy.__version__,
        "import_seconds": imported,
        "scipy_share": FLAGS.scipy_share,
        "rows": rows,
    }
    if FLAGS.out:
        write_atomically(FLAGS.out, json.dumps(report, indent=1) + "\n")
    show(report)


def show(report) -> None:
    table = Table(title=f"{report['cores']} cores, load {report['load_before']:.1f}, float64")
    for name in ("", "seconds", "CPU seconds", "scipy, CPU s", "scipy, finite differences", "ends"):
        table.add_column(name, justify="left" if name in ("", "ends") else "right")
    for row in report["rows"]:
        table.add_row(
            row["what"],
            f"{row['seconds']:.3f}",
            f"{row['cpu_seconds']:.3f}",
            f"{row['scipy']:.3f}" if "scipy" in row else "",
            f"{row['scipy_finite_differences']:.1f}" if "scipy_finite_differences" in row else "",
            ", ".join(f"{k} {v:.11g}" for k, v in row["result"].items()),
        )
    console = Console(width=150)
    console.print(table)
    for row in report["rows"]:
        console.print(f"scipy, {row['what']}: {row['scipy_result']}", highlight=False)
    note = (
        "" if report["scipy_share"] == 1 else f"; scipy from a share of {report['scipy_share']:g}"
    )
    console.print(f"import of lm.scaling {report['import_seconds']:.2f} s{note}", highlight=False)


def objective(theta, log_params, log_tokens, log_loss, weights):
    """Value and gradient of the sum of Huber residuals, one theta: plain numpy."""
    size = np.exp(theta[0] - theta[3] * log_params)
    data = np.exp(theta[1] - theta[4] * log_tokens)
    floor = np.exp(theta[2])
    total = size + data + floor
    residual = np.log(total) - log_loss
    slope = np.clip(residual, -DELTA, DELTA)
    value = (weights * slope * (residual - slope / 2)).sum()
    slope = weights * slope / total
    size, data = size * slope, data * slope
    by_constants = [size.sum(), data.sum(), floor * slope.sum()]
    return value, np.array([*by_constants, -(size @ log_params), -(data @ log_tokens)])


def lbfgs(function, start, given, analytic):
    return minimize(function, start, args=given, jac=analytic, method="L-BFGS-B", options=OPTIONS).x


def columns(runs):
    return np.log(runs.params), np.log(runs.tokens), np.log(runs.loss)


def scipy_starts(runs, starts, analytic: bool):
    x, y, z = columns(runs)
    chosen = starts[:: round(1 / FLAGS.scipy_share)]
    if analytic:
        function = objective
    else:
        function = lambda *given: objective(*given)[0]  # noqa: E731
    ends = []
    with np.errstate(over="ignore", invalid="ignore"):
        for start in chosen:
            end = lbfgs(function, start, (x, y, z, 1.0), analytic)
            value, gradient = objective(end, x, y, z, 1.0)
            ends.append((value, np.linalg.norm(gradient)))
    values, norms = np.array(ends).T
    return {
        "scale": len(starts) / len(chosen),
        "starts": len(chosen),
        "gradient_norm_below_1e-6": int((norms < 1e-6).sum()),
        "at_best": int((values < np.nanmin(values) * (1 + 1e-6)).sum()),
        "objective": float(np.nanmin(values)),
    }


def scipy_bootstrap(runs, theta):
    x, y, z = columns(runs)
    rng = np.random.default_rng(0)
    draws = round(DRAWS * FLAGS.scipy_share)
    found = []
    for _ in range(draws):
        weights = rng.multinomial(len(z), np.full(len(z), 1 / len(z))).astype(float)
        found.append(lbfgs(objective, theta, (x, y, z, weights), True))
    return {"scale": DRAWS / draws, "draws": draws, "sd_alpha": float(np.std(found, axis=0)[3])}


def scipy_variable_projection(runs):
    """Nelder-Mead over alpha, beta, with scipy's nnls for E, A, B inside."""
    log_params, log_tokens, _ = columns(runs)
    x, y = log_params - log_params.mean(), log_tokens - log_tokens.mean()

    def error(exponents):
        basis = np.stack([np.ones_like(x), np.exp(-exponents[0] * x), np.exp(-exponents[1] * y)])
        return nnls(basis.T, runs.loss)[1]

    options = {"xatol": 1e-8, "fatol": 1e-12}
    found = min(
        (minimize(error, start, method="Nelder-Mead", options=options) for start in STARTS_2D),
        key=lambda end: end.fun,
    )
    return {"a": float(found.x[1] / found.x.sum())}


STARTS_2D = [(alpha, beta) for alpha in (0.2, 0.5, 1.0) for beta in (0.2, 0.5, 1.0)]


if __name__ == "__main__":
    sys.exit(command.run(main, FLAGS, __doc__))
