"""Texts from prompts: one pass over the prompts fills the cache, then a token a step."""

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lm.command import BadInput, one_of
from lm.config import Config
from lm.generate.sampling import Sampling, draw
from lm.model import Decoder, kv_cache
from lm.model.loss import logits
from lm.sharding import layout, placed

DEFAULT = Sampling()
SMALLEST_ROOM = 128  # positions of the cache of a short text


@dataclass(frozen=True)
class Completion:
    """What followed one prompt, without the stop token."""

    tokens: list[int]
    log_probabilities: list[float]  # of each token under the model itself, whatever the sampling
    stopped: bool  # by a stop token, not by the length
    log_probability: float  # of all of it together, the stop token with it


class _Text(NamedTuple):
    """The batch while it is written. P positions in all."""

    tokens_BP: jax.Array  # int32
    log_p_BP: jax.Array
    total_B: jax.Array  # log-probability of what was drawn, a stop token with it
    length_B: jax.Array  # tokens so far, the prompt's included
    done_B: jax.Array
    logits_BV: jax.Array  # of each row's next token
    seen_BV: jax.Array | None  # which tokens a row holds; None where nothing asks


class Generator:
    """A decoder ready to write, for one mesh, sampling and number of positions.

    Args:
      config: of the run whose parameters are used; ``data.seq_len`` bounds nothing here.
      params: the decoder's parameters.
      positions: the longest text, prompt included, that it can hold.
      mesh: where the parameters lie.
      stop: ids of tokens that end a text.
      cache_dtype: float32 | bfloat16 | int8.

    Raises:
      BadInput: more positions than learned ones were made for, or experts that choose tokens: they
        see the whole text.
    """

    def __init__(
        self,
        config: Config,
        params: Any,
        positions: int,
        mesh: Mesh,
        sampling: Sampling = DEFAULT,
        stop: Sequence[int] = (),
        cache_dtype: str = "float32",
    ):
        last = config.data.seq_len
        if config.model.position == "learned" and positions > last:
            raise BadInput(f"{positions} positions: learned ones end at {last}")
        one_of("cache_dtype", cache_dtype, kv_cache.DTYPES)
        model, moe = config.model, config.model.moe
        if moe.n_experts and moe.routing == "expert_choice":
            raise BadInput(
                "model.moe.routing = 'expert_choice': must be 'token_choice' to generate,"
                " since experts choose among all tokens of a text"
            )
        # Experts then drop no token, whose neighbours are not here to compete with it.
        moe = dataclasses.replace(moe, dispatch="auto")
        model = dataclasses.replace(model, remat="none", attention_kernel="auto", moe=moe)
        self.positions, self.sampling, self.params = positions, sampling, params
        self._cache_dtype, self._model = cache_dtype, model
        self._decoder = Decoder(model, last if model.position == "learned" else positions)
        self._soft_cap, self._stop = model.logit_soft_cap, jnp.array(list(stop) or [-1])
        # A step has one position: nothing to split.
        whole = dataclasses.replace(config.mesh, sequence_sharded=False, stage=1, rounds=1)
        self._mesh = mesh
        self._layout = layout(dataclasses.replace(config, mesh=whole), mesh)
        self._run_prefill = jax.jit(self._prefill, static_argnums=3)
        self._run_grown = jax.jit(partial(kv_cache.grown, model), static_argnums=1)
        self._run_steps = jax.jit(self._steps, donate_argnums=(1, 2))

    def __call__(
        self, prompts: Sequence[Sequence[int]], max_tokens: int, seed: int = 0
    ) -> list[Completion]:
        """A completion of each prompt, of at most ``max_tokens`` tokens."""
        *_, last = self.stream(prompts, max_tokens, seed, every=max_tokens)
        return last

    def stream(
        self, prompts: Sequence[Sequence[int]], max_tokens: int, seed: int = 0, every: int = 8
    ) -> Iterator[list[Completion]]:
        """The completions so far, after every few tokens; the last are whole.

        Raises ``BadInput`` for an empty prompt, and for one that leaves no room.
        """
        self._check(prompts, max_tokens)
        started_B = np.array([len(prompt) for prompt in prompts])
        # A power of two, so that prompts of other lengths meet a compiled program.
        width = min(self.positions, 1 << int(started_B.max() - 1).bit_length())
        inputs_BT = np.zeros((len(prompts), width), np.int32)
        for row, prompt in zip(inputs_BT, prompts, strict=True):
            row[: len(prompt)] = prompt
        keys_B = jax.random.split(jax.random.key(seed), len(prompts))
        with jax.set_mesh(self._mesh), placed(self._mesh, self._layout):
            longest, last = int(started_B.max()), int(started_B.max()) + max_tokens
            room = self._room(max(longest + 1, width))
            text, cache = self._run_prefill(self.params, inputs_BT, started_B, room)
            while longest < last:
                if longest == room:
                    room = self._room(longest + 1)
                    cache = self._run_grown(cache, room)
                n = min(every, last - longest, room - longest)
                text, cache = self._run_steps(self.params, text, cache, keys_B, np.int32(n))
                longest += n
                yield self._completions(text, started_B)
                if text.done_B.all():
                    return

    def _room(self, positions: int) -> int:
        """The cache's, for a text of so many: half as much again and twice as much, by turns.

        So a token's cost grows with its position, at a few compilations on a text's way.
        """
        room = SMALLEST_ROOM
        while room < positions:
            room = room * 4 // 3 if room % 3 == 0 else room * 3 // 2
        return min(room, self.positions)

    def _check(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> None:
        if max_tokens < 1:
            raise BadInput(f"max_tokens = {max_tokens}: must be at least 1")
        for prompt in prompts:
            if not len(prompt):
                raise BadInput("an empty prompt: must have at least one token")
            if len(prompt) + max_tokens > self.positions:
                raise BadInput(
                    f"a prompt of {len(prompt)} tokens and max_tokens = {max_tokens}:"
                    f" must be at most {self.positions} together"
                )

    def _hidden(self, params, cache, inputs_BT, segments_BT, positions_BT):
        (x_BTD, _), changed = self._decoder.apply(
            {"params": params, "cache": cache},
            *(inputs_BT, segments_BT, positions_BT),
            method="hidden",
            mutable=["cache"],
        )
        return x_BTD, changed["cache"]

    def _next_logits(self, params, x_BD) -> jax.Array:
        unembedding_DV = self._decoder.apply({"params": params}, method="unembedding")
        return logits(x_BD[:, None], unembedding_DV, self._soft_cap)[:, 0]

    def _prefill(self, params, inputs_BT, length_B, room: int) -> tuple[_Text, Any]:
        b, t = inputs_BT.shape
        positions_BT = jnp.broadcast_to(jnp.arange(t), (b, t))
        # Padding is another document, which the cache leaves out.
        segments_BT = (positions_BT >= length_B[:, None]).astype(jnp.int32)
        cache = kv_cache.empty(self._model, params, b, room, self._cache_dtype)
        x_BTD, cache = self._hidden(params, cache, inputs_BT, segments_BT, positions_BT)
        logits_BV = self._next_logits(params, x_BTD[jnp.arange(b), length_B - 1])
        seen_BV = None
        if self.sampling.repetition_penalty != 1:
            seen_BV = jnp.zeros(logits_BV.shape, bool)
            seen_BV = seen_BV.at[jnp.arange(b)[:, None], inputs_BT].max(segments_BT == 0)
        tokens_BP = jnp.zeros((b, self.positions), jnp.int32).at[:, :t].set(inputs_BT)
        text = _Text(
            *(tokens_BP, jnp.zeros(tokens_BP.shape), jnp.zeros(b), length_B, jnp.zeros(b, bool)),
            *(logits_BV, seen_BV),
        )
        return text, cache

    def _steps(self, params, text: _Text, cache, keys_B, n: jax.Array) -> tuple[_Text, Any]:
        """``n`` tokens more, or fewer where every text ends before."""

        def go_on(carry):
            i, text, _ = carry
            return (i < n) & ~text.done_B.all()

        def step(carry):
            i, text, cache = carry
            rows_B = jnp.arange(len(text.length_B))
            keys = jax.vmap(jax.random.fold_in)(keys_B, text.length_B)
            token_B = draw(keys, text.logits_BV, self.sampling, text.seen_BV)
            log_p_B = jax.nn.log_softmax(text.logits_BV)[rows_B, token_B]
            stopped_B = text.done_B | (token_B[:, None] == self._stop).any(-1)
            # A text that ended writes beyond its end, which is dropped.
            at_B = jnp.where(stopped_B, self.positions, text.length_B)
            x_BTD, cache = self._hidden(
                params, cache, token_B[:, None], None, text.length_B[:, None]
            )
            seen_BV = text.seen_BV
            if seen_BV is not None:
                seen_BV = seen_BV.at[rows_B, token_B].set(True)
            return (
                i + 1,
                _Text(
                    text.tokens_BP.at[rows_B, at_B].set(token_B, mode="drop"),
                    text.log_p_BP.at[rows_B, at_B].set(log_p_B, mode="drop"),
                    text.total_B + jnp.where(text.done_B, 0, log_p_B),
                    text.length_B + ~stopped_B,
                    stopped_B,
                    self._next_logits(params, x_BTD[:, 0]),
                    seen_BV,
                ),
                cache,
            )

        _, text, cache = jax.lax.while_loop(go_on, step, (jnp.int32(0), text, cache))
        return text, cache

    def _completions(self, text: _Text, started_B: np.ndarray) -> list[Completion]:
        fields = (text.tokens_BP, text.log_p_BP, text.total_B, text.length_B, text.done_B)
        rows = zip(*jax.device_get(fields), started_B, strict=True)
        return [
            Completion(
                tokens[first:end].tolist(), log_p[first:end].tolist(), bool(done), float(total)
            )
            for tokens, log_p, total, end, done, first in rows
        ]


def best(completions: Sequence[Completion]) -> Completion:
    """The likeliest one as a whole: to have ended there counts, too."""
    return max(completions, key=lambda completion: completion.log_probability)


def vote(texts: Sequence[str], wanted: re.Pattern) -> tuple[str | None, float]:
    """The commonest answer and its share of the texts; (None, 0) where none has one.

    A text's answer is its last match of ``wanted``: the first group, where there is one. Of equally
    common ones the first.
    """
    matches = [list(wanted.finditer(text)) for text in texts]
    answers = Counter(found[-1][min(1, wanted.groups)] for found in matches if found)
    if not answers:
        return None, 0.0
    answer, n = answers.most_common(1)[0]
    return answer, n / len(texts)
