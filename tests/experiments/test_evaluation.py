"""The committed task files are the ones that the script writes, and can be asked."""

import json

import pytest

from experiments.evaluation import make_tasks
from lm.evaluate.tasks import read_examples


@pytest.mark.parametrize("task", [make_tasks.capitals, make_tasks.problems])
def test_task_files(task):
    path = make_tasks.FOLDER / f"{task.__name__}.jsonl"
    assert [json.loads(line) for line in path.read_text().splitlines()] == task()
    examples = read_examples(path)
    assert len({example.prompt for example in examples}) == len(examples)
    for example in examples:
        shown = example.choices or (example.reasoning.rpartition("answer is ")[2][:-1],)
        assert example.target in shown
