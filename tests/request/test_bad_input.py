"""Each mistake gives one clear sentence that says what was given and what to write instead; nothing is left behind."""

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from maxdiffusion import request, variants
from maxdiffusion.config import Config, schema
from maxdiffusion.errors import UserError

A14B = "model_name=wan2.2-t2v-a14b"
S2V = ["model_name=wan2.2-s2v-14b", "image=a.png", "width=128", "height=64"]

# words after base.yml -> what the sentence must say
WORDS: list[tuple[list[str], str]] = [
    # names
    (["heigth=480"], "unknown key heigth (command line); did you mean height?"),
    (["num-frames=81"], "did you mean num_frames?"),
    (["Sample_Step=50"], "did you mean sample_steps?"),
    (["zzz=1"], "unknown key zzz (command line)"),
    (["-height=480"], "write KEY=VALUE or --KEY VALUE"),
    (["--height"], "--height has no value"),
    (["height=480", "height=480"], "height is given twice on the command line"),
    (["more.yml"], "Exactly one YAML file or page is needed, but the arguments 'base.yml', 'more.yml' are"),
    (["height"], "the argument 'height' has no '='; write height=VALUE"),
    (["inspect=true", "plan=v6e-8"], "inspect and plan exclude each other"),
    (["inspect=true", "verify=true"], "inspect and verify exclude each other"),
    # types
    (["height=tall"], "height=tall (command line) cannot be used: it should be a valid integer"),
    (["height=480.5"], "should be a valid integer"),
    (["height="], "should be a valid integer"),
    (["height=[480]"], "should be a valid integer"),
    (["guidance_scale=strong"], "should be a valid number"),
    (["guidance_scale=nan"], "should be a finite number"),
    (["flow_shift=inf"], "should be a finite number"),
    (["scan_layers=maybe"], "should be a valid boolean"),
    (["seed=one"], "seed=one (command line) cannot be used: it should be a valid integer"),
    (["seed=[1, two]"], "seed=two"),
    (['prompt=["a, b]'], "starts as a list but cannot be read as one"),
    (["logical_axis_rules=[[mlp]]"], "should be a list of pairs"),
    (["logical_axis_rules=mlp"], "should be a list of pairs"),
    # bounds
    (["height=8"], "should be greater than or equal to 16"),
    (["width=100000"], "should be less than or equal to 8192"),
    (["num_frames=0"], "should be greater than or equal to 1"),
    (["num_inference_steps=0"], "should be greater than or equal to 1"),
    (["guidance_scale=0.5"], "should be greater than or equal to 1"),
    (["flow_shift=0"], "should be greater than 0"),
    (["fps=0"], "should be greater than or equal to 1"),
    (["seed=-2"], "should be greater than or equal to -1"),
    (["seed=4294967296"], "should be less than or equal to 4294967295"),
    (["per_device_batch_size=0.125"], "should be a valid integer"),
    (["ici_tensor_parallelism=0"], "a positive integer, or -1 to fill"),
    # hosts
    (["num_processes=2"], "give all three, or none under a launcher"),
    (["coordinator_address=a:1", "process_id=1"], "give all three, or none"),
    (["num_processes=2", "process_id=0"], "give all three, or none"),
    (["coordinator_address=a", "num_processes=2", "process_id=1"], "coordinator_address=a is not HOST:PORT"),
    (["coordinator_address=a:99999", "num_processes=2", "process_id=0"], "a port that is not one of 1 to 65535"),
    (["coordinator_address=http://a:1"], "coordinator_address=http://a:1 is not HOST:PORT"),
    (["coordinator_address=a:1", "num_processes=2", "process_id=2"], "process_id=2 is none of num_processes=2"),
    (["coordinator_address=a:1", "num_processes=0", "process_id=0"], "should be greater than or equal to 1"),
    (["jax_distributed=maybe"], "it should be 'auto', 'on' or 'off'"),
    # elsewhere
    (["output_dir=nose://a"], "nose://a has an unknown scheme"),
    (["pretrained_model_name_or_path=nose://a"], "nose://a has an unknown scheme"),
    (["save_file=memory://a/b", "output_format=png"], "output_format=png of several frames is a folder"),
    # choices
    (
        ["weights_dtype=float16"],
        "weights_dtype=float16 (command line) cannot be used: it should be 'float32' or 'bfloat16'",
    ),
    (["attention=ulyses_ring"], "did you mean ulysses_ring?"),
    (["solver=ddim"], "should be 'unipc', 'euler', 'dpmpp_2m' or 'renoise'"),
    (["output_format=avi"], "should be 'mp4', 'gif', 'webp', 'png', 'jpg' or 'npy'"),
    (["log_level=loud"], "'debug', 'info', 'warning' or 'error'"),
    (["progress=maybe"], "'auto', 'on' or 'off'"),
    # sizes
    (["height=100"], "height=100 is not a multiple of 16, as wan2.1-t2v-1.3b needs; the nearest are 96 or 112"),
    (["width=831"], "the nearest are 816 or 832"),
    (["num_frames=80"], "num_frames=80 is not of the form 4n+1, as wan2.1-t2v-1.3b needs; the nearest are 77 and 81"),
    (["size=1280"], "write width*height, width first"),
    (["size=[1280, 720]"], "write width*height, width first"),
    (["size=1280*720", "height=480"], "height is given as 720 (command line, size=1280*720) and as 480"),
    (["frame_num=81", "num_frames=77"], "keep one of the two"),
    # prompt
    (["prompt="], "prompt is empty"),
    (["prompt=[]"], "prompt is missing or an empty list"),
    (["prompt=[a, '']"], "prompt is empty"),
    (["seed=[]"], "seed is missing or an empty list"),
    (["prompt=[a, b]", "seed=[1, 2, 3]"], "prompt has 2 entries and seed has 3, which cannot be paired"),
    (["negative_prompt=[a, b]", "seed=[1, 2, 3]"], "negative_prompt has 2 entries"),
    # model
    (["model_name=wan2.1-t2v-13b"], "the nearest is 'wan2.1-t2v-1.3b'"),
    (["model_type=I2V"], "write T2V"),
    (
        ["model_name=wan2.1", "model_type=TI2V"],
        "model_type 'TI2V' does not exist for model_name 'wan2.1'; write FLF2V, I2V, T2V, VACE",
    ),
    (["image=a.png"], "image is not used by wan2.1-t2v-1.3b, whose model_type is T2V"),
    (["model_name=wan2.1-i2v-14b-480p"], "wan2.1-i2v-14b-480p needs image; write image=FILE"),
    (["model_name=wan2.1-flf2v-14b", "image=a.png", "width=832", "height=480"], "wan2.1-flf2v-14b needs last_image"),
    (
        ["model_name=wan2.1-flf2v-14b", "image=a.png", "last_image=b.png", "width=832", "num_frames=1"],
        "A video of num_frames=1 cannot end with another image; write num_frames=81",
    ),
    (["model_name=wan2.2-ti2v-5b", "image=none.png"], "none.png does not exist"),
    (["model_name=wan2.2-ti2v-5b", "image=base.yml"], "base.yml cannot be read as an image"),
    (["model_name=wan2.2-ti2v-5b", "image=ftp://host/a.png"], "is not an http or https URL"),
    (["model_name=wan2.2-ti2v-5b", "image=http://127.0.0.1:9/a.png"], "cannot be fetched"),
    (["size=auto"], "size=auto (command line) takes the proportions of video, which is not given"),
    (["size=auto", "width=832", "image=a.png"], "size=auto and a width or height (command line) contradict"),
    (["expert_residency=in_turn"], "expert_residency is not used by wan2.1-t2v-1.3b, which has one expert"),
    (["sample_guide_scale=[3, 4]"], "guidance_scale_2 is not used by wan2.1-t2v-1.3b"),
    (["model_name=wan2.1", "model_type=S2V"], "model_type 'S2V' does not exist for model_name 'wan2.1'; write "),
    (["model_name=wan2.1"], "stands for several variants and no checkpoint is given that tells which"),
    (["model_name=wan2.1", "ckpt_dir=somebody/model"], "the checkpoint somebody/model does not tell which"),
    (["model_name=wan-tiny-t2v"], "has no official checkpoint; give pretrained_model_name_or_path=FOLDER"),
    (["ckpt_dir=./nowhere"], "is neither an existing folder nor a hub id"),
    (["ckpt_dir=nowhere"], "is neither an existing folder nor a hub id"),
    (["ckpt_dir=/no/where/at/all"], "is neither an existing folder nor a hub id"),
    (["ckpt_dir=$UNSET_FOLDER/model"], "uses $UNSET_FOLDER, which is not set"),
    (["ckpt_dir=."], "has no transformer/config.json"),
    (["ckpt_dir="], "pretrained_model_name_or_path"),
    # noise levels and experts
    (["sigmas=[1, 1.2]"], "should be less than or equal to 1"),
    (["sigmas=[1, 0.5, 0]"], "should be greater than 0"),
    (["sigmas=[1, -0.5]"], "should be greater than 0"),
    (["sigmas=[1, half]"], "should be a valid number"),
    (["sigmas=[1, nan]"], "sigmas"),
    (["sigmas=[0.5, 0.9]"], "sigmas must fall, but 0.5 is followed by 0.9"),
    (["sigmas=[1, 0.5, 0.5]"], "sigmas must fall, but 0.5 is followed by 0.5"),
    (["sigmas=1 0.5"], "should be a valid number"),
    (["sigmas=[1, 0.5]", "sample_steps=4"], "num_inference_steps=4 is not the number of sigmas, which is 2"),
    (["sigmas=[1, 0.5]", "flow_shift=5"], "flow_shift=5 is not used beside sigmas, which are the shifted levels"),
    (
        [A14B, "sigmas=[1, 0.5]", "num_inference_steps_2=4"],
        "num_inference_steps_2 is not used beside them; leave it out, and write boundary_step",
    ),
    (["solver=lcm"], "should be 'unipc', 'euler', 'dpmpp_2m' or 'renoise'"),
    (["boundary_step=2"], "boundary_step is not used by wan2.1-t2v-1.3b, which has one expert"),
    (["num_inference_steps_2=4"], "num_inference_steps_2 is not used by wan2.1-t2v-1.3b, which has one expert"),
    ([A14B, "boundary_step=-1"], "should be greater than or equal to 0"),
    ([A14B, "boundary_step=50"], "boundary_step=50 is more than the 40 steps of the run; it must be 0 to 40"),
    ([A14B, "boundary_step=2", "boundary_ratio=0.9"], "boundary_step=2 and boundary_ratio=0.9 both say where"),
    ([A14B, "boundary_step=2", "num_inference_steps_2=4"], "boundary_step=2 and num_inference_steps_2=4 both say"),
    ([A14B, "num_inference_steps_2=0"], "should be greater than or equal to 1"),
    ([A14B, "flow_shift_2=5"], "flow_shift_2 is only used with num_inference_steps_2=4"),
    ([A14B, "num_inference_steps_2=4", "flow_shift_2=0"], "should be greater than 0"),
    (
        [A14B, "num_inference_steps_2=4", "boundary_ratio=1"],
        "boundary_ratio=1 leaves one of the experts without noise levels",
    ),
    # latents
    (["initial_latents=missing.safetensors"], "initial_latents=missing.safetensors is not an existing file"),
    (["decode_latents=missing.safetensors"], "decode_latents=missing.safetensors is not an existing file"),
    (["decode_latents=base.yml", "initial_latents=base.yml"], "exclude each other"),
    # control
    (["video=missing.mp4"], "missing.mp4 does not exist"),
    (["video=missing.mp4", "size=832*480"], "video=missing.mp4 does not exist"),
    (["strength=0"], "should be greater than 0"),
    (["video=folder"], "it is a folder without frames"),
    (["strength=0.5"], "strength is only used with video=FILE; add that, or leave strength out"),
    (
        ["mask=folder"],
        "mask is not used by wan2.1-t2v-1.3b, whose model_type is T2V; leave it out, or choose a model of type VA",
    ),
    (["pose_video=folder"], "choose a model of type ANIMATE or S2V"),
    (["mode=replace"], "mode is not used by wan2.1-t2v-1.3b"),
    (["mode=dance"], "should be 'animate' or 'replace'"),
    (
        ["model_name=wan2.1-vace-1.3b", "strength=0.5", "video=folder", "width=832", "height=480"],
        "strength is not used by wan2.1-vace-1.3b",
    ),
    (["model_name=wan2.1-vace-1.3b", "mask=folder"], "mask is only used with video=FILE"),
    (["model_name=wan2.1-vace-1.3b", "conditioning_scale=[1, x]"], "conditioning_scale=x"),
    (["keep_audio=true"], "keep_audio is only used with an input video (video, pose_video, face_video, background_vi"),
    (
        ["keep_audio=true", "output_format=webp", "video=folder", "width=832", "height=480"],
        "keep_audio is not used with output_format=webp, which holds no sound; write output_format=mp4",
    ),
    (
        ["model_name=wan2.1-vace-1.3b", "video=folder", "width=832", "height=480", "keep_audio=true"],
        "keep_audio and input_frames=spread exclude each other",
    ),
    # sound
    (
        ["audio=a.wav"],
        "audio is not used by wan2.1-t2v-1.3b, whose model_type is T2V; leave it out, or choose a model of",
    ),
    ([*S2V, "audio=a.wav", "keep_audio=true"], "keep_audio is not used beside audio=a.wav, whose sound the result has"),
    ([*S2V], "wan2.2-s2v-14b needs audio; write audio=FILE, the path or URL of a sound, or of a video that has one"),
    ([*S2V, "audio=missing.wav"], "missing.wav does not exist; give a sound file, or a video with sound"),
    ([*S2V, "audio=base.yml"], "base.yml cannot be read as a sound"),
    (
        [*S2V, "audio=a.wav", "segment_frame_length=81"],
        "segment_frame_length=81 is not of the form 4n, as wan2.2-s2v-14b needs; the nearest are 80 and 84",
    ),
    (
        [*S2V, "audio=a.wav", "segment_frame_length=2"],
        "is not of the form 4n, as wan2.2-s2v-14b needs; the nearest is 4",
    ),
    (
        [*S2V[:2], "audio=a.wav", "width=832", "height=480"],
        "height=480 is not a multiple of 64, as wan2.2-s2v-14b needs",
    ),
    ([*S2V, "audio=a.wav", "clips=2"], "clips=2 is not used by wan2.2-s2v-14b, which makes long videos in segments by"),
    (
        ["model_name=wan2.2-s2v-14b", "num_frames=9", "decode_latents=base.yml"],
        "wan2.2-s2v-14b decodes latents after those of its image; write image=FILE",
    ),
    # windows
    (["context_window=80"], "context_window=80 is not of the form 4n+1, as wan2.1-t2v-1.3b needs; the nearest are 77 "),
    (["context_window=85"], "context_window=85 is longer than the video of num_frames=81; leave it out, or write less"),
    (["context_window=0"], "should be greater than or equal to 1"),
    (
        ["context_window=49", "context_overlap=18"],
        "context_overlap=18 is not a multiple of 4 below context_window=49; the nearest are 16 and 20",
    ),
    (["context_window=49", "context_overlap=49"], "below context_window=49; the nearest is 48"),
    (["context_window=9"], "context_overlap=16 is not a multiple of 4 below context_window=9; the nearest is 8"),
    (["context_overlap=8"], "context_overlap is only used with context_window=81; add that, or leave context_overlap"),
    (
        ["plan=v6e-8", "model_name=wan2.2-i2v-a14b", "context_window=49"],
        "context_window is not used by wan2.2-i2v-a14b, whose model_type is I2V; leave it out, or choose a model of ",
    ),
    (
        ["plan=v6e-8", "model_name=wan2.2-ti2v-5b", "image=a.png", "width=1280", "context_window=49"],
        "context_window=49 and an image exclude each other: only the first window could start from given frames",
    ),
    (
        ["plan=v6e-8", "model_name=wan2.2-ti2v-5b", "extend=folder", "width=1280", "context_window=49"],
        "context_window=49 and extend exclude each other",
    ),
    # plan
    (["plan_file=plan.json"], "plan_file is only used with plan=v6e-8"),
    (["price_per_chip_hour=2"], "price_per_chip_hour is only used with plan"),
    (["plan=v6e-8", "price_per_chip_hour=0"], "should be greater than 0"),
    (["plan=v6e-8", "plan_minutes=0"], "should be greater than 0"),
    (["plan=v6e-8", "plan_file=plan.png"], "plan_file=plan.png is neither .json nor .svg; name it plan.json"),
    (["plan=v6e-8", "plan_file=base.yml/plan.json"], "plan_file: the folder base.yml cannot be written"),
    (["plan=v6e-8", "verify=true"], "plan and verify exclude each other"),
    # parallelism
    (["ulysses_shards=0"], "a positive integer, or -1"),
    (["ulysses_shards=5"], "does not divide the 12 heads of wan2.1-t2v-1.3b; choose 1 or 2 or 3 or 4 or 6 or 12"),
    (
        ["ulysses_shards=3", "ici_context_parallelism=8"],
        "does not divide the context axis of 8 devices; choose 1 or 2 or 4",
    ),
    (["ulysses_shards=2", "attention=ring"], "is not used by attention=ring"),
    (["ici_data_parallelism=-1"], "ici_data_parallelism and ici_context_parallelism are both -1"),
    (["ring_size=2", "ulysses_size=2", "ici_context_parallelism=8"], "make 4; leave one of them out"),
    (["ring_size=0"], "must be positive integers"),
    (["ring_size=2", "ulysses_shards=-1"], "must be positive integers"),
    # output
    (["save_file=clip.avi"], "output_format=avi (save_file) cannot be used"),
    (["save_file=clip"], "name it clip.mp4"),
    (["save_file=one.jpg"], "output_format=jpg is one picture, and num_frames=81; write num_frames=1"),
    (["save_file=one.JPEG"], "output_format=jpg is one picture"),
    (["save_file=frames", "output_format=png", "num_frames=1"], "name it frames.png"),
    (["save_file=THERE.mp4/", "num_frames=1"], "is a folder; name a file"),
    (["save_file=clip.mp4", "output_format=gif"], "name it clip.gif"),
    (["save_file=clip.mp4", "output_format=png"], "name it clip."),
    (["save_file=clip.mp4", "seed=[1, 2]"], "save_file names one file, but 2 videos are asked for"),
    (["save_file=there.mp4"], "there.mp4 exists already; name another save_file, or write overwrite=true"),
    (["save_file=beside.mp4"], "beside.json exists already"),
    (["save_file=folder", "output_format=mp4"], "is a folder; name a file"),
    (["save_file=/"], "is a folder; name a file"),
    (["save_file=new.mp4/"], "is a folder; name a file"),
    (["save_file=base.yml/clip.mp4"], "cannot be written"),
    (["output_dir=base.yml/results"], "output_dir: the folder base.yml/results/wan2.1-t2v-1.3b cannot be written"),
    (["output_dir=/proc/results"], "cannot be written"),
    (["output_dir="], "should have at least 1 character"),
    (["output_dir=" + "x" * 300], "cannot be written"),
    (["video=" + "x" * 300], "cannot be written or read (File name too long); give another path"),
    (["save_file=" + "x" * 300 + ".mp4"], "File name too long"),
    (["transformer_file=" + "x" * 300], "File name too long"),
    (["ckpt_dir=" + "x" * 300], "File name too long"),
    (["run_name=../elsewhere"], "should be the name of one folder, without slashes"),
    (["run_name=.."], "should be the name of one folder"),
]

