"""Letterboxing and the mirrored end of a driving video as diffusers' modular pipeline has them."""

from types import SimpleNamespace

import numpy as np
import pytest
from diffusers.modular_pipelines.modular_pipeline import PipelineState
from diffusers.modular_pipelines.wan_animate_2.encoders import WanAnimate2ProcessImagesInputStep
from diffusers.modular_pipelines.wan_animate_2.video_processor import WanAnimate2VideoProcessor
from PIL import Image

from maxdiffusion import conditioning, request
from maxdiffusion.conditioning.animate2 import frames_of
from maxdiffusion.errors import UserError
from maxdiffusion.media.frames import between_bars, letterboxed, to_float
from maxdiffusion.media.sizes import own
from maxdiffusion.media.write import write
from maxdiffusion.variants import ANIMATE2


@pytest.mark.parametrize("size", [(64, 96), (96, 64)])
@pytest.mark.parametrize(("own", "filter"), [((75, 119), "bilinear"), ((121, 60), "bicubic")])
def test_letterboxing_is_the_references(size, own, filter):
    image = np.random.default_rng(0).integers(0, 256, (*own, 3), dtype=np.uint8)
    processor = WanAnimate2VideoProcessor(resample=filter)
    theirs = processor.preprocess(Image.fromarray(image), *size, resize_mode="fill")[0].permute(1, 2, 0).numpy()
    mine = letterboxed(image, *size, Image.Resampling[filter.upper()])
    np.testing.assert_allclose(to_float(mine[None], *size)[0], theirs, atol=1e-6)


@pytest.mark.parametrize("image", [(1000, 750), (333, 600), (31, 33), (640, 800)])
def test_size_and_bars_are_the_references(image):
    processor = WanAnimate2VideoProcessor(resample="bicubic")
    parts = SimpleNamespace(image_processor=processor, vae_scale_factor_spatial=8, _execution_device="cpu")
    state = PipelineState()
    for name, value in {"image": Image.new("RGB", image), "height": 800, "width": 640}.items():
        state.set(name, value)
    _, state = WanAnimate2ProcessImagesInputStep()(parts, state)
    width, height = ANIMATE2.official_size(640 * 800, image, 16)
    rows, columns = between_bars(own(0, image, 16), height, width)  # conventions=diffusers
    theirs = [state.get(name) for name in ("height", "width", "crop_region")]
    region = rows.start, columns.start, rows.stop - rows.start, columns.stop - columns.start
    assert theirs == [height, width, region]


@pytest.mark.parametrize(("form", "columns"), [("npy", 811), ("mp4", 810)])  # an mp4 has even sides
def test_a_result_has_no_bars(tmp_path, monkeypatch, caplog, form, columns):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (1001, 750), "white").save("image.png")
    write(np.full((5, 64, 96, 3), 255, np.uint8), tmp_path / "driving.mp4", 24, "mp4", {})
    (tmp_path / "run.yml").write_text("model_name: wan2.2-animate2-14b\nprompt: a cat\nlog_level: info\n")
    words = ["image=image.png", "driving_video=driving.mp4", f"output_format={form}"]
    job = request.load(["run.yml", *words])
    with caplog.at_level("INFO", "maxdiffusion"):
        inputs = conditioning.read(job)
    assert f"{columns} x 608 pixels of the 816 x 608 are shown" in caplog.text
    [made] = inputs.by_kind["animate2"].characters.values()
    [[shown]] = inputs.results([made[None, None]], job.videos, 0)
    assert shown.shape == (1, 608, columns, 3) and (shown == 255).all() and (made == 0).any()


def test_a_picture_of_which_nothing_is_left_is_refused():
    with pytest.raises(UserError, match="2000 x 1 pixels within 96 x 64"):
        letterboxed(np.zeros((1, 2000, 3), np.uint8), 64, 96)


def test_a_driving_video_goes_on_backwards_from_its_last_frame():
    assert frames_of(5, 0, 8) == [0, 1, 2, 3, 4, 4, 3, 2]  # the reference's own example
    assert frames_of(2, 1, 6) == [1, 1, 0, 0, 1, 1]  # where the reference has no more frames
