"""Every command of the README runs: in continuous integration, or here with small settings.

Those for accelerators are not run; their configs load.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from lm.config_file import load

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.strip().splitlines()
]
TUTORIAL = [c for c in COMMANDS if re.search("my_text|runs/mine|runs/tiny", c)]
TUTORIAL = [command for command in TUTORIAL if "lm.plan" not in command]
ESTIMATES = [c for c in COMMANDS if "lm.estimate" in c and "--topology" not in c]
PLANS = [command for command in COMMANDS if "lm.plan" in command]
ON_ACCELERATORS = [c for c in COMMANDS if re.search("--workdir=DIR|--topology", c)]
SMALL_DATA = ["--config.data.seq_len=32", "--config.data.validation_tokens=1024"]
SMALL = {
    "lm.data": SMALL_DATA,
    "lm.train": [*SMALL_DATA, "--config.train.tokens=20000", "--config.train.evaluate_every=0"],
    "lm.sweep": [
        *SMALL_DATA,
        "--config.sweep.budgets=(2e8,5e8,1e9)",
        "--config.sweep.first_optimum=8e3",
        "--config.sweep.spread=2.5",
    ],
    "lm.fit": ["--approaches=isoflop,parametric", "--bootstrap=100"],
}


def run(command, folder, *more):
    words = shlex.split(command)
    assert words[:2] == ["python", "-m"]
    result = subprocess.run(
        [sys.executable, *words[1:], *more],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory, text_data):
    folder = tmp_path_factory.mktemp("readme")
    (folder / "configs").symlink_to(ROOT / "configs")
    (folder / "my_text").symlink_to(Path(text_data.files).parent)
    return folder


PAGES = [ROOT / "README.md", *sorted(ROOT.glob("experiments/*/README.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_pages_are_whole(page):
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"@[A-Z]+@|TODO", text)
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (page.parent / target).exists(), f"{page}: {target}"


def test_every_command_is_run_somewhere():
    continuous = (ROOT / ".ci" / "run").read_text().splitlines()
    assert {"make test", "make isoflop STUDY=smoke", "make test-slow"} <= set(continuous)
    known = {"make isoflop", "make test", *TUTORIAL, *PLANS, *ESTIMATES, *ON_ACCELERATORS}
    assert [command for command in COMMANDS if command not in known] == []
    assert [len(x) for x in (TUTORIAL, PLANS, ESTIMATES, ON_ACCELERATORS)] == [10, 3, 1, 4]


@pytest.mark.slow
def test_the_tutorial_goes_from_text_to_a_plan(folder):
    for command in TUTORIAL + PLANS:
        more = [] if "--status" in command else SMALL.get(shlex.split(command)[2], [])
        run(command, folder, *more)
    found = {path.name for path in (folder / "runs" / "mine").iterdir()}
    assert {"runs.csv", "curves.csv", "law.json", "report.html"} <= found


@pytest.mark.parametrize("command", ESTIMATES)
def test_estimates_count_parameters(command, folder):
    assert "8,030,261,248" in run(command, folder)


@pytest.mark.parametrize("command", PLANS[1:])
def test_plans_from_published_laws(command, folder):
    assert "tokens" in run(command, folder)


@pytest.mark.parametrize("command", ON_ACCELERATORS)
def test_configs_for_accelerators_load(command):
    path = re.search(r"--config=(\S+)", command).group(1)
    assert load(path).model.n_layers > 1


@pytest.mark.slow
def test_the_notebook_trains_and_fits(tmp_path, text_data):
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
    assert len([line for line in code.splitlines() if line.strip()]) <= 12
    small = f"data={{'corpus': 'text', 'files': {text_data.files!r}, 'validation_tokens': 1024}}"
    code = code.replace('train={"tokens": 2e5}', f'train={{"tokens": 2e4}}, {small}')
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    a = float(re.search(r"^(0\.\d+) \(", result.stdout, re.MULTILINE).group(1))
    assert a == pytest.approx(0.28 / 0.62, abs=1e-3)
