"""Packaging: ranges of versions that the test suite passed on; requirements.txt has the exact pins that CI installs."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

# Lower bounds are the pins of requirements.txt. Of jax the suite was run on the oldest and the newest version of the
# range: 0.10.2 on Python 3.11, and 0.12.0.1 with flax 0.12.12 and tokamax 0.0.17 on 3.12.
JAX = "jax{}>=0.10.2,<0.13"
RUNTIME = [
    "absl-py>=2.5.1,<3",
    "av>=18.1,<19",
    "flax>=0.12.8,<0.13",
    "fsspec>=2026.9",
    "ftfy>=6.3.1,<7",
    "gguf>=0.19,<0.20",
    "huggingface_hub>=2.4,<3",
    "imageio>=2.38.1,<3",
    JAX.format(""),
    "jaxtyping>=0.3.11,<0.4",
    "ml_dtypes>=0.6,<1",
    "numpy>=2.4.6,<3",
    "orbax-checkpoint>=0.12.8,<0.13",
    "pillow>=13,<14",
    "pydantic>=2.14.3,<3",
    "PyYAML>=6.0.3,<7",
    "safetensors>=0.8,<0.9",
    "sentencepiece>=0.2.3,<0.3",  # 1.4 MB to download
    "threadpoolctl>=3.8,<4",
    "tqdm>=4.70.1,<5",
    "transformers>=5.23,<6",
    "universal_pathlib>=0.3.10,<0.4",
]
DEVELOPMENT = [line.partition("#")[0].strip() for line in (HERE / "requirements-dev.txt").read_text().splitlines()]
VERSION = re.search(r'__version__ = "(.*)"', (HERE / "maxdiffusion" / "__init__.py").read_text())[1]
# Side by side as in the checkout, since pages name ../models; read by maxdiffusion/config/pages.py.
BUNDLED = {"maxdiffusion.bundled.configs": "configs", "maxdiffusion.bundled.models": "models"}

setup(
    name="maxdiffusion",
    version=VERSION,
    description="WAN video diffusion models on XLA: CPU, GPU, TPU",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=[*find_packages(include=["maxdiffusion", "maxdiffusion.*"]), *BUNDLED],
    package_dir=BUNDLED,
    package_data={"maxdiffusion.output": ["gallery.html"], **{package: ["**/*"] for package in BUNDLED}},
    install_requires=RUNTIME,
    extras_require={
        "tpu": [JAX.format("[tpu]"), "tokamax>=0.0.12,<0.1"],
        "gcs": ["gcsfs>=2026.9"],  # gs://; 19 MB to download
        "heif": ["pillow-heif>=1.8.1,<2"],  # the photos of phones
        "cuda12": [JAX.format("[cuda12]")],
        "cuda13": [JAX.format("[cuda13]")],
        "test": [line for line in DEVELOPMENT if line],
    },
    entry_points={"console_scripts": ["generate_wan = maxdiffusion.cli:main"]},
)
