"""One of two nodes of a Ray cluster, both on this machine, is killed while its worker trains."""

import importlib.util
import random
import subprocess
import time
from pathlib import Path

from experiments.fault_injection import study

FAULT = "Ray node killed"
TIMES = 5
REQUIRED = "all runs finish once, `runs.csv` equal to the undisturbed sweep's but for times"
COLUMNS = ("faults", "results_before", "runs", "attempts", "wrong")


def cannot_run() -> str:
    """Why not here, or an empty string."""
    return "" if importlib.util.find_spec("ray") else "ray is not installed"


def trial(number: int, folder: Path) -> dict:
    """One study on a worker a node, and the first node killed after some of its runs."""
    from ray.cluster_utils import Cluster

    draw, wanted = random.Random(f"ray node {number}"), study.undisturbed(folder)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    (folder / "study").mkdir()
    watch = study.Watch(folder)
    watch.start()

    with (folder / "launcher.log").open("w") as log:
        launcher = subprocess.Popen(
            study.command(folder, "--backend=ray", "--workers=2"),
            env={**study.environment(folder), "RAY_ADDRESS": cluster.address},
            cwd=study.ROOT,
            stdout=log,
            stderr=log,
        )
        least = draw.randint(1, 5)
        while study.results(folder) < least and launcher.poll() is None:
            time.sleep(0.05)
        time.sleep(draw.uniform(0.0, 2.0))
        before, running = study.results(folder), launcher.poll() is None
        cluster.remove_node(nodes[0], allow_graceful=False)
        code = launcher.wait()
    cluster.shutdown()
    wrong = watch.end(wanted)
    if code:
        wrong.append(f"exit code {code}")
    return {
        "faults": int(running),
        "results_before": before,
        "runs": study.results(folder),
        "attempts": study.attempts(folder),
        "wrong": "; ".join(wrong),
    }
