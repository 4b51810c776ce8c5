"""Bundled pages by name, and the list of them."""

import gzip
import json
import math
from pathlib import Path

import pytest

from maxdiffusion import request, variants
from maxdiffusion.config import help, listing, pages, schema
from maxdiffusion.errors import UserError

CONFIGS = Path(__file__).parents[2] / "configs"
MANIFESTS = Path(__file__).parents[1] / "golden" / "manifests"


def test_a_page_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    by_name = request.load(["wan_tiny", "seed=3"]).cfg
    assert by_name == request.load([str(CONFIGS / "wan_tiny.yml"), "seed=3"]).cfg
    (tmp_path / "wan_tiny").write_text(
        f"model_name: wan-tiny-t2v\nprompt: mine\nckpt_dir: {CONFIGS.parent}/models/wan_tiny\n"
    )
    assert request.load(["wan_tiny"]).cfg.prompt == ("mine",)  # a file that is there comes first


def test_the_list_has_a_line_for_each_page() -> None:
    header, *lines = listing.text().splitlines()[: len(pages.names()) + 1]
    assert header.split()[0] == "page"
    assert [line.split()[0] for line in lines] == pages.names() and len(pages.names()) > 20
    table = {line.split()[0]: line for line in lines}
    assert "  T2V  " in table["wan2.2_t2v_a14b"] and table["wan2.2_t2v_a14b"].endswith(
        "Wan-AI/Wan2.2-T2V-A14B-Diffusers"
    )
    assert "  prompt image last_image  " in table["wan2.1_flf2v_14b"] and "  50  " in table["wan2.1_flf2v_14b"]
    assert "  image pose_video face_video [" in table["wan2.2_animate_14b"]
    assert "  prompt image audio [pose_video] " in table["wan2.2_s2v_14b"]
    assert "  3  " in table["fastwan2.1_t2v_1.3b"] and "832x448, 61 frames" in table["fastwan2.1_t2v_1.3b"]
    assert table["wan_tiny"].endswith("bundled")
    assert len({line.index("T2V") for line in lines if " T2V " in line}) == 1  # aligned
    assert "wan_tiny_i2v" in listing.text("tiny") and "wan2.1" not in listing.text("tiny")


def test_the_listed_parameters_are_those_of_the_official_checkpoints() -> None:
    def count(manifest: str) -> int:
        with gzip.open(MANIFESTS / f"{manifest}.json.gz") as file:
            shapes = json.load(file)
        shapes.pop("encoder.embed_tokens.weight", None)  # shared.weight again
        return sum(map(math.prod, shapes.values()))

    for spec in variants.VARIANTS.values():
        if spec.hub_id:
            name = spec.name.removesuffix("-480p").removesuffix("-720p")
            transformer = count({"wan2.2-vace-fun-a14b": "wan2.1-vace-14b"}.get(name, name))  # of the same shapes
            sizes = {"text_encoder": count("umt5-xxl-encoder"), "image_encoder": count("clip-vit-h-14")}
            sizes |= {"audio_encoder": count("wav2vec2-large-xlsr-53")}
            sizes |= {"transformer": transformer, "transformer_2": transformer, "vae": count(f"{_vae(spec)}-vae")}
            assert spec.billions == pytest.approx(sum(sizes[net] for net in spec.nets) / 1e9, abs=0.01), spec.name


def _vae(spec: variants.WanSpec) -> str:
    return "wan2.2" if spec.task is variants.TI2V else "wan2.1"


def test_help_of_a_group_a_key_and_a_page() -> None:
    assert help.text(["hosts"]).startswith("hosts:") and "process_id" in help.text(["hosts"])
    assert "num_inference_steps" not in help.text(["hosts"])
    for name in ("num_inference_steps", "num-inference-steps", "--sample_steps"):
        text = help.text([name])
        assert "Denoise steps" in text and "50 (wan2.1-t2v-1.3b," in text and "sample_steps" in text
    assert "ring_direction" in help.text(["parallelism"]) and "ring_direction" in help.text(["attention"])
    assert "expert_residency=in_turn" in help.text(["offload_model"])
    assert "model_name: wan-tiny-t2v" in help.text(["wan_tiny"])
    assert "832*480" in help.text(["size"]) or "1280*720" in help.text(["size"])
    with pytest.raises(UserError, match="did you mean num_frames"):
        help.text(["num_frame"])


@pytest.mark.parametrize("key", schema.KEYS)
def test_help_of_every_key(key: str) -> None:
    assert schema.type_name(key) and key in help.text([key])
