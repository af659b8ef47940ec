"""One process of a run of several: the command ``lm.train``, noting in a file which rows it reads.

python tests/host.py READ.json --config=... --workdir=...
"""

import json
import sys

from lm import command
from lm.data import Dataset
from lm.train import __main__ as train


def main(noted: str) -> int:
    trained: set[int] = set()  # step x rows of a batch + row
    validated = 0
    read, batch = Dataset._train_rows, Dataset._batch

    def reading(dataset, rows, seed):
        trained.update(map(int, rows))
        return read(dataset, rows, seed)

    def making(dataset, tokens, weights=None):
        nonlocal validated
        validated += 0 if weights is None else int(weights.any(axis=1).sum())
        return batch(dataset, tokens, weights)

    Dataset._train_rows, Dataset._batch = reading, making
    code = command.run(train.main, train.FLAGS, train.__doc__, ["lm.train", *sys.argv[2:]])
    with open(noted, "w") as file:
        json.dump({"trained": sorted(trained), "validated": validated}, file)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
