"""Prepares a config's corpus (downloads, checks, tokenises, stores) and prints its statistics.

python -m lm.data --config=configs/tiny.py [--config.data.tokenizer=bpe:4096]
"""

import json
import sys

from absl import flags
from rich.console import Console
from rich.table import Table

from lm import command
from lm.config_file import config_from_flags, define_config_flag
from lm.data import Dataset, open_dataset, store
from lm.data.corpora import SPLITS
from lm.data.packing import Packed

FLAGS = flags.FlagValues()
define_config_flag(FLAGS)
flags.DEFINE_bool("json", False, "Print the statistics as JSON.", flag_values=FLAGS)


def main() -> int | None:
    dataset = open_dataset(config_from_flags(FLAGS).data)
    for source in dataset.sources:
        store.load(source.store.path, verify=True)
    if FLAGS.json:
        print(json.dumps(dataset.statistics, indent=1))
    else:
        _print(dataset)


def _print(dataset: Dataset) -> None:
    console = Console(width=None if sys.stdout.isatty() else 100)
    for source in dataset.sources:
        table = Table(title=f"{source.name}, {dataset.tokenizer.name} ({dataset.vocab_size} ids)")
        table.add_column("source")
        for name in ("split", "documents", "bytes", "tokens", "bytes/token", "duplicates removed"):
            table.add_column(name, justify="left" if name == "split" else "right")
        totals = {split: [0, 0, 0] for split in SPLITS}
        duplicates = 0
        for name, counts in source.store.header["sources"].items():
            duplicates += counts["duplicates_removed"]
            for split in SPLITS:
                if entry := counts.get(split):
                    values = [entry["documents"], entry["bytes"], entry["tokens"]]
                    totals[split] = [a + b for a, b in zip(totals[split], values, strict=True)]
                    removed = counts["duplicates_removed"] if split == "train" else ""
                    table.add_row(name, split, *_cells(values), str(removed))
        table.add_section()
        for split in SPLITS:
            removed = str(duplicates) if split == "train" else ""
            table.add_row("all", split, *_cells(totals[split]), removed)
        console.print(table)
        console.print(str(source.store.path), highlight=False)
        if isinstance(rows := source.windows["train"], Packed):
            console.print(
                f"train: {len(rows):,} rows of {rows.row} tokens,"
                f" {rows.filled / len(rows) / rows.row:.1%} full; {rows.cut} conversations cut to a"
                f" row, {rows.left_out} left out, whose answers lie beyond it"
            )
    for name, epochs in dataset.epochs(dataset.train_tokens).items():
        if len(dataset.sources) > 1:
            console.print(f"{name}: {epochs:.2f} epochs in {dataset.train_tokens:,} tokens")


def _cells(values: list[int]) -> list[str]:
    return [*(f"{v:,}" for v in values), f"{values[1] / max(values[2], 1):.2f}"]


if __name__ == "__main__":
    sys.exit(command.run(main, FLAGS, __doc__))
