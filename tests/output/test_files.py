"""The files of a batch; their names and numbers are tested where they are made."""

import json
import os
import re
import shutil
import tempfile
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maxdiffusion import output, request
from maxdiffusion.errors import UserError
from maxdiffusion.media import write as media
from maxdiffusion.media.read import read_video
from maxdiffusion.output import names
from maxdiffusion.weights.latents_io import load_latents
from tests.support.bucket import bucket
from tests.support.media import read_metadata
from tests.support.output import reserved, write

__all__ = ["bucket"]  # a fixture
PAGE = str(Path(__file__).parents[2] / "configs" / "wan_tiny.yml")
LATENTS = np.arange(2 * 5 * 12 * 12 * 8, dtype=np.float32).reshape(2, 5, 12, 12, 8)


def refused(job):
    with pytest.raises(UserError) as error, reserved(job, job.videos, LATENTS[: len(job.videos)]):
        pass
    return str(error.value)


def test_a_name_that_another_run_holds_or_has_written_is_refused_before_the_work(tmp_path):
    job = request.load([PAGE, "prompt=a red circle", f"save_file={tmp_path}/a.mp4"])
    with names.reserve_file(tmp_path / "a.mp4", [".mp4"]), pytest.raises(UserError, match="another run is making"):
        output.Outputs(job, "model")
    (tmp_path / "a.mp4").write_bytes(b"theirs")
    with pytest.raises(UserError, match="exists already"):
        output.Outputs(job, "model")
    assert (tmp_path / "a.mp4").read_bytes() == b"theirs" and os.listdir(tmp_path) == ["a.mp4"]


@pytest.mark.parametrize("existed", [False, True])
def test_a_run_that_fails_leaves_no_empty_folder(tmp_path, existed):
    out = tmp_path / "made" / "too"
    if existed:
        out.mkdir(parents=True)
    job = request.load([PAGE, "prompt=a red circle", f"output_dir={out}"])
    with pytest.raises(UserError, match="later"), output.Outputs(job, "model") as outputs:
        outputs.reserve(job.videos)
        raise UserError("later")
    assert list(tmp_path.rglob("*")) == ([out.parent, out] if existed else [])


@pytest.mark.parametrize(
    "words", [("save_file={}/a.mp4",), ("output_dir={}",), ("prompts={}/p.jsonl", "output_dir={}")]
)
@pytest.mark.parametrize("where", ["here", "bucket"])
def test_whole_latents_of_an_earlier_run_are_found_under_every_name(tmp_path, bucket, words, where):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a red circle", "output": "x"}\n')
    place = tmp_path if where == "here" else "gs://b"
    words = [word.format(tmp_path if word.startswith("prompts") else place) for word in words]
    job = request.load([PAGE, "prompt=a red circle", *words])
    with output.Outputs(job, "model") as outputs:
        outputs.reserve(job.videos).save_latents(LATENTS[:1])
    job = output.remaining(request.load([PAGE, "prompt=a red circle", *words]))
    with output.Outputs(job, "model") as outputs:
        ((videos, found),) = outputs.denoised()
        assert videos == job.videos and outputs.unfinished(videos) == []
        np.testing.assert_array_equal(found, LATENTS[:1])


