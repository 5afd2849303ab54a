"""Packaging of megashear; `pip install -c constraints.txt -e .` for a checkout."""

import re

from setuptools import find_packages, setup

VERSION = re.search(
    r'__version__ = "(.+)"', open("megashear/__init__.py", encoding="utf-8").read()
)[1]

setup(
    name="megashear",
    version=VERSION,
    description="Structured pruning of LLaMA models on megatron-core, under tensor and pipeline parallelism",
    long_description=open("README.md", encoding="utf-8").read(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["megashear", "megashear.*"]),
    package_data={"megashear": ["py.typed", "report/templates/*.html"]},
    python_requires=">=3.11,<3.14",
    install_requires=[
        "torch>=2.9",
        "megatron-core==0.16.1",
        # megatron-core imports both without declaring them: psutil when it saves, einops in some groups
        "psutil>=5.9",
        "einops>=0.7",
        "numpy>=1.26",
        "safetensors>=0.4",
        "sentencepiece>=0.2",
        "tokenizers>=0.20",
        "protobuf>=4",
        "tensorboard>=2.16",
        "pyyaml>=6.0",
        "tqdm>=4.66",
        "jinja2>=3.1",  # the page of a report; torch needs it too
        "zstandard>=0.22",
        "pillow>=10.1",  # images of masks; TensorBoard needs it too
    ],
    extras_require={
        # Transformer Engine for the CUDA that torch was built for; torch's default wheels have 13
        "gpu": ["transformer-engine[pytorch,core_cu13]>=2.9"],
        "gpu-cu12": ["transformer-engine[pytorch,core_cu12]>=2.0"],
        "gpu-cu13": ["transformer-engine[pytorch,core_cu13]>=2.9"],
        "verify": ["transformers>=4.51"],
        "report": ["matplotlib>=3.8"],
        # TaskManager.load begins with 0.4.12; the interface changes in 0.5
        "eval": ["lm-eval>=0.4.12,<0.5"],
        "parquet": ["pyarrow>=15"],
        "wandb": ["wandb>=0.19"],
        "test": [
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.8",
            "hypothesis>=6",
            "transformers>=4.51",
            "lm-eval>=0.4.12,<0.5",
            "accelerate>=0.26",  # of the harness's own `hf` model, with which ours is compared
            "matplotlib>=3.8",
            "pyarrow>=15",
            "wandb>=0.19",
            "ruff>=0.6",
            "mypy>=1.11",
            "types-PyYAML",
            "types-tqdm",
        ],
    },
    entry_points={"console_scripts": ["megashear=megashear.__main__:recorded_main"]},
)
