"""``isoflop_tpu:1e20`` on one host of eight H100 (80 GB): the same corpus, shapes and rules.

    python -m lm.sweep --config=configs/isoflop_gpu.py --workdir=runs/isoflop_gpu
    python -m lm.fit --runs=runs/isoflop_gpu --out=runs/isoflop_gpu
    python -m lm.estimate --config=configs/isoflop_gpu.py --chip=h100 --chips=8 --mfu=0.4

63 runs of 4.16e7 to 3.52e9 parameters at 1e18 to 1e20 FLOPs; 1.89e21 exact FLOPs, which is 6.9 days
on 8 H100 at 40 % of their bfloat16 peak, 9.89e14 a second; 1,330 chip-hours. (Arithmetic; not run
here. What share of the peak they reach is not predicted.) The largest run needs 48 GB of a GPU, by
arithmetic too, of the 60 that jax takes of 80. A node under SLURM: tpu_setup/README.md.
"""

from configs import isoflop_tpu


def get_config():
    """What a GPU's memory and links ask for; attention is cuDNN's by itself."""
    config = isoflop_tpu.get_config("1e20")
    config.name = "isoflop_gpu"
    # Room for the projections' outputs of half a batch and for whole weights: less is computed
    # again, and nothing is gathered a layer at a time.
    config.model.remat = "dots_with_no_batch_dims"
    config.train.accumulation = 2
    config.mesh.zero = 2
    return config
