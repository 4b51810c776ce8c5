"""Every test runs with the shape annotations of the package executed."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from jaxtyping import install_import_hook

install_import_hook("maxdiffusion", "beartype.beartype")
