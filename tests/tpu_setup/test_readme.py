"""The commands of tpu_setup/README.md: the scripts' dry runs, and the configs they give to lm."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from lm.config_file import load

ROOT = Path(__file__).parents[2]
README = (ROOT / "tpu_setup" / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.replace("\\\n", " ").strip().splitlines()
]
SCRIPTS = [command for command in COMMANDS if command.startswith("tpu_setup/")]
MODULES = [command for command in COMMANDS if "python -m lm." in command]
EXPORTS = [command for command in COMMANDS if command.startswith("export ")]


def test_nothing_is_left_out():
    used = {re.match(r"tpu_setup/(\w+\.sh)", command).group(1) for command in SCRIPTS}
    there = {path.name for path in (ROOT / "tpu_setup").iterdir()} - {"README.md"}
    assert there - used == {"common.sh", "worker.sh", "Containerfile"}
    assert {name for name in there if name not in README} == set()
    assert len(EXPORTS) == 6 and len(MODULES) >= 8


@pytest.mark.parametrize("command", SCRIPTS)
def test_the_scripts_take_what_the_page_gives_them(command):
    script, _, rest = command.partition(" ")
    text = "\n".join(["set -u", *EXPORTS, f"{script} --dry_run {rest}"])
    result = subprocess.run(
        ["bash", "-c", text], cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert result.returncode == 0, result.stderr
    assert re.match(r"(gcloud compute tpus|git|sbatch) ", result.stdout)


@pytest.mark.parametrize("command", MODULES)
def test_the_configs_load_with_the_overrides_of_the_page(command):
    words = shlex.split(command[command.index("python -m lm.") :])
    flags = dict(word[2:].split("=", 1) for word in words if "=" in word)
    if "config" not in flags:
        return  # lm.fit: its flags are its own
    overrides = [f"{k[7:]}={v}" for k, v in flags.items() if k.startswith("config.")]
    config = load(str(ROOT / flags["config"]), overrides)
    for override in overrides:
        key, _, value = override.partition("=")
        section, name = key.split(".")
        assert str(getattr(getattr(config, section), name)) == value


def test_the_links_lead_somewhere():
    headings = re.findall(r"^## (.*)$", README, re.MULTILINE)
    anchors = {re.sub(r"[^a-z0-9 -]", "", h.lower()).replace(" ", "-") for h in headings}
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        path, _, anchor = target.partition("#")
        assert (ROOT / "tpu_setup" / path).exists() and (not anchor or anchor in anchors)
