"""The decoder: pre-norm blocks of attention and feed-forward, as the papers write them."""

from lm.model.decoder import Decoder
from lm.model.kernels import choose_kernel
from lm.model.loss import cross_entropy, head_cross_entropy

__all__ = ["Decoder", "choose_kernel", "cross_entropy", "head_cross_entropy"]
