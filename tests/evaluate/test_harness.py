"""lm-eval on our model beside its own `hf` on the same weights, exported (extras eval, compare).

Offline: tasks are local files.
"""

import json
import subprocess
import sys

import numpy as np
import pytest

from lm.command import BadInput
from lm.config import Config, ModelConfig, replace
from tests.evaluate.test_scorer import made, run_of_ends, saved

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compilation")]
lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not here; pip install '.[eval]'")
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from lm.evaluate.harness import HarnessModel  # noqa: E402

CONFIG = replace(
    Config(
        model=ModelConfig(vocab_size=257, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=48)
    ),
    data={"seq_len": 96},
)
QUESTIONS = [
    {"prompt": "The sky is", "choices": ["blue", "green cheese", "up"], "answer": 0},
    {"prompt": "One and one are", "choices": ["three", "two", "naïve"], "answer": 1},
    {
        "prompt": "A long, long tale, " * 7 + "it",
        "choices": ["ends", "goes on", "is"],
        "answer": 0,
    },
]
TEXTS = [{"text": "It was a dark night. " * 14}, {"text": "No."}]
WRITE = [{"prompt": "Two and two:", "target": "four"}, {"prompt": "Say", "target": "it"}]
TASKS = {
    "choices": (QUESTIONS, """
output_type: multiple_choice
doc_to_text: "{{prompt}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}, {metric: acc_norm}, {metric: brier_score}]
"""),
    "texts": (TEXTS, """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
"""),
    "writing": (WRITE, """
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{target}}"
generation_kwargs: {until: ["e", "\\n\\n"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]
"""),
}  # fmt: skip


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A decoder that writes text, not parts of UTF-8."""
    _, _, params = made(CONFIG)
    letters = np.isin(np.arange(257), list(b"abcdefghij \n"))
    params["head"] = {"kernel": params["head"]["kernel"] * np.where(letters, 3, 1)}
    return saved(tmp_path_factory.mktemp("run"), CONFIG, params)


@pytest.fixture(scope="module")
def samples(workdir, tmp_path_factory):
    """Runs the tasks: name to its samples and results, of a model of lm-eval."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, (documents, settings) in TASKS.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(document) + "\n" for document in documents))
        head = f"task: {name}\ndataset_path: json\ntest_split: test\n"
        files = f"dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {folder}}}\n"
        (folder / f"{name}.yaml").write_text(head + files + settings)
    manager = TaskManager(include_path=str(folder), include_defaults=False)

    def run(model, **arguments):
        found = lm_eval.simple_evaluate(
            model=model, model_args=arguments, tasks=list(TASKS), task_manager=manager,
            bootstrap_iters=0, log_samples=True,
        )  # fmt: skip
        return found["samples"], found["results"]

    return run


@pytest.fixture(scope="module")
def ours(samples, workdir):
    return samples("lm", workdir=str(workdir))


def test_its_own_model_on_the_same_weights_says_the_same(samples, ours, workdir, tmp_path):
    for name in ("torch", "transformers", "accelerate", "lm_eval.models"):
        pytest.importorskip(name, reason=f"{name} is not here; pip install '.[compare]'")
    from lm.interop.workdir import export_weights

    export_weights(workdir, tmp_path)
    theirs = samples("hf", pretrained=str(tmp_path), device="cpu", dtype="float32", batch_size=2)
    for name in ("choices", "texts", "writing"):
        assert len(ours[0][name]) == len(TASKS[name][0])
        for mine, other in zip(ours[0][name], theirs[0][name], strict=True):
            assert mine["doc"] == other["doc"]
            if name == "writing":
                assert mine["resps"] == other["resps"] and mine["resps"][0][0]
                continue
            for a, b in zip(mine["filtered_resps"], other["filtered_resps"], strict=True):
                a, b = (x if isinstance(x, (tuple, list)) else (x, True) for x in (a, b))
                assert float(a[0]) == pytest.approx(float(b[0]), abs=1e-4) and a[1] == b[1]
        for metric, value in theirs[1][name].items():
            if isinstance(value, float):
                assert ours[1][name][metric] == pytest.approx(value, abs=1e-5), metric


def test_it_agrees_with_our_own_evaluation(ours, workdir):
    from lm.evaluate import Scorer
    from lm.evaluate.tasks import Example, by_likelihood, summarise

    examples = [
        Example(q["prompt"], q["choices"][q["answer"]], tuple(q["choices"])) for q in QUESTIONS
    ]
    mine = summarise(by_likelihood(Scorer.open(workdir), examples, cut=True))
    assert ours[1]["choices"]["acc,none"] == pytest.approx(mine["accuracy"]["value"])
    assert ours[1]["choices"]["brier_score,none"] == pytest.approx(
        mine["brier_score"]["value"], abs=1e-4
    )


def test_chats_are_written_by_the_runs_template(workdir):
    model = HarnessModel(str(workdir))
    text = model.apply_chat_template([{"role": "user", "content": "Hi"}])
    assert text == "<|user|>\nHi<|endoftext|>\n<|assistant|>\n"
    context, _ = model.scorer.encode_pair(text, "Hello")
    assert context.count(256) == 1 and "messages" in model.chat_template(True)
    assert model.tokenizer_name == "bytes-257"


def test_an_end_of_turn_ends_what_is_written(tmp_path):
    model = HarnessModel(str(run_of_ends(tmp_path)), max_gen_toks=3)
    assert model.generate_until([Instance("generate_until", {}, ("ab", {}), 0)]) == [""]


def test_bad_input_is_one_line_of_the_command():
    argv = ["run", "--model", "lm", "--model_args", "workdir=nowhere", "--tasks", "lambada_openai"]
    told = subprocess.run(
        [sys.executable, "-m", "lm.evaluate.harness", *argv], capture_output=True, text=True
    )
    assert told.returncode == 2 and "Traceback" not in told.stderr
    assert told.stderr.splitlines()[-1].startswith("error: nowhere: no run here")


def test_how_a_task_asks_for_text(workdir):
    model = HarnessModel(str(workdir), max_gen_toks=3)

    def write(**settings):
        return model.generate_until([
            Instance("generate_until", {}, (prompt, settings), i)
            for i, prompt in enumerate(("It", "A longer prompt", "x" * 300))
        ])  # fmt: skip

    greedy = write()
    assert [len(text) for text in greedy] == [3] * 3
    assert write(until=greedy[0][1])[0] == greedy[0][:1]
    assert write(max_new_tokens=5, do_sample=False, temperature=0.7)[1][:3] == greedy[1]
    assert write(do_sample=True, temperature=5.0) != greedy
    with pytest.raises(BadInput, match="num_beams are not known"):
        write(num_beams=3)
    for settings in ({}, {"temperature": 0.0}):
        with pytest.raises(BadInput, match="do_sample without a temperature"):
            write(do_sample=True, **settings)
