"""Goes on from a finished run, or from imported weights, with conversations.

    python -m lm.train --config=configs/finetune.py:runs/tiny --workdir=runs/tiny_chat \
        --config.data.files='my_chats/*.jsonl' [--config.model.lora.rank=8]

The files hold a conversation a line, {"messages": [{"role", "content"}, ...]} or
{"prompt", "response"}; answers alone count in the loss. With a rank above 0 only adapters are
trained, which want about ten times the rate. A run like configs/tiny.py learns 500 conversations of
100 bytes by heart in a quarter of a minute on a two-core CPU machine.
"""

from pathlib import Path

from configs import base
from lm.checkpoint import load_config
from lm.config import to_config_dict
from lm.data import open_tokenizer


def get_config(workdir):
    """The model and tokenizer of ``workdir``, whose parameters are the first."""
    run = load_config(Path(workdir))
    tokenizer = open_tokenizer(run.data)
    config = base.get_config()
    config.name = "finetune"
    config.model = to_config_dict(run).model
    config.data.corpus = "chat"
    config.data.tokenizer = str(getattr(tokenizer, "path", tokenizer.name))
    # Learned positions keep their number; else conversations are rarely as long as a context.
    learned = run.model.position == "learned"
    config.data.seq_len = run.data.seq_len if learned else min(run.data.seq_len, 2_048)
    config.data.data_dir = run.data.data_dir
    config.data.validation_tokens = config.data.seq_len
    config.optimizer.learning_rate = 0.001
    config.optimizer.weight_decay = 0.0
    config.train.init_from = str(workdir)
    config.train.tokens = 1e6
    config.train.batch_tokens = 4_096.0
    return config