# content of case.yml -> what the sentence must say
FILES: list[tuple[bytes, str]] = [
    (b"model_name: wan2.1-t2v-14b\nheigth: 480\n", "unknown key heigth (file case.yml); did you mean height?"),
    (b"prompt: a\nheight: 480\nprompt: b\n", "gives prompt twice, in lines 1 and 3"),
    (b"prompt: [a, b\nheight: 480\n", "is not valid YAML: "),
    (b"prompt: a: b\n", "mapping values are not allowed here in line 1"),
    (b"\tprompt: a\n", "is not valid YAML"),
    (b"- prompt\n- height\n", "holds no key: value lines"),
    (b"just words\n", "holds no key: value lines"),
    (b"prompt:\n  text: a\n", "case.yml, line 1: prompt holds a mapping"),
    (b"prompt: &a [*a]\n", "nested too deeply"),
    (
        b"x: &a [%s]\ny: &b [%s]\nprompt: [%s]\n" % (b"1, " * 1500, b"*a, " * 1500, b"*b, " * 1500),
        "more than 1,000,000",
    ),
    (b"prompt: " + b"[" * 5000, "deeply"),
    (b"prompt: a\n---\nprompt: b\n", "is not valid YAML: expected a single document"),
    (b"prompt: \xff\xfe\n", "is not UTF-8 text"),
    (b"prompt: a\x00b\n", "is not valid YAML"),
    (b"model_name: [wan2.1]\nprompt: a\n", "model_name (file case.yml) is a list, but it takes one value"),
    (b"model_name: wan2.1-t2v-14b\n", "prompt is missing or an empty list"),
    (b"model_name: wan2.1-t2v-14b\nprompt:\n", "prompt is missing or an empty list"),
    (b"model_name: wan2.1-t2v-14b\nprompt: a\nsize: 1280*720\nheight: 480\n", "height is given as 720"),
    (b'model_name: wan2.1-t2v-14b\nprompt: a\noutput_dir: "a\\0b"\n', "contains a NUL character"),
    (b"model_name: wan2.1-t2v-14b\nprompt: a\nheight: 1:30\n", "should be a valid integer"),
    (b"prompt: a\n", "model_name wan2.1 stands for several variants"),
]


