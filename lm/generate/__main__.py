"""Writes on from a prompt with the weights of a run's newest checkpoint.

python -m lm.generate --workdir=runs/tiny --prompt="It was a" [--temperature=0.8 --top_p=0.95 ...]

Several --prompt make a batch. With --chat each is a user's message, which the model answers. With
--samples each prompt is continued so often; --best alone keeps the likeliest, --vote=REGEX tells
the commonest match (its first group, where it has one), which is self-consistency (Wang et al.
2023).

The context that the model was made for (data.seq_len, or more by model.rope_scaling) ends every
text: --max_tokens becomes what the longest prompt leaves of it, and a line on stderr says so. Under
LongRoPE the long factors turn every text from its start where the longest prompt and --max_tokens
together are beyond model.rope_scaling.original_positions, else the short ones. One process writes,
on the devices of one host.
"""

import dataclasses
import json
import os
import re
import sys
from functools import partial
from pathlib import Path

from absl import flags

from lm import command, hosts
from lm.command import BadInput

FLAGS = flags.FlagValues()
flags.DEFINE_string("workdir", None, "A run's folder.", flag_values=FLAGS)
flags.DEFINE_multi_string("prompt", [], "What to continue; may be repeated.", flag_values=FLAGS)
flags.DEFINE_bool("chat", False, "Prompts are messages, to be answered.", flag_values=FLAGS)
flags.DEFINE_integer("max_tokens", 200, "Tokens of a continuation, at most.", flag_values=FLAGS)
flags.DEFINE_float("temperature", 1.0, "0: the likeliest token.", flag_values=FLAGS)
flags.DEFINE_integer("top_k", 0, "Draw from the k likeliest (0: all).", flag_values=FLAGS)
flags.DEFINE_float("top_p", 1.0, "From the fewest that reach this probability.", flag_values=FLAGS)
flags.DEFINE_float(
    "min_p", 0.0, "From those of this share of the likeliest's probability.", flag_values=FLAGS
)
flags.DEFINE_float(
    "repetition_penalty", 1.0, "Above 1: tokens already there are less likely.", flag_values=FLAGS
)
flags.DEFINE_integer("seed", 0, "Of the draws.", 0, 2**32 - 1, flag_values=FLAGS)
flags.DEFINE_integer("samples", 1, "Continuations of each prompt.", flag_values=FLAGS)
flags.DEFINE_bool("best", False, "Of the samples, the likeliest alone.", flag_values=FLAGS)
flags.DEFINE_string("vote", None, "The samples' commonest match of this regex.", flag_values=FLAGS)
flags.DEFINE_multi_integer("stop", None, "Ids that end a text (the model's).", flag_values=FLAGS)
flags.DEFINE_string("cache_dtype", "float32", "float32, bfloat16 or int8.", flag_values=FLAGS)
flags.DEFINE_bool("json", False, "An object a line, with log-probabilities.", flag_values=FLAGS)


def main() -> None:
    if FLAGS.workdir is None or not FLAGS.prompt:
        missing = "prompt" if FLAGS.workdir else "workdir"
        raise BadInput(f"--{missing} is missing; as --workdir=runs/tiny --prompt='It was a'")
    if FLAGS.samples < 1:
        raise BadInput(f"--samples={FLAGS.samples}: must be at least 1")
    try:
        wanted = re.compile(FLAGS.vote) if FLAGS.vote is not None else None
    except re.error as error:
        raise BadInput(f"--vote={FLAGS.vote}: not a regular expression ({error})") from error
    if (found := hosts.cluster(os.environ)) is not None:
        raise BadInput(
            f"the environment (LM_PROCESSES, srun, a TPU pod) has {found.n} processes: texts are"
            " written by one"
        )

    from lm.data.tokenizers import decode_after
    from lm.generate.decode import Generator
    from lm.generate.sampling import Sampling

    fields = [field.name for field in dataclasses.fields(Sampling)]
    sampling = Sampling(**{name: FLAGS[name].value for name in fields})
    generator, tokenizer, prompts = _open(Generator, sampling)
    decoders = [partial(decode_after, tokenizer, prompt) for prompt in prompts]
    max_tokens = generator.positions - max(map(len, prompts))
    rows = [prompt for prompt in prompts for _ in range(FLAGS.samples)]
    if len(rows) == 1 and not FLAGS.json and wanted is None:
        found = _print_growing(generator.stream(rows, max_tokens, FLAGS.seed, 4), *decoders)
    else:
        found = generator(rows, max_tokens, FLAGS.seed)
        _print_whole(found, decoders, wanted)
    if max_tokens < FLAGS.max_tokens and not all(completion.stopped for completion in found):
        told = f"ended after {max_tokens} tokens, where the model's context does"
        print(f"--max_tokens={FLAGS.max_tokens}: {told}", file=sys.stderr)


