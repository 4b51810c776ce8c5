"""What a run of several processes refuses before jax joins them, with threads in the place of processes."""

import http.server
import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from maxdiffusion import request
from maxdiffusion.errors import UserError
from maxdiffusion.runtime import distributed, rendezvous
from maxdiffusion.runtime.hosts import Hosts, metadata
from tests.support.hosts import free_port


def meet(*who: tuple[int, int], timeout: float = 2) -> list[str]:
    """What each (process_id, num_processes) is told; "" where all is well."""
    address, told, met = f"localhost:{free_port()}", [""] * len(who), []

    def run(place: int, index: int, count: int) -> None:
        try:
            met.append(rendezvous.meet(address, count, index, timeout))
        except UserError as error:
            told[place] = str(error)

    threads = [threading.Thread(target=run, args=(i, *one)) for i, one in enumerate(who)]
    for thread in threads[1:] + threads[:1]:  # process 0 last: the others try until it is there
        thread.start()
    for thread in threads:
        thread.join()
    for link in (link for links in met for link in links.values()):
        link.close()
    return told


def test_all_come():
    assert meet((0, 4), (1, 4), (2, 4), (3, 4)) == [""] * 4
    assert meet((0, 1)) == [""]


def test_other_counts_are_refused_on_both_sides():
    told = meet((0, 3), (1, 3), (2, 4))
    assert "process 2 has num_processes=4 and process 0 has 3" in told[0]
    assert told[2] == told[0]
    assert told[1] == told[0] or "cannot be reached" in told[1]  # if it comes after the refusal


def test_the_same_number_twice():
    told = meet((0, 3), (1, 3), (1, 3))
    assert "two processes have process_id=1; number them 0 to 2" in told[0] and told[0] in told[1:]
    told = meet((0, 2), (0, 2))
    assert any("port" in text and "cannot be opened here, on process 0" in text for text in told)


def test_one_does_not_come():
    told = meet((0, 3), (1, 3), timeout=0.5)
    assert told[0] == "of 3 processes, number 2 did not come within 0.5 s; start one on every host."
    assert told[1]


def test_a_coordinator_that_cannot_be_reached():
    with pytest.raises(UserError, match=r"coordinator_address=localhost:\d+ cannot be reached"):
        rendezvous.meet(f"localhost:{free_port()}", 2, 1, 0.3)
    with pytest.raises(UserError, match=r"coordinator_address=nowhere.invalid:80 cannot be reached"):
        rendezvous.meet("nowhere.invalid:80", 2, 1, 0.3)


def connected(port: int) -> socket.socket:
    """A connection to a server that may not listen yet."""
    for _ in range(100):
        try:
            return socket.create_connection(("localhost", port), timeout=5)
        except ConnectionRefusedError:
            time.sleep(0.05)
    raise TimeoutError("nobody listens")


def test_a_stranger_at_the_port_hinders_nobody():
    port, told = free_port(), []

    def first() -> None:
        rendezvous.meet(f"localhost:{port}", 2, 0, 5)
        told.append("ready")

    thread = threading.Thread(target=first)
    thread.start()
    for text in ("GET / HTTP/1.1", "", "x y"):
        with connected(port) as link:
            link.sendall(f"{text}\n".encode())
            assert link.makefile().read() == ""
    assert not told
    rendezvous.meet(f"localhost:{port}", 2, 1, 5)
    thread.join()
    assert told == ["ready"]


def test_silent_strangers_do_not_hold_the_deadline():
    port, told = free_port(), []

    def first() -> None:
        with pytest.raises(UserError, match="number 1 did not come within 1 s"):
            rendezvous.meet(f"localhost:{port}", 2, 0, 1)
        told.append(time.monotonic())

    begun = time.monotonic()
    thread = threading.Thread(target=first)
    thread.start()
    with connected(port), connected(port), connected(port):
        thread.join()
    assert 1 <= told[0] - begun < 4


