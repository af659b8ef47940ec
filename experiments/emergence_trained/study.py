"""The runs of experiments/emergence_trained: decoders of growing width on one corpus of problems.

    python -m lm.train --config=experiments/emergence_trained/study.py:chain_32 \
        --config.data.files=chain.jsonl --workdir=runs/chain_32

run.py writes the corpora and has all commands.
"""

from configs import base
from lm.command import one_of

WIDTHS = (4, 6, 8, 10, 12, 16, 24, 32, 64)
TOKENS = {"addition": 1e6, "chain": 2e6}
BYTES = {"addition": 1_250_000, "chain": 2_500_000}  # of the corpora: less than an epoch


def get_config(run="chain_32"):
    """CORPUS_WIDTH: two layers and four heads at every width."""
    names = [f"{corpus}_{width}" for corpus in TOKENS for width in WIDTHS]
    one_of("experiments/emergence_trained/study.py: the run", run, names)
    corpus, _, width = run.partition("_")
    d = int(width)
    config = base.get_config()
    config.name = f"emergence_trained_{run}"
    config.model.d_model = d
    config.model.n_layers = 2
    config.model.n_heads = config.model.n_kv_heads = 4
    config.model.head_width = max(8, d // 4)
    config.model.d_ff = -(-8 * d // 3 // 4) * 4
    config.model.rope_base = 100.0  # four pairs of columns for 128 positions
    config.data.corpus = "text"
    config.data.files = f"runs/emergence_trained/{corpus}.jsonl"
    config.data.respect_documents = True
    config.data.validation_tokens = 32_768
    config.optimizer.learning_rate_rule = "width"
    config.optimizer.learning_rate = 0.01
    config.train.batch_tokens = 512.0
    config.train.tokens = TOKENS[corpus]
    config.train.tensorboard = False
    return config
