"""The documents to look at when a batch made a step go bad."""

from typing import Any

import jax
import numpy as np

from lm.data import Dataset
from lm.data.excerpts import excerpts
from lm.train.step import Program

ROWS = 3  # of a batch, that are told


def worst_documents(
    program: Program, params: Any, dataset: Dataset, seed: int, step: int, sequences: int
) -> list[dict[str, Any]]:
    """Of the rows of batch ``step`` with the highest loss, the document that is worst in each.

    Worst first: its row, source, number in the source, nats a token (null: not finite) and start of
    the text. Losses are of ``params``, which may be some steps further on. Where they are finite in
    no row, the parameters are to blame and the list is empty; where in some, those are left out.
    All processes call this, as they hold parts of the batch.
    """
    batches = dataset.batches(seed, step, 1, sequences, program.rows(sequences))
    batch = program.put(jax.tree.map(lambda x: x[0], batches))
    nats_BT = np.asarray(program.token_nats(params, batch))
    nats_B = nats_BT.sum(1)
    finite = np.isfinite(nats_B)
    if not finite.any():
        return []
    found = []
    for row in np.argsort(np.where(finite, -nats_B, -np.inf), kind="stable")[:ROWS]:
        if finite[row] and not finite.all():
            break
        documents = excerpts(dataset, seed, step, sequences, int(row))
        means = [nats_BT[row, each.start : each.stop].mean() for each in documents]
        worst = int(np.argmax(np.where(np.isfinite(means), means, np.inf)))
        document = documents[worst]
        found.append(
            {
                "row": int(row),
                "source": document.source,
                "document": document.document,
                "nats_per_token": float(means[worst]),
                "text": document.text,
            }
        )
    return found
