"""Whole and damaged checkpoint folders."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from maxdiffusion.errors import UserError
from maxdiffusion.models.umt5.config import XXL
from maxdiffusion.variants import get
from maxdiffusion.weights.checkpoint import open_checkpoint
from tests.support import synthetic

CONFIGS = {
    "text_encoder": {"architectures": ["UMT5EncoderModel"], **dataclasses.asdict(XXL)},
    "transformer": {
        "_class_name": "WanTransformer3DModel",
        **(get("wan2.1-t2v-1.3b").network or {}),
        "num_layers": 3,
    },
    "vae": {"_class_name": "AutoencoderKLWan", "latents_mean": [0.0] * 16, "latents_std": [1.0] * 16},
}


@pytest.fixture
def folder(tmp_path):
    """A whole checkpoint of three networks: one file, three shards, one file."""
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline"}))
    synthetic.write_net(tmp_path / "text_encoder", synthetic.tensors(1), stem="model")
    synthetic.write_net(tmp_path / "transformer", synthetic.tensors(), shards=3)
    synthetic.write_net(tmp_path / "vae", synthetic.tensors(2))
    for name, config in CONFIGS.items():
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer", "scheduler"):
        (tmp_path / name).mkdir()
    return tmp_path


def test_a_whole_checkpoint(folder):
    checkpoint = open_checkpoint(folder)
    assert list(checkpoint.nets) == list(checkpoint.configs) == list(CONFIGS)
    transformer = checkpoint.nets["transformer"]
    assert transformer.path == folder / "transformer" and transformer.config.num_layers == 3
    assert set(transformer.tensors) == set(synthetic.tensors())
    assert len({tensor.file for tensor in transformer.tensors.values()}) == 3


@pytest.mark.parametrize(
    ("variant", "pipeline"),
    [
        ("wan2.1-t2v-1.3b", "WanVideoToVideoPipeline"),
        ("wan2.2-ti2v-5b", "WanImageToVideoPipeline"),
        ("wan2.2-ti2v-5b", "WanPipeline"),
    ],
)
def test_a_folder_that_another_pipeline_of_diffusers_saved(folder, variant, pipeline):
    edit(folder / "model_index.json", lambda index: index.update(_class_name=pipeline))
    edit(folder / "transformer" / "config.json", lambda config: config.update(get(variant).network))
    assert open_checkpoint(folder, get(variant)).folder == folder
    with pytest.raises(UserError, match="this command runs WanAnimatePipeline"):
        open_checkpoint(folder, dataclasses.replace(get("wan2.2-animate-14b"), nets=get(variant).nets))


def test_copies_have_one_digest_and_other_weights_or_configs_another(folder, tmp_path_factory):
    copy = Path(shutil.copytree(folder, tmp_path_factory.mktemp("copy") / "elsewhere"))
    digest = open_checkpoint(folder).digest()
    assert open_checkpoint(copy).digest() == digest and len(digest) == 64
    edit(copy / "transformer" / "config.json", lambda config: config.update(ffn_dim=7))
    changed = open_checkpoint(copy).digest()
    synthetic.write_net(copy / "vae", synthetic.tensors(2, "float16"))
    assert len({digest, changed, open_checkpoint(copy).digest()}) == 3


def test_other_weights_of_the_same_headers_and_another_tokenizer_are_told_apart(folder):
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    before = open_checkpoint(folder).digests
    weights = next((folder / "transformer").glob("*.safetensors"))
    content = weights.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    weights.write_bytes(content[:start] + bytes(byte ^ 1 for byte in content[start:]))
    (folder / "tokenizer" / "tokenizer.json").write_text('{"another": 1}')
    after = open_checkpoint(folder).digests
    assert {name for name in after if after[name] != before[name]} == {"transformer", "tokenizer"}


def test_it_imports_neither_jax_nor_numpy():
    code = (
        "import sys, maxdiffusion.weights.checkpoint; print([m for m in ('jax', 'numpy', 'flax') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def shard(folder, i):
    return folder / "transformer" / f"diffusion_pytorch_model-{i:05}-of-00003.safetensors"


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def index(folder):
    return folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json"


def remove(folder, name):
    for path in (folder / name).iterdir():
        path.unlink()
    (folder / name).rmdir()


FOLDER_FAULTS = {
    "no model_index": (lambda f: (f / "model_index.json").unlink(), "no model_index.json"),
    "other pipeline": (lambda f: edit(f / "model_index.json", lambda c: c.update(_class_name="FluxPipeline")), "Flux"),
    "model_index is a list": (lambda f: (f / "model_index.json").write_text("[]"), "JSON list, not an object"),
    "scheduler's config is a list": (
        lambda f: (f / "scheduler/scheduler_config.json").write_text("[]"),
        r"scheduler_config\.json holds a JSON list, not an object",
    ),
    "no net": (lambda f: remove(f, "transformer"), "no folder 'transformer'"),
    "no tokenizer": (lambda f: remove(f, "tokenizer"), "no folder 'tokenizer'"),
    "no config": (lambda f: (f / "transformer/config.json").unlink(), r"config\.json does not exist"),
    "config cut": (lambda f: (f / "transformer/config.json").write_text('{"a"'), "not valid JSON"),
    "config nested too deep": (
        lambda f: (f / "transformer/config.json").write_text('{"a": ' + "[" * 100_000),
        "not valid JSON.*recursion",
    ),
    "model_index nested too deep": (lambda f: (f / "model_index.json").write_text("[" * 100_000), "not valid JSON"),
    "shard of another folder": (
        lambda f: edit(index(f), lambda c: c["weight_map"].update(ghost="../text_encoder/model.safetensors")),
        r"\.\./text_encoder/model\.safetensors is absent",
    ),
    "shard of a long name": (
        lambda f: edit(index(f), lambda c: c["weight_map"].update(ghost="x" * 300)),
        "x{300} is absent",
    ),
    "config is no text": (lambda f: (f / "transformer/config.json").write_bytes(b"\xff\xfe{"), "not valid JSON"),
    "other net": (
        lambda f: edit(f / "transformer/config.json", lambda c: c.update(_class_name="WanVACETransformer3DModel")),
        "'WanVACETransformer3DModel', and this command runs WanTransformer3DModel",
    ),
    "no class": (lambda f: (f / "text_encoder/config.json").write_text("{}"), "None, and this command runs UMT5"),
    "no weights": (lambda f: (f / "text_encoder/model.safetensors").unlink(), "holds no .*safetensors"),
    "pickle only": (
        lambda f: (f / "text_encoder/model.safetensors").rename(f / "text_encoder/pytorch_model.bin"),
        r"it has pytorch_model\.bin",
    ),
    "two of them": (lambda f: synthetic.write_net(f / "transformer", synthetic.tensors()), "unclear which"),
    "no shard": (lambda f: shard(f, 2).unlink(), "lists 3 files, of which .*-00002-of-00003.safetensors is absent"),
    "two shards absent": (lambda f: (shard(f, 2).unlink(), shard(f, 3).unlink()), "are absent"),
    "shard cut": (lambda f: shard(f, 1).write_bytes(shard(f, 1).read_bytes()[:-1]), "00001.*truncated"),
    "index without map": (lambda f: index(f).write_text("{}"), "no `weight_map`"),
    "index with a strange map": (lambda f: index(f).write_text('{"weight_map": {"a": 1}}'), "no `weight_map`"),
    "tensor not in its shard": (
        lambda f: edit(index(f), lambda c: c["weight_map"].update(ghost=shard(f, 1).name)),
        "disagree about 1 tensors: ghost",
    ),
    "tensor not in the index": (
        lambda f: edit(index(f), lambda c: c["weight_map"].pop("patch.bias")),
        r"disagree about 1 tensors: patch\.bias",
    ),
}


@pytest.mark.parametrize("fault", FOLDER_FAULTS)
def test_incomplete_checkpoint(folder, fault):
    damage, message = FOLDER_FAULTS[fault]
    damage(folder)
    with pytest.raises(UserError, match=message) as error:
        open_checkpoint(folder)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


def test_no_folder(tmp_path):
    with pytest.raises(UserError, match="is not a folder"):
        open_checkpoint(tmp_path / "nowhere")
