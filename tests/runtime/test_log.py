import logging
import os
import subprocess
import sys

import pytest


def run(program, **env):
    """In an environment without what jax writes into this process's own where libtpu is installed."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("TPU_")}
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=inherited | env)


@pytest.mark.parametrize(("level", "seen"), [("debug", "diwe"), ("info", "iwe"), ("warning", "we"), ("error", "e")])
def test_levels_and_one_handler_on_stderr(level, seen):
    done = run(
        "import logging; from absl import logging as absl_logging; from maxdiffusion.runtime import log\n"
        "logging.basicConfig()\n"  # as absl does: a handler on the root
        f"log.setup('error'); log.setup({level!r})\n"
        "m = logging.getLogger('maxdiffusion.x')\n"
        "m.debug('d'); m.info('i'); m.warning('w'); m.error('e')"
    )
    assert done.stdout == ""
    assert "".join(line.split()[-1] for line in done.stderr.splitlines()) == seen
    assert ("warning: w" in done.stderr) == ("w" in seen)


def test_jax_says_nothing_of_a_missing_tpu_and_keeps_the_rest():
    done = run(
        "import logging; from maxdiffusion.runtime import log; log.setup('info')\n"
        "j = logging.getLogger('jax._src.xla_bridge')\n"
        "j.warning('No GPU/TPU found, falling back to CPU.'); j.warning('An NVIDIA GPU may be present')"
    )
    assert "TPU" not in done.stderr and "NVIDIA" in done.stderr


def test_a_run_on_the_cpu_starts_silently():
    """As installed to run: libtpu, which the tests bring along, would look for a TPU and say what it misses."""
    start = "from maxdiffusion.runtime import log; log.setup('info'); import jax; jax.devices()"
    done = run(f"import sys; sys.modules['libtpu'] = None; {start}", JAX_PLATFORMS="")
    assert done.returncode == 0 and done.stderr == ""


def test_a_logger_of_the_package_is_named_after_its_module():
    from maxdiffusion.runtime import progress

    assert progress.log is logging.getLogger("maxdiffusion.runtime.progress")
