"""Updates that diffusers reads wrongly or not at all, against PEFT, LyCORIS and arithmetic written here."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import peft
import pytest
import torch
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule

from maxdiffusion.models.dit.config import DiTConfig
from maxdiffusion.weights import naming, sources
from maxdiffusion.weights.headers import read_header
from maxdiffusion.weights.lora.file import read
from maxdiffusion.weights.lora.merge import merge
from maxdiffusion.weights.tables import original
from tests.support import lora
from tests.support.lora import assert_close, numbers, opened
from tests.support.safetensors_file import write

NAME, THEIRS = "blocks.1.ffn.net.0.proj", "blocks.1.ffn.0"  # 32 x 24
CONV = "patch_embedding"  # 24 x 4 x 1 x 2 x 2
CONFIG = DiTConfig(2, 2, 12, 32, 4, 4, 16)


@pytest.fixture(autouse=True)
def small_strips(monkeypatch):
    monkeypatch.setattr(sources, "STRIP", 200)  # a few rows


@pytest.fixture
def rng():
    return np.random.default_rng(5)


def check(merged, plain, file, strength, **wanted):
    """Only the tensors of `wanted` (their names with _ for points) change, to those values."""
    before = numbers(opened(plain))
    assert_close(merged(plain, {file: strength}), before | {name.replace("__", "."): a for name, a in wanted.items()})


def base(plain, name):
    return numbers(opened(plain))[name]


@pytest.mark.parametrize("form", [lambda m: f"diffusion_model.{m}", lambda m: "lora_unet__" + m.replace(".", "_")])
@pytest.mark.parametrize(("ours", "theirs"), lora.OTHERS)
def test_alpha_outside_the_blocks(plain, tmp_path, merged, rng, form, ours, theirs):
    weight = base(plain, f"{ours}.weight")
    down, up = rng.normal(size=(4, weight.shape[1])), rng.normal(size=(weight.shape[0], 4))
    down, up = down.astype("f4"), up.astype("f4")
    tensors = {f"{form(theirs)}.lora_down.weight": down, f"{form(theirs)}.lora_up.weight": up}
    file = lora.write(tmp_path / "a.safetensors", tensors | {f"{form(theirs)}.alpha": np.array(8, np.int64)})
    check(merged, plain, file, 0.5, **{f"{ours}.weight": weight + 0.5 * 2 * up @ down})


def test_whole_differences(plain, tmp_path, merged, rng):
    """.diff, .diff_b, .diff_m and LyCORIS' w_norm and b_norm: as they are, without alpha."""
    net = opened(plain)
    names = {  # in the file -> ours
        "diffusion_model.blocks.0.diff_m": "blocks.0.scale_shift_table",
        "diffusion_model.blocks.1.modulation.diff": "blocks.1.scale_shift_table",
        "diffusion_model.head.diff_m": "scale_shift_table",
        "diffusion_model.head.head.diff": "proj_out.weight",
        "diffusion_model.head.head.diff_b": "proj_out.bias",
        "diffusion_model.patch_embedding.diff": "patch_embedding.weight",
        "diffusion_model.patch_embedding.diff_b": "patch_embedding.bias",
        "diffusion_model.blocks.0.norm3.diff": "blocks.0.norm2.weight",
        "diffusion_model.blocks.0.norm3.diff_b": "blocks.0.norm2.bias",
        "lycoris_blocks_1_norm2.w_norm": "blocks.1.norm2.weight",
        "lycoris_blocks_1_norm2.b_norm": "blocks.1.norm2.bias",
        "diffusion_model.blocks.0.self_attn.norm_q.diff": "blocks.0.attn1.norm_q.weight",
        "diffusion_model.time_projection.1.diff_b": "condition_embedder.time_proj.bias",
    }
    deltas = {theirs: rng.normal(size=net.tensors[ours].shape).astype("f4") for theirs, ours in names.items()}
    file = lora.write(tmp_path / "a.safetensors", deltas)
    before = numbers(net)
    check(merged, plain, file, -0.7, **{ours: before[ours] - 0.7 * deltas[theirs] for theirs, ours in names.items()})
    _, own = merge(net.tensors, net.config, read(file), 1.0)
    assert "9 of 9 modules, no alpha, 8 whole differences, 5 biases, strength 1" in str(own)


def linear(weight):
    module = torch.nn.Linear(*weight.shape[::-1])
    module.weight.data = torch.tensor(weight)
    return module


def convolution(weight):
    module = torch.nn.Conv3d(weight.shape[1], weight.shape[0], weight.shape[2:], stride=weight.shape[2:])
    module.weight.data = torch.tensor(weight)
    return module


