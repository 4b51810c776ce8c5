"""The record beside a video."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from maxdiffusion import request
from maxdiffusion.errors import UserError
from tests.support.output import reserved

PAGE = str(Path(__file__).parents[2] / "configs" / "wan_tiny.yml")
VERSIONS, TIMINGS = {"jax": "0"}, {"seconds": {"load": 1.5}}
INPUTS = {"video": {"file": "a.mp4", "fps": "30000/1001", "frames": {"first": 0, "last": 8, "count": 5}}}


@pytest.fixture
def opened(tmp_path):
    def opened(*words, prompt="猫"):
        words = [PAGE, f"prompt={prompt}", f"save_file={tmp_path}/a.mp4", *words]
        job = request.load([*words, f"decode_latents={tmp_path}/latents.safetensors"])
        return reserved(job, job.videos, np.zeros((1, 5, 12, 12, 8), np.float32))

    (tmp_path / "latents.safetensors").write_bytes(b"")
    return opened


def test_the_record_is_complete_and_readable(tmp_path, opened):
    with opened("seed=7") as files:
        files.record(VERSIONS, TIMINGS, INPUTS)
        with pytest.raises(UserError, match="exists already"):
            files.record(VERSIONS, TIMINGS)
    text = (tmp_path / "a.json").read_text("utf-8")
    record = json.loads(text)
    assert record.pop("config")["prompt"] == ["猫"]
    assert len(record.pop("identity")) == 16
    named = {"output": "a.mp4", "frames": 17, "contact_sheet": "a.sheet.jpg"}
    assert record == {**named, "seed": 7, "inputs": INPUTS, "versions": VERSIONS, "timings": TIMINGS}
    assert "猫" in text and text.endswith("}\n")
    with opened("seed=8", "overwrite=true") as files:
        files.record(VERSIONS, TIMINGS)
    assert json.loads((tmp_path / "a.json").read_text("utf-8"))["seed"] == 8


@pytest.mark.parametrize("value", [float("nan"), {1, 2}])
def test_what_json_cannot_hold_leaves_nothing(tmp_path, opened, value):
    with pytest.raises((TypeError, ValueError)), opened() as files:
        files.record(VERSIONS, {"x": value})
    assert os.listdir(tmp_path) == ["latents.safetensors"]


def test_bytes_of_an_argument_that_are_no_utf8_survive(tmp_path, opened):
    prompt = b"\xff cat".decode(errors="surrogateescape")
    with opened(prompt=prompt) as files:
        files.record(VERSIONS, TIMINGS)
    assert json.loads((tmp_path / "a.json").read_text("utf-8"))["config"]["prompt"] == [prompt]
