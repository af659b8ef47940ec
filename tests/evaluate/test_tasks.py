"""Metrics by hand on a stand-in for the model; what it is asked; and one real model."""

import json
import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm.command import BadInput
from lm.data.tokenizers import ByteTokenizer
from lm.evaluate.scorer import Continuation, Generated, Scorer
from lm.evaluate.tasks import (
    Example,
    Prompting,
    by_likelihood,
    by_writing,
    edit_distance,
    read_examples,
    summarise,
)
from lm.generate.decode import Completion
from lm.generate.sampling import Sampling
from tests.evaluate.test_scorer import made

pytestmark = pytest.mark.usefixtures("quick_compilation")


class Told:
    """A model that says what it is told to; keeps what it was asked."""

    tokenizer = ByteTokenizer()

    def __init__(self, nats=(), texts=()):
        self.nats, self.texts, self.asked = list(nats), list(texts), []

    def log_likelihoods(self, pairs, cut=False):
        pairs = list(pairs)
        self.asked += pairs
        told = [self.nats.pop(0) for _ in pairs]
        return [Continuation(list(nats), [0.25] * len(nats), False) for nats in told]

    def generate(self, prompts, max_tokens, sampling, until, seed, cut):
        self.asked += prompts
        self.until = until
        return [Generated(self.texts.pop(0), Completion([], [], True, 0.0)) for _ in prompts]


QUESTIONS = [
    Example("Sky?", "blue", ("blue", "transparent")),
    Example("Grass?", "green", ("red", "green")),
]


def test_choices_by_hand():
    """The longer choice of the first is less likely, also a token, but likelier a byte."""
    model = Told([[-1.0, -3.0], [-2.5] * 2, [-2.0], [-1.0]])
    records = by_likelihood(model, QUESTIONS)
    assert model.asked[:2] == [("Sky?", " blue"), ("Sky?", " transparent")]
    first, second = records
    assert first["prediction"] == "blue" and first["accuracy"] == 1
    assert first["accuracy_per_byte"] == 0 and first["accuracy_per_token"] == 1
    p = 1 / (1 + math.exp(-1))
    assert first["brier_score"] == pytest.approx(2 * (1 - p) ** 2)
    told = summarise(records)
    assert told["examples"] == 2
    assert told["accuracy"] == {"value": 1.0, "standard_error": 0.0}
    assert told["accuracy_per_byte"]["value"] == 0.5
    assert told["accuracy_per_byte"]["standard_error"] == pytest.approx(0.5)
    assert told["log_prob_per_token"]["value"] == pytest.approx(-5 / 3)
    # Residuals of the ratio: -4 + 2 * 5/3 and -1 + 5/3, so -+2/3, over 3 tokens.
    assert told["log_prob_per_token"]["standard_error"] == pytest.approx(4 / 9)
    assert summarise(records[:1])["accuracy"]["standard_error"] is None


def test_a_written_answer_by_hand():
    sums = [Example("2+2=", "4"), Example("17+4=", "21")]
    model = Told([[-0.5], [-1.0, -3.0]], [" 4\n", "12 "])
    first, second = by_writing(model, sums, Prompting(gap=""))
    assert (first["prediction"], first["exact_match"], first["edit_distance"]) == ("4", 1, 0)
    assert (second["prediction"], second["exact_match"], second["edit_distance"]) == ("12", 0, 2)
    assert second["log_prob"] == -4 and second["token_brier_score"] == 0.5
    told = summarise([first, second])
    assert told["exact_match"]["value"] == 0.5
    assert told["log_prob_per_token"]["value"] == pytest.approx(-4.5 / 3)
    assert told["token_brier_score"]["value"] == 0.25
    assert model.asked == ["2+2=", "17+4=", ("2+2=", "4"), ("17+4=", "21")]


def test_a_chain_of_thought_votes():
    shots = [Example("1+1?", "2", (), "One and one. The answer is 2.")]
    prompting = Prompting(1, shots, reasoning=True)
    texts = ["Two twos. The answer is 4.", "The answer is 5.", "Well, 3? The answer is 4.", "Dunno"]
    model = Told(texts=texts)
    (record,) = by_writing(
        *(model, [Example("2+2?", "4")], prompting, 64, Sampling(), 4),
        answer=re.compile(r"answer is (\d+)"),
    )
    assert model.asked == ["1+1? One and one. The answer is 2.\n\n2+2?"] * 4
    assert model.until == ["\n\n"]
    assert record == {
        "prediction": "4", "exact_match": 1.0, "edit_distance": 0.0, "vote_share": 0.5,
    }  # fmt: skip
    with pytest.raises(BadInput, match="samples = 4 at temperature 0"):
        by_writing(model, shots, prompting, samples=4, sampling=Sampling(temperature=0))


