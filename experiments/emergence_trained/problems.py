"""Three tasks as text, a problem a line; held-out problems never reach a training document.

    addition   "7310+1901=82211"        137 + 1091 in reverse: the least significant digit first;
                                        addition_k: both of at most k digits
    chain      "3eBaDfE=123456"         what 3 becomes mod 7; e is + 5, B is * 2
    hidden     "3521465=..."            all + or all *, which the document doesn't say

Answers end with the line. The metrics count their first LENGTH tokens, beyond which a sum of
shorter numbers has only zeros.
"""

import hashlib
import json
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from lm.evaluate.tasks import Example

MODULUS, OPERATIONS = 7, "+*"
OPERATORS = {"+": "abcdef", "*": "ABCDEF"}  # by 1 to 6
DIGITS, STEPS = 4, 6
CORPORA = {"addition": ("addition",), "chain": ("chain", "hidden")}  # and what is in each
SIZES = {f"addition_{k}": k for k in range(2, DIGITS + 1)}  # digits of the numbers asked for
TESTED = {"addition": tuple(SIZES), "chain": ("chain", "hidden")}
TASKS = tuple(task for tasks in TESTED.values() for task in tasks)
LENGTH = {task: SIZES[task] + 1 if task in SIZES else STEPS for task in TASKS}
HELD_OUT = 0.1  # share of problems
MOST_LINES = 5  # of a document, which so fits into 128 tokens


class Problem(NamedTuple):
    """``identity`` is what may not be both trained on and tested."""

    prompt: str
    target: str
    identity: str


def addition(rng: np.random.Generator, size: int = 0) -> Problem:
    """Two numbers written with four digits, leading zeros included; the sum has five.

    Each is below 10^size, or without one below 10, 100, ... or 10,000, as it falls.
    """
    sizes = [size] * 2 if size else rng.integers(1, DIGITS + 1, 2)
    a, b = (int(rng.integers(0, 10**n)) for n in sizes)
    told = [f"{x:0{n}}"[::-1] for x, n in ((a, DIGITS), (b, DIGITS), (a + b, DIGITS + 1))]
    return Problem(f"{told[0]}+{told[1]}=", told[2], f"{min(a, b)}+{max(a, b)}")


def chain(rng: np.random.Generator, hidden: str = "") -> Problem:
    """A digit and six operations on it; the answer has the value after each.

    ``hidden`` is the one operation, of which the prompt then has the numbers alone.
    """
    value = int(rng.integers(MODULUS))
    prompt, values = str(value), ""
    for _ in range(STEPS):
        operation = hidden or OPERATIONS[rng.integers(len(OPERATIONS))]
        x = int(rng.integers(1, MODULUS))
        value = (value + x if operation == "+" else value * x) % MODULUS
        prompt += str(x) if hidden else OPERATORS[operation][x - 1]
        values += str(value)
    return Problem(f"{prompt}=", values, prompt)


def is_held_out(problem: Problem) -> bool:
    """By a hash of the identity: the same whatever is drawn, and in whatever order."""
    digest = hashlib.blake2b(problem.identity.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < HELD_OUT * 2**64


def draw(rng: np.random.Generator, task: str, operation: str, held_out: bool) -> Problem:
    """One problem from its side of the split; ``operation`` is the hidden one, where it is."""
    while True:
        if task.startswith("addition"):
            problem = addition(rng, SIZES.get(task, 0))
        else:
            problem = chain(rng, operation if task == "hidden" else "")
        if is_held_out(problem) == held_out:
            return problem


def lines(problems: list[Problem]) -> str:
    """The problems with their answers."""
    return "".join(f"{p.prompt}{p.target}\n" for p in problems)


def documents(corpus: str, seed: int, n_bytes: int) -> Iterator[str]:
    """Training documents: one to five problems of one task, and of one hidden operation."""
    rng, written = np.random.default_rng([seed, *corpus.encode()]), 0
    while written < n_bytes:
        task = CORPORA[corpus][rng.integers(len(CORPORA[corpus]))]
        operation = OPERATIONS[rng.integers(len(OPERATIONS))]
        n = rng.integers(1, MOST_LINES + 1)
        text = lines([draw(rng, task, operation, False) for _ in range(n)])
        written += len(text)
        yield text


def as_file(corpus: str, seed: int, n_bytes: int) -> bytes:
    """``documents`` as JSON lines."""
    return "".join(
        json.dumps({"text": text}) + "\n" for text in documents(corpus, seed, n_bytes)
    ).encode()


def questions(task: str, operation: str, seed: int, n: int, held_out: bool) -> list[Example]:
    """``n`` different problems, each with three wrong choices; trained ones with whole answers.

    The draws are those of (task, operation, seed, side), so that tests ask all models the same.
    """
    rng = np.random.default_rng([seed, held_out, *f"{task}{operation}".encode()])
    found: dict[str, Example] = {}
    while len(found) < n:
        problem = draw(rng, task, operation, held_out)
        target = problem.target[: LENGTH[task] if held_out else None]
        wrong = near_misses(rng, target, 10 if task in SIZES else MODULUS)
        choices = rng.permutation([target, *wrong]).tolist()
        found[problem.identity] = Example(problem.prompt, target, tuple(choices))
    return list(found.values())


def near_misses(rng: np.random.Generator, target: str, digits: int, n: int = 3) -> list[str]:
    """``n`` different texts, each wrong in one digit of ``target``."""
    found: list[str] = []
    while len(found) < n:
        at = int(rng.integers(len(target)))
        other = (int(target[at]) + int(rng.integers(1, digits))) % digits
        text = target[:at] + str(other) + target[at + 1 :]
        if text not in found:
            found.append(text)
    return found
