"""`lora=` and `lora_2=`: how they are written, where files may lie, and what they are part of."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from maxdiffusion import inspection, request
from maxdiffusion.errors import UserError
from maxdiffusion.media import fetch
from maxdiffusion.output import manifest
from maxdiffusion.request import loras
from maxdiffusion.request.nets import open_checkpoint
from tests.support import lora
from tests.support.hub_server import REPO, SHA, Hub, serve
from tests.support.output import reserved

ROOT = Path(__file__).parents[2]
PAGE = str(ROOT / "configs" / "wan_tiny.yml")
TWO = str(ROOT / "configs" / "wan2.2_t2v_a14b.yml")


@pytest.fixture
def file(tmp_path):
    """A LoRA for the bundled miniature."""
    shape = {"lora_A": (2, 128), "lora_B": (128, 2)}
    numbers = np.random.default_rng(0)
    tensors = {f"blocks.0.self_attn.q.{part}.weight": numbers.normal(size=of) for part, of in shape.items()}
    return lora.write(tmp_path / "style.safetensors", {name: array.astype("f4") for name, array in tensors.items()})


def load(*words, page=PAGE):
    return request.load([page, *words])


def merged(*words, fetch=True):
    job = load(*words)
    return loras.merged(job, open_checkpoint(job), fetch).nets["transformer"]


# ---- how they are written


@pytest.mark.parametrize(
    ("word", "wanted"),
    [
        ("", {}),
        ("a.safetensors", {"a.safetensors": 1}),
        ("[a.safetensors, b.safetensors]", {"a.safetensors": 1, "b.safetensors": 1}),
        ("{a.safetensors: 0.8, b.safetensors: -1}", {"a.safetensors": 0.8, "b.safetensors": -1}),
        ("{https://x.org/a.safetensors: 2}", {"https://x.org/a.safetensors": 2}),
        ("[]", {}),
        ("{}", {}),
    ],
)
def test_words_and_the_record(tmp_path, word, wanted):
    cfg = load(f"lora={word}").cfg
    assert cfg.lora == wanted and list(cfg.lora) == list(wanted) and cfg.lora_2 == {}
    (tmp_path / "record.yml").write_text(json.dumps(cfg.to_json()))
    assert load(page=str(tmp_path / "record.yml")).cfg.lora == wanted


def test_a_yaml_file_with_paths_beside_it(tmp_path):
    lines = [
        "model_name: wan2.2-t2v-a14b",
        "prompt: a cat",
        "lora: {./a.safetensors: 0.5}",
        "lora_2:",
        "  - ./b.safetensors",
    ]
    (tmp_path / "page.yml").write_text("\n".join(lines))
    cfg = load(page=str(tmp_path / "page.yml")).cfg
    assert cfg.lora == {f"{tmp_path}/a.safetensors": 0.5} and cfg.lora_2 == {f"{tmp_path}/b.safetensors": 1}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["lora=[a.safetensors, a.safetensors]"], "name each file once, not a.safetensors twice"),
        (["lora={a.safetensors: 1, a.safetensors: 2}"], "a.safetensors twice"),
        (["lora={a.safetensors: strong}"], "lora=strong .* should be a valid number"),
        (["lora={a.safetensors: nan}"], "finite"),
        (["lora={a.safetensors: }"], "valid number"),
        (["lora={a.safetensors: [1]}"], "should give each file one strength"),
        (["lora={a.safetensors: 1]}"], "cannot be read as one"),
        (["lora=$NOWHERE/a.safetensors"], "NOWHERE, which is not set"),
        (["lora_2=a.safetensors"], "lora_2 is not used by wan-tiny-t2v, which has one expert"),
        ([TWO, "lora=x/wan_low_noise_v2.safetensors"], "named low noise, .* give it as lora_2"),
        ([TWO, "lora_2=wan-HighNoise.safetensors"], "named high noise, .* low-noise expert; give it as lora,"),
    ],
)
def test_bad_words(words, said):
    with pytest.raises(UserError, match=said):
        request.load(words if words[0] == TWO else [PAGE, *words])


def test_names_of_the_right_expert():
    load("prompt=a", "lora=low_noise/high_noise_model.safetensors", "lora_2=high_noise/low_noise.safetensors", page=TWO)
    load("prompt=a", "lora=high_noise_and_low_noise.safetensors", page=TWO)


# ---- prompt files


def lines(tmp_path, *objects):
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps(each) for each in objects))
    return f"prompts={tmp_path}/p.jsonl"


def test_lines_that_agree(tmp_path):
    word = lines(tmp_path, {"prompt": "a", "lora": "x.safetensors"}, {"prompt": "b", "lora": {"x.safetensors": 1.0}})
    job = load(word, "lora=y.safetensors")
    assert job.cfg.lora == {"x.safetensors": 1} and len(job.videos) == 2
    assert "line 1" in job.cfg.origins["lora"]
    word = lines(tmp_path, {"prompt": "a", "lora": ["y.safetensors"]}, {"prompt": "b"})
    assert load(word, "lora=y.safetensors").cfg.lora == {"y.safetensors": 1}


@pytest.mark.parametrize(
    ("second", "said"),
    [
        ({}, "line 2 asks for lora=none and line 1 for {'x.safetensors': 0.5}, .* share one model"),
        ({"lora": "x.safetensors"}, "line 2 asks for lora={'x.safetensors': 1.0}"),
        ({"lora": 3}, "line 2 gives lora=3, which is not a file"),
        ({"lora": {"x.safetensors": "strong"}}, "lora=strong .*line 2"),
    ],
)
def test_lines_that_do_not(tmp_path, second, said):
    word = lines(tmp_path, {"prompt": "a", "lora": {"x.safetensors": 0.5}}, {"prompt": "b", **second})
    with pytest.raises(UserError, match=said):
        load(word)


def test_the_manifest_knows_a_file_by_its_content(tmp_path, file):
    def left(*words):
        job = load(lines(tmp_path, {"prompt": "a", "output": "one"}), f"output_dir={tmp_path}/out", *words)
        return job, [video.output for video in manifest.remaining(job).videos]

    job, todo = left(f"lora={{{file}: 0.5}}")
    with reserved(job, job.videos, np.zeros((1, 5, 12, 12, 8), np.float32)) as files:
        files.paths[0].write_bytes(b"video")
        files.record({}, {})
    assert todo == ["one"] and left(f"lora={{{file}: 0.5}}")[1] == []
    copy = file.rename(tmp_path / "other.safetensors")
    assert left(f"lora={{{copy}: 0.5}}")[1] == []
    for words in ((f"lora={copy}",), ()):
        with pytest.raises(UserError, match="other settings"):
            left(*words)
    record = json.loads((tmp_path / "out" / job.cfg.run_name / "one.json").read_text())
    assert record["config"]["lora"] == {str(file): 0.5}


# ---- where files lie


CODE = """
import sys
from maxdiffusion import request
from maxdiffusion.errors import UserError
from maxdiffusion.request import loras
from maxdiffusion.request.nets import open_checkpoint
for word in sys.argv[2:]:
    location, fetch = word.split("|")
    job = request.load([sys.argv[1], f"lora={location}"])
    try: net = loras.merged(job, open_checkpoint(job), fetch == "fetch").nets["transformer"]
    except UserError as error: print("error", error)
    else: print(net.loras[0].lora.digest, net.loras[0], net.tensors["blocks.0.attn1.to_q.weight"].rows(0, 1).sum())
