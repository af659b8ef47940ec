"""How good a trained decoder is: on text, and on tasks."""

from lm.evaluate.scorer import Continuation, Generated, Scorer

__all__ = ["Continuation", "Generated", "Scorer"]
