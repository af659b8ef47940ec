"""From text to batches: corpora, tokenizers, the token store, and ``batch(seed, step)``."""

from lm.data.dataset import Batch, Dataset, open_dataset

__all__ = ["Batch", "Dataset", "open_dataset"]
