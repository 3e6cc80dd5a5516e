"""Names, packages and dependencies; tool settings live in pyproject.toml, tested versions in constraints.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent
README = HERE / "README.md"
VERSION = re.search(r'__version__ = "([^"]+)"', (HERE / "pipeline/__init__.py").read_text(encoding="utf-8"))
assert VERSION is not None

setup(
    name="bge-icl-train",
    version=VERSION.group(1),
    description="Training system for few-shot text embedders (arXiv 2409.15700) on DeepSpeed",
    long_description=README.read_text(encoding="utf-8") if README.is_file() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    # kernels/ is a source root like src/, without __init__.py: a top-level package `kernels` would shadow the one
    # from the Hugging Face hub that transformers imports.
    packages=find_packages(include=["pipeline", "pipeline.*"])
    + find_packages("kernels", include=["embed_kernels", "embed_kernels.*"]),
    package_dir={"embed_kernels": "kernels/embed_kernels"},
    package_data={"pipeline.evaluation": ["tables/*.json"]},
    entry_points={"console_scripts": ["bge-icl=pipeline.command_line:main"]},
    install_requires=[
        "torch>=2.11",
        "deepspeed>=0.19.8",
        # 5.0 to 5.9 mistake any folder named kernels for the hub's package and fail.
        "transformers>=5.10",
        "peft>=0.21",
        "datasets>=4",
        "mpi4py>=4",  # for preprocessing over several nodes; installing it needs no MPI
        "tokenizers>=0.22",
        "numpy>=2",
        "scipy>=1.13",  # connected groups of rows
        "pyarrow>=20",
        "pyyaml>=6",
        "tqdm>=4.66",
        "matplotlib>=3.9",
        "safetensors>=0.5",
        "zstandard>=0.23",  # .zst files
    ],
    extras_require={
        "gpu": ["flash-attn", "triton"],  # both optional even there: `auto` takes torch's own attention and PyTorch
        "eval": ["mteb>=2.20", "bm25s", "PyStemmer"],  # the last two for the baseline BM25
        "mining": ["faiss-cpu", "bm25s", "sentence-transformers"],  # hard negatives, teacher scores
        "mpi": ["mpich"],  # an MPI without system packages
        "tracking": ["tensorboard", "wandb"],
        "quickstart": ["gguf"],  # reads the base model of examples/quickstart
        "dev": [
            "pytest",
            "pytest-xdist",
            "triton; platform_system == 'Linux'",  # its interpreter and compiler need no GPU
            "hypothesis",
            "ruff",
            "mypy",
            "types-PyYAML",
            "types-tqdm",
            # Real tokenizers for the tests.
            "mistral-common",
            "sentencepiece",
            "tiktoken",
            "tensorboard",
        ],
    },
)