def sentence(words: list[str]) -> str:
    with pytest.raises(UserError) as caught:
        request.load(words)
    text = str(caught.value)
    assert "\n" not in text and 20 < len(text) < 800 and text.endswith((".", "?", ")"))
    return text


@pytest.mark.parametrize(("words", "expected"), WORDS, ids=lambda value: str(value)[:60])
def test_command_line(place: Path, words: list[str], expected: str) -> None:
    (place / "there.mp4").touch()
    (place / "beside.json").touch()
    (place / "folder").mkdir()
    before = sorted(place.rglob("*"))
    assert expected in sentence(["base.yml", *words])
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize(("content", "expected"), FILES, ids=lambda value: str(value)[:60])
def test_file(place: Path, content: bytes, expected: str) -> None:
    (place / "case.yml").write_bytes(content)
    assert expected in sentence(["case.yml"])


WORDS_OF_ANY_KEY = st.tuples(
    st.sampled_from([*Config.model_fields, *schema.ALIASES, *schema.COMPOUND_ALIASES]),
    st.one_of(
        st.text(max_size=12),
        st.integers().map(str),
        st.floats().map(str),
        st.sampled_from(
            ["", "[]", "[[", "[1, 2]", "[a, null]", "true", "null", "-1", "16x16", "/", "..", "~", "$A", "{}"]
        ),
    ),
).map("=".join)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(words=st.lists(WORDS_OF_ANY_KEY, max_size=3))
def test_any_words_give_a_config_or_a_sentence(place: Path, words: list[str]) -> None:
    before = sorted(place.rglob("*"))
    with contextlib.suppress(UserError):
        json.dumps(request.load(["base.yml", *words]).cfg.to_json())
    assert sorted(place.rglob("*")) == before


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(text=st.one_of(st.text(alphabet="ab:-[]{}&*!|>'\"%@`#,? \n\t\0", max_size=30), st.text(max_size=20)))
def test_any_file_gives_a_config_or_a_sentence(place: Path, text: str) -> None:
    (place / "case.yml").write_text(text, encoding="utf-8", errors="replace")
    with contextlib.suppress(UserError):
        request.load(["case.yml", "model_name=wan2.1-t2v-14b"])


