"""Tasks: questions with choices, judged by log-likelihood, or with a target, answered by writing.

A task file has an object a line: ``{"prompt", "choices": [...], "answer": index or choice}``, or
``{"prompt", "target"}`` and, to be shown with it in a chain of thought, ``"reasoning"``.
"""

import itertools
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lm.command import BadInput
from lm.evaluate.scorer import GREEDY, Scorer
from lm.generate.decode import vote
from lm.generate.sampling import Sampling
from lm.score import Ratio

WHOLE = re.compile(r"\A\s*(.*?)\s*\Z", re.DOTALL)  # the answer where nothing else is asked for


@dataclass(frozen=True)
class Example:
    """One question. ``target`` is the answer's text, in ``choices`` where there are some."""

    prompt: str
    target: str
    choices: tuple[str, ...] = ()
    reasoning: str = ""  # a whole answer, which ends in the target


@dataclass(frozen=True)
class Prompting:
    """How a question is put: after ``shots`` others with their answers.

    Those are the first of ``pool``, or with a ``seed`` drawn from it anew for each question; the
    question itself is never among them. ``reasoning`` shows how their answers come about (Wei et
    al. 2022).
    """

    shots: int = 0
    pool: Sequence[Example] = ()
    seed: int | None = None
    reasoning: bool = False
    gap: str = " "  # before an answer
    between: str = "\n\n"  # after it

    def __post_init__(self):
        if self.shots < 0:
            raise BadInput(f"shots = {self.shots}: must be 0 or more")
        if self.reasoning and not all(example.reasoning for example in self.pool):
            raise BadInput("a shot without 'reasoning': a chain of thought needs it of all")

    def context(self, examples: Sequence[Example], i: int) -> str:
        """What stands before the gap and the answer of ``examples[i]``.

        Raises ``BadInput`` where the pool has fewer other questions than shots.
        """
        order = range(len(self.pool))
        if self.seed is not None:
            order = np.random.default_rng((self.seed, i)).permutation(len(self.pool))
        others = (self.pool[k] for k in order if self.pool[k] != examples[i])
        chosen = list(itertools.islice(others, self.shots))
        if len(chosen) < self.shots:
            raise BadInput(f"shots = {self.shots}: there are {len(chosen)} other questions")
        parts = []
        for shot in chosen:
            answer = shot.reasoning if self.reasoning else shot.target
            parts.append(f"{shot.prompt}{self.gap}{answer}{self.between}")
        return "".join(parts) + examples[i].prompt


