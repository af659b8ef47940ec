"""Nine sizes, five tasks, seven metrics: where the jumps are, and whose.

    python -m experiments.emergence_trained.run --workdir=runs/emergence_trained [--norun]

Trains and tests what is missing, then writes ``results/``; ``--norun`` reads what is there.
"""

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from absl import flags

from experiments.emergence_trained import problems
from experiments.emergence_trained.problems import LENGTH
from experiments.emergence_trained.study import BYTES, WIDTHS
from experiments.results import as_csv, save
from lm import command
from lm.command import BadInput, write_atomically
from lm.config_file import load
from lm.evaluate import Scorer
from lm.evaluate.tasks import Prompting, by_likelihood, by_writing
from lm.scaling import TokenLossLaw, emergence_score, exact_match, sharpness, token_accuracy
from lm.train.device import keep_compiled
from lm.train.loop import train
from lm.train.metrics import read_metrics

HERE = Path(__file__).resolve().parent
SEEDS = (0, 1, 2, 3, 4)
SHOTS = (0, 1, 2, 4)
POOL = 64  # training problems that a question's shots are drawn from
KEPT = ("task", "width", "seed", "params", "shots", "questions")

FLAGS = flags.FlagValues()
flags.DEFINE_string("workdir", None, "folder of the runs", flag_values=FLAGS)
flags.DEFINE_bool("run", True, "train and test what is missing", flag_values=FLAGS)
flags.DEFINE_integer("questions", 400, "held-out problems a task", 4, flag_values=FLAGS)
flags.DEFINE_list("widths", [str(w) for w in WIDTHS], "sizes of the models", flag_values=FLAGS)
flags.DEFINE_string("results", str(HERE / "results"), "where results go", flag_values=FLAGS)
flags.DEFINE_multi_string("override", [], "of all runs, as train.tokens=1e5", flag_values=FLAGS)


def runs() -> list[tuple[str, int, int]]:
    """(corpus, width, seed) of all runs."""
    return [(c, int(w), s) for c in problems.CORPORA for s in SEEDS for w in FLAGS.widths]


def train_all(workdir: Path) -> None:
    """Every run that is missing, each going on from its newest checkpoint."""
    for corpus in problems.CORPORA:
        if not (path := workdir / f"{corpus}.jsonl").exists():
            write_atomically(path, problems.as_file(corpus, 0, BYTES[corpus]))
    programs: dict = {}
    for corpus, width, seed in runs():
        settings = [f"data.files={workdir / corpus}.jsonl", f"data.data_dir={workdir / 'data'}",
                    f"train.seed={seed}", *FLAGS.override]  # fmt: skip
        config = load(f"{HERE / 'study.py'}:{corpus}_{width}", settings)
        folder = workdir / f"{corpus}_{width}-s{seed}"
        print(folder.name, train(config, folder, programs=programs)["loss"], flush=True)


def tested(scorer: Scorer, task: str, shots: int) -> dict:
    """The metrics of one model on one task; lists are by the tokens of the answer."""
    written, right, choices = [], [], []
    operations = problems.OPERATIONS if task == "hidden" else ("",)
    for operation in operations:
        n = FLAGS.questions // len(operations)
        questions = problems.questions(task, operation, 0, n, held_out=True)
        pool = problems.questions(task, operation, 0, POOL, held_out=False)
        prompting = Prompting(shots, pool, seed=0, gap="", between="\n")
        written += by_writing(scorer, questions, prompting, max_tokens=LENGTH[task])
        pairs = [(prompting.context(questions, i), q.target) for i, q in enumerate(questions)]
        found = scorer.log_likelihoods(pairs)
        for record, question, judged in zip(written[-n:], questions, found, strict=True):
            text = record["prediction"] or ""
            record["right_to"] = [text[:k] == question.target[:k]
                                  for k in range(1, LENGTH[task] + 1)]  # fmt: skip
            right.append(judged.token_log_probs)
        if not shots:
            choices += by_likelihood(scorer, questions, prompting)
    log_p_QL = np.array(right)
    result = {
        "loss": -log_p_QL.mean(),
        "exact_match": np.mean([r["exact_match"] for r in written]),
        "edit_distance": np.mean([r["edit_distance"] for r in written]) / LENGTH[task],
        "token_brier_score": np.mean([r["token_brier_score"] for r in written]) / LENGTH[task],
        "drawn_match": np.exp(log_p_QL.sum(1)).mean(),
        "loss_by_token": -log_p_QL.mean(0),
        "exact_match_by_length": np.mean([r["right_to"] for r in written], 0),
        "drawn_match_by_length": np.exp(np.cumsum(log_p_QL, 1)).mean(0),
    }
    for name in ("accuracy", "brier_score") if choices else ():
        result[f"choice_{name}"] = np.mean([r[name] for r in choices])
    return {name: np.round(value, 5).tolist() for name, value in result.items()}


