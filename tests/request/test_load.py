"""Typed overrides, aliases, origins, variants and paths."""

import ast
import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from PIL import Image

from maxdiffusion import request, variants
from maxdiffusion.attention.options import KernelOptions
from maxdiffusion.config import schema
from maxdiffusion.errors import UserError
from maxdiffusion.request import Video, videos
from maxdiffusion.request.job import kernel_options
from tests.support import sounds

CONFIGS = Path(__file__).parents[2] / "configs"


def write(folder: Path, text: str) -> str:
    (folder / "case.yml").write_text(text)
    return "case.yml"


def test_overrides_are_typed_by_their_keys(place: Path) -> None:
    words = [
        "num_frames=33",
        "guidance_scale=4",
        "flow_shift=3e0",
        "scan_layers=false",
        "fps=24",
        "overwrite=true",
        "seed=7",
    ]
    cfg = request.load(["base.yml", *words]).cfg
    assert (cfg.num_frames, cfg.fps, cfg.seed) == (33, 24, (7,))
    assert (cfg.guidance_scale, cfg.flow_shift) == (4.0, 3.0) and isinstance(cfg.guidance_scale, float)
    assert (cfg.scan_layers, cfg.overwrite) == (False, True)


@pytest.mark.parametrize(
    "prompt", ["123", "true", "null", "a: b", "2024-01-01", "x=y=z", "1e3", " spaced ", "{a}", "[", "- a", "猫 \N{CAT}"]
)
def test_a_prompt_stays_as_it_is_typed(place: Path, prompt: str) -> None:
    assert request.load(["base.yml", f"prompt={prompt}"]).cfg.prompt == (prompt,)


@pytest.mark.parametrize("text", ["123", "yes", "2024-01-01", "1:30", "0x10", "1e3", "'null'"])
def test_a_prompt_in_the_file_stays_a_text(place: Path, text: str) -> None:
    file = write(place, f"model_name: wan2.1-t2v-14b\nprompt: {text}\n")
    assert request.load([file]).cfg.prompt == (text.strip("'"),)


def test_words_come_in_any_order(place: Path) -> None:
    words = ["base.yml", "height=96", "width=112", "seed=3"]
    first = request.load(words).cfg
    assert all(request.load(order).cfg == first for order in itertools.permutations(words))


def test_a_null_leaves_the_key_at_its_default(place: Path) -> None:
    file = write(place, "model_name: wan2.1-t2v-14b\nprompt: x\nheight: null\nfps:\nsave_file: ~\n")
    cfg = request.load([file]).cfg
    assert (cfg.height, cfg.fps, cfg.save_file) == (720, 16, None)


def test_empty_texts(place: Path) -> None:
    cfg = request.load(["base.yml", "negative_prompt=", "save_file=", "jax_cache_dir=", "revision="]).cfg
    assert (cfg.negative_prompt, cfg.save_file, cfg.jax_cache_dir, cfg.revision) == (("",), None, "", None)


@pytest.mark.parametrize(
    ("alias", "key", "value"),
    [
        ("frame_num=33", "num_frames", 33),
        ("sample_steps=20", "num_inference_steps", 20),
        ("sample_shift=3.5", "flow_shift", 3.5),
        ("sample_guide_scale=6", "guidance_scale", 6.0),
        ("sample_solver=unipc", "solver", "unipc"),
        ("sample_solver=dpm++", "solver", "dpmpp_2m"),
        ("base_seed=5", "seed", (5,)),
        ("ulysses_size=4", "ulysses_shards", 4),
        ("ckpt_dir=somebody/some-model", "pretrained_model_name_or_path", "somebody/some-model"),
    ],
)
def test_official_names(place: Path, alias: str, key: str, value: object) -> None:
    cfg = request.load(["base.yml", alias]).cfg
    assert getattr(cfg, key) == value
    assert cfg.origins[key] == f"command line, {alias}"


def test_every_alias_is_tried_above() -> None:
    tried = {
        mark.args[1][i][0].split("=")[0]
        for mark in test_official_names.pytestmark  # type: ignore[attr-defined]
        for i in range(len(mark.args[1]))
    }
    of_inputs = {key.alias for key in schema.KEYS.values() if key.group == "control" or key.alias.endswith("_frame")}
    assert tried == {*schema.ALIASES, "sample_guide_scale"} - of_inputs  # which tests/config/test_dashes.py tries


