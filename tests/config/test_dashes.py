"""Arguments with dashes, and lines of the official command as they stand in its READMEs."""

import re
import shlex
from pathlib import Path

import pytest

from maxdiffusion.config import dashes, dialects, pages, parse, schema
from maxdiffusion.config.parse import typed
from maxdiffusion.errors import UserError


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        (["--prompt", "a cat"], ["prompt=a cat"]),
        (["--prompt=a cat"], ["prompt=a cat"]),
        (["--prompt", "a=b"], ["prompt=a=b"]),
        (["--num-frames", "81", "page.yml"], ["num_frames=81", "page.yml"]),
        (["--negative-prompt="], ["negative_prompt="]),
        (["--base_seed", "-1"], ["base_seed=-1"]),
        (["--overwrite", "page.yml"], ["overwrite=true", "page.yml"]),
        (["--overwrite", "--verify"], ["overwrite=true", "verify=true"]),
        (["--overwrite", "false"], ["overwrite=false"]),
        (["--t5_cpu", "--offload_model", "True"], ["t5_cpu=true", "offload_model=True"]),
        (["prompt=--x", "seed=1"], ["prompt=--x", "seed=1"]),
    ],
)
def test_dashes_are_another_spelling(given: list[str], plain: list[str]) -> None:
    assert dashes.plain(given) == plain
    assert dashes.plain(plain) == plain


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--prompt"], "--prompt has no value; write --prompt VALUE"),
        (["--prompt", "--seed", "1"], "--prompt has no value"),
        (["-s", "1"], "unknown option '-s'"),
        (["--"], "unknown option '--'"),
    ],
)
def test_a_mistake_is_a_sentence(given: list[str], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        dashes.plain(given)


def pasted(line: str) -> dict[str, str]:
    return {key: entry.value for key, entry in parse(shlex.split(line)).items()}


def test_lines_of_the_official_readme() -> None:
    line = (
        "--task t2v-A14B --size 1280*720 --ckpt_dir ./Wan2.2-T2V-A14B --offload_model True --convert_model_dtype "
        '--prompt "Two cats fight."'
    )
    assert pasted(line) == {
        "model_name": "wan2.2-t2v-a14b",
        "size": "1280*720",
        "width": "1280",
        "height": "720",
        "pretrained_model_name_or_path": "./Wan2.2-T2V-A14B",
        "offload_model": "True",
        "convert_model_dtype": "true",
        "prompt": "Two cats fight.",
    }
    line = (
        "--task flf2v-14B --frame_num 33 --sample_steps 20 --sample_shift 4 --sample_guide_scale 6 --base_seed 7 "
        "--first_frame a.png --last_frame b.png --sample_solver dpm++ --ulysses_size 4 --ring_size 2 --save_file x.mp4"
    )
    assert pasted(line) == {
        "model_name": "wan2.1-flf2v-14b",
        "num_frames": "33",
        "num_inference_steps": "20",
        "flow_shift": "4",
        "guidance_scale": "6",
        "seed": "7",
        "image": "a.png",
        "last_image": "b.png",
        "solver": "dpmpp_2m",
        "ulysses_shards": "4",
        "ici_context_parallelism": "8",
        "save_file": "x.mp4",
    }
    line = "--task animate-14B --src_root_path ./made --refert_num 5 --replace_flag --use_relighting_lora"
    assert pasted(line) == {
        "model_name": "wan2.2-animate-14b",
        "image": "./made/src_ref.png",
        "pose_video": "./made/src_pose.mp4",
        "face_video": "./made/src_face.mp4",
        "background_video": "./made/src_bg.mp4",
        "mask_video": "./made/src_mask.mp4",
        "mode": "replace",
        "prev_segment_conditioning_frames": "5",
        "use_relighting_lora": "true",
    }
    assert "background_video" not in pasted("--task animate-14B --src_root_path ./made")
    line = "--task vace-1.3B --src_video v.mp4 --src_mask m.mp4 --src_ref_images a.png,b.png --prompt x"
    assert pasted(line)["reference_images"] == ["a.png", "b.png"] and pasted(line)["mask"] == "m.mp4"
    assert pasted("--task t2i-14B --prompt x")["num_frames"] == "1"


def test_the_line_of_the_docs() -> None:
    page = (Path(__file__).parents[2] / "docs" / "dialects.md").read_text()
    (line,) = re.findall("^generate_wan (.*)$", page, re.MULTILINE)
    assert pasted(line).items() >= {"model_name": "wan2.2-t2v-a14b", "num_inference_steps": "30", "seed": "7"}.items()


def test_flags_that_mean_nothing_here_are_one_line_of_the_log_each() -> None:
    values = parse(shlex.split("--task t2v-1.3B --prompt x --offload_model True --dit_fsdp"))
    given = {"pretrained_model_name_or_path": "x", "model_type": "T2V", "width": 16, "height": 16, "num_frames": 1}
    given |= {"fps": 16, "negative_prompt": "", "num_inference_steps": 1, "guidance_scale": 1, "flow_shift": 1}
    text = typed(values, given | {"run_name": "x"}).describe()
    for flag in ("offload_model", "dit_fsdp"):
        assert f"{flag}: not used; {dialects.SERVED_BY[flag]}" in text.splitlines()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--task t2v-15B", "choose one of t2v-1.3B"),
        ("--task t2v-14B wan_tiny", "Exactly one YAML file or page"),
        ("wan_tiny --heigth 480", "did you mean height"),
        ("wan_tiny a cat", "has no '='"),
        ("wan_tinny --prompt x", "did you mean wan_tiny"),
    ],
)
def test_a_wrong_line_is_a_sentence(line: str, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        pasted(line)


def test_the_table_names_keys_and_pages_that_exist() -> None:
    assert set(dialects.TASKS.values()) <= set(pages.names())
    assert set(dialects.DIFFUSERS) <= set(schema.KEYS) >= dialects.SAME
    known = {*schema.KEYS, *schema.ALIASES, *schema.COMPOUND_ALIASES}
    assert not known & set(dialects.SERVED_BY)
    assert {*dialects.SERVED_BY, *schema.COMPOUND_ALIASES} >= dialects.FLAGS
    assert dialects.COMPOUNDS.keys() == schema.COMPOUND_ALIASES.keys()
    assert {key for keys in dialects.COMPOUNDS.values() for key in keys} <= set(schema.KEYS)
