"""The lines of a prompt file: what they override, and each mistake as one sentence with its line."""

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from maxdiffusion import request
from maxdiffusion.config import Config
from maxdiffusion.errors import UserError
from maxdiffusion.request import Video, videos


@pytest.fixture
def load(place: Path):
    def load(text: str | bytes, *words: str) -> Config:
        (place / "p.jsonl").write_bytes(text if isinstance(text, bytes) else text.encode())
        return request.load(["base.yml", "prompts=p.jsonl", *words]).cfg

    return load


def test_lines_win_over_the_config(load):
    cfg = load(
        '{"prompt": "a dog", "seed": 7, "size": "480*832", "output": "dog.mp4"}\n'
        "\n"
        '{"negative_prompt": "blur", "width": 640, "output": "cat"}\r\n'
        '{"seed": 3}',
        "seed=2",
        "negative_prompt=bad",
    )
    assert videos.read(cfg) == (
        Video("a dog", "bad", 7, 480, 832, "dog"),
        Video("a cat", "blur", 2, 640, 480, "cat"),
        Video("a cat", "bad", 3, 832, 480, "a-cat-seed3-832x480x81"),
    )


def test_a_line_is_reproduced_without_the_file(load):
    cfg = load('{"prompt": "a dog", "seed": 7, "size": "480*832", "output": "dog.mp4"}\n{"seed": 3}')
    dog, cat = (videos.single(cfg, video) for video in videos.read(cfg))
    assert (dog.prompts, dog.prompt, dog.seed, dog.width, dog.height) == (None, ("a dog",), (7,), 480, 832)
    assert videos.read(cat) == (Video("a cat", cfg.negative_prompt[0], 3, 832, 480),)


def test_a_byte_order_mark_is_no_part_of_the_first_line(load):
    assert load(b'\xef\xbb\xbf{"seed": 3}\r\n').prompts == "p.jsonl"


def test_no_prompt_of_the_config_is_needed(place):
    (place / "bare.yml").write_text("model_name: wan2.1-t2v-1.3b\n")
    (place / "p.jsonl").write_text('{"prompt": "a dog"}\n{"seed": 1}\n')
    with pytest.raises(UserError, match=r"line 2 has no prompt and the config gives none"):
        request.load(["bare.yml", "prompts=p.jsonl"])
    (place / "p.jsonl").write_text('{"prompt": "a dog"}\n')
    assert len(videos.read(request.load(["bare.yml", "prompts=p.jsonl"]).cfg)) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "prompts=p.jsonl holds no line"),
        (b"\xff\xfe", "is not UTF-8 text"),
        ('{"seed": 1}\n{"seed": 2', "p.jsonl, line 2 is not JSON (Expecting"),
        ('{"seed": 1}\nseed: 2', "p.jsonl, line 2 is not JSON"),
        ('[["seed", 1]]', "p.jsonl, line 1 is not a JSON object"),
        ("7", "p.jsonl, line 1 is not a JSON object"),
        ("[]", "p.jsonl, line 1 is not a JSON object"),
        ('\n{"promt": "a"}', "p.jsonl, line 2 has the key 'promt'; did you mean 'prompt'?"),
        ('{"num_frames": 5}', "line 1 has the key 'num_frames'"),
        ('{"seed": 1, "seed": 2}', "line 1 gives seed twice"),
        ('{"size": "480*832", "height": 480}', "line 1 gives height twice"),
        ('{"size": "big"}', "line 1 gives size='big'; write width*height"),
        ('{"size": 480}', "line 1 gives size=480"),
        ('{"seed": "7"}', "line 1 gives seed='7', which is not an integer"),
        ('{"seed": true}', "line 1 gives seed=True, which is not an integer"),
        ('{"seed": -2}', "line 1 gives seed=-2; it must be from 0"),
        ('{"prompt": ["a"]}', "which is not text"),
        ('{"prompt": " "}', "line 1 has no prompt"),
        ('{"prompt": null}', "which is not text"),
        ('{"output": "a/b"}', "line 1 gives output='a/b', which names no file"),
        ('{"output": ".mp4"}', "which names no file"),
        ('{"output": "\\ud800"}', "which names no file"),
        ('{"output": "..", "seed": 2}', "which names no file"),
        ('{"output": "P.manifest"}', "line 1 gives output='P.manifest', the name of the manifest"),
        ('{"output": "a"}\n{"seed": 4}\n{"output": "A.mp4"}', "line 3 and line 1 would both be written as 'A'"),
        ('{"seed": 4}\n{"seed": 4}', "line 2 and line 1 would both be written as 'a-cat-seed4-832x480x81'"),
        ('{"height": 500, "output": "tall"}', "output tall: height=500 is not a multiple of 16"),
        ('{"width": 0}', "width=0 is not a multiple of 16"),
        ('{"width": 160000}', "width=160000"),
    ],
)
def test_mistakes(load, text, message):
    with pytest.raises(UserError) as caught:
        load(text)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["prompts=none.jsonl"], "prompts=none.jsonl cannot be read (No such file or directory)"),
        (["prompts=p.jsonl", "save_file=a.mp4"], "save_file is not used beside prompts=p.jsonl"),
        (["prompts=p.jsonl", "initial_latents=a"], "initial_latents is not used beside prompts=p.jsonl"),
        (["prompts=p.jsonl", "prompt=[a, b]"], "give one prompt, negative_prompt, seed and image beside it"),
    ],
)
def test_beside_other_keys(place, words, message):
    (place / "p.jsonl").write_text("{}\n")
    (place / "a").write_text("")
    with pytest.raises(UserError) as caught:
        request.load(["base.yml", *words])
    assert message in str(caught.value)


