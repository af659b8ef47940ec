"""The loads of the best run's experts: from the sweep's table to the page."""

import matplotlib
import numpy as np

from lm.report import figures
from lm.report.expert_loads import read_expert_loads
from lm.scaling import RunTable

HEADER = "run_id,tokens,layer,dropped_share,router_entropy,load\n"


def test_the_best_run_of_the_highest_budget_is_read_and_drawn(tmp_path):
    runs = RunTable.from_arrays(
        run_id=["small", "worse", "best", "dense"], params=[1e4, 1e4, 2e4, 2e4],
        tokens=[1e6, 1e7, 0.5e7, 1e9], loss=[1.0, 2.1, 2.0, 1.5],
    )  # fmt: skip
    assert read_expert_loads([tmp_path], runs) is None
    lines = [
        f"{run},{tokens},{layer},{0.1 * layer},1.0,{0.1 * layer:.1f} 0.2 {0.8 - 0.1 * layer:.1f}\n"
        for run in ("small", "worse", "best")
        for tokens in (20, 100, 3)
        for layer in (3, 1)
    ]
    (tmp_path / "experts.csv").write_text(HEADER + "".join(lines))
    loads = read_expert_loads([tmp_path / "runs.csv"], runs)
    assert loads.run_id == "best" and loads.layers_L == [1, 3]
    np.testing.assert_array_equal(loads.tokens_P, [3, 20, 100])
    np.testing.assert_allclose(loads.load_PLE, [[[0.1, 0.2, 0.7], [0.3, 0.2, 0.5]]] * 3)
    np.testing.assert_allclose(loads.dropped_PL, [[0.1, 0.3]] * 3)
    with matplotlib.rc_context(figures.STYLE):
        axes = figures.expert_loads(loads).axes[0]
    np.testing.assert_allclose(
        axes.collections[0].get_array(),
        3 * np.array([[x] * 3 for x in (0.1, 0.2, 0.7, 0.3, 0.2, 0.5)]),
    )
    assert [text.get_text() for text in axes.get_yticklabels()] == ["1", "3"]
