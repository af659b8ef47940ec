"""Loss, perplexity and bits per byte of a run's newest checkpoint on text.

python -m lm.evaluate --workdir=runs/tiny [--split=test]
python -m lm.evaluate --workdir=runs/tiny --corpus='text:my_text/*.txt' [--json]

Without --corpus the run's own held-out windows, else every document of the corpus (pd_english,
text:GLOB, or a TFDS name) on its own. Standard errors are between documents.
"""

import json
import sys

from absl import flags

from lm import command
from lm.command import BadInput

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
flags.DEFINE_integer("documents", 0, "Of each source, the first (0: all).", flag_values=FLAGS)
flags.DEFINE_integer("batch_tokens", 8_192, "Positions computed at a time.", flag_values=FLAGS)
flags.DEFINE_bool("json", False, "One object instead of a table.", flag_values=FLAGS)


def main() -> None:
    if FLAGS.workdir is None:
        raise BadInput("--workdir is missing; as --workdir=runs/tiny")
    for name, least in {"seq_len": 0, "stride": 0, "tokens": 0, "documents": 0}.items():
        if FLAGS[name].value < least:
            raise BadInput(f"--{name}={FLAGS[name].value}: must be {least} or more")
    from lm.evaluate.corpus import held_out, summarise, texts
    from lm.evaluate.scorer import Scorer

    scorer = Scorer.open(FLAGS.workdir, max_length=FLAGS.seq_len, batch_tokens=FLAGS.batch_tokens)
    if not FLAGS.corpus:
        found = held_out(scorer, FLAGS.split or "validation", FLAGS.seq_len, FLAGS.tokens)
    else:
        settings = (FLAGS.split or "all", FLAGS.stride, FLAGS.documents)
        found = (d for name in FLAGS.corpus for d in texts(scorer, name, *settings))
    told = summarise(found)
    print(json.dumps({"schema": 1, **told}) if FLAGS.json else _table(told))


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