def test_a_folder_of_frames_takes_no_name_of_a_record(place):
    (place / "p.jsonl").write_text('{"output": "a"}\n{"output": "a.json", "seed": 2}\n')
    assert request.load(["base.yml", "prompts=p.jsonl"])
    with pytest.raises(UserError, match=r"line 2 gives output='a.json', the name of a file beside a video"):
        request.load(["base.yml", "prompts=p.jsonl", "output_format=png"])


def test_a_path_of_the_yaml_file_is_relative_to_it(place):
    (place / "sub").mkdir()
    (place / "sub" / "p.jsonl").write_text("{}\n")
    (place / "sub" / "page.yml").write_text("model_name: wan2.1-t2v-1.3b\nprompt: a\nprompts: ./p.jsonl\n")
    assert request.load(["sub/page.yml"]).cfg.prompts == str(place / "sub" / "p.jsonl")


def test_an_image_of_a_line_is_expanded_as_any_other_and_none_if_empty(load, place, monkeypatch):
    monkeypatch.setenv("SHOTS", "/shots")
    Image.new("RGB", (16, 16)).save(place / "a.png")
    words = ("model_name=wan2.1-i2v-14b-480p", "image=a.png", "width=832", "height=480")
    cfg = load('{"image": "~/b.png"}\n{"image": "$SHOTS/c.png", "seed": 1}\n{"seed": 2}', *words)
    assert [video.image for video in videos.read(cfg)] == ["/home/someone/b.png", "/shots/c.png", "a.png"]
    cfg = load('{"seed": 1}\n{"image": "", "seed": 2}', "model_name=wan2.2-ti2v-5b", "image=a.png")
    assert [video.image for video in videos.read(cfg)] == ["a.png", None]
    with pytest.raises(UserError, match=r"line 1: image is \$NOWHERE/c\.png and uses \$NOWHERE, which is not set"):
        load('{"image": "$NOWHERE/c.png"}', *words)


def test_a_line_has_the_size_of_its_image(place):
    """Its own size is an area beside an image; a width or height is exact, in the line or in the config."""
    Image.new("RGB", (300, 200)).save(place / "wide.png")
    Image.new("RGB", (200, 300)).save(place / "tall.png")
    lines = [{}, {"image": "tall.png"}, {"size": "320*192"}, {"image": "tall.png", "height": 480}, {"image": ""}]
    (place / "p.jsonl").write_text(
        "".join(json.dumps({"output": str(i), **line}) + "\n" for i, line in enumerate(lines))
    )

    def sizes(*words):
        words = ("base.yml", "model_name=wan2.2-ti2v-5b", "prompts=p.jsonl", "image=wide.png", *words)
        return [(video.width, video.height) for video in request.load(words).videos]

    assert sizes("size=832*480") == [(768, 512), (512, 768), (288, 192), (768, 480), (768, 512)]
    assert sizes("width=832", "height=480") == [(832, 480)] * 2 + [(288, 192), (832, 480), (832, 480)]
    assert sizes("size=832*480", "conventions=diffusers") == [(832, 480)] * 2 + [(320, 192), (832, 480), (832, 480)]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda c: st.lists(c), max_leaves=3
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from(["prompt", "seed", "size", "width", "output"]) | st.text(), JSON))
def test_any_line_loads_or_is_one_sentence(load, line):
    try:
        cfg = load(json.dumps(line))
    except UserError as error:
        assert "\n" not in str(error) or "\n" in json.dumps(line, ensure_ascii=False)
    else:
        (video,) = videos.read(cfg)
        assert "/" not in video.output and video.prompt.strip()
