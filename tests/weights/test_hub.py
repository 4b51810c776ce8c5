"""`resolve` in a process of its own, since huggingface_hub reads its environment when it is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from maxdiffusion.errors import UserError
from maxdiffusion.weights.hub import resolve
from tests.support.hub_server import REPO, SHA, Hub, serve

FILES = {
    "model_index.json": b'{"_class_name": "WanPipeline"}',
    "README.md": b"# hello",
    "transformer/config.json": b"{}",
    "transformer/diffusion_pytorch_model.safetensors": bytes(range(256)) * 4096,  # 1 MiB
    "transformer/diffusion_pytorch_model.bin": b"pickle",
    "tokenizer/spiece.model": b"sp",
}
WANTED = {name for name in FILES if not name.endswith((".md", ".bin"))}
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"

CODE = """
import os, resource, signal, sys
from maxdiffusion.errors import UserError
from maxdiffusion.weights import hub
from maxdiffusion.weights.hub import resolve
hub.TIMEOUT = float(os.environ.get("TIMEOUT", hub.TIMEOUT))
name, revision, limit = sys.argv[1], sys.argv[2] or None, int(sys.argv[3])
if limit:  # stands for a full disk
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try: print("folder", resolve(name, revision))
except UserError as error: print("error", error)
"""


def run(hub, home, name=REPO, revision="", limit=0, **env):
    """("folder" or "error", the rest of the line)."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    clean |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", **env}
    clean["no_proxy"] = clean["NO_PROXY"] = "127.0.0.1"
    command = [sys.executable, "-c", CODE, name, revision, str(limit)]
    done = subprocess.run(command, env=clean, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1, done.stdout
    kind, _, rest = done.stdout.strip().partition(" ")
    return kind, rest


def files_under(home):
    """Every file by the name under which a reader would find it; locks and bookkeeping left out."""
    snapshots = (home / "hub").glob("*/snapshots/*")
    return {str(path.relative_to(top)) for top in snapshots for path in top.rglob("*") if path.is_file()}


def test_fetches_what_is_needed_once(tmp_path):
    with serve(Hub(FILES)) as hub:
        kind, folder = run(hub, tmp_path)
        assert kind == "folder"
        assert files_under(tmp_path) == WANTED
        assert all((Path(folder) / name).read_bytes() == FILES[name] for name in WANTED)
        assert run(hub, tmp_path, revision=SHA) == ("folder", folder)
        assert len(hub.bodies(WEIGHTS)) == 1
    hub.url = "http://127.0.0.1:9"  # nobody answers any more; the cache does
    assert run(hub, tmp_path, HF_HUB_OFFLINE="1") == ("folder", folder)
    assert run(hub, tmp_path) == ("folder", folder)


def test_a_download_that_is_cut_resumes_where_it_was(tmp_path):
    """The library keeps what arrived in steps of 10 MB, hence a larger file."""
    big = bytes(range(256)) * 96 * 1024  # 24 MiB, cut at 12
    with serve(Hub(FILES | {WEIGHTS: big}, cuts={WEIGHTS: 1})) as hub:
        kind, folder = run(hub, tmp_path)
        assert kind == "folder"
        assert (Path(folder) / WEIGHTS).read_bytes() == big
        first, second = hub.bodies(WEIGHTS)
        assert first is None
        assert second is not None and 0 < int(second.removeprefix("bytes=").removesuffix("-")) <= len(big) // 2


def test_a_download_that_never_completes_leaves_no_model_file(tmp_path):
    with serve(Hub(FILES, cuts={WEIGHTS: 1}, broken={WEIGHTS})) as hub:
        kind, message = run(hub, tmp_path)
        assert kind == "error"
        assert "broke off" in message and "run again" in message
        assert WEIGHTS not in files_under(tmp_path)
        sizes = [path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()]
        assert sum(sizes) < len(FILES[WEIGHTS]) // 2  # nor half of it under another name
        assert run(hub, tmp_path, HF_HUB_OFFLINE="1")[0] == "error"
        hub.broken.clear()
        assert run(hub, tmp_path)[0] == "folder"
        assert files_under(tmp_path) == WANTED


def test_a_full_disk(tmp_path):
    with serve(Hub(FILES)) as hub:
        kind, message = run(hub, tmp_path, limit=200_000)
        assert kind == "error"
        assert "does not fit on the disk" in message and str(tmp_path) in message
        assert WEIGHTS not in files_under(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "org/other"}, "'org/other' is neither a folder here nor"),
        ({"revision": "v9"}, "has no revision 'v9'"),
        ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set and it is not in the cache"),
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "http://127.0.0.1:9 cannot be reached and it is not in the cache"),
    ],
)
def test_refusals(tmp_path, options, message):
    with serve(Hub(FILES)) as hub:
        kind, got = run(hub, tmp_path, **options)
        assert kind == "error"
        assert message in got


def test_a_gated_repository_wants_the_token(tmp_path):
    with serve(Hub(FILES, token="hf_secret")) as hub:
        kind, message = run(hub, tmp_path)
        assert kind == "error"
        assert "gated" in message and "HF_TOKEN" in message
        assert run(hub, tmp_path, HF_TOKEN="hf_secret")[0] == "folder"


def test_a_local_folder_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "tiny").mkdir(parents=True)
    (tmp_path / "a_file").touch()
    assert resolve("org/tiny") == Path("org/tiny")
    assert resolve(str(tmp_path / "org")) == tmp_path / "org"
    with pytest.raises(UserError, match="is a file"):
        resolve("a_file")


@pytest.mark.parametrize("name", ["", "wan", "./org/tiny", "/no/such/folder", "a/b/c", "org/", "org name/x"])
def test_what_is_neither_folder_nor_hub_id(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="organisation/name"):
        resolve(name)


def test_a_hub_that_says_nothing_is_given_up(tmp_path):
    with serve(Hub(FILES, silent=True)) as hub:
        kind, message = run(hub, tmp_path, TIMEOUT="0.5")
        assert kind == "error"
        assert REPO in message and hub.url in message


def test_a_file_outside_of_the_repository_is_one_sentence(tmp_path):
    with serve(Hub(FILES | {"../../../x.json": b"{}"})) as hub:
        kind, message = run(hub, tmp_path)
        assert kind == "error" and "../" in message
        assert not list(tmp_path.glob("**/x.json"))
