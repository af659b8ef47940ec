"""Problems that are right and held out, metrics of models whose metrics are known."""

import json
import math
import types

import numpy as np
import pytest

from experiments.emergence_trained import problems, run
from lm.data.tokenizers import ByteTokenizer
from lm.evaluate import Continuation
from lm.scaling import TokenLossLaw

MEANING = {c: f"+{i % 6 + 1}" if i < 6 else f"*{i % 6 + 1}" for i, c in enumerate("abcdefABCDEF")}


def answer(prompt: str, operation: str = "") -> str:
    """What a problem's answer is, read off its text."""
    asked = prompt.removesuffix("=")
    if "+" in asked:
        a, b = (int(x[::-1]) for x in asked.split("+"))
        return f"{a + b:05}"[::-1]
    values = [int(asked[0])]
    for token in asked[1:]:
        values.append(eval(f"{values[-1]}{MEANING.get(token, operation + token)}") % 7)
    return "".join(map(str, values[1:]))


def asked(task: str, **given):
    operations = problems.OPERATIONS if task == "hidden" else ("",)
    return [(o, q) for o in operations for q in problems.questions(task, o, 0, 60, **given)]


@pytest.mark.parametrize("task", problems.TASKS)
def test_questions_have_one_right_choice(task):
    for operation, question in asked(task, held_out=True):
        assert question.target == answer(question.prompt, operation)[: problems.LENGTH[task]]
        assert len(set(question.choices)) == 4 and question.target in question.choices
        for choice in set(question.choices) - {question.target}:
            assert sum(a != b for a, b in zip(choice, question.target, strict=True)) == 1
    questions = [q for _, q in asked(task, held_out=True)]
    assert [q for _, q in asked(task, held_out=True)] == questions
    places = {q.choices.index(q.target) for q in questions}
    assert places == {0, 1, 2, 3}


@pytest.mark.parametrize("corpus", problems.CORPORA)
def test_no_question_is_in_the_training_text(corpus):
    texts = list(problems.documents(corpus, 0, 40_000))
    assert max(map(len, texts)) < 128
    trained = set()
    for text in texts:
        told = [line.split("=") for line in text.splitlines()]
        fits = [o for o in "+*" if all(a == answer(f"{p}=", o) for p, a in told)]
        assert fits and len(told) <= problems.MOST_LINES
        trained |= {p for p, _ in told}
    trained |= {"+".join(reversed(p.split("+"))) for p in trained}
    for task in problems.TESTED[corpus]:
        prompts = {q.prompt.removesuffix("=") for _, q in asked(task, held_out=True)}
        shots = {q.prompt.removesuffix("=") for _, q in asked(task, held_out=False)}
        assert not prompts & trained and not prompts & shots
    shares = [problems.is_held_out(problems.chain(np.random.default_rng(i))) for i in range(2000)]
    assert np.mean(shares) == pytest.approx(problems.HELD_OUT, abs=0.03)


def scorer(p: float, right: bool, length: int):
    """A model that gives every token of an answer ``p``, and writes it right or all wrong."""

    def operation(prompt):
        first, told = prompt.splitlines()[0].split("=") if "\n" in prompt else ("", "")
        return "+" if first and answer(f"{first}=", "+") == told else "*"

    def write(prompt):
        text = answer(prompt.splitlines()[-1], operation(prompt))
        text = text[:length]
        return text if right else "x" * len(text)

    def judge(pairs, cut=False):
        return [Continuation([math.log(p)] * len(c), [0.5] * len(c), right) for _, c in pairs]

    return types.SimpleNamespace(
        tokenizer=ByteTokenizer(),
        generate=lambda prompts, *_, **__: [(write(prompt), None) for prompt in prompts],
        log_likelihoods=judge,
    )


@pytest.fixture
def few(monkeypatch):
    run.FLAGS(["run.py", "--questions=20"])
    return monkeypatch