def read_examples(path: str | Path) -> list[Example]:
    """The questions of a task file.

    Raises ``BadInput`` naming the line: no JSON object, a key missing or of another kind, an answer
    that is no choice; or where questions of both kinds are mixed.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: invalid UTF-8 at byte {error.start}") from error
    examples = [_example(line, f"{path}, line {n}") for n, line in enumerate(lines, 1) if line]
    if not examples:
        raise BadInput(f"{path}: holds no question")
    if len({bool(example.choices) for example in examples}) == 2:
        raise BadInput(f"{path}: questions with choices and with a target; make it two files")
    return examples


def _example(line: str, where: str) -> Example:
    try:
        given = json.loads(line)
        json.dumps(given, ensure_ascii=False).encode()  # JSON can spell half of a surrogate pair
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{where}: not JSON ({error})") from error
    if not isinstance(given, dict) or not isinstance(given.get("prompt"), str):
        raise BadInput(f"{where}: needs an object with a string 'prompt'")
    reasoning, target = given.get("reasoning", ""), given.get("target")
    if "choices" not in given:
        if not isinstance(target, str) or not target or not isinstance(reasoning, str):
            raise BadInput(f"{where}: needs 'choices' and 'answer', or a text as 'target'")
        return Example(given["prompt"], target, (), reasoning)
    choices, answer = given["choices"], given.get("answer")
    if not isinstance(choices, list) or not all(isinstance(c, str) and c for c in choices):
        raise BadInput(f"{where}: 'choices' must be a list of texts")
    if len(set(choices)) < max(2, len(choices)):
        raise BadInput(f"{where}: 'choices' must be two or more, all different")
    if answer in choices:
        answer = choices.index(answer)
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise BadInput(
            f"{where}: 'answer' = {answer!r}: must be one of the choices, or its index from 0"
        )
    return Example(given["prompt"], choices[answer], tuple(choices))


def by_likelihood(
    scorer: Scorer,
    examples: Sequence[Example],
    prompting: Prompting = Prompting(),
    cut: bool = False,
) -> list[dict[str, Any]]:
    """Which choice is likeliest, of each question: a record with its metrics.

    `accuracy` takes the largest log-likelihood, `accuracy_per_byte` and `accuracy_per_token` that
    over the choice's length; `brier_score` is that of the likelihoods normalised over the choices.
    """
    pairs = [
        (prompting.context(examples, i), prompting.gap + choice)
        for i, example in enumerate(examples)
        for choice in example.choices
    ]
    found = iter(scorer.log_likelihoods(pairs, cut))
    records = []
    for example in examples:
        judged = [next(found) for _ in example.choices]
        right = example.choices.index(example.target)
        nats = np.array([continuation.log_prob for continuation in judged])
        n_tokens = np.array([len(continuation.token_log_probs) for continuation in judged])
        n_bytes = np.array([len(choice.encode()) for choice in example.choices])
        p = np.exp(nats - nats.max())
        p /= p.sum()
        records.append({
            "prediction": example.choices[int(nats.argmax())],
            "accuracy": float(nats.argmax() == right),
            "accuracy_per_byte": float((nats / n_bytes).argmax() == right),
            "accuracy_per_token": float((nats / n_tokens).argmax() == right),
            "brier_score": float(np.square(p - np.eye(len(p))[right]).sum()),
            "log_prob": float(nats[right]),
            "tokens": int(n_tokens[right]),
        })  # fmt: skip
    return records


def by_writing(
    scorer: Scorer,
    examples: Sequence[Example],
    prompting: Prompting = Prompting(),
    max_tokens: int = 64,
    sampling: Sampling = GREEDY,
    samples: int = 1,
    answer: re.Pattern = WHOLE,
    seed: int = 0,
    cut: bool = False,
) -> list[dict[str, Any]]:
    """What the model writes after each question: a record with its metrics.

    `exact_match` with the target, `edit_distance` from it in tokens (Levenshtein); of the target
    itself, unless a chain of thought comes before it, the log-probability and the Brier score,
    summed over its tokens.

    Args:
      max_tokens: of what is written, which ends where a shot's answer would (``between``).
      samples: so many are drawn, and vote (self-consistency; Wang et al. 2023).
      answer: of a text its last match, the first group where there is one, is its answer.

    Raises ``BadInput`` for several samples of temperature 0, which would all be one.
    """
    if samples < 1 or samples > 1 and not sampling.temperature:
        raise BadInput(
            f"samples = {samples} at temperature {sampling.temperature}: must be 1 or more, above 1"
            " with a temperature"
        )
    contexts = [prompting.context(examples, i) for i in range(len(examples))]
    prompts = [context for context in contexts for _ in range(samples)]
    until = [prompting.between] if prompting.between else []
    written = scorer.generate(prompts, max_tokens, sampling, until, seed, cut)
    judged = [None] * len(examples)
    if not prompting.reasoning:
        pairs = zip(contexts, (prompting.gap + e.target for e in examples), strict=True)
        judged = scorer.log_likelihoods(pairs, cut)
    records = []
    for i, (example, target) in enumerate(zip(examples, judged, strict=True)):
        texts = [text for text, _ in written[i * samples : (i + 1) * samples]]
        found, share = vote(texts, answer)
        ids = (scorer.tokenizer.encode(text).tolist() for text in (found or "", example.target))
        record = {
            "prediction": found,
            "exact_match": float(found == example.target),
            "edit_distance": float(edit_distance(*ids)),
        }
        if samples > 1:
            record["vote_share"] = share
        if target is not None:
            record |= {
                "log_prob": target.log_prob,
                "token_brier_score": float(np.sum(target.token_brier_scores)),
                "tokens": len(target.token_log_probs),
            }
        records.append(record)
    return records


def edit_distance(a: Sequence[Any], b: Sequence[Any]) -> int:
    """The fewest insertions, deletions and replacements that make ``b`` of ``a`` (Levenshtein)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def summarise(records: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The mean of each metric with its standard error between questions.

    `log_prob_per_token` and `token_brier_score` are means over the targets' tokens, of which those
    of one question are not independent.
    """
    records = list(records)
    ratios: dict[str, Ratio] = {}
    for record in records:
        for name, value in record.items():
            per_token = name in ("log_prob", "token_brier_score")
            shown = "log_prob_per_token" if name == "log_prob" else name
            if isinstance(value, float):
                ratios.setdefault(shown, Ratio()).add(value, record["tokens"] if per_token else 1)
    return {"examples": len(records)} | {
        name: {
            "value": float(ratio.value),
            "standard_error": float(ratio.standard_error) if len(records) > 1 else None,
        }
        for name, ratio in ratios.items()
    }