def test_latents_that_the_folder_cannot_take_are_saved_in_the_temporary_one(tmp_path, caplog, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    job = request.load([PAGE, "prompt=a red circle", f"save_file={tmp_path}/folder/a.mp4"])
    with output.Outputs(job, "model") as outputs:
        files = outputs.reserve(job.videos)
        shutil.rmtree(tmp_path / "folder")
        (tmp_path / "folder").write_bytes(b"a file in its way")
        files.save_latents(LATENTS[:1])
    (kept,) = re.findall(r"decode_latents=(\S+) makes", caplog.text)
    assert kept.startswith(str(tmp_path / "temporary"))
    np.testing.assert_array_equal(load_latents(Path(kept))[0], LATENTS[:1])
    job = request.load([PAGE, "prompt=a red circle", f"save_file={tmp_path}/b.mp4", f"decode_latents={kept}"])
    with reserved(job, job.videos, LATENTS[:1]) as files:
        assert files.paths == [tmp_path / "b.mp4"]
    assert not (tmp_path / "b.latents.safetensors").exists()


def test_latents_of_another_run_are_not_replaced_and_those_of_this_one_are_used(tmp_path):
    job = request.load([PAGE, "prompt=a red circle", f"save_file={tmp_path}/a.mp4"])
    with output.Outputs(job, "model") as outputs:
        outputs.reserve(job.videos).save_latents(LATENTS[:1])
    with output.Outputs(job, "model") as outputs:
        ((videos, found),) = outputs.denoised()
        assert videos == job.videos and outputs.unfinished(videos) == []
        np.testing.assert_array_equal(found, LATENTS[:1])
    with pytest.raises(UserError, match="exists already"):
        output.Outputs(job, "another model")


@pytest.mark.parametrize(
    ("words", "file", "format"),
    [
        (["save_file={}/clip.MP4"], "clip.MP4", "mp4"),
        (["save_file={}/a.v2.Gif"], "a.v2.Gif", "gif"),
        (["save_file={}/x.NPY"], "x.NPY", "npy"),
        (["save_file={}/one.png", "num_frames=1"], "one.png", "PNG"),
        (["save_file={}/one.JPG", "num_frames=1"], "one.JPG", "JPEG"),
        (["save_file={}/one.jpeg", "num_frames=1"], "one.jpeg", "JPEG"),
        (["save_file={}/one.webp", "num_frames=1"], "one.webp", "WEBP"),
        (["save_file={}/frames", "output_format=png"], "frames", "folder"),
        (["save_file={}/frames.png"], "frames.png", "folder"),
    ],
)
@pytest.mark.parametrize("overwrite", ["overwrite=false", "overwrite=true"])
def test_a_named_file_is_written_to_the_letter(tmp_path, words, file, format, overwrite):
    job = request.load([PAGE, "prompt=a cat", *(word.format(tmp_path) for word in words), overwrite])
    other = tmp_path / f"{file.casefold()}.other" if overwrite == "overwrite=false" else tmp_path / file.casefold()
    if other.name != file:
        other.write_bytes(b"theirs")
    frames = np.random.default_rng(0).integers(0, 256, (1, job.cfg.num_frames, 96, 96, 3), np.uint8)
    with reserved(job, job.videos, LATENTS[:1]) as files:
        assert write(files, frames) == [tmp_path / file]
        files.record({}, {})
    stem = file if format == "folder" else file.rpartition(".")[0]
    made = {path.name for path in tmp_path.iterdir()} - ({other.name} - {file})
    sheet = {f"{stem}.sheet.jpg"} if job.cfg.num_frames > 1 else set()
    assert made == {file, f"{stem}.json", f"{stem}.latents.safetensors"} | sheet
    assert json.loads((tmp_path / f"{stem}.json").read_text())["output"] == file
    assert (tmp_path / file).is_dir() == (format == "folder")
    if format.isupper():
        with Image.open(tmp_path / file) as picture:
            assert (picture.format, picture.size) == (format, (96, 96))
        assert read_metadata(tmp_path / file) == {"prompt": "a cat", "seed": "0"}
    assert read_video(tmp_path / file).shape == frames.shape[1:]
    if other.name != file:
        assert other.read_bytes() == b"theirs"


@pytest.mark.parametrize("fmt", ["gif", "webp", "npy", "png"])  # x264 is not the same to the bit every time
def test_frames_are_encoded_as_they_come_and_a_decode_that_fails_leaves_its_latents_alone(tmp_path, fmt):
    job = request.load([PAGE, "prompt=a cat", f"output_dir={tmp_path}", "run_name=r", f"output_format={fmt}"])
    frames = np.random.default_rng(0).integers(0, 256, (1, job.cfg.num_frames, 96, 96, 3), np.uint8)
    attempt = reserved(job, job.videos, LATENTS[:1])
    with pytest.raises(UserError, match="NaN"), attempt as files, files.writing(job.cfg.num_frames):
        files.add(frames[:, :4])
        raise UserError("NaN")
    assert [path.name.partition(".")[2] for path in (tmp_path / "r").iterdir()] == ["latents.safetensors"]
    with reserved(job, job.videos, LATENTS[:1]) as files:
        (path,) = write(files, frames)
        files.record({}, {})
    media.write(frames[0], tmp_path / "whole", job.cfg.fps, fmt, {"prompt": "a cat", "seed": "0"})
    for file in [path] if path.is_file() else sorted(path.iterdir()):
        assert (
            file.read_bytes() == (tmp_path / "whole" / file.name if fmt == "png" else tmp_path / "whole").read_bytes()
        )


@pytest.mark.parametrize("fmt", ["png", "jpg", "jpeg"])
def test_default_names_of_one_frame_are_pictures(tmp_path, fmt):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a cat", "output": "tom"}\n')
    for words, name in (["prompt=a cat"], "a-cat-seed0-96x96x1"), ([f"prompts={tmp_path}/p.jsonl"], "tom"):
        job = request.load([PAGE, *words, f"output_dir={tmp_path}", "num_frames=1", f"output_format={fmt}"])
        with reserved(job, job.videos, LATENTS[:1]) as files:
            (path,) = write(files, np.zeros((1, 1, 96, 96, 3), np.uint8))
            files.record({}, {})
        assert path.name == f"{name}.{fmt.replace('jpeg', 'jpg')}" and path.is_file()
    assert output.remaining(job).videos == ()


@pytest.mark.parametrize("where", ["save_file={}/folder/a.mp4", "output_dir={}/folder"])
def test_a_folder_that_cannot_be_written_is_said_once(tmp_path, where):
    job = request.load([PAGE, "prompt=a red circle", where.format(tmp_path)])
    (tmp_path / "folder").write_bytes(b"a file")
    assert "folder" in refused(job)


def test_a_disk_without_room_for_the_latents_is_refused_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: types.SimpleNamespace(free=20_000))
    with pytest.raises(UserError, match=r"0\.0 MB are free on the disk of .*, and the latents of a video take 0\.0 MB"):
        request.load([PAGE, "prompt=a red circle", f"output_dir={tmp_path}/new"])
    request.load([PAGE, "prompt=a red circle", f"output_dir={tmp_path}/new", "num_frames=1"])