def drawn(module, seed=0):
    """The parameters of a LyCORIS module, drawn anew: some of them start at zero."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return module


def update(own, shape):
    """As its forward has it; `get_diff_weight` of LoHa and LoKr applies the scale once more (4.1.3)."""
    return own.get_diff_weight(1.0, shape)[0] if isinstance(own, LoConModule) else own.get_weight(shape)


LYCORIS = {
    "LoHa": (LohaModule, {}),
    "LoKr": (LokrModule, {"factor": 4}),
    "LoKr, both factored": (LokrModule, {"factor": 8, "decompose_both": True, "lora_dim": 1}),
    "LoKr, both full": (LokrModule, {"factor": 4, "full_matrix": True}),
    "LoRA": (LoConModule, {}),
}


@pytest.mark.parametrize("alpha", [2, 4])
@pytest.mark.parametrize(("name", "tucker"), [(NAME, False), (CONV, False), (CONV, True)])
@pytest.mark.parametrize("kind", LYCORIS)
def test_lycoris(plain, tmp_path, merged, kind, name, tucker, alpha):
    weight = base(plain, f"{name}.weight")
    make, options = LYCORIS[kind]
    module = convolution(weight) if name == CONV else linear(weight)
    own = drawn(make("x", module, **{"lora_dim": 4, "alpha": alpha, "use_tucker": tucker, **options}))
    state = {f"lycoris_{name.replace('.', '_')}.{key}": value for key, value in own.custom_state_dict().items()}
    file = lora.write(tmp_path / "a.safetensors", {key: value.detach().numpy() for key, value in state.items()})
    change = update(own, weight.shape).detach().numpy()
    check(merged, plain, file, 0.5, **{f"{name}.weight": weight + 0.5 * change})


@pytest.mark.parametrize("on_output", [True, False])
@pytest.mark.parametrize("name", ["blocks.1.attn1.to_q", NAME, CONV])
@pytest.mark.parametrize("make", [LoConModule, LohaModule, LokrModule])
def test_dora_of_lycoris(plain, tmp_path, merged, make, name, on_output):
    """Norms of rows or of input channels, for a square matrix as well; a strength goes from W to W'."""
    weight = base(plain, f"{name}.weight")
    module = convolution(weight) if name == CONV else linear(weight)
    own = make("x", module, lora_dim=4, alpha=2, weight_decompose=True, wd_on_out=on_output)
    own = drawn(own)
    state = {f"lycoris_{name.replace('.', '_')}.{key}": value for key, value in own.custom_state_dict().items()}
    file = lora.write(tmp_path / "a.safetensors", {key: value.detach().numpy() for key, value in state.items()})
    want = own.apply_weight_decompose(torch.tensor(weight) + update(own, weight.shape)).detach().numpy()
    check(merged, plain, file, 1.0, **{f"{name}.weight": want})
    check(merged, plain, file, 0.4, **{f"{name}.weight": weight + 0.4 * (want - weight)})


class Net(torch.nn.Module):
    """Modules under their original names."""

    def __init__(self, weights):
        super().__init__()
        self.blocks = torch.nn.ModuleList([torch.nn.Module(), torch.nn.Module()])
        self.blocks[1].ffn = torch.nn.ModuleList([linear(weights[f"{NAME}.weight"])])
        self.blocks[1].ffn[0].bias.data = torch.tensor(weights[f"{NAME}.bias"])
        self.patch_embedding = convolution(weights[f"{CONV}.weight"])
        self.patch_embedding.bias.data = torch.tensor(weights[f"{CONV}.bias"])


