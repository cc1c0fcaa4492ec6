"""The package for pip; settings of the tools are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "memshard/__init__.py").read_text("utf-8"))
assert VERSION

# Lower bounds are versions that the tests have really run with; constraints.txt holds the exact
# set.
EXTRAS = {
    "deepspeed": ["deepspeed>=0.19"],
    "tensor-parallel": ["fairscale>=0.4.13"],
    # Web archives; FastWARC and Resiliparse 2 are rewrites that break code for 1.
    "data": [
        "FastWARC>=2.0.1,<3",
        "Resiliparse>=2.0.1,<3",
        "trafilatura>=2.3.1",
        "lxml_html_clean>=0.4",
        "py3langid>=0.4",
        "pillow>=13",
    ],
    "eval": ["matplotlib>=3.11", "sacrebleu>=2.6", "lm_eval>=0.4.13", "datasets>=5.2"],
    # Loads exports made with --huggingface.
    "huggingface": ["transformers>=5.23"],
    # The trainers of the examples.
    "adopt": ["transformers>=5.23", "accelerate>=1.15", "lightning>=2.6", "peft>=0.21"],
    # The documentation as a site.
    "docs": ["mkdocs>=1.6.1"],
    "wandb": ["wandb>=0.29"],
    # Searches on several machines.
    "ray": ["ray>=2.60"],
    # Peers. fbgemm-gpu-cpu 1.9.0 does not load under torch 2.13.
    "bench": [
        "tokenizers>=0.23",
        "warcio>=1.8",
        "product-key-memory>=0.3",
        "PEER-pytorch>=0.2.2",
        "fbgemm-gpu-cpu==1.8.0",
        "reformer-pytorch>=1.4.4",
    ],
    # Triton comes with torch's CUDA builds; elsewhere its interpreter and compiler test the GPU
    # kernels.
    "dev": [
        "pytest>=9.2",
        "pytest-xdist>=3.8",
        "ruff>=0.17",
        "mypy>=2.4",
        "types-PyYAML>=6.0.12",
        "triton>=3.7.1; platform_system == 'Linux'",
        "nbclient>=0.11",
        "ipykernel>=7.4",
    ],
}

setup(
    name="memshard",
    version=VERSION[1],
    author="The memshard authors",
    description="Language models with product-key memory layers: sharded value tables, row-sparse "
    "Adam, one trainer",
    long_description=(ROOT / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    keywords="language-models product-key-memory sparse-optimizer sharding transformer pytorch",
    project_urls={
        "Product-key memories": "https://arxiv.org/abs/1907.05242",
        "Fast weights": "https://arxiv.org/abs/2102.11174",
        "Reformer": "https://arxiv.org/abs/2001.04451",
        "Primer": "https://arxiv.org/abs/2109.08668",
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["memshard", "memshard.*"]),
    package_data={
        "memshard": [
            "*.pyi",
            "recipes/*.yaml",
            "launch/examples/*.sh",
            "models/kernels/*.cpp",
            "py.typed",
        ]
    },
    install_requires=[
        "torch>=2.13",
        "numpy>=2.4",
        "sentencepiece>=0.2.3",
        "safetensors>=0.8",
        "webdataset>=1.0",
        "tensorboard>=2.21",
        "pyyaml>=6.0",
        "pydantic>=2.14",
        "tqdm>=4.70",
        # Completion scripts for shells.
        "shtab>=1.13",
    ],
    # fla (GPU kernels of the delta rule) is not among all: transformers imports it wherever it is,
    # and fails without a GPU.
    extras_require={
        **EXTRAS,
        "fla": ["fla-core>=0.6"],
        "all": sorted({package for packages in EXTRAS.values() for package in packages}),
    },
    entry_points={"console_scripts": ["memshard = memshard.__main__:main"]},
)