def measured(workdir: Path) -> list[dict]:
    """A row a task, model and number of shots; kept in the runs' folders."""
    rows = []
    for corpus, width, seed in runs():
        folder = workdir / f"{corpus}_{width}-s{seed}"
        path = folder / f"metrics-{FLAGS.questions}.json"
        if not path.exists():
            if not FLAGS.run:
                raise BadInput(f"{path} is missing: run without --norun first")
            params = json.loads((folder / "result.json").read_text())["params"]
            scorer = Scorer.open(folder)
            found = [
                dict(zip(KEPT, (task, width, seed, params, shots, FLAGS.questions), strict=True))
                | tested(scorer, task, shots)
                for task in problems.TESTED[corpus]
                for shots in SHOTS
            ]
            write_atomically(path, json.dumps(found, indent=1))
        rows += json.loads(path.read_text())
    return sorted(rows, key=lambda r: (r["task"], r["shots"], r["params"], r["seed"]))


def column(rows: list[dict], task: str, name: str, shots: int = 0) -> np.ndarray:
    """Of one task, (sizes, seeds, ...), smallest first."""
    chosen = [r for r in rows if r["task"] == task and r["shots"] == shots]
    values = np.array([r[name] for r in chosen])
    return values.reshape(-1, len(SEEDS), *values.shape[1:])


def fit(rows: list[dict], task: str) -> TokenLossLaw:
    """The law of 0-shot losses, all seeds."""
    params, loss = (column(rows, task, name).ravel() for name in ("params", "loss"))
    return TokenLossLaw(c=3e4, alpha=-1.0).fit(params, loss=loss)


def claim(rows: list[dict], task: str) -> dict:
    """How far greedy exact match is from p^L and from drawn answers', over sizes and lengths."""
    found_SRL = column(rows, task, "exact_match_by_length")
    lengths_L = np.arange(1, found_SRL.shape[-1] + 1)
    p_SR1 = token_accuracy(column(rows, task, "loss"))[..., None]
    drawn_SRL = column(rows, task, "drawn_match_by_length")
    predicted_SRL = exact_match(p_SR1, lengths_L)

    def distance(a, b):
        return {"rms": round(float(np.sqrt(np.mean((a - b) ** 2))), 3),
                "mean": round(float(np.mean(a - b)), 3),
                "largest": round(float(np.abs(a - b).max()), 3)}  # fmt: skip

    return {"greedy_less_p_to_the_L": distance(found_SRL, predicted_SRL),
            "drawn_less_p_to_the_L": distance(drawn_SRL, predicted_SRL),
            "greedy_less_drawn": distance(found_SRL, drawn_SRL)}  # fmt: skip


