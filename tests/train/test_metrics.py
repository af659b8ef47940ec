"""The run's log, and those that get the same numbers."""

import json
import struct
from pathlib import Path

import pytest

from lm.command import BadInput
from lm.config import Config, replace
from lm.train import metrics
from lm.train.metrics import MetricsLog, check_trackers, read_metrics


def test_what_is_flushed_to_disk_was_all_written_before(tmp_path, monkeypatch):
    log = MetricsLog(tmp_path, 0)
    synced = []
    path = tmp_path / "metrics.jsonl"
    monkeypatch.setattr(metrics.os, "fsync", lambda file: synced.append(path.read_text()))
    log.write({"step": 1, "train_loss": float("nan")})
    log.flush()
    assert synced == [] and read_metrics(tmp_path) == [{"step": 1, "train_loss": None}]
    log.write({"step": 2})
    log.flush(to_disk=True)
    assert synced == ['{"step": 1, "train_loss": null}\n{"step": 2}\n']
    log.close()


@pytest.mark.parametrize("torn", [b'{"step": 2, "tr', b'{"st\xff\xfep": 2}x\n', b"\0\0\n", b"["])
def test_a_log_ends_before_its_first_line_that_is_none(torn, tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + torn)
    assert read_metrics(tmp_path) == [{"step": 1}]
    with MetricsLog(tmp_path, 1) as log:
        log.write({"step": 2})
    assert read_metrics(tmp_path) == [{"step": 1}, {"step": 2}]


class Noted(list):
    def write(self, step, scalars):
        self.append((step, scalars))

    def close(self, done):
        self.append(done)


def test_trackers_get_the_finite_numbers_and_how_it_ended(tmp_path):
    whole, interrupted = Noted(), Noted()
    with MetricsLog(tmp_path, 0, [whole]) as log:
        log.write({"step": 1, "train_loss": float("inf"), "expert_load": [[0.5, 0.25]]})
    assert whole == [(1, {"expert_load/0/0": 0.5, "expert_load/0/1": 0.25}), True]
    with pytest.raises(KeyboardInterrupt), MetricsLog(tmp_path, 0, [interrupted]) as log:
        raise KeyboardInterrupt
    assert interrupted == [False]


def test_tensorboard_and_nothing_else_gets_them_by_default(tmp_path):
    MetricsLog.of(Config(), tmp_path, 0).close()
    assert {path.name.split(".")[0] for path in tmp_path.iterdir()} == {"metrics", "events"}


def events(path):
    """TensorBoard's, of a file of records: length, its checksum, content, its checksum."""
    from tensorboardX.proto.event_pb2 import Event

    content, found = path.read_bytes(), []
    while content:
        (size,) = struct.unpack("Q", content[:8])
        found.append(Event.FromString(content[12 : 12 + size]))
        content = content[16 + size :]
    return found


def test_tensorboard_sees_the_numbers_and_from_where_a_run_goes_on(tmp_path):
    with MetricsLog.of(Config(), tmp_path, 7) as log:
        log.write({"step": 8, "train_loss": 2.5, "expert_load": [0.5]})
    first, session, line = events(*tmp_path.glob("events.out.tfevents.*"))
    assert first.file_version == "brain.Event:2"
    assert session.step == 8 and session.session_log.status == session.session_log.START
    found = {value.tag: value.simple_value for value in line.summary.value}
    assert line.step == 8 and found == {"train_loss": 2.5, "expert_load/0": 0.5}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("full", ["metrics.jsonl", "events"])
def test_a_full_disk_is_one_error_that_names_the_file(tmp_path, full):
    log = MetricsLog.of(Config(), tmp_path, 0)
    if full == "metrics.jsonl":
        log._file = open("/dev/full", "a")
    else:
        log._trackers[0]._writer._py_recordio_writer._writer = open("/dev/full", "wb")
    with pytest.raises(OSError, match="No space left") as error:
        for step in range(20_000):  # beyond every buffer
            log.write({"step": step})
            log.flush()
    assert error.value.filename == str(tmp_path / full)
    with pytest.raises(OSError, match="No space left"):
        log.close(done=False)


def test_a_tracker_that_is_not_installed_is_told(monkeypatch):
    train = replace(Config(), train={"track": "wandb"}).train
    monkeypatch.setattr(metrics, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match=r"'wandb': needs `pip install 'lm-scaling\[wandb\]'`"):
        check_trackers(train)
    with pytest.raises(BadInput, match="train.track = 'mlflow': must be 'wandb'"):
        replace(Config(), train={"track": "mlflow"})


def test_weights_and_biases_goes_on_with_an_interrupted_run(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = replace(Config(), train={"track": "wandb", "tensorboard": False})
    with pytest.raises(KeyboardInterrupt), MetricsLog.of(config, tmp_path, 0) as log:
        log.write({"step": 1, "train_loss": 3.140625})
        raise KeyboardInterrupt
    run = json.loads((tmp_path / "wandb" / "wandb-resume.json").read_text())["run_id"]
    with MetricsLog.of(config, tmp_path, 1) as log:
        log.write({"step": 7, "train_loss": 2.718750})
        log.write({"step": 2, "train_loss": 2.937500})  # after a rollback
    wandb.teardown()  # waits for its own process to have written
    files = sorted(tmp_path.glob(f"wandb/offline-run-*/run-{run}.wandb"))
    for file, losses in zip(files, ((b"3.140625",), (b"2.71875", b"2.9375")), strict=True):
        written = file.read_bytes()
        assert (
            b"train_loss" in written
            and all(loss in written for loss in losses)
            and b"learning_rate_rule" in written
        )
    # A run that is done is not gone on with: the folder may be used for another.
    assert not (tmp_path / "wandb" / "wandb-resume.json").exists()
