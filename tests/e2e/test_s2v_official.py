"""S2V against the official code: the same files and noise through `WanS2V.generate` and the entry page.

No size is given: that of the image, as the official code has it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from maxdiffusion import generate_wan, request
from maxdiffusion.media.write import write
from maxdiffusion.weights.latents_io import load_latents, save_latents
from tests.support import official, official_s2v
from tests.support.official_s2v import CLIP
from tests.support.parity import relative_error
from tests.support.sounds import tone

CLIPS, STEPS, BEFORE = 2, 2, 19
FRAMES = CLIP * CLIPS - 3
WIDTH, HEIGHT = 64, 64


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """An image of other proportions, a sound that changes, and a pose that ends before the video."""
    folder, rng = tmp_path_factory.mktemp("inputs"), np.random.default_rng(6)

    def smooth(width: int, height: int) -> Image.Image:
        few = Image.fromarray(rng.integers(0, 256, (4, 6, 3), dtype=np.uint8))
        return few.resize((width, height), Image.Resampling.BICUBIC)

    smooth(61, 57).save(folder / "image.png")
    tone(folder / "sound.wav", seconds=1.6)
    pose = np.stack([np.asarray(smooth(WIDTH, HEIGHT)) for _ in range(15)])
    write(pose, folder / "pose.mp4", 16, "mp4", {})
    return folder


def words(speaker: Path, files: Path, save: Path, *more: str) -> list[str]:
    return [
        *official_s2v.words(speaker, files),
        f"image={files / 'image.png'}",
        f"audio={files / 'sound.wav'}",
        "negative_prompt=blurry",
        f"num_inference_steps={STEPS}",
        f"save_file={save}",
        *official.ONE,
        "jax_cache_dir=",
        *more,
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("pose", "scale"), [(False, 3.0), (True, 1.0)])
def test_s2v_equals_the_official_code(speaker, files, tmp_path, pose, scale):
    """Two clips of a longer sound, with guidance, and with a pose."""
    pose_video = files / "pose.mp4" if pose else None
    latents, video = official.generate(
        official_s2v.pipeline(speaker),
        "a cat sings",
        str(files / "image.png"),
        str(files / "sound.wav"),
        *(False, None, None, None),
        num_repeat=CLIPS,
        pose_video=pose_video and str(pose_video),
        max_area=1024 * 704,
        infer_frames=CLIP,
        shift=3.0,
        sampling_steps=STEPS,
        guide_scale=scale,
        n_prompt="blurry",
        seed=3,
    )
    theirs = np.concatenate([latents[0][1:], *(each[BEFORE:] for each in latents[1:])])
    assert video.shape == (FRAMES, HEIGHT, WIDTH, 3) and theirs.std() > 0.1

    shape = (16, CLIP // 4, HEIGHT // 8, WIDTH // 8)
    drawn = [torch.randn(shape, generator=torch.Generator().manual_seed(3 + clip)) for clip in range(CLIPS)]
    save_latents(tmp_path / "noise.safetensors", np.concatenate([*map(official.channels_last, drawn)])[None], {})
    more = [f"initial_latents={tmp_path / 'noise.safetensors'}", f"num_frames={FRAMES}", f"guidance_scale={scale}"]
    more += [f"pose_video={pose_video}"] if pose else []
    job = request.load(words(speaker, files, tmp_path / "ours.npy", *more))
    assert (job.cfg.width, job.cfg.height, len(job.segments)) == (WIDTH, HEIGHT, CLIPS)
    generate_wan.run(job)
    ours, _ = load_latents(tmp_path / "ours.latents.safetensors")
    error = relative_error(ours[0], theirs)
    shown = (video / 2 + 0.5).clip(0, 1) * 255
    off = np.load(tmp_path / "ours.npy") - shown
    psnr = 10 * np.log10(255**2 / np.mean((np.load(tmp_path / "ours.npy") - np.round(shown)) ** 2))
    print(f"S2V, pose {pose}, scale {scale}: latents within {error:.1e}, frames {psnr:.1f} dB")
    assert error < 1e-4 and psnr > 60
    assert np.abs(off).max() < 0.51


@pytest.mark.slow
def test_eight_devices_and_decoding_alone_make_the_same(speaker, files, tmp_path):
    """Ring 4 x Ulysses 2, over which the tokens do not divide; latents are decoded after the image again."""
    common = [f"num_frames={FRAMES}", "seed=3"]

    def video(name: str, *more: str) -> np.ndarray:
        plain = words(speaker, files, tmp_path / f"{name}.npy", *common)
        given = {word.partition("=")[0] for word in more}
        generate_wan.run(request.load([*(each for each in plain if each.partition("=")[0] not in given), *more]))
        return np.load(tmp_path / f"{name}.npy")

    one = video("one")
    eight = video("eight", "attention=ulysses_ring", "ulysses_shards=2", "ici_context_parallelism=8")
    latents = [load_latents(tmp_path / f"{name}.latents.safetensors")[0] for name in ("one", "eight")]
    error = relative_error(latents[1], latents[0])
    print(f"S2V on eight devices: latents within {error:.1e}")
    assert error < 1e-5 and np.abs(eight.astype(int) - one).max() <= 1
    again = video("again", f"decode_latents={tmp_path / 'one.latents.safetensors'}")
    np.testing.assert_array_equal(again, one)
