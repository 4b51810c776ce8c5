"""The processes of a run, as the config or a launcher states them. Imports no jax."""

from __future__ import annotations

import dataclasses
import functools
import glob
import os
import urllib.request


@dataclasses.dataclass(frozen=True)
class Hosts:
    """The processes of a run.

    Attributes:
      mode: `auto`, `on` or `off`.
      address: HOST:PORT of process 0; None where a launcher states it.
      count: the number of processes.
      index: the index of this process.
      timeout: seconds to wait for the others.
    """

    mode: str = "auto"
    address: str | None = None
    count: int | None = None
    index: int | None = None
    timeout: int = 300

    def join(self) -> bool:
        """Whether this process joins others; asks the metadata server on a TPU VM."""
        return self.mode == "on" or (self.mode == "auto" and (self.address is not None or _launched()))

    def may_join(self) -> bool:
        """Whether it may join others, without a query: the chips of a TPU VM may belong to a slice of several hosts."""
        return self.mode != "off" and (self.join() or bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")))


@functools.cache
def metadata(attribute: str) -> str:
    """Ask Compute Engine's metadata server for an attribute of this virtual machine; empty if there is no server."""
    server = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
    url = f"http://{server}/computeMetadata/v1/instance/attributes/{attribute}"
    try:
        request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.read().decode()
    except OSError:
        return ""


def _launched() -> bool:
    """Whether a launcher's environment states several processes, which jax then finds by itself."""
    env = os.environ
    hosts = env.get("TPU_PROCESS_ADDRESSES") or env.get("TPU_WORKER_HOSTNAMES") or ""
    counts = [env.get("MEGASCALE_NUM_SLICES"), env.get("OMPI_COMM_WORLD_SIZE")]
    counts += [env.get("SLURM_NTASKS")] if "SLURM_STEP_NODELIST" in env else []
    if "," in hosts or any(count and count.isdecimal() and int(count) > 1 for count in counts):
        return True
    if "TPU_ML_PLATFORM" not in env or "TPU_SKIP_MDS_QUERY" in env:  # jax sets them: no chips here
        return False
    return "," in metadata("worker-network-endpoints")
