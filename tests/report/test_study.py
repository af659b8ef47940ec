import json

import numpy as np
import pytest

from lm.report.study import column, plain
from lm.scaling import RunTable


def test_plain_values_are_json():
    value = {
        "array": np.array([1.0, np.nan, np.inf]),
        "number": np.float32(0.5),
        "count": np.int64(3),
        "flag": np.bool_(True),
        "rows": [(1, 2.5)],
        "text": np.str_("bytes"),
        "none": None,
    }
    assert json.loads(json.dumps(plain(value), allow_nan=False)) == {
        "array": [1.0, None, None],
        "number": 0.5,
        "count": 3,
        "flag": True,
        "rows": [[1, 2.5]],
        "text": "bytes",
        "none": None,
    }


@pytest.mark.parametrize(
    "values, said",
    [
        ([0.1, 0.3, 0.2], [0.1, 0.3]),
        ([7.0, 7.0, 7.0], 7.0),
        (["bpe", "bpe", "bpe"], "bpe"),
        (["cosine", "wsd", "cosine"], ["cosine", "wsd"]),
        ([np.nan] * 3, "not in the table"),
        (["", "", ""], "not in the table"),
    ],
)
def test_a_column_in_one_value(values, said):
    runs = RunTable.from_arrays(
        params=[1e4, 2e4, 3e4], tokens=[1e6, 1e6, 1e6], loss=[2.0, 1.9, 1.8], extra=values
    )
    assert column(runs, "extra") == said
    assert column(runs, "absent") == "not in the table"
