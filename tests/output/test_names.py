import contextlib
import os
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from maxdiffusion.errors import UserError
from maxdiffusion.media.write import write
from maxdiffusion.output.names import reserve, reserve_file, sibling
from maxdiffusion.request.videos import default_stem
from maxdiffusion.runtime.atomic import write_json
from tests.support.media import CLIPS


@pytest.mark.parametrize(
    ("prompt", "slug"),
    [
        ("a red circle moving left", "a-red-circle-moving-left"),
        ("  A  Red/Circle.. ", "a-red-circle"),
        ("../../etc/passwd", "etc-passwd"),
        ("Café del Mar", "café-del-mar"),
        ("一只猫 在跳舞", "一只猫-在跳舞"),
        ("नमस्ते", "नमस्ते"),
        ("ｆｕｌｌ ｗｉｄｔｈ", "full-width"),
        ("🎬🎬", "video"),
        ("", "video"),
        ("word " * 40, "word-word-word-word-word-word-word-word-word-word-word-word"),
        ("x" * 200, "x" * 60),
        ("猫" * 100, "猫" * 20),
    ],
)
def test_the_prompt_can_be_read_in_the_name(prompt, slug):
    stem = default_stem(prompt, 7, 96, 64, 17)
    assert stem == unicodedata.normalize("NFKC", f"{slug}-seed7-96x64x17")


@given(st.text(max_size=300), st.integers(0, 2**64 - 1))
def test_any_prompt_gives_a_legal_name(prompt, seed):
    stem = default_stem(prompt, seed, 1280, 720, 81)
    assert len((stem + "-999.latents.safetensors").encode()) <= 143
    assert not set(stem) & set('/\\:*?"<>|. \t\n\0') and stem[0] not in ".-"
    assert stem.isprintable()


def test_stems_do_not_meet(tmp_path):
    folder = tmp_path / "new"
    with contextlib.ExitStack() as batch:
        stems = [batch.enter_context(reserve(folder, "cat")) for _ in range(3)]
        assert [stem.name for stem in stems] == ["cat", "cat-2", "cat-3"]
        sibling(stems[1], ".latents.safetensors").write_bytes(b"")
    assert os.listdir(folder) == ["cat-2.latents.safetensors"]
    with reserve(folder, "cat") as first, reserve(folder, "cat") as second:
        assert (first.name, second.name) == ("cat", "cat-3")


