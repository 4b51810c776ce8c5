import json
import subprocess
from importlib import metadata

import jax

from maxdiffusion import __version__
from maxdiffusion.runtime import versions as module


def test_versions_are_json_and_true():
    found = module.versions()
    assert json.loads(json.dumps(found)) == found
    assert found["maxdiffusion"] == __version__
    assert found["jax"] == jax.__version__ and found["flax"] == metadata.version("flax")
    assert found["device_count"] == jax.device_count() and found["backend"] == jax.default_backend()


def test_the_commit_is_that_of_this_checkout_only(tmp_path):
    def git(*args):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(
            ["git", "-C", tmp_path, *identity, *args], check=True, capture_output=True, text=True
        ).stdout

    assert module.commit(tmp_path) is None
    git("init", "-q")
    assert module.commit(tmp_path) is None  # no commit yet
    (tmp_path / "file").write_text("a")
    git("add", "file")
    git("commit", "-q", "-m", "a")
    head = git("rev-parse", "HEAD").strip()
    assert module.commit(tmp_path) == head
    (tmp_path / "file").write_text("b")
    assert module.commit(tmp_path) == head + "+changes"
    (tmp_path / "inside").mkdir()
    assert module.commit(tmp_path / "inside") is None