@pytest.mark.parametrize("kind", ["dangling link", "loop", "long name", "in a file"])
def test_a_folder_that_nobody_can_make_is_refused_before_the_work(tmp_path, kind):
    out = tmp_path / ("n" * 300 if kind == "long name" else "out")
    if kind == "dangling link":
        out.symlink_to(tmp_path / "nowhere" / "else")
    elif kind == "loop":
        out.symlink_to(out)
    elif kind == "in a file":
        out.write_bytes(b"a file")
    with pytest.raises(UserError, match="cannot be written"):
        request.load([PAGE, "prompt=a red circle", f"output_dir={out}"])


@pytest.mark.parametrize("when", ["after the record", "after the states"])
@pytest.mark.parametrize("words", [("prompts={}/p.jsonl",), ("seed=[1, 2]", "prompt=a red circle")])
def test_a_video_whose_run_was_killed_at_its_last_file_is_not_made_again(tmp_path, monkeypatch, words, when):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a red circle"}\n{"prompt": "a blue circle"}\n')
    words = [PAGE, *(word.format(tmp_path) for word in words), f"output_dir={tmp_path}", "num_frames=1"]
    words += ["output_format=png"]
    job = request.load(words)
    with output.Outputs(job, "model") as outputs:
        files = outputs.reserve(job.videos[:1])
        files.save_latents(LATENTS[:1])
        write(files, np.zeros((1, 1, 96, 96, 3), np.uint8))
        files.record({}, {})
        outputs.reserve(job.videos[1:])
        if when == "after the states":
            outputs.states.remove(job.videos[:1])
        locks = {path: path.read_bytes() for path in tmp_path.rglob(".*.lock")}
    for path, content in locks.items():  # as SIGKILL leaves them
        path.write_bytes(content)
    job = output.remaining(request.load(words))
    with output.Outputs(job, "model") as outputs:
        assert [job.videos[row] for row in outputs.unfinished([])] == list(job.videos[1:])
    assert len(output.remaining(request.load(words)).videos) == (1 if job.cfg.prompts else 2)
