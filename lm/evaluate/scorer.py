"""What a decoder thinks of given text, and what it writes: all that evaluation asks of it.

Axes in names as in ``lm/model/decoder.py``.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lm.checkpoint import load_config, load_params
from lm.command import BadInput
from lm.config import Config, MeshConfig, ModelConfig, check_vocabulary, replace
from lm.data import Batch, open_tokenizer
from lm.data.chat import stops
from lm.data.tokenizers import Tokenizer, decode_after
from lm.generate.decode import Completion, Generator
from lm.generate.sampling import Sampling
from lm.model import Decoder
from lm.model.loss import logits
from lm.model.rotary import laid_out
from lm.sharding import batch_shards, lay, layout, make_mesh, named_sharding, placed

Text = str | Sequence[int]  # as it is, or as token ids
GREEDY = Sampling(temperature=0)
SHORTEST = 16  # positions of the smallest bucket
HEAD_ELEMENTS = 2**25  # logits that exist at a time, at most


@dataclass(frozen=True)
class Continuation:
    """A continuation under the model, each token given the context and the tokens before it."""

    token_log_probs: list[float]  # nats
    token_brier_scores: list[float]  # sum over the vocabulary of (p - [it is the token])^2
    greedy: bool  # whether each token is the likeliest

    @property
    def log_prob(self) -> float:
        """Of all tokens together, in nats."""
        return float(np.sum(self.token_log_probs, dtype=np.float64))


class Generated(NamedTuple):
    """What followed a prompt: the text cut before the first stop, and the tokens as drawn."""

    text: str
    completion: Completion


class Judged(NamedTuple):
    """Of each target of a batch."""

    log_p_BT: jax.Array
    brier_BT: jax.Array
    greedy_BT: jax.Array  # bool


class Scorer:
    """A decoder ready to judge text, on one mesh.

    Args:
      config: of the run whose parameters are used.
      params: the decoder's parameters, lying over ``mesh``.
      tokenizer: of the run.
      mesh: rows of a batch are divided over its data axes.
      max_length: the longest input in tokens; 0: the length that the run was trained at.
      batch_tokens: positions that are computed at a time.
      marked: a special token's name in a text is that token, as chat templates write it.
      stop: ids that end what is written (none: end of text).

    Raises:
      BadInput: a tokenizer with more ids than the embedding, or a ``max_length`` beyond learned
        positions.
    """

    def __init__(
        self,
        config: Config,
        params: Any,
        tokenizer: Tokenizer,
        mesh: Mesh,
        max_length: int = 0,
        batch_tokens: int = 8_192,
        marked: bool = False,
        stop: Sequence[int] = (),
    ):
        check_vocabulary(config, tokenizer.vocab_size)
        trained = config.data.seq_len
        self.max_length = max_length or trained
        if config.model.position == "learned" and self.max_length > trained:
            raise BadInput(f"max_length = {max_length}: learned positions end at {trained}")
        self.config, self.params, self.tokenizer = config, params, tokenizer
        self._mesh, self._batch_tokens, self._marked = mesh, batch_tokens, marked
        self._stop = list(stop) or [tokenizer.end_of_text]
        self._layout = layout(config, mesh)
        self._longest = trained if config.model.position == "learned" else self.max_length
        self._model = dataclasses.replace(config.model, remat="none")
        # Among rows of other lengths experts drop no token.
        moe = dataclasses.replace(config.model.moe, dispatch="auto")
        self._dropless = dataclasses.replace(self._model, moe=moe)
        self._run = jax.jit(self._judge, static_argnums=0)
        self._generators: dict[tuple, Generator] = {}

    @classmethod
    def open(cls, workdir: str | Path, **settings: Any) -> "Scorer":
        """Of the newest checkpoint of a run's folder, on all devices here.

        ``settings``: what has a default above; ``stop`` is beside the model's own. Raises
        ``BadInput`` where the folder holds no run.
        """
        workdir = Path(workdir)
        config = load_config(workdir)
        tokenizer = open_tokenizer(config.data)
        check_vocabulary(config, tokenizer.vocab_size)
        model = config.mesh.model
        model = model if model > 0 and len(jax.devices()) % model == 0 else 1
        mesh = make_mesh(MeshConfig(data=-1, model=model))
        alone = {"stage": 1, "rounds": 1, "context": 1, "experts": "model"}
        config = replace(config, mesh={**alone, "sequence_sharded": False})
        stop = [*stops(workdir, tokenizer), *settings.pop("stop", ())]
        params = load_params(workdir, config, mesh)
        return cls(config, params, tokenizer, mesh, stop=stop, **settings)

    def rows(self, width: int) -> int:
        """How many rows of ``width`` positions go together; they divide over the mesh."""
        shards = batch_shards(self._mesh)
        return max(shards, self._batch_tokens // width // shards * shards)

    def judge(self, batch: Batch) -> Judged:
        """Every target of a batch of ``rows`` as training reads it: experts' capacity and all."""
        return self._judged(self._model, batch)

    def log_likelihoods(
        self, pairs: Iterable[tuple[Text, Text]], cut: bool = False
    ) -> list[Continuation]:
        """Each (context, continuation)'s continuation.

        Pairs of text become tokens as ``encode_pair`` says. Rows are padded to a power of two of
        positions and computed together; each such bucket compiles once. Under LongRoPE the short
        factors judge a row of at most its original positions, the long ones any other.

        Args:
          pairs: texts, or tokens.
          cut: where a pair is too long, its context loses tokens on the left.

        Raises ``BadInput`` for an empty continuation, a pair longer than ``max_length`` + 1 tokens
        unless ``cut``, and a continuation that is so alone. So it does for experts that choose
        tokens: they look ahead.
        """
        moe = self.config.model.moe
        if moe.n_experts and moe.routing == "expert_choice":
            raise BadInput(
                "model.moe.routing = 'expert_choice': must be 'token_choice' to tell the"
                " probability of a continuation, since experts choose among all tokens of a text"
            )
        rows = [self._row(*self.encode_pair(*pair), cut) for pair in pairs]
        found: list[Continuation] = [None] * len(rows)
        buckets: dict[int, list[int]] = {}
        for i, (tokens, _) in enumerate(rows):
            buckets.setdefault(self._width(len(tokens) - 1), []).append(i)
        for width, members in sorted(buckets.items()):
            for chunk, n_rows in self._chunks(members, self.rows(width)):
                tokens_Bt = np.zeros((n_rows, width + 1), np.int32)
                for row, i in zip(tokens_Bt, chunk, strict=False):
                    row[: len(rows[i][0])] = rows[i][0]
                batch = Batch(tokens_Bt[:, :-1], tokens_Bt[:, 1:])
                judged = jax.device_get(self._judged(self._dropless, batch))
                for b, i in enumerate(chunk):
                    tokens, n = rows[i]
                    part = slice(len(tokens) - 1 - n, len(tokens) - 1)
                    found[i] = Continuation(
                        judged.log_p_BT[b, part].tolist(),
                        judged.brier_BT[b, part].tolist(),
                        bool(judged.greedy_BT[b, part].all()),
                    )
        return found

    def encode_pair(self, context: Text, continuation: Text) -> tuple[list[int], list[int]]:
        """Tokens of both, as the two texts together have them.

        As lm-eval does: blanks at the context's end belong to the continuation, whose tokens are
        those of the joint text beyond as many as the context alone has. What the tokenizer puts
        before a text stands before the context; where nothing would stand there, end of text.
        """
        if isinstance(context, str) != isinstance(continuation, str):
            raise BadInput("a pair of text and tokens: must be two texts, or tokens of both")
        if not isinstance(context, str):
            return [int(i) for i in context], [int(i) for i in continuation]
        first, joint = (self._encode(text) for text in (context.rstrip(), context + continuation))
        return self._started(first), joint[len(first) :]

    def _encode(self, text: str) -> list[int]:
        encode = self.tokenizer.encode
        return (self.tokenizer.encode_marked(text)[0] if self._marked else encode(text)).tolist()

    def _started(self, ids: list[int]) -> list[int]:
        """After what stands before a text, unless it is there; end of text alone for nothing."""
        start = list(self.tokenizer.prefix)
        if self._marked and start and ids[: len(start)] == start:
            return ids
        return start + ids or [self.tokenizer.end_of_text]

    def generate(
        self,
        prompts: Sequence[Text],
        max_tokens: int,
        sampling: Sampling = GREEDY,
        until: Sequence[str] = (),
        seed: int = 0,
        cut: bool = False,
        batch_size: int = 32,
    ) -> list[Generated]:
        """What follows each prompt, ended by end of text, ``until`` or ``max_tokens``.

        Args:
          until: texts that end a continuation, and are no part of it.
          seed: of the draws; what a prompt draws depends on its place in the list too.
          cut: a prompt that leaves no room in ``max_length`` loses tokens on the left.

        Raises ``BadInput`` as ``Generator`` does, and for a prompt that leaves no room.
        """
        ids = [self._prompt(prompt, max_tokens, cut) for prompt in prompts]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        found: list[Generated] = [None] * len(ids)
        # Under LongRoPE what a prompt may come to, not its neighbours, says which factors turn it.
        alike = itertools.groupby(order, lambda i: self._is_plain(len(ids[i]) + max_tokens))
        chunks = [chunk for _, some in alike for chunk in self._chunks(list(some), batch_size)]
        for chunk, n_rows in chunks:
            # Rows that fill a batch up repeat its last, so that all have a compiled program.
            filled = [ids[i] for i in chunk] + [ids[chunk[-1]]] * (n_rows - len(chunk))
            positions = self._width(len(filled[-1]) + max_tokens)
            stream = self._generator(positions, sampling).stream(
                *(filled, max_tokens, _seed(seed, chunk[0])), every=16 if until else max_tokens
            )
            for completions in stream:
                texts = [
                    decode_after(self.tokenizer, prompt, completion.tokens)
                    for prompt, completion in zip(filled[: len(chunk)], completions, strict=False)
                ]
                ends = [min((t.find(u) for u in until if u in t), default=-1) for t in texts]
                if all(e >= 0 or c.stopped for e, c in zip(ends, completions, strict=False)):
                    break
            for i, text, end, completion in zip(chunk, texts, ends, completions, strict=False):
                found[i] = Generated(text if end < 0 else text[:end], completion)
        return found

    def _generator(self, positions: int, sampling: Sampling) -> Generator:
        key = (positions, sampling)
        if key not in self._generators:
            self._generators[key] = Generator(
                *(self.config, self.params, positions, self._mesh, sampling),
                stop=self._stop,
            )
        return self._generators[key]

    def _prompt(self, prompt: Text, max_tokens: int, cut: bool) -> list[int]:
        if isinstance(prompt, str):
            prompt = self._started(self._encode(prompt))
        room = self.max_length - max_tokens
        if len(prompt) > room:
            if not cut or room < 1:
                raise BadInput(
                    f"a prompt of {len(prompt)} tokens and max_tokens = {max_tokens}:"
                    f" must be at most {self.max_length} together"
                )
            prompt = prompt[-room:]
        return [int(i) for i in prompt]

    def _row(self, context: list[int], continuation: list[int], cut: bool) -> tuple[list, int]:
        """(tokens, how many at their end are judged)"""
        n, longest = len(continuation), self.max_length + 1
        if not n or not context:
            raise BadInput(f"{'a context' if n else 'a continuation'} of no tokens")
        tokens = context + continuation
        if len(tokens) > longest:
            if not cut or n >= longest:
                raise BadInput(
                    f"a context of {len(context)} tokens and a continuation of {n}: must be at most"
                    f" {longest} together (max_length = {self.max_length})"
                )
            tokens = tokens[-longest:]
        vocabulary = self.config.model.vocab_size
        if max(tokens) >= vocabulary or min(tokens) < 0:
            raise BadInput(f"a token {max(tokens)}: must be below the model's {vocabulary} ids")
        return tokens, n

    def _width(self, n: int) -> int:
        """Of a bucket that takes ``n`` positions; under LongRoPE both have the same factors."""
        last = self.max_length
        if not self._is_plain(n):
            last = min(last, self._model.rope_scaling.original_positions)
        return min(max(_power_of_two(n), SHORTEST), last)

    def _is_plain(self, n: int) -> bool:
        """Whether ``n`` positions are not turned by LongRoPE's short factors."""
        return laid_out(self._model, n) is self._model

    def _chunks(self, members: list[int], most: int) -> Iterator[tuple[list[int], int]]:
        """The members, ``most`` at a time, and the rows they take: a power of two where it can."""
        shards = batch_shards(self._mesh)
        most = max(shards, most - most % shards)
        for at in range(0, len(members), most):
            chunk = members[at : at + most]
            n_rows = max(shards, _power_of_two(len(chunk)))
            yield chunk, min(most, -(-n_rows // shards) * shards)

    def _judged(self, model: ModelConfig, batch: Batch) -> Judged:
        here, n = np.arange(len(batch.inputs_BT)), len(batch.inputs_BT)
        sharding = named_sharding(self._mesh, self._layout, "batch", None)
        batch = jax.tree.map(lambda x: lay(x, here, n, 0, sharding), batch)
        with jax.set_mesh(self._mesh), placed(self._mesh, self._layout):
            return self._run(laid_out(model, batch.inputs_BT.shape[1]), self.params, batch)

    def _judge(self, model: ModelConfig, params: Any, batch: Batch) -> Judged:
        apply = partial(Decoder(model, self._longest).apply, {"params": params})
        x_BTD, _ = apply(*(batch.inputs_BT, batch.segments_BT, batch.positions_BT), method="hidden")
        unembedding_DV = apply(method="unembedding")
        b, t = batch.targets_BT.shape
        # The most positions at a time that divide the row: a large vocabulary's logits are many.
        rows = -(-b // batch_shards(self._mesh))
        wanted = max(1, HEAD_ELEMENTS // (rows * unembedding_DV.shape[1]))
        chunk = max(k for k in range(1, min(t, wanted) + 1) if t % k == 0)

        def of_some(given):
            x_BCD, targets_BC = given
            logits_BCV = logits(x_BCD, unembedding_DV, self.config.model.logit_soft_cap)
            log_p_BCV = jax.nn.log_softmax(logits_BCV)
            chosen_BC = jnp.take_along_axis(log_p_BCV, targets_BC[..., None], -1)[..., 0]
            squares_BC = jnp.sum(jnp.exp(2 * log_p_BCV), -1)
            brier_BC = squares_BC - 2 * jnp.exp(chosen_BC) + 1
            return Judged(chosen_BC, brier_BC, jnp.argmax(logits_BCV, -1) == targets_BC)

        def split(x):
            return jnp.moveaxis(x.reshape(b, t // chunk, chunk, *x.shape[2:]), 1, 0)

        judged = jax.lax.map(of_some, (split(x_BTD), split(batch.targets_BT)))
        return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(b, t), judged)


def _seed(seed: int, place: int) -> int:
    """A batch's own, of the seed and where in the list it begins."""
    return int(np.random.SeedSequence((seed, place)).generate_state(1)[0])


def _power_of_two(n: int) -> int:
    """The least that is at least ``n``."""
    return 1 << max(n - 1, 0).bit_length()
