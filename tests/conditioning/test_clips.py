"""What a clip is given of the one before it, on a random VAE; and the video that the first one extends."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from maxdiffusion import request
from maxdiffusion.conditioning import clips, image, vace
from maxdiffusion.conditioning.kind import ClipStart
from maxdiffusion.errors import UserError
from maxdiffusion.media.write import write
from maxdiffusion.request.session import Session
from maxdiffusion.runtime.stages import Stages
from tests.support.vae import Pair

HEIGHT, WIDTH, FRAMES = 16, 32, 9


@pytest.fixture(scope="module")
def vae():
    return Pair().ours


@pytest.fixture
def session(tmp_path, monkeypatch):
    """A session of a run without a checkpoint, in which a.png and v.npy can be named."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (WIDTH, HEIGHT), (200, 40, 40)).save("a.png")
    np.save("v.npy", np.arange(20 * HEIGHT * WIDTH * 3, dtype=np.int64).astype(np.uint8).reshape(20, HEIGHT, WIDTH, 3))
    (tmp_path / "run.yml").write_text("prompt: a\n")

    def of(model, *words):
        size = [f"height={HEIGHT}", f"width={WIDTH}", f"num_frames={FRAMES}"]
        size = [word for word in size if word.partition("=")[0] not in [each.partition("=")[0] for each in words]]
        job = request.load(["run.yml", f"model_name={model}", *size, *words])
        layers = SimpleNamespace(adapter=SimpleNamespace(vace_layers=(0, 1)))

        class WithoutCheckpoint(Session):
            configs = property(lambda self: {"transformer": layers})
            stages = Stages("off")

        WithoutCheckpoint.job = job
        return object.__new__(WithoutCheckpoint)

    return of


def frames(count, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (count, HEIGHT, WIDTH, 3)).astype(np.float32)


@pytest.mark.parametrize(
    ("words", "marked", "padded"),
    [([], 5, False), (["clip_mask=first"], 1, False), (["clip_padding=reference"], 5, True)],
)
def test_image_to_video_sees_the_frames_that_overlap(session, vae, words, marked, padded):
    s = session("wan2.2-i2v-a14b", "image=a.png", "clips=2", "overlap_frames=5", *words)
    (video,) = s.job.videos
    shown, before = np.full((HEIGHT, WIDTH, 3), 0.5, np.float32), frames(5)
    given = {("a.png", WIDTH, HEIGHT): shown}
    (found,) = image.clip_channels(s, given, vae, [ClipStart(video, 1, True, before)])
    whole = np.zeros((FRAMES, HEIGHT, WIDTH, 3), np.float32)
    whole[:5], whole[5:] = before, shown if padded else 0
    channels = np.asarray(found.channels)
    np.testing.assert_allclose(channels[..., 4:], np.asarray(vae.encode(jnp.asarray(whole[None])))[0], atol=1e-5)
    assert channels[..., :4].mean(axis=(1, 2)).ravel().tolist() == [1] * (marked + 3) + [0] * (FRAMES - marked)


def test_text_and_image_to_video_keeps_their_latents(session, vae):
    s = session("wan2.2-i2v-a14b", "extend=v.npy", "clips=2", "overlap_frames=5")
    (video,), before = s.job.videos, frames(5)
    (found,) = image.clip_first(s, {}, vae, [ClipStart(video, 1, True, before)])
    np.testing.assert_allclose(found.first, vae.encode(jnp.asarray(before[None]))[0], atol=1e-6)


def test_vace_keeps_the_frames_that_overlap_and_goes_on_with_its_video(session, vae):
    s = session("wan2.1-vace-1.3b", "video=v.npy", "clips=2", "overlap_frames=5", "input_frames=every")
    given = vace.read(s.job, {})
    assert len(given.video.frames) == 2 * FRAMES - 5
    (video,), before = s.job.videos, frames(5)
    (found,) = vace.clip_controls(s, given, vae, [ClipStart(video, 1, True, before)])
    control = np.load("v.npy")[4 : 4 + FRAMES].astype(np.float32) / 255 * 2 - 1
    kept, made, mask = np.zeros_like(control), control.copy(), np.ones_like(control)
    kept[:5], made[:5], mask[:5] = before, 0, 0
    latents, z = np.asarray(found.latents), vae.config.z_dim
    np.testing.assert_allclose(latents[..., :z], np.asarray(vae.encode(jnp.asarray(kept[None])))[0], atol=1e-5)
    np.testing.assert_allclose(latents[..., z : 2 * z], np.asarray(vae.encode(jnp.asarray(made[None])))[0], atol=1e-5)
    assert latents[..., 2 * z :].mean(axis=(1, 2, 3)).tolist() == [0, 0, 1]


def test_a_video_is_extended_from_its_last_frame_at_the_rate_of_the_result(session, tmp_path):
    stored = np.stack([np.full((HEIGHT, WIDTH, 3), 12 * k, np.uint8) for k in range(13)])
    write(stored, tmp_path / "v.mp4", 24, "mp4", {})
    job = session("wan2.1-vace-1.3b", "extend=v.mp4", "fps=8").job
    found = clips.read_extended(job)
    np.testing.assert_allclose(found.frames.mean(axis=(1, 2, 3)), 12 * np.arange(0, 13, 3), atol=2)
    assert (found.used.first, found.used.last, found.used.count) == (0, 12, 5)
    with pytest.raises(UserError, match="has 5 frames at fps=8, but overlap_frames=9; give a longer video"):
        clips.read_extended(
            session("wan2.1-vace-1.3b", "extend=v.mp4", "fps=8", "overlap_frames=9", "num_frames=13").job
        )