@pytest.mark.parametrize("order", [(1, 2), (2, 1)])
def test_a_process_that_its_launcher_starts_again_takes_its_place(order):
    port = free_port()
    address, met = f"localhost:{port}", []

    def run(index: int) -> None:
        met.append(rendezvous.meet(address, 3, index, 20))

    threads = [threading.Thread(target=run, args=(index,)) for index in (0, 1, 2)]
    threads[0].start()
    with connected(port) as link:
        link.sendall(b"1 3\n")
        time.sleep(0.2)
    for index in order:
        threads[index].start()
        time.sleep(0.2)
    for thread in threads:
        thread.join()
    assert sorted(map(sorted, met)) == [[0], [0], [1, 2]]
    for links in met:
        for link in links.values():
            link.close()


def test_process_0_gone_before_it_answers():
    with socket.create_server(("localhost", 0)) as server:

        def leave() -> None:
            link = server.accept()[0]
            link.recv(64)
            link.close()
            server.close()

        threading.Thread(target=leave).start()
        with pytest.raises(UserError, match=r"coordinator_address=localhost:\d+ cannot be reached"):
            rendezvous.meet(f"localhost:{server.getsockname()[1]}", 2, 1, 1)


def test_a_host_of_slurm_that_does_not_come(monkeypatch):
    for name, value in {
        "JOB_ID": "1",
        "STEP_NODELIST": "localhost",
        "NTASKS": "2",
        "PROCID": "0",
        "LOCALID": "0",
    }.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    with pytest.raises(UserError, match="of 2 processes, number 1 did not come within 1 s"):
        distributed.start(Hosts(timeout=1))


LAUNCHERS = [
    ({}, False),
    ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
    ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
    ({"MEGASCALE_NUM_SLICES": "2"}, True),
    ({"SLURM_NTASKS": "4"}, False),  # a batch script outside of srun
    ({"SLURM_NTASKS": "4", "SLURM_STEP_NODELIST": "node[1-4]"}, True),
    ({"SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "node1"}, False),
    ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
]


@pytest.mark.parametrize(("env", "several"), LAUNCHERS)
def test_launchers(monkeypatch, env, several):
    names = {name for other, _ in LAUNCHERS for name in other} | {"TPU_PROCESS_ADDRESSES", "TPU_ML_PLATFORM"}
    for name in names:
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert Hosts().join() is several


@pytest.mark.parametrize(("endpoints", "hosts"), [("me:1:10.0.0.2", 1), ("a:1:10.0.0.2,b:2:10.0.0.3", 2)])
def test_hosts_of_a_tpu_slice(monkeypatch, endpoints, hosts):
    class Metadata(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            assert self.headers["Metadata-Flavor"] == "Google" and self.path.endswith("/worker-network-endpoints")
            self.send_response(200)
            self.end_headers()
            self.wfile.write(endpoints.encode())

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("localhost", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever).start()
        monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)
        monkeypatch.setenv("TPU_ML_PLATFORM", "JAX")
        monkeypatch.setenv("GCE_METADATA_IP", f"localhost:{server.server_port}")
        metadata.cache_clear()
        assert Hosts().join() is (hosts > 1)
        server.shutdown()
    metadata.cache_clear()
    assert not Hosts().join()  # nobody answers
    metadata.cache_clear()


def test_an_address_alone_does_not_make_a_run(tmp_path):
    (tmp_path / "run.yml").write_text("model_name: wan2.1-t2v-1.3b\nprompt: a\n")
    words = [str(tmp_path / "run.yml"), f"output_dir={tmp_path}", "coordinator_address=localhost:1"]
    with pytest.raises(UserError, match=r"jax\.distributed cannot start .* give coordinator_address=HOST:PORT"):
        distributed.start(request.load(words).hosts)
    distributed.start(request.load([*words, "jax_distributed=off"]).hosts)


@pytest.mark.parametrize("platform", ["cuda", "nothing"])
def test_a_platform_that_is_not_here_is_one_sentence(platform):
    code = (
        "from maxdiffusion.errors import UserError\nfrom maxdiffusion.runtime import distributed\n"
        "try:\n    distributed.devices()\nexcept UserError as error:\n    print(error)"
    )
    environment = os.environ | {"JAX_PLATFORMS": platform}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"jax cannot start its devices with JAX_PLATFORMS={platform}: ")
    assert "set JAX_PLATFORMS=cpu" in done.stdout
