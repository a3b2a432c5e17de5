"""Metadata, version ranges and the folder-to-package map of effbert.

The folders kernels/, search/ and bench/ install as effbert.kernels, effbert.search and effbert.bench: a
top-level package called `kernels` would collide with the Hugging Face package that transformers imports.
"""

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "effbert/__init__.py").read_text(encoding="utf-8"), re.MULTILINE)

setup(
    name="effbert",
    version=VERSION[1],
    description="Find and train small BERTs on one GPU, fast: progressive search with warm-up distillation",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    python_requires=">=3.11",
    package_dir={
        "effbert": "effbert",
        "effbert.kernels": "kernels",
        "effbert.search": "search",
        "effbert.bench": "bench",
    },
    packages=["effbert", "effbert.data", "effbert.kernels", "effbert.search", "effbert.bench"],
    install_requires=[
        "torch>=2.11,<2.14",
        "triton>=3.6,<3.10; platform_system == 'Linux'",
        "transformers>=5.10,<6",
        "datasets>=5,<6",
        "filelock>=3.30",
        "tokenizers>=0.22",
        "safetensors>=0.5",
        "numpy>=1.26",
        "scipy>=1.11",
        "scikit-learn>=1.5",
        "optuna>=5,<6",
        "tyro>=1,<2",
        "rich>=13",
    ],
    extras_require={
        "onnx": ["onnx>=1.23", "onnxruntime>=1.32", "onnxscript>=0.7"],
        "postgresql": ["psycopg[binary]>=3.1"],
        "test": [
            "pytest>=8",
            "pytest-benchmark>=5",
            "pytest-xdist>=3",
            "hypothesis>=6",
            "onnx>=1.23",
            "onnxruntime>=1.32",
            "onnxscript>=0.7",
            "psycopg[binary]>=3.1",
            "ruff>=0.8",
            "build>=1",
            "accelerate>=1",
            "optuna-dashboard>=0.20",
            "psutil>=5",
        ],
    },
    entry_points={"console_scripts": ["effbert = effbert.__main__:main"]},
)
