"""Videos of several clips: how their frames, prompts and seeds follow from the keys, and what is refused."""

import numpy as np
import pytest
from PIL import Image

from maxdiffusion import request
from maxdiffusion.errors import UserError

I2V, TI2V, VACE = "wan2.2-i2v-a14b", "wan2.2-ti2v-5b", "wan2.1-vace-1.3b"


@pytest.fixture
def load(place):
    """Loads a run of a variant with these words beside an image, a video of 9 frames and prompts."""
    Image.new("RGB", (832, 480)).save(place / "a.png")
    np.save(place / "v.npy", np.zeros((9, 32, 48, 3), np.uint8))
    (place / "p.jsonl").write_text('{"prompt": "a"}\n')

    def loaded(model, *words):
        return request.load(["base.yml", f"model_name={model}", *words])

    return loaded


def test_frames_that_overlap_count_once(load):
    job = load(I2V, "image=a.png", "clips=3", "num_frames=81", "overlap_frames=5")
    assert job.segments.starts == (0, 76, 152) and job.segments.frames == 3 * 81 - 2 * 5
    assert load(I2V, "image=a.png", "clips=2", "num_frames=81").segments.frames == 161
    assert load(VACE, "extend=v.npy", "overlap_frames=5", "num_frames=9").segments.frames == 9


def test_each_clip_has_a_seed_and_a_prompt(load):
    job = load(I2V, "image=a.png", "clips=3", "seed=[4294967295,7]")
    assert [job.seed(video, clip) for video in job.videos for clip in range(3)] == [4294967295, 0, 1, 7, 8, 9]
    assert job.prompts(False) == ("a cat",)
    job = load(I2V, "image=a.png", "clips=2", "clip_seeds=[5,3]", "clip_prompts=[one, two]")
    (video,) = job.videos
    assert [(job.seed(video, clip), job.prompt(video, clip)) for clip in range(2)] == [(5, "one"), (3, "two")]
    assert job.prompts(False) == ("one", "two")


def test_a_video_that_is_extended_keeps_its_size(load):
    cfg = load(I2V, "extend=v.npy").cfg
    assert (cfg.width, cfg.height) == (48, 32)


@pytest.mark.parametrize(
    ("model", "words", "said"),
    [
        ("wan2.1-t2v-1.3b", ["clips=2"], "choose a model of type VACE, I2V, FLF2V, TI2V, or make long videos of T2V"),
        ("wan2.1-t2v-1.3b", ["extend=v.npy"], "extend=v.npy is not used by wan2.1-t2v-1.3b.*context_window"),
        ("wan2.2-animate-14b", ["clips=2"], "makes long videos in segments by itself"),
        (I2V, ["image=a.png", "overlap_frames=5"], "overlap_frames is only used with clips=N or extend=VIDEO"),
        (I2V, ["image=a.png", "redo_clip=2"], "redo_clip is only used with clips=N"),
        (I2V, ["image=a.png", "clips=2", "overlap_frames=4"], "of the form 4n.1.*write 1 or 5"),
        (I2V, ["image=a.png", "clips=2", "overlap_frames=81"], "less than num_frames=81; write 77"),
        (
            I2V,
            ["image=a.png", "clips=2", "num_frames=1"],
            "too short for clips; write at least num_frames=5",
        ),
        (
            TI2V,
            ["image=a.png", "clips=2", "overlap_frames=5"],
            "clip starts from one image; write overlap_frames=1",
        ),
        (TI2V, ["clips=2"], "clips=2 of TI2V start from an image or a video; write image=FILE or extend=VIDEO"),
        (I2V, ["image=a.png", "clips=100"], "clips=100 of num_frames=81 are 8001 frames.*at most 4093"),
        (I2V, ["image=a.png", "clips=2", "clip_seeds=[1]"], "clip_seeds has 1 entries, but clips=2"),
        (I2V, ["image=a.png", "clips=2", "clip_prompts=[a,b,c]"], "clip_prompts has 3 entries, but clips=2"),
        (I2V, ["image=a.png", "clips=2", "clip_prompts=[a,' ']"], "clip_prompts has an empty prompt"),
        (I2V, ["image=a.png", "clips=2", "clip_seeds=[1,2]", "seed=[1,2]"], "clip_seeds is not used beside several"),
        (I2V, ["image=a.png", "clips=2", "clip_seeds=[1,2]", "prompts=p.jsonl"], "not used beside prompts=p.jsonl"),
        (I2V, ["image=a.png", "extend=v.npy"], "image is not used beside extend=v.npy.*clip_padding=reference"),
        (TI2V, ["image=a.png", "extend=v.npy"], "start the first clip; write image=\\."),
        (VACE, ["clips=2", "clip_padding=reference"], "clip_padding is not used by VACE"),
        (I2V, ["extend=v.npy", "clip_padding=reference"], "needs the image that it shows in every clip"),
        (
            I2V,
            ["image=a.png", "clips=2", "clip_padding=reference", "clip_seeds=[1,1]"],
            "a different seed for each clip",
        ),
        (I2V, ["image=a.png", "clips=2", "clip_padding=reference", "solver=renoise"], "adds noise between steps"),
        (I2V, ["image=a.png", "clips=2", "redo_clip=3"], "redo_clip=3 is none of clips=2; write 2 to 2"),
        (I2V, ["image=a.png", "clips=2", "redo_clip=2", "seed=-1"], "needs the seed of the video, which its record"),
        (I2V, ["image=a.png", "clips=2", "redo_clip=2", "plan=v6e-8"], "redo_clip is not used beside plan"),
        (I2V, ["image=a.png", "clips=2", "lora={a.safetensors: [1, 0.5]}"], "one strength.*extend=VIDEO"),
        (I2V, ["clips=2"], "wan2.2-i2v-a14b needs image"),
    ],
)
def test_what_cannot_work_is_one_sentence(load, model, words, said):
    with pytest.raises(UserError, match=said):
        load(model, *words)