def of_peft(plain, folder, config):
    """A file and its adapter_config.json as PEFT saves them, and the weights that PEFT merges."""
    net = peft.get_peft_model(Net(base_weights := numbers(opened(plain))), config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in net.named_parameters():
        if parameter.requires_grad and "magnitude" not in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
        elif parameter.requires_grad:
            parameter.data *= 1.5
    net.save_pretrained(folder)
    merged = net.merge_and_unload()
    wanted = {}
    for ours, module in ((NAME, merged.blocks[1].ffn[0]), (CONV, merged.patch_embedding)):
        wanted |= {f"{ours}.weight": module.weight, f"{ours}.bias": module.bias}
    wanted = {name: value.detach().numpy() for name, value in wanted.items()}
    assert any(not np.array_equal(array, base_weights[name]) for name, array in wanted.items())
    return folder / "adapter_model.safetensors", wanted


TARGETS = {"target_modules": ["ffn.0", "patch_embedding"], "r": 4, "lora_alpha": 6}
PEFT = {
    "plain": {},
    "rank-stabilized": {"use_rslora": True},
    "patterns": {"rank_pattern": {"ffn.0": 2}, "alpha_pattern": {"patch_embedding": 1}},
    "biases": {"lora_bias": True},
    "DoRA": {"use_dora": True},
}


@pytest.mark.parametrize("kind", PEFT)
def test_peft_with_its_adapter_config(plain, tmp_path, merged, kind):
    file, wanted = of_peft(plain, tmp_path, peft.LoraConfig(**TARGETS, **PEFT[kind]))
    check(merged, plain, file, 1.0, **wanted)


@pytest.mark.parametrize("rank", [2, 8])
@pytest.mark.parametrize("make", [peft.LoHaConfig, peft.LoKrConfig])
def test_products_of_peft(plain, tmp_path, merged, make, rank):
    """At rank 8 both factors of LoKr are whole."""
    file, wanted = of_peft(plain, tmp_path, make(target_modules=["ffn.0"], r=rank, alpha=3))
    check(merged, plain, file, 1.0, **wanted)


def test_a_global_alpha_in_the_header(plain, tmp_path, merged, rng):
    weight = base(plain, f"{NAME}.weight")
    down, up = rng.normal(size=(4, 24)).astype("f4"), rng.normal(size=(32, 4)).astype("f4")
    tensors = {f"{THEIRS}.lora_A.weight": down, f"{THEIRS}.lora_B.weight": up}
    for key, text in {"lora_alpha": "8", "network_alpha": "8.0", "alpha": "8", "ss_network_alpha": "8"}.items():
        file = lora.write(tmp_path / "a.safetensors", tensors, {key: text, "ss_network_dim": "4"})
        check(merged, plain, file, 1.0, **{f"{NAME}.weight": weight + 2 * up @ down})
    file = lora.write(tmp_path / "a.safetensors", tensors, {"ss_network_alpha": "Dynamic", "note": "{"})
    check(merged, plain, file, 1.0, **{f"{NAME}.weight": weight + up @ down})


def test_tensors_of_fp8_are_merged_in_fp32(tmp_path, rng):
    """With and without scales, by rows and whole; the sum is not rounded back to fp8."""
    codes = (rng.normal(size=(32, 24)) * 20).astype(ml_dtypes.float8_e4m3fn)
    down, up = rng.normal(size=(4, 24)).astype("f4"), (0.01 * rng.normal(size=(32, 4))).astype("f4")
    lora.write(tmp_path / "lora.safetensors", {f"{THEIRS}.lora_A.weight": down, f"{THEIRS}.lora_B.weight": up})
    for scale in (None, np.float32(0.01), rng.uniform(0.01, 1, 32).astype("f4")):
        file = {f"{THEIRS}.weight": codes}
        if scale is not None:
            file[f"{THEIRS}.scale_weight"] = np.asarray(scale)
        write(tmp_path / "base.safetensors", file)
        tensors = naming.normalised(read_header(tmp_path / "base.safetensors")[0], original.DIT)
        got, _ = merge(tensors, CONFIG, read(tmp_path / "lora.safetensors"), 1.0)
        factor = 1.0 if scale is None else np.reshape(scale, (-1, 1))
        want = codes.astype("f4") * factor + up @ down
        np.testing.assert_allclose(got[f"{NAME}.weight"].rows(0, 32), want, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(got[f"{NAME}.weight"].rows(5, 9), want[5:9], rtol=1e-6, atol=1e-6)


def test_what_rounding_removes(plain, tmp_path, rng):
    """All of an update far below a step of bfloat16, nothing of one far above; a stored bfloat16 base decides."""
    net = opened(plain)
    weight = net.tensors[f"{NAME}.weight"].rows(0, 32)
    write(tmp_path / "half.safetensors", {f"{NAME}.weight": weight.astype(ml_dtypes.bfloat16)})
    half = read_header(tmp_path / "half.safetensors")[0]
    down, up = rng.normal(size=(4, 24)).astype("f4"), rng.normal(size=(32, 4)).astype("f4")
    file = lora.write(tmp_path / "a.safetensors", {f"{NAME}.lora_A.weight": down, f"{NAME}.lora_B.weight": up})
    lost = {
        strength: merge(half, net.config, read(file), strength)[1].lost("bfloat16") for strength in (1e-7, 1e-5, 1.0)
    }
    assert lost[1e-7] == 1 and lost[1e-5] > 0.5 and abs(lost[1.0]) < 0.01
    assert abs(merge(half, net.config, read(file), 1e-4)[1].lost("float32")) < 0.01


def test_rows_of_one_tensor_for_two_modules(tmp_path, rng):
    """Animate's keys and values are one linear layer in the official files."""
    names = [f"face_adapter.3.{part}" for part in ("to_k", "to_v")]
    write(tmp_path / "base.safetensors", {f"{name}.weight": rng.normal(size=(24, 24)).astype("f4") for name in names})
    tensors = read_header(tmp_path / "base.safetensors")[0]
    module = "diffusion_model.face_adapter.fuser_blocks.3.linear1_kv"
    down, up = rng.normal(size=(4, 24)).astype("f4"), rng.normal(size=(48, 4)).astype("f4")
    file = lora.write(tmp_path / "a.safetensors", {f"{module}.lora_down.weight": down, f"{module}.lora_up.weight": up})
    got, _ = merge(tensors, CONFIG, read(file), 1.0)
    for i, name in enumerate(names):
        want = tensors[f"{name}.weight"].rows(0, 24) + (up @ down)[24 * i : 24 * i + 24]
        np.testing.assert_allclose(got[f"{name}.weight"].rows(0, 24), want, rtol=1e-5, atol=1e-5)
