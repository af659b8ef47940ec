"""How good a run's newest checkpoint is on text: loss, perplexity, bits per byte; and on tasks.

python -m lm.evaluate --workdir=runs/tiny [--split=test]
python -m lm.evaluate --workdir=runs/tiny --corpus='text:my_text/*.txt' [--json]
python -m lm.evaluate --workdir=runs/tiny --task=sums.jsonl --shots=5

Without --corpus and --task the run's own held-out windows; of a corpus (pd_english, text:GLOB, or a
TFDS name) every document on its own. A task is a file of JSON lines, {"prompt", "choices",
"answer"} or {"prompt", "target"}. Standard errors are between documents, and between questions.
"""

import errno
import json
import os
import re
import sys
import tempfile
from pathlib import Path

from absl import flags

from lm import command
from lm.command import BadInput, write_atomically

FLAGS = flags.FlagValues()
flags.DEFINE_string("workdir", None, "A run's folder.", flag_values=FLAGS)
flags.DEFINE_multi_string("corpus", [], "What to read; may be repeated.", flag_values=FLAGS)
flags.DEFINE_string(
    "split", None, "train, validation (the run's own), test; of a corpus also all (its default).",
    flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_integer("seq_len", 0, "Tokens of a window (0: the run's own).", flag_values=FLAGS)
flags.DEFINE_integer(
    "stride", 0, "Of a long document's windows (0: no overlap).", flag_values=FLAGS
)
flags.DEFINE_integer("tokens", 0, "Of the run's own data (0: as in training).", flag_values=FLAGS)
flags.DEFINE_integer("documents", 0, "Of each corpus, the first (0: all).", flag_values=FLAGS)
flags.DEFINE_integer("batch_tokens", 8_192, "Positions computed at a time.", flag_values=FLAGS)
flags.DEFINE_multi_string("task", [], "A task file; may be repeated.", flag_values=FLAGS)
flags.DEFINE_integer("shots", 0, "Questions shown with their answers.", flag_values=FLAGS)
flags.DEFINE_string("shots_from", None, "Their file (the task's own).", flag_values=FLAGS)
flags.DEFINE_integer("shots_seed", None, "Draws them (else the first).", 0, flag_values=FLAGS)
flags.DEFINE_bool("reasoning", False, "Shots show theirs: chain of thought.", flag_values=FLAGS)
flags.DEFINE_string("answer", None, "A text's last match of this regex.", flag_values=FLAGS)
flags.DEFINE_integer("max_tokens", 64, "Of an answer, at most.", flag_values=FLAGS)
flags.DEFINE_integer("samples", 1, "Of a question, which vote.", flag_values=FLAGS)
flags.DEFINE_float("temperature", 0.0, "Of the samples.", flag_values=FLAGS)
flags.DEFINE_integer("seed", 0, "Of the samples.", 0, flag_values=FLAGS)
flags.DEFINE_string("gap", " ", "Between question and answer.", flag_values=FLAGS)
flags.DEFINE_string("between", r"\n\n", "Between answer and question.", flag_values=FLAGS)
flags.DEFINE_bool("cut", False, "Prompts too long lose their start.", flag_values=FLAGS)
flags.DEFINE_string("records", None, "File for each question's metrics.", flag_values=FLAGS)
flags.DEFINE_bool("json", False, "One object instead of a table.", flag_values=FLAGS)

OF_TASKS = (
    *("shots", "shots_from", "shots_seed", "reasoning", "answer", "max_tokens", "samples"),
    *("temperature", "seed", "gap", "between", "cut", "records"),
)
GO_WITH = dict.fromkeys(("stride", "documents"), "corpus") | dict.fromkeys(OF_TASKS, "task")


def main() -> None:
    if FLAGS.workdir is None:
        raise BadInput("--workdir is missing; as --workdir=runs/tiny")
    for name, needed in GO_WITH.items():
        if FLAGS[name].value != FLAGS[name].default and not FLAGS[needed].value:
            raise BadInput(f"--{name} goes with --{needed}, which is not given")
    if FLAGS.task and FLAGS.split and not FLAGS.corpus:
        raise BadInput("--split does not go with --task alone: a task has no parts")
    if FLAGS.tokens and (FLAGS.task or FLAGS.corpus):
        raise BadInput("--tokens goes with the run's own data, not with --corpus or --task")
    for name in ("seq_len", "stride", "tokens", "documents"):
        if FLAGS[name].value < 0:
            raise BadInput(f"--{name}={FLAGS[name].value}: must be 0 or more")
    if FLAGS.batch_tokens < 1:
        raise BadInput(f"--batch_tokens={FLAGS.batch_tokens}: must be 1 or more")
    if FLAGS.records:
        _check_file("--records", FLAGS.records)
    tasks = _tasks()
    from lm.evaluate.corpus import held_out, summarise, texts
    from lm.evaluate.scorer import Scorer

    scorer = Scorer.open(FLAGS.workdir, max_length=FLAGS.seq_len, batch_tokens=FLAGS.batch_tokens)
    told = {}
    if FLAGS.corpus:
        settings = (FLAGS.split or "all", FLAGS.stride, FLAGS.documents)
        told = summarise(d for name in FLAGS.corpus for d in texts(scorer, name, *settings))
    elif not tasks:
        split = FLAGS.split or "validation"
        told = summarise(held_out(scorer, split, FLAGS.seq_len, FLAGS.tokens))
    if tasks:
        told["tasks"] = _judge(scorer, tasks)
    print(json.dumps({"schema": 1, **told}) if FLAGS.json else _shown(told))


def _check_file(flag: str, given: str) -> None:
    """Raises ``BadInput`` unless a file can be written there, in folders that may still be made."""
    path = Path(given)
    try:
        there = next(p for p in path.absolute().parents if p.exists())
        tempfile.NamedTemporaryFile(prefix=f".{path.name}.", dir=there).close()
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    except OSError as error:
        raise BadInput(f"{flag}={given}: cannot be written ({error.strerror})") from error


def _tasks() -> dict:
    """Name to questions and prompting; before the weights are read, so that it fails at once."""
    from lm.evaluate.tasks import Prompting, read_examples

    result = {}
    shown = FLAGS.shots_from and read_examples(FLAGS.shots_from)
    for path in FLAGS.task:
        if (name := Path(path).stem) in result:
            raise BadInput(f"--task={path}: there is a task {name} already; names must differ")
        examples = read_examples(path)
        prompting = Prompting(
            *(FLAGS.shots, shown or examples, FLAGS.shots_seed, FLAGS.reasoning, FLAGS.gap),
            between=FLAGS.between.replace(r"\n", "\n"),
        )
        if FLAGS.reasoning and examples[0].choices:
            raise BadInput(f"{path}: has choices; --reasoning goes with targets")
        result[name] = examples, prompting
    return result


def _judge(scorer, tasks: dict) -> dict:
    from lm.evaluate.tasks import WHOLE, by_likelihood, by_writing, summarise
    from lm.generate.sampling import Sampling

    try:
        answer = WHOLE if FLAGS.answer is None else re.compile(FLAGS.answer)
    except re.error as error:
        raise BadInput(f"--answer={FLAGS.answer}: not a regular expression ({error})") from error
    told, lines = {}, []
    for name, (examples, prompting) in tasks.items():
        if examples[0].choices:
            records = by_likelihood(scorer, examples, prompting, FLAGS.cut)
        else:
            sampling = Sampling(temperature=FLAGS.temperature)
            settings = (FLAGS.max_tokens, sampling, FLAGS.samples, answer, FLAGS.seed, FLAGS.cut)
            records = by_writing(scorer, examples, prompting, *settings)
        told[name] = summarise(records)
        lines += [json.dumps({"task": name, "example": i, **r}) for i, r in enumerate(records)]
    if FLAGS.records:
        write_atomically(FLAGS.records, "".join(line + "\n" for line in lines))
    return told


def _shown(told: dict) -> str:
    lines = [_table(told)] if "loss" in told else []
    for name, metrics in told.get("tasks", {}).items():
        lines.append(f"{name}: {metrics['examples']} questions")
        for metric, entry in metrics.items():
            if metric != "examples":
                lines.append(f"{metric:>24}{_pm(entry, 'value', 'standard_error'):>20}")
    return "\n".join(lines)


def _table(told: dict) -> str:
    lines = [f"{'':24}{'nats a token':>20}{'perplexity':>12}{'bits a byte':>20}{'tokens':>12}"]
    named = {"all": told, **told["sources"]} if len(told["sources"]) > 1 else {"all": told}
    for name, entry in named.items():
        lines.append(
            f"{name[-24:]:24}{_pm(entry, 'loss', 'standard_error'):>20}{entry['perplexity']:12.4g}"
            f"{_pm(entry, 'bits_per_byte', 'bits_per_byte_standard_error'):>20}"
            f"{entry['tokens']:12,}"
        )
    lines.append("by position:")
    for entry in told["positions"]:
        last = "" if entry["last"] is None else entry["last"]
        place = f"{entry['first']}-{last}" if last != entry["first"] else f"{last}"
        lines.append(f"{place:>24}{_pm(entry, 'loss', 'standard_error'):>20}")
    return "\n".join(lines)


def _pm(entry: dict, value: str, error: str) -> str:
    shown = f"{entry[value]:.4f}"
    return shown if entry[error] is None else f"{shown} +- {entry[error]:.4f}"


if __name__ == "__main__":
    sys.exit(command.run(main, FLAGS, __doc__))
