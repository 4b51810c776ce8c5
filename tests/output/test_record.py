import json
import os

import pytest

from maxdiffusion.errors import UserError
from maxdiffusion.output.record import write_record

RECORD = {
    "config": {"prompt": "猫", "height": 96},
    "seed": 7,
    "versions": {"jax": "0"},
    "timings": {"seconds": {"load": 1.5}},
}


def test_the_record_is_complete_and_readable(tmp_path):
    write_record(tmp_path / "a.json", **RECORD, output=tmp_path / "a.mp4")
    text = (tmp_path / "a.json").read_text("utf-8")
    assert json.loads(text) == {**RECORD, "output": "a.mp4"}
    assert "猫" in text and text.endswith("}\n")
    with pytest.raises(UserError, match="exists already"):
        write_record(tmp_path / "a.json", **RECORD, output=tmp_path / "a.mp4")
    write_record(tmp_path / "a.json", **RECORD | {"seed": 8}, output=tmp_path / "a.mp4", overwrite=True)
    assert json.loads((tmp_path / "a.json").read_text("utf-8"))["seed"] == 8


@pytest.mark.parametrize("value", [float("nan"), {1, 2}])
def test_what_json_cannot_hold_leaves_nothing(tmp_path, value):
    with pytest.raises((TypeError, ValueError)):
        write_record(tmp_path / "a.json", **RECORD | {"timings": {"x": value}}, output=tmp_path / "a.mp4")
    assert os.listdir(tmp_path) == []


def test_bytes_of_an_argument_that_are_no_utf8_survive(tmp_path):
    prompt = b"\xff cat".decode(errors="surrogateescape")
    write_record(tmp_path / "a.json", **RECORD | {"config": {"prompt": prompt}}, output=tmp_path / "a.mp4")
    assert json.loads((tmp_path / "a.json").read_text("utf-8"))["config"]["prompt"] == prompt