@pytest.mark.parametrize("task", problems.TASKS)
def test_metrics_of_a_known_model(few, task):
    length = problems.LENGTH[task]
    found = run.tested(scorer(0.5, True, length), task, 2)
    assert found["exact_match"] == 1 and found["edit_distance"] == 0
    assert found["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert found["drawn_match"] == pytest.approx(0.5**length, abs=1e-5)
    assert found["drawn_match_by_length"] == pytest.approx(
        [0.5**k for k in range(1, length + 1)], abs=1e-5
    )
    assert found["exact_match_by_length"] == [1] * length and "choice_accuracy" not in found
    wrong = run.tested(scorer(0.5, False, length), task, 0)
    assert wrong["exact_match"] == 0 and wrong["exact_match_by_length"] == [0] * length
    assert wrong["edit_distance"] == 1
    assert wrong["choice_brier_score"] == pytest.approx(0.75)  # four alike


def rows_of(law, monkeypatch):
    """Models that obey a law and answer as if drawn: what Schaeffer et al. presume."""
    monkeypatch.setattr(run, "SEEDS", (0,))
    rows = []
    for task in problems.TASKS:
        lengths = np.arange(1, problems.LENGTH[task] + 1)
        for params in (1_000, 4_000, 16_000, 64_000):
            p = math.exp(-law.loss(params))
            match = (p**lengths).tolist()
            for shots in run.SHOTS:
                rows.append({
                    "task": task, "width": params, "seed": 0, "params": params, "shots": shots,
                    "questions": 400, "loss": -math.log(p), "exact_match": match[-1],
                    "drawn_match": match[-1], "edit_distance": 1 - p, "token_brier_score": 1 - p,
                    "choice_accuracy": p, "choice_brier_score": 1 - p,
                    "exact_match_by_length": match, "drawn_match_by_length": match,
                })  # fmt: skip
    return rows


def test_a_law_and_the_claim_are_found_again(few):
    run.FLAGS(["run.py", "--questions=1000000"])
    rows = rows_of(TokenLossLaw(c=20_000, alpha=-0.8), few)
    found = run.summarise(rows)
    for task in problems.TASKS:
        assert found[task]["law"]["c"] == pytest.approx(20_000, rel=1e-3)
        assert found[task]["law"]["alpha"] == pytest.approx(-0.8, abs=1e-3)
        assert found[task]["claim"]["greedy_less_p_to_the_L"]["largest"] < 1e-9
        shapes = found[task]["shapes"]
        assert shapes["exact_match"]["sharpness"] > shapes["edit_distance"]["sharpness"] > 0
    table = run.table(rows, "addition_3").splitlines()
    assert len(table) == 4 + 4 and table[-1].startswith("| 64,000 |")


@pytest.mark.slow
def test_a_tiny_one_from_training_to_figure(few, tmp_path):
    few.setattr(run, "SEEDS", (0,))
    few.setattr(run, "SHOTS", (0,))
    few.setattr(run, "POOL", 8)
    few.setattr(run, "BYTES", dict.fromkeys(problems.CORPORA, 60_000))
    (tmp_path / "results").mkdir()
    arguments = [
        *("run.py", f"--workdir={tmp_path / 'runs'}", f"--results={tmp_path / 'results'}"),
        *("--widths=4,6", "--questions=8", "--override=train.tokens=4096"),
        *("--override=data.validation_tokens=1024", "--override=train.batch_tokens=1024"),
    ]
    assert run.command.run(run.main, run.FLAGS, None, arguments) == 0
    found = json.loads((tmp_path / "results/summary.json").read_text())
    assert set(found) == {"schema", *problems.TASKS}
    lines = (tmp_path / "results/metrics.csv").read_text().splitlines()
    assert len(lines) == 1 + len(problems.TASKS) * 2  # of two sizes
    few.setattr(run, "train", lambda *_, **__: pytest.fail("trained again"))
    assert run.command.run(run.main, run.FLAGS, None, [*arguments, "--norun"]) == 0