def test_the_log_names_the_conventions(place: Path) -> None:
    for words, line in (
        ([], "conventions: official  (default)"),
        (["conventions=diffusers"], "conventions: diffusers  (command line)"),
    ):
        assert line in request.load(["base.yml", *words]).cfg.describe().splitlines()


@pytest.mark.parametrize("size", ["1280*720", "1280x720", "1280X720", "1280 * 720"])
def test_size_is_width_first_and_told_in_words(place: Path, size: str) -> None:
    cfg = request.load(["base.yml", f"size={size}", "height=720"]).cfg
    assert (cfg.width, cfg.height) == (1280, 720)
    assert "1280 wide x 720 high" in cfg.describe()
    assert cfg.origins["width"] == f"command line, size={size}"


def test_the_command_line_wins_over_the_file_through_aliases(place: Path) -> None:
    file = write(place, "model_name: wan2.1-t2v-14b\nprompt: x\nsize: 832*480\nframe_num: 33\nseed: 1\n")
    cfg = request.load([file, "height=96", "num_frames=17", "base_seed=2"]).cfg
    assert (cfg.width, cfg.height, cfg.num_frames, cfg.seed) == (832, 96, 17, (2,))


def test_ring_size_times_ulysses_is_the_context_axis(place: Path) -> None:
    cfg = request.load(["base.yml", "ring_size=2", "ulysses_size=4"]).cfg
    assert (cfg.ici_context_parallelism, cfg.ulysses_shards) == (8, 4)
    alone = request.load(["base.yml", "ring_size=2"]).cfg
    assert (alone.ici_context_parallelism, alone.ulysses_shards) == (2, 1)
    file = write(place, "model_name: wan2.1-t2v-14b\nprompt: x\nring_size: 2\n")
    assert request.load([file, "ulysses_shards=4", "ici_context_parallelism=8"]).cfg.ici_context_parallelism == 8


def test_variant_defaults_and_their_origin(place: Path) -> None:
    cfg = request.load(["base.yml"]).cfg
    assert (cfg.width, cfg.height, cfg.num_frames, cfg.num_inference_steps) == (832, 480, 81, 50)
    assert cfg.pretrained_model_name_or_path == "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    assert cfg.origins["height"] == "variant wan2.1-t2v-1.3b"
    assert cfg.origins["prompt"] == "file base.yml"
    assert "vae_dtype" not in cfg.origins


def test_the_familys_name_lets_the_checkpoint_choose(place: Path, checkpoint: Callable[..., Path]) -> None:
    file = write(place, "model_name: wan2.1\nmodel_type: t2v\nprompt: x\n")
    for dims, name in (
        ("wan2.1-t2v-1.3b",) * 2,
        ("wan2.1-t2v-14b",) * 2,
        ("wan-tiny-t2v",) * 2,
        ("other", "wan2.1-t2v"),
    ):
        cfg = request.load([file, f"pretrained_model_name_or_path={checkpoint(dims, dims)}"]).cfg
        assert cfg.model_name == name
        assert "family wan2.1" in cfg.origins["model_name"]
    cfg = request.load([file, "ckpt_dir=Wan-AI/Wan2.1-T2V-14B-Diffusers"]).cfg
    assert (cfg.model_name, cfg.height) == ("wan2.1-t2v-14b", 720)