def _open(generator, sampling):
    """The generator and the tokenizer of ``--workdir``, and the prompts' ids."""
    import jax

    from lm.checkpoint import context, load_config, load_params
    from lm.config import MeshConfig, check_vocabulary
    from lm.data import open_template, open_tokenizer
    from lm.data.chat import end_of_turn, stops
    from lm.sharding import make_mesh

    workdir = Path(FLAGS.workdir)
    config = load_config(workdir)
    tokenizer = open_tokenizer(config.data)
    check_vocabulary(config, tokenizer.vocab_size)
    prompts = [[*tokenizer.prefix, *tokenizer.encode(text).tolist()] for text in FLAGS.prompt]
    stop = stops(workdir, tokenizer)
    if FLAGS.chat:
        template = open_template(config.data, tokenizer)
        asked = [[{"role": "user", "content": text}] for text in FLAGS.prompt]
        marked = [tokenizer.encode_marked(template.render(a, prompt=True))[0] for a in asked]
        prompts = [ids.tolist() for ids in marked]
        stop += end_of_turn(template, tokenizer)
    longest, room = max(map(len, prompts)), context(workdir)
    if longest >= room:
        raise BadInput(
            f"a prompt of {longest:,} tokens: must be fewer than the {room:,} positions that the"
            " model was made for"
        )
    # A single row is no work for many: what the model axis does not take stays idle.
    here, wanted = jax.devices(), max(config.mesh.model, 1)
    n = max(k for k in range(1, min(wanted, len(here)) + 1) if wanted % k == 0)
    mesh = make_mesh(MeshConfig(data=1, model=n), here[:n])
    positions = min(longest + FLAGS.max_tokens, room)
    opened = generator(
        *(config, load_params(workdir, config, mesh), positions, mesh, sampling),
        stop=FLAGS.stop or stop,
        cache_dtype=FLAGS.cache_dtype,
    )
    return opened, tokenizer, prompts


def _print_growing(stream, decode) -> list:
    """The text as it grows. A character that is not whole yet waits. Returns the completion."""
    told, before = 0, "" if FLAGS.chat else FLAGS.prompt[0]
    for completions in stream:
        text = before + decode(completions[0].tokens)
        whole = len(text.rstrip("\ufffd"))  # may be less than before: a byte can spoil its run
        print(text[told:whole], end="", flush=True)
        told = max(told, whole)
    print(text[told:])
    return completions


def _print_whole(found: list, decoders: list, wanted: re.Pattern | None) -> None:
    """All samples of each prompt, the best of them, or their vote."""
    from lm.generate.decode import best, vote

    for i, (prompt, decode) in enumerate(zip(FLAGS.prompt, decoders, strict=True)):
        samples = found[i * FLAGS.samples : (i + 1) * FLAGS.samples]
        if wanted is not None:
            answer, share = vote([decode(sample.tokens) for sample in samples], wanted)
            print(json.dumps({"prompt": prompt, "answer": answer, "share": share}))
            continue
        for sample in [best(samples)] if FLAGS.best else samples:
            text = decode(sample.tokens)
            told = {"prompt": prompt, "text": text, **dataclasses.asdict(sample)}
            between = "\n" if FLAGS.chat else ""
            print(json.dumps(told) if FLAGS.json else f"{prompt}{between}{text}\n")


if __name__ == "__main__":
    sys.exit(command.run(main, FLAGS, __doc__))