@pytest.mark.parametrize("name", ["cat.mp4", "cat", "Cat.json"])
def test_a_stem_with_any_file_is_taken(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    (tmp_path / "cat-3").mkdir()
    (tmp_path / "catalogue.mp4").write_bytes(b"")
    with reserve(tmp_path, "cat") as first, reserve(tmp_path, "cat") as second:
        assert (first.name, second.name) == ("cat-2", "cat-4")


def test_two_processes_and_a_killed_one(tmp_path):
    program = (
        "import sys, time; from pathlib import Path; from maxdiffusion.output.names import reserve\n"
        "with reserve(Path(sys.argv[1]), 'cat') as stem:\n"
        "    print(stem.name, flush=True); time.sleep(60)"
    )
    runs = []
    for _ in range(2):
        runs.append(subprocess.Popen([sys.executable, "-c", program, tmp_path], stdout=subprocess.PIPE, text=True))
    names = {run.stdout.readline().strip() for run in runs}
    for run in runs:
        run.kill()
        run.communicate()
    assert names == {"cat", "cat-2"}
    with reserve(tmp_path, "cat") as stem:
        assert stem.name == "cat"


def test_a_link_in_the_place_of_a_reservation_is_not_followed(tmp_path):
    """Names can be guessed: a link of that name must not cost the folder that it points to."""
    precious, out = tmp_path / "precious", tmp_path / "out"
    for folder in (precious, out):
        folder.mkdir()
    (precious / "dear").write_bytes(b"dear")
    for name in (".cat.lock", ".cat.mp4.part", ".my.lock", ".my.mp4.part"):
        (out / name).symlink_to(precious)
    with reserve(out, "cat") as stem:
        assert stem.name == "cat-2"
        write(np.zeros((1, 32, 32, 3), np.uint8), out / "cat.mp4", 16, "mp4", {})
    said = pytest.raises(UserError, match=r"another run is making .*my\.mp4.* or delete .*\.my\.lock")
    with said, reserve_file(out / "my.mp4", (".mp4",), overwrite=True):
        pytest.fail("the block must not run")
    assert os.listdir(precious) == ["dear"]
    assert sorted(os.listdir(out)) == [".cat.lock", ".cat.mp4.part", ".my.lock", ".my.mp4.part", "cat.mp4"]


@pytest.mark.parametrize("fmt", ["png", "npy"])
def test_all_files_of_a_reserved_stem_can_be_written(tmp_path, fmt):
    frames = np.zeros((1, 32, 32, 3), np.uint8)
    with reserve(tmp_path, "cat") as stem:
        write(frames, sibling(stem, CLIPS[fmt]), 16, fmt, {})
        write_json(sibling(stem, ".json"), {})
    assert sorted(os.listdir(tmp_path)) == sorted(["cat" + CLIPS[fmt], "cat.json"])


def test_a_file_named_to_the_letter(tmp_path):
    final = tmp_path / "new" / "My video.v2.MP4"
    with reserve_file(final, (".mp4", ".json")) as stem:
        assert sibling(stem, ".json") == tmp_path / "new" / "My video.v2.json"
        with pytest.raises(UserError, match="another run"), reserve_file(final, (".mp4", ".json"), overwrite=True):
            pytest.fail("the block must not run")
    with reserve_file(tmp_path / "frames.v2", ("", ".json")) as stem:
        assert stem == tmp_path / "frames.v2"


@pytest.mark.parametrize("existing", ["a.mp4", "a.json"])
def test_nothing_that_exists_is_overwritten_unless_told(tmp_path, existing):
    (tmp_path / existing).write_bytes(b"")
    with (
        pytest.raises(UserError, match=rf"{existing} exists already"),
        reserve_file(tmp_path / "a.mp4", (".mp4", ".json")),
    ):
        pytest.fail("the block must not run")
    assert os.listdir(tmp_path) == [existing]
    with reserve_file(tmp_path / "a.mp4", (".mp4", ".json"), overwrite=True) as stem:
        assert stem == tmp_path / "a"


@pytest.mark.parametrize("name", ["a.mp4", "a.json"])
def test_overwrite_means_no_folder_of_others(tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "dear").write_bytes(b"dear")
    said = pytest.raises(UserError, match=rf"{name} is a folder")
    with said, reserve_file(tmp_path / "a.mp4", (".mp4", ".json"), overwrite=True):
        pytest.fail("the block must not run")
    assert os.listdir(tmp_path / name) == ["dear"] and os.listdir(tmp_path) == [name]


def test_a_name_whose_latents_would_be_too_long_is_refused_before_the_work(tmp_path):
    said = pytest.raises(UserError, match="the name is too long")
    with said, reserve_file(tmp_path / f"{'n' * 236}.mp4", (".mp4", ".json", ".latents.safetensors")):
        pytest.fail("the block must not run")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["a.mov", "a", ".mp4"])
def test_another_suffix_is_refused(tmp_path, name):
    with pytest.raises(UserError, match=r"does not end in \.mp4"), reserve_file(tmp_path / name, (".mp4",)):
        pytest.fail("the block must not run")


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match="not a folder"), reserve(tmp_path / "file", "cat"):
        pytest.fail("the block must not run")
    with pytest.raises(UserError, match="not a folder"), reserve_file(tmp_path / "file" / "a.mp4", (".mp4",)):
        pytest.fail("the block must not run")