def shapes(rows: list[dict], task: str) -> dict:
    """Sharpness and emergence score of each metric over the sizes, mean of seeds."""
    params = column(rows, task, "params")[:, 0]
    result = {}
    metrics = ("exact_match", "choice_accuracy", "edit_distance", "token_brier_score",
               "choice_brier_score", "loss")  # fmt: skip
    for name in metrics:
        metric = column(rows, task, name).mean(1)
        # What a test cannot tell from 0 counts as its resolution.
        seen = np.maximum(metric, 1 / FLAGS.questions)
        score = float(f"{float(emergence_score(metric)):.3g}")
        result[name] = {"sharpness": round(float(sharpness(seen, params)), 2), "emergence": score}
    return result


def summarise(rows: list[dict]) -> dict:
    result = {}
    for task in problems.TASKS:
        law = fit(rows, task)
        params, loss = column(rows, task, "params"), column(rows, task, "loss")
        residual = np.log(law.loss(params) / loss)
        visible = law.smallest_visible_params(LENGTH[task], FLAGS.questions)
        result[task] = {
            "law": {"c": float(f"{law.c:.4g}"), "alpha": round(law.alpha, 3),
                    "rms_residual_of_log_loss": round(float(np.sqrt(np.mean(residual**2))), 3),
                    "visible_from_params": float(f"{visible:.3g}")},
            "claim": claim(rows, task),
            "shapes": shapes(rows, task),
        }  # fmt: skip
    return {"schema": 1} | result


def table(rows: list[dict], task: str) -> str:
    """Markdown: the metrics of each size, mean of seeds."""
    length = LENGTH[task]
    names = {
        "loss": "loss, nats a token", "edit_distance": "edit distance a token",
        "token_brier_score": "Brier, a token", "choice_brier_score": "Brier, of 4",
        "choice_accuracy": "best of 4", "exact_match": "exact match",
        "drawn_match": "of drawn answers",
    }  # fmt: skip
    shots = [f"{k} shot{'s' * (k > 1)}" for k in SHOTS[1:]]
    head = ["N", *names.values(), f"p^{length}", *shots]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    match_S = exact_match(token_accuracy(column(rows, task, "loss")), length).mean(1)
    for i, params in enumerate(column(rows, task, "params")[:, 0]):
        cells = [f"{params:,}", *(f"{column(rows, task, n).mean(1)[i]:.3f}" for n in names)]
        cells.append(f"{match_S[i]:.3f}")
        cells += [f"{column(rows, task, 'exact_match', k).mean(1)[i]:.3f}" for k in SHOTS[1:]]
        lines.append(f"| {' | '.join(cells)} |")
    return f"**{task}**\n\n" + "\n".join(lines) + "\n"


def draw(rows: list[dict], path: Path) -> None:
    """A row a task: the metric that jumps, those that don't, the loss with its law, the shots."""
    n = len(problems.TASKS)
    figure, axes = plt.subplots(n, 4, figsize=(14, 3 * n), sharex=True, layout="constrained")
    for row, task in zip(axes, problems.TASKS, strict=True):
        params, length = column(rows, task, "params")[:, 0], LENGTH[task]
        dense = np.geomspace(params[0], params[-1], 200)
        law, loss = fit(rows, task), column(rows, task, "loss")

        def of(name, panel, label, style="o-", shots=0, task=task, params=params, **kinds):
            values = column(rows, task, name, shots)
            (line,) = panel.plot(params, values.mean(1), style, ms=4, lw=1.4, label=label, **kinds)
            if "o" in style:
                for seed in values.T:
                    panel.plot(params, seed, ".", ms=6, alpha=0.5, color=line.get_color())

        of("exact_match", row[0], "greedy answers", color="C3")
        of("drawn_match", row[0], "drawn answers", "s--", color="C1")
        predicted = exact_match(token_accuracy(loss), length).mean(1)
        row[0].plot(params, predicted, "k:", lw=1.6, label=f"$p^{length}$, p = exp(-loss)")
        law_match = np.exp(-length * law.loss(dense))
        row[0].plot(dense, law_match, color="0.6", lw=1, label=f"$p^{length}$ by the law")
        of("choice_accuracy", row[1], "best of 4", color="C4")
        of("choice_brier_score", row[1], "Brier score of 4", color="C5")
        of("token_brier_score", row[1], "Brier score a token", color="C2")
        of("edit_distance", row[1], "edit distance a token", color="C0")
        of("loss", row[2], "nats a token", color="C0")
        told = f"$(N / {law.c / 1e3:.1f}\\,k)^{{{law.alpha:.2f}}}$"
        row[2].plot(dense, law.loss(dense), color="0.6", lw=1, label=told)
        chance = np.log(10 if task in problems.SIZES else problems.MODULUS)
        row[2].axhline(chance, color="0.4", lw=0.8, ls=":")
        row[2].set(yscale="log", ylim=(min(loss.min() / 1.5, 0.05), 6 * chance))
        for shots, colour in zip(
            SHOTS, plt.cm.viridis(np.linspace(0, 0.85, len(SHOTS))), strict=True
        ):
            label = f"{shots} example{'s' * (shots != 1)}"
            of("exact_match", row[3], label, shots=shots, color=colour)
        titles = ("exact match", "other metrics", "loss (dotted: chance)", "exact match by shots")
        for panel, title in zip(row, titles, strict=True):
            panel.set(xscale="log", title=f"{task}: {title}")
            panel.title.set_fontsize(10)
            panel.legend(fontsize=7, framealpha=0.6, ncol=2, loc="upper left")
        for panel in (row[0], row[1], row[3]):
            panel.set_ylim(-0.04, 1.32)
    for panel in axes[-1]:
        panel.set_xlabel("parameters, blocks and head")
    save(figure, path, dpi=100)


