"""Weights of other people in, ours out.

python -m lm.interop import --from=HF_DIR_OR_GGUF --to=WORKDIR
python -m lm.interop export --from=WORKDIR --to=HF_DIR [--dtype=bfloat16] [--adapters]
python -m lm.interop merge --from=WORKDIR --to=WORKDIR

A WORKDIR is a run's folder. HF_DIR holds config.json, model*.safetensors and tokenizer.json, as
transformers writes and reads them. Of a run with LoRA adapters, export and merge add them to their
matrices; export --adapters writes them alone, as peft reads them.
"""

import sys
from pathlib import Path

from absl import flags

from lm import command
from lm.command import BadInput, folder_atomically, one_of

FLAGS = flags.FlagValues()
flags.DEFINE_string("from", None, "What is read.", flag_values=FLAGS)
flags.DEFINE_string("to", None, "The folder that is made.", flag_values=FLAGS)
flags.DEFINE_string(
    "dtype",
    "float32",
    "import: of the computation, float32 or bfloat16; export: of the stored weights, or float16.",
    flag_values=FLAGS,
)
flags.DEFINE_bool(
    "scan_layers", False, "import: stack the layers, for a scan over them.", flag_values=FLAGS
)
flags.DEFINE_bool("adapters", False, "export: LoRA's adapters alone.", flag_values=FLAGS)


def _paths() -> tuple[Path, Path]:
    for name in ("from", "to"):
        if not FLAGS[name].value:
            raise BadInput(f"--{name} is missing; see --help")
    return Path(FLAGS["from"].value), Path(FLAGS.to)


def import_() -> None:
    given, to = _paths()
    from lm.interop.workdir import import_weights

    one_of("--dtype", FLAGS.dtype, ("float32", "bfloat16"))
    if not given.exists():
        raise BadInput(f"--from={given}: is not there")
    with folder_atomically(to) as folder:
        result = import_weights(given, folder, FLAGS.dtype, FLAGS.scan_layers)
    print(f"{to}: {result['total_params']:,} parameters")


def export() -> None:
    workdir, to = _paths()
    from lm.interop.workdir import export_adapters, export_weights

    one_of("--dtype", FLAGS.dtype, ("float32", "bfloat16", "float16"))
    with folder_atomically(to) as folder:
        if FLAGS.adapters:
            config = export_adapters(workdir, folder, FLAGS.dtype)
            told = f"{', '.join(config['target_modules'])} at rank {config['r']}"
        else:
            told = export_weights(workdir, folder, FLAGS.dtype)["architectures"][0]
    print(f"{to}: {told}")


def merge() -> None:
    workdir, to = _paths()
    from lm.interop.workdir import merge_weights

    with folder_atomically(to) as folder:
        result = merge_weights(workdir, folder)
    print(f"{to}: {result['total_params']:,} parameters")


if __name__ == "__main__":
    sys.exit(command.run({"import": import_, "export": export, "merge": merge}, FLAGS, __doc__))
