"""Our models under EleutherAI's lm-eval, whose hundreds of tasks then run on them.

python -m lm.evaluate.harness run --model lm --model_args workdir=runs/tiny --tasks lambada_openai

takes what the command `lm-eval` takes (extra `eval`). From Python, importing this registers the
model `lm` for ``lm_eval.simple_evaluate``.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm.checkpoint import load_config
from lm.command import BAD_INPUT, BadInput
from lm.data import open_template, open_tokenizer
from lm.data.chat import end_of_turn
from lm.evaluate.corpus import rolling
from lm.evaluate.scorer import Scorer
from lm.generate.sampling import Sampling

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
except ImportError:
    if __name__ == "__main__":
        sys.exit("error: lm-eval is not here; pip install '.[eval]'")
    raise

# What a task may call the longest answer, in the order of lm-eval's own models.
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@register_model("lm")
class HarnessModel(LM):
    """A run's newest checkpoint. As lm-eval wants it, contexts too long are cut on the left.

    Args:
      workdir: a run's folder.
      max_length: the longest input in tokens (0: the length that the run was trained at).
      batch_tokens: positions that are computed at a time; ``batch_size`` is left alone.
      max_gen_toks: of an answer, where a task does not say.
      seed: of the draws, where a task samples.
    """

    def __init__(
        self,
        workdir: str,
        max_length: int = 0,
        batch_tokens: int = 8_192,
        max_gen_toks: int = 256,
        seed: int = 0,
        batch_size: Any = None,
        max_batch_size: Any = None,
        device: Any = None,
    ):
        super().__init__()
        config = load_config(Path(workdir))
        tokenizer = open_tokenizer(config.data)
        self.template = open_template(config.data, tokenizer)
        self.scorer = Scorer.open(
            workdir, max_length=max_length, batch_tokens=batch_tokens, marked=True,
            stop=end_of_turn(self.template, tokenizer),
        )  # fmt: skip
        self.max_gen_toks, self.seed = max_gen_toks, seed

    @property
    def tokenizer_name(self) -> str:
        """By which lm-eval tells its caches apart."""
        return self.scorer.tokenizer.fingerprint

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as the run's template writes it."""
        return self.template.render(chat_history, add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The template itself, for lm-eval's notes."""
        return self.template.source if chat_template else ""

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """(nats of the continuation, whether greedy decoding writes it) of each pair."""
        found = self.scorer.log_likelihoods((request.args for request in requests), cut=True)
        return [(continuation.log_prob, continuation.greedy) for continuation in found]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Nats of each whole text."""
        texts = self.scorer.tokenizer.encode_batch([request.args[0] for request in requests])
        windows = [rolling(self.scorer, ids.tolist()) for ids in texts]
        found = iter(self.scorer.log_likelihoods(pair for pairs in windows for pair in pairs))
        return [sum(next(found).log_prob for _ in pairs) for pairs in windows]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """What follows each context, cut before the first of its stops."""
        written: list[str] = [""] * len(requests)
        groups: dict[tuple, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(self._settings(request.args[1]), []).append(i)
        for (max_tokens, sampling, until), members in groups.items():
            prompts = [requests[i].args[0] for i in members]
            found = self.scorer.generate(prompts, max_tokens, sampling, until, self.seed, cut=True)
            for i, generated in zip(members, found, strict=True):
                written[i] = generated.text
        return written

    def _settings(self, given: dict[str, Any]) -> tuple[int, Sampling, Sequence[str]]:
        given = {key: value for key, value in given.items() if value is not None}
        lengths = [given.pop(name) for name in LENGTHS if name in given]
        until, samples = given.pop("until", []), given.pop("do_sample", None)
        settings = {"temperature": 0.0} | {k: given.pop(k) for k in SAMPLING if k in given}
        if given:
            raise BadInput(f"generation_kwargs: {', '.join(given)} are not known here")
        if samples and not settings["temperature"]:  # as transformers refuses it
            raise BadInput("generation_kwargs: do_sample without a temperature above 0")
        if samples is False:
            settings["temperature"] = 0.0
        until = (until,) if isinstance(until, str) else tuple(until)
        return int((lengths or [self.max_gen_toks])[0]), Sampling(**settings), until


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except BadInput as error:  # lm-eval has the flags, so command.run cannot
        print(f"error: {error}", file=sys.stderr)
        sys.exit(BAD_INPUT)