def curves(workdir: Path) -> list[dict]:
    """The training loss of every run, along its tokens."""
    return [
        {"corpus": corpus, "width": width, "seed": seed, "tokens": line["tokens"],
         "train_loss": round(line["train_loss"], 4)}
        for corpus, width, seed in runs()
        for line in read_metrics(workdir / f"{corpus}_{width}-s{seed}")
    ]  # fmt: skip


def draw_training(lines: list[dict], path: Path) -> None:
    """A panel a corpus, a curve a run."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
    widths = sorted({line["width"] for line in lines})
    colours = dict(zip(widths, plt.cm.viridis(np.linspace(0, 0.95, len(widths))), strict=True))
    for panel, corpus in zip(axes, problems.CORPORA, strict=True):
        for width in widths:
            for seed in SEEDS:
                key = (corpus, width, seed)
                run = [x for x in lines if (x["corpus"], x["width"], x["seed"]) == key]
                points = np.array([(x["tokens"], x["train_loss"]) for x in run])
                label = f"width {width}" if seed == SEEDS[0] else None
                panel.plot(*points.T, lw=1, color=colours[width], label=label)
        panel.set(xlabel="tokens", title=f"corpus {corpus}", ylim=(0.8, 2))
        panel.xaxis.set_major_formatter(lambda x, _: f"{x / 1e6:g} M")
    axes[0].set_ylabel("training loss, nats a token")
    axes[1].legend(fontsize=7, ncol=2)
    save(figure, path, dpi=100)


def main() -> None:
    if not FLAGS.workdir:
        raise BadInput("--workdir must be given, e.g. --workdir=runs/emergence_trained")
    workdir, results = Path(FLAGS.workdir).resolve(), Path(FLAGS.results)
    keep_compiled()
    if FLAGS.run:
        train_all(workdir)
    rows = measured(workdir)
    write_atomically(results / "metrics.csv", as_csv(rows))
    lines = curves(workdir)
    write_atomically(results / "curves.csv", as_csv(lines))
    draw_training(lines, results / "training.png")
    write_atomically(results / "summary.json", json.dumps(summarise(rows), indent=1) + "\n")
    tables = "\n".join(table(rows, task) for task in problems.TASKS)
    write_atomically(results / "table.md", tables)
    draw(rows, results / "emergence_trained.png")
    print(tables, end="")


if __name__ == "__main__":
    sys.exit(command.run(main, FLAGS, __doc__))