def test_paths(place: Path, checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = checkpoint("models/mine", "wan2.1-t2v-14b")
    monkeypatch.setenv("RESULTS", str(place))
    (place / "configs").mkdir()
    file = "configs/" + write(place / "configs", "model_name: wan2.1\nprompt: x\nckpt_dir: ../models/mine\n")
    cfg = request.load([file, "output_dir=$RESULTS/out"]).cfg
    assert cfg.pretrained_model_name_or_path == str(folder)
    assert cfg.output_dir == f"{place}/out"
    assert cfg.jax_cache_dir == "/home/someone/.cache/maxdiffusion/xla"
    monkeypatch.chdir(place / "configs")
    assert request.load(["case.yml"]).cfg.pretrained_model_name_or_path == str(folder)
    assert request.load(["case.yml", "ckpt_dir=../models/mine"]).cfg.pretrained_model_name_or_path == "../models/mine"


def test_prompts_seeds_and_negative_prompts_are_paired(place: Path) -> None:
    cfg = request.load(["base.yml", 'prompt=["a, b", c]', "seed=[1, 2]", "negative_prompt=bad"]).cfg
    assert videos.read(cfg) == (
        Video("a, b", "bad", 1, cfg.width, cfg.height),
        Video("c", "bad", 2, cfg.width, cfg.height),
    )
    cfg = request.load(["base.yml", "seed=[1, 2, 3]", "negative_prompt=['', x, y]"]).cfg
    assert [(each.prompt, each.negative_prompt, each.seed) for each in videos.read(cfg)] == [
        ("a cat", "", 1),
        ("a cat", "x", 2),
        ("a cat", "y", 3),
    ]


@pytest.mark.parametrize(
    ("text", "prompts"),
    [
        ("[close-up] a cat", ("[close-up] a cat",)),
        ("[a] b [c]", ("[a] b [c]",)),
        ("[close-up]", ("[close-up]",)),
        ("[a cat in the rain]", ("[a cat in the rain]",)),
        ("[scene: night, rain]", ("[scene: night, rain]",)),
        ("[[a, b], c]", ("[[a, b], c]",)),
        ("[a, b", ("[a, b",)),
        ("['", ("['",)),
        ("[a, b]", ("a", "b")),
        ('["close-up"]', ("close-up",)),
        ("['a, b', c]", ("a, b", "c")),
        ("[a\\, b]", ("a\\", "b")),
    ],
)
@pytest.mark.parametrize("key", ["prompt", "negative_prompt"])
def test_brackets_of_a_prompt(place: Path, key: str, text: str, prompts: tuple[str, ...]) -> None:
    cfg = request.load(["base.yml", f"{key}={text}"]).cfg
    assert getattr(cfg, key) == prompts
    said = "its brackets are text" in cfg.describe()
    assert said == (text.endswith("]") and prompts == (text,))


def test_brackets_of_other_keys_are_lists(place: Path) -> None:
    assert request.load(["base.yml", "seed=[7]"]).cfg.seed == (7,)
    assert request.load(["base.yml", "verify=true", "verify_against=[attention=ring]"]).cfg.verify_against == (
        "attention=ring",
    )


@pytest.mark.parametrize("name", ["a$b.png", "$HOME", "cost $5 ${x}.png"])
def test_a_dollar_in_the_name_of_a_file_is_kept(place: Path, name: str) -> None:
    Image.new("RGB", (64, 64)).save(place / name, "PNG")
    words = ["model_name=wan2.2-ti2v-5b", "size=64*64"]
    for given in (name, str(place / name)):
        assert request.load(["base.yml", *words, f"image={given}"]).cfg.image == (given,)
    (place / "image.yml").write_text(f"model_name: wan2.2-ti2v-5b\nprompt: x\nsize: 64*64\nimage: './{name}'\n")
    assert request.load(["image.yml"]).cfg.image == (str(place / name),)
    (place / "p.jsonl").write_text(json.dumps({"image": name, "output": "a"}))
    assert request.load(["base.yml", *words, "prompts=p.jsonl"]).videos[0].image == name


def test_a_seed_of_minus_1_is_to_be_drawn(place: Path) -> None:
    assert request.load(["base.yml", "base_seed=-1"]).cfg.seed == (-1,)
    assert [video.seed for video in request.load(["base.yml", "prompt=[a, b]", "seed=[-1, 3]"]).videos] == [-1, 3]


def test_save_files_extension_gives_the_format(place: Path) -> None:
    cfg = request.load(["base.yml", "save_file=new/folder/clip.webp"]).cfg
    assert (cfg.output_format, cfg.origins["output_format"]) == ("webp", "save_file")
    assert request.load(["base.yml", "save_file=frames", "output_format=png"]).cfg.save_file == "frames"
    assert not (place / "new").exists()


def test_axis_rules(place: Path) -> None:
    rules = "logical_axis_rules=[[mlp, tensor], [embed, null], [batch, [data, fsdp]]]"
    expected = (("mlp", "tensor"), ("embed", None), ("batch", ("data", "fsdp")))
    assert request.load(["base.yml", rules]).cfg.logical_axis_rules == expected


def test_nothing_can_be_changed_afterwards(place: Path) -> None:
    cfg = request.load(["base.yml"]).cfg
    with pytest.raises(ValueError, match="frozen"):
        cfg.height = 96  # type: ignore[misc]


def test_round_trip_through_json(place: Path) -> None:
    cfg = request.load(["base.yml", "seed=[1,2]", "logical_axis_rules=[[embed, null]]", "prompt=猫: null"]).cfg
    (place / "again.yml").write_text(yaml.safe_dump(cfg.to_json(), allow_unicode=True))
    (place / "json.yml").write_text(json.dumps(cfg.to_json()))
    assert request.load(["again.yml"]).cfg.to_json() == cfg.to_json()
    assert request.load(["json.yml"]).cfg.to_json() == cfg.to_json()


NEEDED = {
    "_i2v": ("image=a.png",),
    "_flf2v_": ("image=a.png", "last_image=a.png"),
    "_animate_": ("image=a.png", "pose_video=a.png", "face_video=a.png"),
    "_animate2_": ("image=a.png", "driving_video=a.png"),
    "_s2v_": ("image=a.png", "audio=a.wav"),
}


def given(page: str) -> list[str]:
    """The inputs that a page needs beside the prompt."""
    return [word for kind, words in NEEDED.items() if kind in page for word in words]


@pytest.mark.parametrize("name", sorted(path.name for path in CONFIGS.glob("*.yml")))
def test_golden_configs(
    name: str, place: Path, checkpoint: Callable[..., Path], golden: Callable[[str, str], None]
) -> None:
    shutil.copytree(CONFIGS, place / "configs")
    checkpoint("models/wan_tiny", "wan-tiny-t2v")
    checkpoint("models/wan_tiny_i2v", "wan-tiny-i2v", out_channels=8)
    Image.new("RGB", (1000, 800)).save("a.png")
    sounds.tone(place / "a.wav", seconds=5.1)
    cfg = request.load([f"configs/{name}", "prompt=a red circle", *given(name)]).cfg
    text = json.dumps({"config": cfg.to_json(), "origins": dict(cfg.origins)}, indent=1, ensure_ascii=False)
    golden(f"configs/{name.removesuffix('.yml')}.json", text.replace(str(place), "PLACE") + "\n")


@pytest.mark.parametrize("name", ["wan_tiny", "wan_tiny_i2v"])
def test_the_bundled_checkpoints_are_the_variants_of_their_configs(place: Path, name: str) -> None:
    cfg = request.load([str(CONFIGS / f"{name}.yml")]).cfg
    assert cfg.pretrained_model_name_or_path == str(CONFIGS.parent / "models" / name)
    content = json.loads((Path(cfg.pretrained_model_name_or_path) / "transformer" / "config.json").read_text())
    spec = variants.get(cfg.model_name)
    assert variants.matching(content)[0] is spec and spec.dims == variants.Dims.of(content)


def test_configs_are_overlays_of_a_page() -> None:
    for path in CONFIGS.rglob("*.yml"):
        lines, name = path.read_text().splitlines(), path.relative_to(CONFIGS)
        assert lines[0].startswith("#") and any(f"generate_wan.py configs/{name}" in line for line in lines)
        assert len(lines) <= 40


@pytest.mark.parametrize("page", sorted(CONFIGS.glob("*/*.yml")), ids=lambda path: f"{path.parent.name} {path.stem}")
def test_a_page_of_a_machine_is_the_official_one_but_for_its_parallelism(page: Path, place: Path) -> None:
    Image.new("RGB", (1000, 800)).save("a.png")
    sounds.tone(place / "a.wav", seconds=5.1)
    words = ["prompt=x", *given(page.name)]
    ours, official = (request.load([str(path), *words]).cfg.to_json() for path in (page, CONFIGS / page.name))
    changed = {key for key in ours if ours[key] != official[key]}
    assert changed and changed <= set(schema.group(schema.PARALLELISM))


def test_the_negative_prompt_is_the_official_one(place: Path) -> None:
    negative = request.load(["base.yml"]).cfg.negative_prompt[0]
    assert negative.startswith("色调艳丽，过曝，静态，细节模糊不清") and negative.endswith("背景人很多，倒着走")
    assert len(negative) == 137


def test_wan21_alone_keeps_more_away_where_it_starts_from_images() -> None:
    """Shaking, and between two images cuts: `sample_neg_prompt` of the official i2v_14B and flf2v_14B."""
    more = {"wan2.1-i2v": "镜头晃动，", "wan2.1-flf2v": "镜头切换，镜头晃动，"}
    for spec in variants.VARIANTS.values():
        if spec.negative_prompt and spec.task is not variants.S2V:  # the miniatures have none, S2V its own
            kind = f"{spec.family}-{spec.model_type.lower()}"
            assert spec.negative_prompt == more.get(kind, "") + variants.NEGATIVE_PROMPT


def test_variant_rows_are_consistent() -> None:
    for spec in variants.VARIANTS.values():
        assert (spec.width, spec.height) in spec.sizes
        assert all(side % (spec.vae_stride[1] * spec.patch[1]) == 0 for size in spec.sizes for side in size)
        assert (spec.num_frames - 1) % spec.vae_stride[0] == 0
        assert variants.get(spec.name) is spec
    with pytest.raises(UserError, match="not a variant"):
        variants.get("wan9")


def test_a_word_that_begins_like_null_stays_a_word(tmp_path) -> None:
    path = tmp_path / "c.yml"
    path.write_text("model_name: wan2.1-t2v-14b\nprompt: night in the city\nnegative_prompt: null\n")
    assert request.load([str(path)]).cfg.prompt == ("night in the city",)
    words = [str(path), "prompt=[nice day, Night]"]
    assert request.load(words).cfg.prompt == ("nice day", "Night")


def test_kernel_options(place: Path) -> None:
    file = write(
        place,
        "model_name: wan2.1-t2v-14b\nprompt: x\nuse_base2_exp: false\nuse_experimental_scheduler:\n"
        "flash_block_sizes: {block_q: 3024, block_kv: 2048}\nattention_vmem_limit_kib: 65536\n",
    )
    cfg = request.load([file]).cfg
    assert kernel_options(cfg) == KernelOptions(3024, 2048, use_base2_exp=False, attention_vmem_limit_kib=65536)
    cfg = request.load([file, 'flash_block_sizes={"block_q": 512}', "use_base2_exp="]).cfg
    assert kernel_options(cfg) == KernelOptions(512, attention_vmem_limit_kib=65536)
    for words in ([], ["flash_block_sizes={}"], ["flash_block_sizes="]):
        assert request.load(["base.yml", *words]).cfg.flash_block_sizes == {}


def test_the_environment_says_which_process_this_is(monkeypatch, tmp_path):
    (tmp_path / "run.yml").write_text("model_name: wan2.1-t2v-1.3b\nprompt: a\n")
    for name, value in {"COORDINATOR_ADDRESS": "[::1]:81", "NUM_PROCESSES": "2", "PROCESS_ID": "1"}.items():
        monkeypatch.setenv(f"JAX_{name}", value)
    cfg = request.load([str(tmp_path / "run.yml"), f"output_dir={tmp_path / 'run.yml' / 'not a folder'}"]).cfg
    assert (cfg.coordinator_address, cfg.num_processes, cfg.process_id) == ("[::1]:81", 2, 1)
    assert cfg.origins["process_id"] == "environment, JAX_PROCESS_ID"
    words = [str(tmp_path / "run.yml"), f"output_dir={tmp_path}"]
    assert request.load([*words, "process_id=0"]).cfg.process_id == 0
    assert request.load([*words, "jax_distributed=off"]).cfg.process_id is None


def picture(width: int, height: int, name: str = "a.png") -> None:
    Image.new("RGB", (width, height)).save(name)


@pytest.mark.parametrize(
    ("model", "image", "official", "diffusers"),
    [
        ("wan2.1-i2v-14b-480p", (1000, 800), (704, 560), (704, 560)),
        ("wan2.2-i2v-a14b", (1500, 1000), (1168, 768), (1168, 784)),
        ("wan2.1-flf2v-14b", (720, 1280), (720, 1280), (720, 1280)),
        ("wan2.2-ti2v-5b", (1024, 1024), (960, 928), (928, 928)),
        ("wan2.2-ti2v-5b", (1216, 832), (1152, 768), (1120, 768)),
    ],
)
def test_size_follows_the_image(place: Path, model: str, image: tuple[int, int], official, diffusers) -> None:
    picture(*image)
    words = ["base.yml", f"model_name={model}", "image=a.png", "last_image=a.png"][: 4 if "flf2v" in model else 3]
    for size, name in ((official, "official"), (diffusers, "diffusers")):
        for extra in ((), ("size=auto",)):
            cfg = request.load([*words, *extra, f"conventions={name}"]).cfg
            assert (cfg.width, cfg.height) == size
            assert cfg.origins["width"] == f"size=auto, image a.png has {image[0]} x {image[1]} pixels"


@pytest.mark.parametrize("size", ["832*480", "480x832"])
def test_a_size_beside_an_image_is_an_area(place: Path, size: str) -> None:
    """By diffusers' conventions, or where no image decides, it is exact."""
    picture(1500, 1000)
    exact = tuple(map(int, size.replace("x", "*").split("*")))
    (place / "page.yml").write_text(f"model_name: wan2.2-i2v-a14b\nprompt: x\nimage: a.png\nsize: {size}\n")

    def made(*words: str) -> tuple[int, int]:
        cfg = request.load([*words]).cfg
        return cfg.width, cfg.height

    assert (
        made("page.yml") == made("base.yml", "model_name=wan2.2-i2v-a14b", "image=a.png", f"size={size}") == (768, 512)
    )
    assert made("page.yml", "conventions=diffusers") == exact
    assert made("page.yml", "image=", "plan=v6e-8") == exact
    assert made("page.yml", "height=480") == (exact[0], 480)
    assert made("base.yml", f"size={size}") == exact
    assert request.load(["page.yml"]).cfg.origins["height"] == (
        f"file page.yml, size={size} is an area with conventions=official, image a.png has 1500 x 1000 pixels"
    )


def test_the_command_line_decides_between_auto_and_a_size(place: Path) -> None:
    picture(1000, 800)
    (place / "auto.yml").write_text("model_name: wan2.1-i2v-14b-480p\nprompt: x\nimage: ./a.png\nsize: auto\n")
    page = "model_name: wan2.1-i2v-14b-480p\nprompt: x\nimage: ./a.png\nwidth: 832\nheight: 480\n"
    (place / "fixed.yml").write_text(page)
    assert request.load(["auto.yml", "width=480", "height=832"]).cfg.height == 832
    assert request.load(["auto.yml", "size=320x192"]).cfg.width == 272
    assert request.load(["fixed.yml"]).cfg.width == 832
    assert request.load(["fixed.yml", "size=auto"]).cfg.width == 704
    assert request.load(["fixed.yml", "size=320*192"]).cfg.width == 272
    assert request.load(["fixed.yml"]).cfg.image == (str(place / "a.png"),)


def test_an_empty_image_is_none(place: Path) -> None:
    picture(64, 64)
    (place / "page.yml").write_text("model_name: wan2.2-ti2v-5b\nprompt: x\nimage: ./a.png\n")
    assert request.load(["page.yml"]).cfg.width != 1280
    cfg = request.load(["page.yml", "image="]).cfg
    assert (cfg.image, cfg.width, cfg.height, videos.read(cfg)[0].image) == ((), 1280, 704, None)


def test_guidance_of_two_experts(place: Path) -> None:
    words = ["base.yml", "model_name=wan2.2-t2v-a14b"]

    def scales(*extra: str) -> tuple[float, float | None]:
        cfg = request.load([*words, *extra]).cfg
        return cfg.guidance_scale, cfg.guidance_scale_2

    assert scales() == (4.0, 3.0)
    assert scales("sample_guide_scale=[2.5, 6]") == (6.0, 2.5)  # low noise first, as the official repository
    assert scales("guidance_scale=5") == scales("sample_guide_scale=5") == (5.0, 5.0)
    assert scales("guidance_scale=5", "guidance_scale_2=2") == (5.0, 2.0)


@pytest.mark.parametrize(
    ("dims", "changes", "folder", "variant"),
    [
        ((40, 40, 128, 36), {"image_dim": 1280}, "Wan2.1-I2V-14B-720P-Diffusers", "wan2.1-i2v-14b-720p"),
        ((40, 40, 128, 36), {"image_dim": 1280, "pos_embed_seq_len": 514}, "any", "wan2.1-flf2v-14b"),
        ((2, 2, 12, 36), {"image_dim": 16}, "any", None),  # I2V or FLF2V of any size
    ],
)
def test_image_checkpoints_are_told_apart(dims, changes, folder, variant, checkpoint, place: Path) -> None:
    names = ("num_layers", "num_attention_heads", "attention_head_dim", "in_channels")
    checkpoint(folder, "other", **dict(zip(names, dims, strict=True)), out_channels=16, **changes)
    picture(64, 64)
    words = ["base.yml", "model_name=wan2.1", f"ckpt_dir={folder}", "image=a.png", "last_image=a.png"]
    if variant is None:
        with pytest.raises(UserError, match=r"wan2.1-i2v, wan2.1-flf2v"):
            request.load(words)
    else:
        assert request.load(words).cfg.model_name == variant


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yml")), ids=lambda file: file.stem)
def test_a_plan_needs_no_prompt_and_no_input(file: Path) -> None:
    cfg = request.load([str(file), "plan=v6e-8", "output_dir=/proc/nowhere"]).cfg
    spec = variants.get(cfg.model_name)
    assert cfg.plan == "v6e-8"
    assert (cfg.width, cfg.height) == (spec.width, spec.height) or "width:" in file.read_text()


@pytest.mark.parametrize(
    ("model", "words", "shift"),
    [
        ("wan2.1-i2v-14b-480p", [], 3.0),
        ("wan2.1-i2v-14b-480p", ["size=1280*720"], 5.0),
        ("wan2.1-i2v-14b-720p", [], 5.0),
        ("wan2.1-i2v-14b-720p", ["size=480*832"], 3.0),
        ("wan2.1-i2v-14b-720p", ["size=480*832", "flow_shift=4"], 4.0),
        ("wan2.1-t2v-14b", ["size=832*480"], 5.0),
        ("wan2.1-flf2v-14b", ["size=832*480"], 16.0),
    ],
)
def test_the_shift_from_images_follows_the_size(place: Path, model: str, words: list[str], shift: float) -> None:
    """As the official generate.py has it for its task i2v-14B, whatever the checkpoint."""
    Image.new("RGB", (1280, 720)).save("a.png")
    images = {"i2v": ["image=a.png"], "flf2v": ["image=a.png", "last_image=a.png"]}.get(model.split("-")[1], [])
    cfg = request.load([write(place, f"model_name: {model}\nprompt: a cat\n"), *images, *words]).cfg
    assert cfg.flow_shift == shift


def test_a_checkpoint_s_configs_are_read_once(tmp_path):
    code = (
        "import collections, os, sys\n"
        "opened = collections.Counter()\n"
        "sys.addaudithook(lambda event, args: event == 'open' and opened.update([os.fspath(args[0])])\n"
        "    if isinstance(args[0] if args else None, str) else None)\n"
        "from maxdiffusion import request\n"
        "from maxdiffusion.request.nets import open_checkpoint\n"
        "open_checkpoint(request.load(sys.argv[1:]))\n"
        "print({file: count for file, count in opened.items() if file.endswith('config.json')})\n"
    )
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", code, str(root / "configs" / "wan_tiny.yml"), f"output_dir={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    counts = ast.literal_eval(done.stdout)
    assert set(counts.values()) == {1} and len(counts) >= 3
