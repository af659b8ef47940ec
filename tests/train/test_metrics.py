"""The run's log."""

from lm.train import metrics
from lm.train.metrics import MetricsLog, read_metrics


def test_what_is_flushed_to_disk_was_all_written_before(tmp_path, monkeypatch):
    log = MetricsLog(tmp_path, 0, tensorboard=False)
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
