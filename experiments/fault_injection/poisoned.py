"""``lm.train`` with numbers that are not finite, at chosen steps.

python -m experiments.fault_injection.poisoned batch|gradient FIRST LAST once|always ...

The rest is lm.train's. A batch's weights, or the gradient, are NaN in the steps FIRST to LAST;
``once``: until the run has gone back.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np

from lm import command
from lm.data import Dataset
from lm.train import __main__ as train
from lm.train import loop
from lm.train.step import Program


def main(kind: str, first: int, last: int, once: bool) -> int:
    if kind == "batch":
        poison_batches(first, last, once)
    else:
        poison_gradients(first, last)
    return command.run(train.main, train.FLAGS, train.__doc__, ["lm.train", *sys.argv[5:]])


def poison_batches(first: int, last: int, once: bool) -> None:
    read, roll_back, gone_back = Dataset.batches, loop._Run._roll_back, False

    def going_back(run, trouble):
        nonlocal gone_back
        gone_back = True
        return roll_back(run, trouble)

    def batches(dataset, seed, first_step, n_steps, *more):
        batch = read(dataset, seed, first_step, n_steps, *more)
        weights = np.ones(batch.targets_BT.shape, np.float32)
        for i, step in enumerate(range(first_step + 1, first_step + n_steps + 1)):
            if first <= step <= last and not (once and gone_back):
                weights[i, 0, 0] = np.nan
        return batch._replace(weights_BT=weights)

    Dataset.batches, loop._Run._roll_back = batches, going_back


def poison_gradients(first: int, last: int) -> None:
    mean_gradient = Program._mean_gradient

    def poisoned(program, state, batch):
        loss, routing, gradient = mean_gradient(program, state, batch)
        step = state.step + 1
        bad = (first <= step) & (step <= last)
        return loss, routing, jax.tree.map(lambda x: jnp.where(bad, jnp.nan, x), gradient)

    Program._mean_gradient = poisoned


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "once"))
