"""Videos of several clips through the entry page: joined, redone, stopped, extended, on another mesh."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maxdiffusion import cli, generate_wan, request
from maxdiffusion.errors import UserError
from maxdiffusion.output.states import States
from maxdiffusion.weights.latents_io import load_latents
from tests.support.videos import CONFIGS, ROOT, psnr

FRAMES, STEPS = 5, 6
ONE = ("ici_data_parallelism=-1", "ici_context_parallelism=1")
EIGHT = ("attention=ulysses_ring", "ulysses_shards=2", "ici_context_parallelism=8")


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """Words of a run of the image miniature; programs that were compiled are kept."""
    cache = tmp_path_factory.mktemp("xla")

    def of(out, *more):
        common = [f"num_frames={FRAMES}", f"num_inference_steps={STEPS}", f"output_dir={out}", "run_name=r", "seed=4"]
        given = [word.partition("=")[0] for word in more]
        common = [word for word in common if word.partition("=")[0] not in given]
        mesh = [] if any("parallelism" in word for word in more) else ONE
        quiet = ["output_format=npy", f"jax_cache_dir={cache}"]
        return [str(CONFIGS / "wan_tiny_i2v.yml"), *common, *quiet, *mesh, *more]

    return of


@pytest.fixture(scope="module")
def make(words):
    """Makes one video: (folder, words) -> its frames, whole latents by clip, and record."""

    def made(out, *more):
        (path,) = generate_wan.run(request.load(words(out, "log_level=error", *more)))
        stem = Path(str(path).removesuffix(".npy"))
        latents = load_latents(Path(f"{stem}.latents.safetensors"))[0][0]
        record = json.loads(Path(f"{stem}.json").read_text())
        return np.load(path), latents.reshape(-1, 2, *latents.shape[1:]), record

    return made


@pytest.fixture(scope="module")
def three(make, tmp_path_factory):
    """A folder with a video of three clips, and what `make` returns."""
    folder = tmp_path_factory.mktemp("three")
    return folder, *make(folder, "clips=3")


@pytest.mark.slow
def test_a_video_of_three_clips_has_each_frame_once(three, words, tmp_path):
    folder, video, latents, record = three
    assert video.shape == (3 * FRAMES - 2, 96, 96, 3)
    alone = []
    for number in (1, 2, 3):
        (file,) = folder.glob(f"r/*.clip{number}.latents.safetensors")
        stored, metadata = load_latents(file)
        np.testing.assert_array_equal(stored[0], latents[number - 1])
        assert metadata["seed"] == str(3 + number)
        if number < 3:
            decode = words(tmp_path / str(number), f"decode_latents={file}", "log_level=error")
            alone.append(np.load(generate_wan.run(request.load(decode))[0]))
    np.testing.assert_array_equal(video[:FRAMES], alone[0])
    np.testing.assert_array_equal(video[FRAMES : 2 * FRAMES - 1], alone[1][1:])
    print(f"clip 2 starts with clip 1's last frame: {psnr(alone[1][0], alone[0][-1]):.1f} dB")
    assert psnr(alone[1][0], alone[0][-1]) > 20
    assert [clip["seed"] for clip in record["clips"]] == [4, 5, 6]
    assert record["clips"][0]["red"] == pytest.approx(video[:FRAMES, ..., 0].mean(), rel=1e-4)


@pytest.mark.slow
def test_a_clip_is_what_a_run_from_the_last_frame_makes(three, make, tmp_path):
    _, video, latents, _ = three
    Image.fromarray(video[FRAMES - 1]).save(tmp_path / "last.png")
    own = make(tmp_path, f"image={tmp_path}/last.png", "seed=5")[1][0]
    error = np.abs(own - latents[1]).max() / np.abs(latents[1]).max()
    print(f"largest difference, by the rounding of the image: {error:.1e} relative")
    assert error < 0.05


@pytest.mark.slow
def test_a_clip_is_made_anew_with_those_that_follow(three, make, words):
    folder, _, latents, _ = three
    video, redone, record = make(folder, "clips=3", "redo_clip=2", "clip_seeds=[4,77,6]")
    np.testing.assert_array_equal(redone[0], latents[0])
    assert all(np.abs(redone[clip] - latents[clip]).max() > 0.1 for clip in (1, 2))
    assert len(video) == 3 * FRAMES - 2 and record["output"].endswith("-2.npy")
    more = make(folder, "clips=4", "redo_clip=4")[1]  # the first video, and a clip more
    np.testing.assert_array_equal(more[:3], latents)
    with pytest.raises(UserError, match=r"would make .*-2\.json again: no clip has another prompt or seed"):
        make(folder, "clips=3", "redo_clip=2", "clip_seeds=[4,77,6]")
    with pytest.raises(UserError, match=r"needs the latents of clip 1 of this command, and no file \*.clip1"):
        make(folder, "clips=3", "redo_clip=2", "guidance_scale=3")


@pytest.mark.slow
def test_a_stopped_run_makes_no_clip_again(three, words, tmp_path, monkeypatch, capsys):
    count, due = 0, States.due

    def asked(self: States, step: int) -> bool:
        nonlocal count
        count += 1
        if count == STEPS + 3:  # within the second clip: a clip asks after each step
            signal.raise_signal(signal.SIGTERM)
        return due(self, step)

    monkeypatch.setattr(States, "due", asked)
    assert cli.command(words(tmp_path, "clips=3")) == 75
    assert f"stopped after step 3 of {STEPS} of segment 2" in capsys.readouterr().err
    assert len(list(tmp_path.glob("r/*.clip*"))) == 1
    (first,) = tmp_path.glob("r/*.clip1.latents.safetensors")
    written = first.stat().st_mtime_ns
    assert cli.command(words(tmp_path, "clips=3")) == 0
    assert f"resuming at step 4 of {STEPS} of segment 2 of 3" in capsys.readouterr().err
    assert first.stat().st_mtime_ns == written
    (file,) = [path for path in tmp_path.glob("r/*.latents.safetensors") if ".clip" not in path.name]
    values = load_latents(file)[0][0]
    np.testing.assert_allclose(values.reshape(three[2].shape), three[2], atol=1e-4 * np.abs(values).max())
    assert not list(tmp_path.glob("r/.*"))


@pytest.mark.slow
def test_eight_devices_make_the_same_clips(three, make, tmp_path):
    latents = make(tmp_path, "clips=2", *EIGHT)[1]
    error = np.abs(latents - three[2][:2]).max() / np.abs(latents).max()
    print(f"eight devices: {error:.1e} relative")
    assert error < 1e-4


@pytest.mark.slow
def test_a_video_is_extended(three, make, tmp_path):
    """The first two clips' end, extended with the third one's seed, is the third clip but for the rounding."""
    _, video, latents, _ = three
    np.save(tmp_path / "v.npy", video[: 2 * FRAMES - 1])
    longer, own, record = make(tmp_path, f"extend={tmp_path}/v.npy", "image=", "seed=6")
    assert longer.shape == video.shape
    np.testing.assert_array_equal(longer[: 2 * FRAMES - 1], video[: 2 * FRAMES - 1])
    assert np.abs(own[0] - latents[2]).max() < 0.05 * np.abs(latents[2]).max()
    assert record["inputs"]["extend"]["frames"]["count"] == 2 * FRAMES - 1


@pytest.mark.slow
def test_padding_shows_the_image_in_every_clip(three, make, tmp_path):
    frames = ("clips=2", "num_frames=9", "overlap_frames=5")
    zeros = make(tmp_path, *frames)[0]
    assert len(zeros) == 13
    for words in (("clip_padding=reference",), ("clip_mask=first",)):
        other = make(tmp_path, *frames, *words)[0]
        assert other.shape == zeros.shape and np.abs(other[9:].astype(int) - zeros[9:]).max() > 10


@pytest.mark.slow
def test_the_last_image_ends_the_last_clip(make, tmp_path):
    image = np.asarray(Image.open(ROOT / "models" / "wan_tiny_i2v" / "example.png"))
    Image.fromarray(image[:, ::-1]).save(tmp_path / "end.png")
    first = make(tmp_path, "clips=2")[1]
    ended = make(tmp_path, "clips=2", f"last_image={tmp_path}/end.png")[1]
    np.testing.assert_array_equal(ended[0], first[0])
    assert np.abs(ended[1] - first[1]).max() > 0.1
