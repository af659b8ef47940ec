"""What training costs: a run, or all runs of a study; their FLOPs, bytes, time and money.

Before its runs have told, each budget of a study has its optimum where ``sweep.first_optimum`` and
``sweep.prior_exponent`` expect it.
"""

from lm import arithmetic
from lm.config import MESH_AXES, Config, replace
from lm.estimate.memory import device_memory, fuses_attention
from lm.estimate.roofline import roofline
from lm.hardware import HBM_BYTES, PEAK_FLOPS, Topology
from lm.sharding import axis_sizes
from lm.sweep import grid
from lm.train.recipe import resolve

ASSUMED_MFU = 0.4  # of chips without a roofline, as in lm.plan


def planned(config: Config, flops: float) -> list[Config]:
    """The runs of one of a study's budgets; of a config that is no study itself alone."""
    sweep = config.sweep
    if not sweep.budgets:
        return [config]
    growth = (flops / sweep.budgets[0]) ** sweep.prior_exponent
    alone = {"budgets": (flops,), "first_optimum": sweep.first_optimum * growth}
    (budget,) = grid.plan(replace(config, sweep=alone), {})
    return [run.config for run in budget.runs]


def largest_run(config: Config) -> Config:
    """A study's run with the most parameters: its top budget's; else the config itself."""
    runs = planned(config, max(config.sweep.budgets, default=0.0))
    return max(runs, key=lambda run: arithmetic.parameters(run.model).total)


def training(
    config: Config,
    chip: str | None = None,
    chips: int = 0,
    on: Topology | None = None,
    *,
    mfu: float | None = None,
    price: float | None = None,
) -> dict:
    """What `lm.estimate --json` prints as "training": by budget and in all.

    Without a `chip`, runs and FLOPs alone. A run's time follows from `mfu`; where that is not
    given, from the roofline on the topology `on` (None where the mesh does not lie on its torus),
    or without one from ASSUMED_MFU.

    Args:
      chip: a name in ``lm.hardware.PEAK_FLOPS``, of which there are `chips`.
      price: money an hour and chip.
    Raises:
      BadInput: the mesh or a run's batch does not go with the chips.
    """
    told_by = "given" if mfu else "roofline" if on else "assumed"
    if on is None:
        mfu = mfu or ASSUMED_MFU
    sizes = chip and dict(zip(MESH_AXES, axis_sizes(config.mesh, chips), strict=True))
    shards = sizes["replica"] * sizes["data"] if sizes else 1

    def cost(run: Config) -> dict:
        recipe = resolve(run, shards)
        told = {"params": recipe.params, "tokens": recipe.tokens, "flops": recipe.flops}
        if chip is None:
            return told
        rows, fused = recipe.sequences, fuses_attention(run, sizes)
        if mfu:
            seconds = recipe.flops / (mfu * PEAK_FLOPS[chip] * chips)
        else:
            step = roofline(run, on, sizes, rows, fused)
            seconds = step and recipe.tokens / step.tokens_per_second
        return told | {
            "sequences": rows,
            "seconds": seconds,
            "bytes": device_memory(run, sizes, rows, fused).total,
        }

    budgets = []
    for flops in config.sweep.budgets or (resolve(config).flops,):
        costs = [cost(run) for run in planned(config, flops)]
        budget = {"budget": flops, "runs": len(costs), "flops": _sum(costs, "flops")}
        for name in ("params", "tokens", "sequences")[: 3 if chip else 2]:
            budget[name] = [min(c[name] for c in costs), max(c[name] for c in costs)]
        if chip:
            most = max(c["bytes"] for c in costs)
            budget |= {"bytes_per_chip": int(most), "fits": most <= HBM_BYTES[chip]}
            budget["seconds"] = _sum(costs, "seconds")
        budgets.append(budget)
    result = {"runs": sum(b["runs"] for b in budgets), "flops": _sum(budgets, "flops")}
    if chip:
        seconds = _sum(budgets, "seconds")
        hours = seconds and seconds / 3600 * chips
        result |= {
            "chip": chip,
            "chips": chips,
            "mfu": seconds and result["flops"] / (seconds * PEAK_FLOPS[chip] * chips),
            "mfu_from": told_by,
            "chip_hours": hours,
            "days": seconds and seconds / 86_400,
            "dollars": hours and price and hours * price,
        }
    return result | {"budgets": budgets}


def _sum(rows: list[dict], name: str) -> float | None:
    """None where a row's value is not known."""
    values = [row[name] for row in rows]
    return None if None in values else sum(values)
