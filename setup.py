"""Packaging: the requirements files are the one place of version pins."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent


def pins(file: str) -> list[str]:
    """The requirements of a file, without comments."""
    lines = (line.partition("#")[0].strip() for line in (HERE / file).read_text().splitlines())
    return [line for line in lines if line]


RUNTIME = pins("requirements.txt")
JAX = next(pin.partition("==")[2] for pin in RUNTIME if pin.startswith("jax=="))
TOKAMAX = next(pin for pin in pins("requirements-dev.txt") if pin.startswith("tokamax=="))
VERSION = re.search(r'__version__ = "(.*)"', (HERE / "maxdiffusion" / "__init__.py").read_text())[1]

setup(
    name="maxdiffusion",
    version=VERSION,
    description="WAN video diffusion models on XLA: CPU, GPU, TPU",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["maxdiffusion", "maxdiffusion.*"]),
    install_requires=RUNTIME,
    extras_require={
        "tpu": [f"jax[tpu]=={JAX}", TOKAMAX],
        "gcs": ["gcsfs==2026.10.1"],  # gs://; 19 MB to download
        "cuda12": [f"jax[cuda12]=={JAX}"],
        "cuda13": [f"jax[cuda13]=={JAX}"],
        "test": pins("requirements-dev.txt"),
    },
    entry_points={"console_scripts": ["generate_wan = maxdiffusion.cli:main"]},
)