def test_missing_files(place: Path) -> None:
    assert "The config file bas.yml does not exist; did you mean base.yml?" in sentence(["bas.yml"])
    assert "does not exist; give the path of a YAML file" in sentence(["no/where.yml"])
    assert "cannot be read: Is a directory" in sentence([str(place)])
    assert "no argument is given as one" in sentence(["prompt=a"])
    assert "no argument is given as one" in sentence([])


def test_a_checkpoint_of_another_variant(place: Path, checkpoint: Callable[..., Path]) -> None:
    large = checkpoint("large", "wan2.1-t2v-14b")
    text = sentence(["base.yml", f"ckpt_dir={large}"])
    assert "model_name is wan2.1-t2v-1.3b" in text and "write model_name: wan2.1-t2v-14b" in text
    image = checkpoint("image", "wan2.1-t2v-14b", in_channels=36, out_channels=16)
    assert "36 input channels, which is wan2.2-i2v-a14b" in sentence(["base.yml", f"ckpt_dir={image}"])
    control = checkpoint("control", "wan2.1-t2v-14b", in_channels=52, out_channels=16)  # Wan2.2-Fun-A14B-Control
    for name in ("wan2.2-i2v", "wan2.2-i2v-a14b"):
        text = sentence(["base.yml", f"model_name={name}", f"ckpt_dir={control}"])
        assert "with 52 input channels, which is not a variant known here" in text
    vace = checkpoint("vace", "wan2.1-t2v-1.3b", _class_name="WanVACETransformer3DModel")
    assert "holds a WanVACETransformer3DModel" in sentence(["base.yml", f"ckpt_dir={vace}"])
    assert request.load(["base.yml", "model_name=wan2.1", f"ckpt_dir={vace}"]).cfg.model_name == "wan2.1-vace-1.3b"
    speech = checkpoint("speech", "wan2.1-t2v-1.3b", _class_name="WanSpeechTransformer3DModel")
    assert "does not tell which" in sentence(["base.yml", "model_name=wan2.1", f"ckpt_dir={speech}"])
    small = checkpoint("small", "wan2.1-t2v-1.3b")
    assert "revision=main is not used for the local folder" in sentence(
        ["base.yml", f"ckpt_dir={small}", "revision=main"]
    )
    other = checkpoint("other", "other")
    assert "write model_name: wan2.1-t2v," in sentence(["base.yml", f"ckpt_dir={other}"])


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{", "is not valid JSON"),
        ("[]", "holds a JSON list, not an object"),
        ("[" * 100_000, "is not valid JSON"),
        ("{}", "gives num_layers as None"),
        ('{"num_layers": "30"}', "gives num_layers as '30'"),
    ],
)
def test_a_damaged_checkpoint_config(place: Path, checkpoint: Callable[..., Path], content: str, expected: str) -> None:
    folder = checkpoint("damaged", "other")
    (folder / "transformer" / "config.json").write_text(content)
    assert expected in sentence(["base.yml", f"ckpt_dir={folder}"])


def test_at_least_forty_cases() -> None:
    assert len(WORDS) + len(FILES) >= 40
    assert len({str(case) for case in WORDS + FILES}) == len(WORDS) + len(FILES)


def test_the_right_variant_passes(checkpoint: Callable[..., Path]) -> None:
    content = json.loads((checkpoint("right", "wan2.1-t2v-14b") / "transformer" / "config.json").read_text())
    variants.check(variants.get("wan2.1-t2v-14b"), content)
    assert variants.matching(content)[0] is variants.get("wan2.1-t2v-14b")


def test_what_is_read_without_end(place: Path) -> None:
    os.mkfifo(place / "pipe")
    assert "prompts=pipe is neither a file nor a folder but a pipe" in sentence(["base.yml", "prompts=pipe"])
    assert "is not valid YAML" in sentence(["/dev/zero"])


@pytest.mark.parametrize("length", [236, 251])
def test_a_name_too_long_for_the_files_beside_it(place: Path, length: int) -> None:
    assert "a file beside it" in sentence(["base.yml", f"save_file={'a' * length}.mp4"])
    assert request.load(["base.yml", f"save_file={'a' * 235}.mp4"])
