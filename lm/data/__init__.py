"""From text to batches: corpora, tokenizers, the token store, and ``batch(seed, step)``."""

from lm.data.dataset import Batch, Dataset, open_dataset, open_template, open_tokenizer

__all__ = ["Batch", "Dataset", "open_dataset", "open_template", "open_tokenizer"]
