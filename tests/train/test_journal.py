"""What a run tells beside its log's lines, of which the loop's tests are."""

from lm.config import Config
from lm.train.clock import Clock
from lm.train.events import read_events
from lm.train.journal import Journal
from lm.train.recipe import resolve


def test_an_event_is_a_line_to_read_and_an_object_to_compute_with(tmp_path, capsys):
    journal = Journal(Config(), resolve(Config()), tmp_path, Clock(), lambda step: [])
    journal.open(0, {})
    told = {"loss": 2.123456, "to": 7, "reason": "why", "documents": [{"row": 3}]}
    journal.event(12, "spike", **told)
    journal.close(done=True)
    assert capsys.readouterr().err == "step 12: spike (loss 2.123, to 7, reason why)\n"
    assert read_events(tmp_path) == [{"step": 12, "event": "spike", **told}]