"""


def test_merged_from_a_path_a_url_and_the_hub(tmp_path, file):
    """In a process of its own, since huggingface_hub reads its environment when it is imported."""
    config = b'{"r": 2, "lora_alpha": 8}'
    with serve(Hub({"sub/style.safetensors": file.read_bytes(), "sub/adapter_config.json": config})) as hub:
        there, url = f"{REPO}/sub/style.safetensors", f"{hub.url}/{REPO}/resolve/{SHA}/sub/style.safetensors"
        words = [
            f"{there}|",
            f"{there}|fetch",
            f"{there}|",
            f"{url}|fetch",
            f"{file}|",
            f"{REPO}/sub/x.safetensors|fetch",
        ]
        clean = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        clean |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        clean["no_proxy"] = clean["NO_PROXY"] = "127.0.0.1"
        command = [sys.executable, "-c", CODE, PAGE, *words]
        done = subprocess.run(command, env=clean, capture_output=True, text=True, timeout=120)
    unfetched, fetched, cached, by_url, here, absent = done.stdout.splitlines()
    assert "nothing is fetched" in unfetched and f"{REPO}/sub/x.safetensors is neither" in absent
    assert fetched == cached and "alpha 8" in fetched
    assert "no alpha" in by_url and "no alpha" in here
    assert len({line.split()[0] for line in (fetched, by_url, here)}) == 1
    assert by_url.split()[-1] == here.split()[-1] != fetched.split()[-1]


@pytest.mark.parametrize(
    ("location", "said"),
    [
        ("nowhere.safetensors", "does not exist; give the path or URL"),
        ("http://127.0.0.1:9/a.safetensors", "cannot be fetched"),
        ("foo://a.safetensors", "unknown scheme"),
    ],
)
def test_files_that_are_not_there(location, said):
    with pytest.raises(UserError, match=said):
        merged(f"lora={location}")


def test_a_refusal_names_the_location(tmp_path, file, monkeypatch):
    copy = tmp_path / "tmp123.safetensors"
    copy.write_bytes(file.read_bytes()[:-9])
    monkeypatch.setattr(fetch, "local", lambda location, limit: copy)
    with pytest.raises(UserError, match=r"^http://x\.org/a is truncated"):
        merged("lora=http://x.org/a")
    with pytest.raises(UserError, match="not fetched to be inspected"):
        merged("lora=http://x.org/a", fetch=False)


# ---- what they are part of


def test_the_digest_that_hosts_compare(tmp_path, file):
    def digest(*words):
        job = load(*words)
        return loras.merged(job, open_checkpoint(job)).digest()

    with_it = digest(f"lora={file}")
    other = tmp_path / "other.safetensors"
    other.write_bytes(file.read_bytes())
    assert with_it == digest(f"lora={other}")
    changed = bytearray(file.read_bytes())
    changed[-1] ^= 1
    other.write_bytes(changed)
    assert len({with_it, digest(), digest(f"lora={{{file}: 0.5}}"), digest(f"lora={other}")}) == 4


def test_the_log(tmp_path, file, caplog):
    """What matched, and a warning where rounding to the weights' dtype removes an update."""
    name = "transformer/diffusion_pytorch_model.safetensors"
    half = {
        key: array.astype(ml_dtypes.bfloat16) for key, array in load_file(ROOT / "models" / "wan_tiny" / name).items()
    }
    words = [f"transformer_file={lora.write(tmp_path / 'half.safetensors', half)}"]
    for strength, count in ((0.5, 1), (1e-8, 2)):
        caplog.clear()
        job = load(f"lora={{{file}: {strength}}}", *words)
        with caplog.at_level(logging.INFO, "maxdiffusion"):
            loras.report(loras.merged(job, open_checkpoint(job)), "bfloat16")
        line, *warnings = [record.getMessage() for record in caplog.records]
        assert line.startswith(
            f"LoRA of the transformer: {file}: 1 of 1 modules, rank 2, no alpha, strength {strength:g}"
        )
        assert [f"bfloat16 removes 100 % of the update of {file}" in text for text in warnings] == [True] * (count - 1)


