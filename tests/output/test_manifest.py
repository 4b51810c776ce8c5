"""Which videos of a prompt file are done, by files and manifest alone: no video is made."""

import contextlib
import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maxdiffusion import request
from maxdiffusion.errors import UserError
from maxdiffusion.output import manifest
from maxdiffusion.request.videos import single
from tests.support.output import reserved

PAGE = str(Path(__file__).parents[2] / "configs" / "wan_tiny.yml")
LINES = [{"prompt": "a red circle", "output": "one"}, {"prompt": "a white square", "output": "two", "size": "64*96"}]

LATENTS = np.zeros((1, 5, 12, 12, 8), np.float32)


@pytest.fixture
def load(tmp_path):
    def load(*words, lines=LINES, page=PAGE):
        (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return request.load([page, f"prompts={tmp_path}/p.jsonl", f"output_dir={tmp_path}/out", *words])

    return load


def make(job, number, kill=None):
    """Stands for a run of one line: its files in their order, up to where it is killed."""
    video = job.videos[number]
    with contextlib.suppress(KeyboardInterrupt), reserved(job, [video], LATENTS) as files:
        assert files.paths == [manifest.video_path(job, video)]
        if kill != "denoise":
            files.paths[0].write_bytes(b"video" * (number + 1))
        if kill is not None:
            raise KeyboardInterrupt
        files.record({}, {})


def left(job):
    return [video.output for video in manifest.remaining(job).videos]


def test_what_is_done_is_skipped(load):
    job = load()
    assert left(job) == ["one", "two"]
    make(job, 1)
    assert left(job) == ["one"]
    make(job, 0)
    assert left(load()) == []
    record = manifest.video_path(job, job.videos[1]).with_suffix(".json")
    assert json.loads(record.read_text())["config"] == single(job.cfg, job.videos[1]).to_json()


@pytest.mark.parametrize("kill", ["denoise", "before the record"])
def test_a_killed_line_is_made_again(load, kill):
    job = load()
    make(job, 0, kill)
    assert left(job) == ["one", "two"]
    make(job, 0)
    assert left(job) == ["two"]


def test_a_video_that_is_no_longer_whole_is_made_again(load):
    job = load()
    make(job, 0)
    path = manifest.video_path(job, job.videos[0])
    path.write_bytes(b"vid")
    assert left(job) == ["one", "two"]
    path.unlink()
    assert left(job) == ["one", "two"]


def test_a_folder_of_frames_is_counted_whole(load):
    job = load("output_format=png")
    manifest.begin(job, job.videos[:1])
    folder = manifest.video_path(job, job.videos[0])
    folder.mkdir()
    (folder / "0.png").write_bytes(b"12")
    manifest.finish(job, job.videos[:1])
    assert left(job) == ["two"]
    (folder / "0.png").write_bytes(b"1")
    assert left(job) == ["one", "two"]


def test_other_words_or_settings_are_another_video(load):
    make(load(), 0)
    other = [{**LINES[0], "prompt": "a blue circle"}, LINES[1]]
    for words, lines in (((), other), (("num_inference_steps=3",), LINES), (("weights_dtype=bfloat16",), LINES)):
        with pytest.raises(UserError, match=r"one\.mp4 exists already and came of another line or other settings"):
            left(load(*words, lines=lines))
    assert left(load("num_inference_steps=3", "overwrite=true")) == ["one", "two"]
    # Where and how it runs, and the other lines, do not change a video.
    assert left(load("progress=off", "attention=ring", lines=[LINES[1], LINES[0]])) == ["two"]
    assert left(load("guidance_mode=two_pass", "loop=scan")) == ["two"]


def test_another_image_under_the_same_name_is_another_video(load, tmp_path):
    image, page = tmp_path / "image.png", PAGE.replace("wan_tiny", "wan_tiny_i2v")
    lines = [{"prompt": "a red circle", "image": str(image), "output": "one"}]
    Image.new("RGB", (96, 96), "red").save(image)
    make(load(lines=lines, page=page), 0)
    assert left(load(lines=lines, page=page)) == []
    image.rename(tmp_path / "moved.png")
    moved = [{**lines[0], "image": str(tmp_path / "moved.png")}]
    assert left(load(lines=moved, page=page)) == []
    Image.new("RGB", (96, 96), "blue").save(image)
    with pytest.raises(UserError, match=r"one\.mp4 exists already and came of another line or other settings"):
        left(load(lines=lines, page=page))


def test_two_runs_at_once_keep_each_others_rows(load):
    job = load()
    names = [f"v{i}" for i in range(16)]
    videos = [dataclasses.replace(job.videos[0], output=name) for name in names]
    for video in videos:
        path = manifest.video_path(job, video)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"video")
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda video: manifest.finish(job, [video]), videos))
    assert sorted(json.loads((path.parent / "p.manifest.json").read_text())) == sorted(names)


def test_a_foreign_file_is_not_overwritten(load):
    job = load()
    path = manifest.video_path(job, job.videos[0])
    path.parent.mkdir(parents=True)
    path.write_bytes(b"mine")
    with pytest.raises(UserError, match=r"one\.mp4 exists already and came of another run"):
        left(job)


@pytest.mark.parametrize("ending", ["latents.safetensors", "json", "sheet.jpg"])
def test_nor_is_what_lies_beside_another_video(load, ending):
    """A run that was killed while it decoded left its latents; a video in another format has its record."""
    job = load("output_format=gif")
    path = manifest.video_path(job, job.videos[0]).with_suffix(f".{ending}")
    path.parent.mkdir(parents=True)
    path.write_bytes(b"mine")
    with pytest.raises(UserError, match=rf"one\.{ending} exists already and came of another run"):
        left(job)
    assert left(load("output_format=gif", "overwrite=true")) == ["one", "two"]


def test_a_damaged_manifest(load):
    job = load()
    make(job, 0)
    path = manifest.video_path(job, job.videos[0]).with_name("p.manifest.json")
    for text, message in {"{": "cannot be read", "[]": "is not a manifest", '{"one": 1}': "is not a manifest"}.items():
        path.write_text(text)
        with pytest.raises(UserError, match=rf"p\.manifest\.json {message}"):
            left(job)


def test_a_folder_in_a_videos_place_is_not_replaced(load):
    path = manifest.video_path(load(), load().videos[0])
    path.mkdir(parents=True)
    for words in ((), ("overwrite=true",)):
        with pytest.raises(UserError, match=r"one\.mp4 is a folder, which no video replaces"):
            left(load(*words))


def test_a_url_counts_by_its_name_and_needs_no_package(tmp_path, monkeypatch):
    """Fsspec's own reader of http needs aiohttp, which only an extra brings."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "i2v.yml").write_text("model_name: wan2.2-i2v-a14b\nprompt: a cat\nwidth: 64\nheight: 64\n")
    one, other = (
        request.load([str(tmp_path / "i2v.yml"), f"image=https://example.org/{name}.png"]) for name in ("a", "b")
    )
    assert manifest.digest(one, one.videos[0]) != manifest.digest(other, other.videos[0])