def test_shots_are_never_the_question():
    pool = [Example(f"q{i}", f"a{i}") for i in range(6)]
    first = Prompting(2, pool, between="\n")
    assert first.context(pool, 3) == "q0 a0\nq1 a1\nq3"
    assert first.context(pool, 0) == "q1 a1\nq2 a2\nq0"
    drawn = Prompting(2, pool, seed=1, between="\n")
    contexts = [drawn.context(pool, i) for i in range(6)]
    assert contexts == [drawn.context(pool, i) for i in range(6)]
    assert contexts != [Prompting(2, pool, seed=2, between="\n").context(pool, i) for i in range(6)]
    assert len({context.split("q", 1)[1][:1] for context in contexts}) > 2
    for i, context in enumerate(contexts):
        shown = context.split("\n")
        assert shown[-1] == f"q{i}" and len(set(shown)) == 3
        assert all(f"q{i}" not in shot for shot in shown[:-1])
    with pytest.raises(BadInput, match="shots = 6: there are 5 other"):
        Prompting(6, pool).context(pool, 0)
    with pytest.raises(BadInput, match="shots = -1"):
        Prompting(-1)
    with pytest.raises(BadInput, match="without 'reasoning'"):
        Prompting(1, pool, reasoning=True)


@given(st.text("abc", max_size=7), st.text("abc", max_size=7), st.text("abc", max_size=7))
def test_edit_distance_is_a_metric(a, b, c):
    assert edit_distance(a, b) == edit_distance(b, a)
    assert (edit_distance(a, b) == 0) == (a == b)
    assert edit_distance(a, c) <= edit_distance(a, b) + edit_distance(b, c)
    assert edit_distance(a, b + c) <= edit_distance(a, b) + len(c)


def test_edit_distance_of_known_words():
    assert edit_distance("kitten", "sitting") == 3
    assert edit_distance("saturday", "sunday") == 3
    assert edit_distance("", "abc") == 3


@pytest.mark.slow
def test_a_model_that_is_asked():
    """Its own greedy text is an exact match, of the probability that it was written with."""
    scorer, _, params = made()
    letters = np.isin(np.arange(264), list(b"abcdefghij"))  # what it writes shall be text
    head = {"kernel": params["head"]["kernel"] * letters}
    scorer = Scorer(scorer.config, params | {"head": head}, scorer.tokenizer, scorer._mesh)
    (written,) = scorer.generate(["It was"], 6)
    own = Example("It was", written.text)
    (record,) = by_writing(scorer, [own], Prompting(gap=""), max_tokens=6)
    assert record["exact_match"] == 1 and record["edit_distance"] == 0
    p = written.completion.log_probabilities
    assert len(p) == 6 and record["log_prob"] == pytest.approx(np.sum(p), abs=1e-4)
    choices = ("abcdef", "jjjjjj", written.text)
    (judged,) = by_likelihood(scorer, [Example("It was", written.text, choices)], Prompting(gap=""))
    assert judged["accuracy"] == 1 and judged["log_prob"] == pytest.approx(record["log_prob"])


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "line 1: not JSON"),
        ("[" * 100_000, "line 1: not JSON"),
        ("[]", "needs an object with a string 'prompt'"),
        ('{"prompt": 3}', "needs an object with a string 'prompt'"),
        ('{"prompt": "a"}', "needs 'choices' and 'answer', or a text as 'target'"),
        ('{"prompt": "a", "target": ""}', "or a text as 'target'"),
        ('{"prompt": "a", "choices": "ab", "answer": 0}', "must be a list of texts"),
        ('{"prompt": "a", "choices": ["b", "b"], "answer": 0}', "all different"),
        ('{"prompt": "a", "choices": ["b"], "answer": 0}', "two or more"),
        ('{"prompt": "a", "choices": ["b", "c"], "answer": 2}', "'answer' = 2: must be one"),
        ('{"prompt": "a", "choices": ["b", "c"], "answer": true}', "'answer' = True"),
        ('{"prompt": "a", "choices": ["b", "c"]}', "'answer' = None"),
        ('{"prompt": "a", "target": "\\ud800"}', "line 1: not JSON .*surrogates not allowed"),
        ("", "holds no question"),
    ],
)
def test_bad_task_files(tmp_path, line, message):
    path = tmp_path / "task.jsonl"
    path.write_text(line)
    with pytest.raises(BadInput, match=message):
        read_examples(path)


def test_task_files(tmp_path):
    path = tmp_path / "task.jsonl"
    path.write_text(json.dumps({"prompt": "a", "choices": ["b", "c"], "answer": "c"}) + "\n")
    assert read_examples(path) == [Example("a", "c", ("b", "c"))]
    with open(path, "a") as file:
        file.write('\n{"prompt": "a", "target": "b"}\n')
    with pytest.raises(BadInput, match="make it two files"):
        read_examples(path)
    path.write_bytes(b'{"prompt": "\xff"}')
    with pytest.raises(BadInput, match="invalid UTF-8 at byte 12"):
        read_examples(path)
    with pytest.raises(BadInput, match="cannot be read"):
        read_examples(tmp_path / "none.jsonl")