def test_inspection_says_what_matches(file, capsys):
    inspection.run(load(f"lora={file}", "inspect=true"))
    out = capsys.readouterr().out
    assert f"LoRA of the transformer: {file}: 1 of 1 modules, rank 2, no alpha, strength 1\n" in out
    assert "every parameter has its tensor" in out
    with pytest.raises(UserError, match="does not exist"):
        inspection.run(load("lora=nowhere.safetensors", "inspect=true"))


def test_a_plan_checks_what_is_here(file):
    loras.check_local(load(f"lora=[{file}, org/x/y.safetensors, https://x.org/y.safetensors]"))
    with pytest.raises(UserError, match=r"nowhere.* does not exist"):
        loras.check_local(load("lora=nowhere.safetensors"))
    lora.write(file, {f"blocks.9.self_attn.q.lora_{part}": np.ones((128, 128), np.float32) for part in "AB"})
    with pytest.raises(UserError, match=r"blocks\.9"):
        loras.check_local(load(f"lora={file}"))


def test_two_files_in_their_order(tmp_path, file):
    """Each adds to what is there before it."""
    other = tmp_path / "other.safetensors"
    other.write_bytes(file.read_bytes())
    net, name = merged(f"lora={{{file}: 1, {other}: -1}}"), "blocks.0.attn1.to_q.weight"
    job = load()
    base = open_checkpoint(job).nets["transformer"]
    assert [each.strength for each in net.loras] == [1, -1]
    assert dataclasses.replace(net, tensors=base.tensors, loras=()) == base
    np.testing.assert_allclose(net.tensors[name].rows(0, 128), base.tensors[name].rows(0, 128), atol=1e-5)
