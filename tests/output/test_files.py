"""The files of a batch; their names and numbers are tested where they are made."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from maxdiffusion import output, request
from maxdiffusion.errors import UserError
from maxdiffusion.output import names
from maxdiffusion.weights.latents_io import load_latents

PAGE = str(Path(__file__).parents[2] / "configs" / "wan_tiny.yml")
LATENTS = np.arange(2 * 5 * 12 * 12 * 8, dtype=np.float32).reshape(2, 5, 12, 12, 8)


def refused(job, latents):
    with pytest.raises(UserError) as error, output.reserved(job, job.videos, latents):
        pass
    return str(error.value)


@pytest.mark.parametrize("how", ["held", "written"])
def test_latents_are_kept_where_another_run_took_the_name(tmp_path, how):
    job = request.load([PAGE, "prompt=a red circle", f"save_file={tmp_path}/a.mp4"])
    with names.reserve_file(tmp_path / "a.mp4", [".mp4"]):
        if how == "held":
            said = refused(job, LATENTS[:1])
    if how == "written":
        (tmp_path / "a.mp4").write_bytes(b"theirs")
        said = refused(job, LATENTS[:1])
    (kept,) = re.findall(r"decode_latents=(\S+) makes", said)
    assert kept.startswith(str(tmp_path)) and ("another run is making" in said) == (how == "held")
    np.testing.assert_array_equal(load_latents(Path(kept))[0], LATENTS[:1])
    job = request.load([PAGE, "prompt=a red circle", f"save_file={tmp_path}/b.mp4", f"decode_latents={kept}"])
    with output.reserved(job, job.videos, LATENTS[:1]) as files:
        assert files.paths == [tmp_path / "b.mp4"]
    assert not (tmp_path / "b.latents.safetensors").exists()


def test_latents_of_every_line_are_kept_where_one_name_is_held(tmp_path):
    lines = [{"prompt": "a red circle", "output": "one"}, {"prompt": "a white square", "output": "two"}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    job = request.load([PAGE, f"prompts={tmp_path}/p.jsonl", f"output_dir={tmp_path}"])
    folder = tmp_path / job.cfg.run_name
    with names.reserve_file(folder / "two.mp4", [".mp4"]):
        refused(job, LATENTS)
    for name, one in zip(("one", "two-2"), LATENTS, strict=True):
        np.testing.assert_array_equal(load_latents(folder / f"{name}.latents.safetensors")[0], one[None])


@pytest.mark.parametrize("where", ["save_file={}/folder/a.mp4", "output_dir={}/folder"])
def test_a_folder_that_cannot_be_written_is_said_once(tmp_path, where):
    job = request.load([PAGE, "prompt=a red circle", where.format(tmp_path)])
    (tmp_path / "folder").write_bytes(b"a file")
    assert "kept" not in refused(job, LATENTS[:1])
