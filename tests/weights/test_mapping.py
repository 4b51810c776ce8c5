import re

import numpy as np
import pytest

from maxdiffusion.errors import UserError
from maxdiffusion.weights.headers import read_tensors
from maxdiffusion.weights.mapping import match
from maxdiffusion.weights.naming import grouped
from maxdiffusion.weights.rule import Rule, Transform
from tests.support import synthetic


def error(tmp_path, stored, net=None, rules=synthetic.RULES):
    synthetic.write_net(tmp_path, stored)
    with pytest.raises(UserError) as caught:
        match(read_tensors(tmp_path), rules, net or synthetic.Net(), what=str(tmp_path))
    message = str(caught.value)
    assert str(tmp_path) in message and "\n" not in message
    return message


def test_every_slot_finds_its_tensor(tmp_path):
    synthetic.write_net(tmp_path, synthetic.tensors(), shards=3)
    assigned = match(read_tensors(tmp_path), synthetic.RULES, synthetic.Net(), what="")
    assert {target: [(p.layer, p.tensor.name) for p in found] for target, found in assigned.items()} == {
        "embed.embedding": [(None, "shared.weight")],
        "patch.kernel": [(None, "patch.weight")],
        "patch.bias": [(None, "patch.bias")],
        "blocks.ffn.kernel": [(i, f"blocks.{i}.ffn.weight") for i in range(3)],
        "blocks.ffn.bias": [(i, f"blocks.{i}.ffn.bias") for i in range(3)],
        "blocks.norm.scale": [(i, f"blocks.{i}.norm.gamma") for i in range(3)],
        "heads.0.kernel": [(None, "heads.0.weight")],
        "heads.1.kernel": [(None, "heads.1.weight")],
    }


def test_all_that_is_missing_and_all_that_is_left_over(tmp_path):
    stored = synthetic.tensors()
    for name in ("patch.bias", "blocks.0.ffn.weight", "blocks.2.ffn.weight", "shared.weight"):
        del stored[name]
    stored |= {f"blocks.{i}.lora.weight": np.zeros(1, np.float32) for i in (0, 1, 2, 7)}
    message = error(tmp_path, stored)
    missing = "4 missing from the checkpoint: shared.weight, patch.bias, blocks.{0,2}.ffn.weight"
    assert missing in message
    assert "4 not a part of the model: blocks.{0-2,7}.lora.weight" in message


def test_of_many_names_the_first_are_told(tmp_path):
    stored = synthetic.tensors() | {f"{letter}.weight": np.zeros(1, np.float32) for letter in "abcdefgh"}
    message = error(tmp_path, stored)
    assert "8 not a part of the model: a.weight, b.weight, c.weight, d.weight, e.weight, f.weight, ...;" in message


@pytest.mark.parametrize(("layers", "message"), [(4, "3 missing from"), (2, "3 not a part of the model")])
def test_another_number_of_layers(tmp_path, layers, message):
    text = error(tmp_path, synthetic.tensors(), synthetic.Net(layers=layers))
    layer = max(2, layers - 1)
    assert message in text and f"blocks.{layer}.ffn.weight" in text


def test_wrong_shapes_are_told_in_torch_order(tmp_path):
    stored = synthetic.tensors()
    for i in range(3):
        stored[f"blocks.{i}.ffn.weight"] = stored[f"blocks.{i}.ffn.weight"].T.copy()
    stored["patch.weight"] = np.zeros((16, 5, 1, 2, 2), np.float32)
    stored["blocks.1.norm.gamma"] = np.zeros((17, 1, 1), np.float32)
    message = error(tmp_path, stored)
    assert "3 stored as 16x24 instead of 24x16: blocks.{0-2}.ffn.weight" in message
    assert "1 stored as 16x5x1x2x2 instead of 16x4x1x2x2: patch.weight" in message
    assert "1 stored as 17x1x1 instead of 16: blocks.1.norm.gamma" in message


def test_integers_are_not_weights(tmp_path):
    stored = synthetic.tensors()
    stored["patch.bias"] = np.zeros(16, np.int8)
    assert "1 stored as I8 instead of F64, F32, BF16, F16, F8_E4M3, F8_E5M2: patch.bias" in error(tmp_path, stored)


def test_a_parameter_that_no_rule_names(tmp_path):
    rules = tuple(rule for rule in synthetic.RULES if "heads" not in rule.source)
    message = error(tmp_path, synthetic.tensors(), rules=rules)
    assert "2 parameters that no tensor is known for: heads.{0-1}.kernel" in message
    assert "2 not a part of the model: heads.{0-1}.weight" in message


def test_what_is_ignored_is_said(tmp_path):
    stored = synthetic.tensors() | {f"blocks.{i}.norm_added_q.weight": np.zeros(1, np.float32) for i in range(3)}
    synthetic.write_net(tmp_path, stored)
    tensors, net = read_tensors(tmp_path), synthetic.Net()
    with pytest.raises(UserError, match=re.escape("blocks.{0-2}.norm_added_q.weight")):
        match(tensors, synthetic.RULES, net, what="")
    match(tensors, synthetic.RULES, net, what="", ignored=[r"blocks\.\d+\.norm_added_q\.weight"])


@pytest.mark.parametrize(
    "extra", [Rule("other.weight", "patch.bias"), Rule("blocks.{layer}.x", "blocks.ffn.bias"), synthetic.RULES[0]]
)
def test_an_ambiguous_table_is_our_mistake(tmp_path, extra):
    synthetic.write_net(tmp_path, synthetic.tensors())
    with pytest.raises(ValueError, match="two rules"):
        match(read_tensors(tmp_path), (*synthetic.RULES, extra), synthetic.Net(), what="")


def test_a_fold_of_axes_keeps_the_number_of_elements(tmp_path):
    """A patch embedding: a convolution on disk, a matrix in memory."""
    rules = (*(rule for rule in synthetic.RULES if rule.source != "patch.bias"), Rule("p", "patch.bias", reshape=True))
    stored = synthetic.tensors()
    stored["p"] = stored.pop("patch.bias").reshape(4, 2, 2)
    synthetic.write_net(tmp_path, stored)
    assert match(read_tensors(tmp_path), rules, synthetic.Net(), what="")["patch.bias"][0].shape == (16,)
    assert Transform.LINEAR.value == (1, 0)


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        ([], []),
        (["a"], ["a"]),
        (["a.0.w", "a.1.w", "b"], ["a.{0-1}.w", "b"]),
        (["a.10.w", "a.2.w", "a.3.w", "a.w"], ["a.{2-3,10}.w", "a.w"]),
        (["up.0.res.1.w", "up.1.res.1.w", "up.0.res.2.w"], ["up.{0-1}.res.1.w", "up.0.res.2.w"]),
        (["to_out.0", "to_out.1"], ["to_out.{0-1}"]),
        (["w2.norm1"], ["w2.norm1"]),
    ],
)
def test_grouped(names, wanted):
    assert grouped(names) == wanted
