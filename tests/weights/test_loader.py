import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.experimental.layout import Layout
from jax.sharding import AxisType

from maxdiffusion.errors import UserError
from maxdiffusion.parallel import Placement, axes
from maxdiffusion.runtime import paths
from maxdiffusion.weights import loader, mapping, sources
from maxdiffusion.weights.headers import read_tensors
from tests.support import synthetic
from tests.support.bucket import Bucket, bucket

__all__ = ["bucket"]  # a fixture


def load(folder, net, placement=None, on_tensor=lambda nbytes: None):
    assignments = mapping.match(read_tensors(folder), synthetic.RULES, net, what=str(folder))
    return loader.materialize(net, assignments, placement, on_tensor)


def values(net):
    return {name: param.get_value() for name, param in mapping.parameters(net).items()}


def mesh_placement(fsdp, tensor):
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices")
    shape = (8 // (fsdp * tensor), fsdp, 1, 1, tensor)
    mesh = jax.make_mesh(shape, axes.MESH_AXES, axis_types=(AxisType.Auto,) * 5)
    return Placement(mesh, {axes.EMBED: (axes.FSDP,), axes.MLP: (axes.TENSOR,), axes.VOCAB: (axes.TENSOR,)})


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("stored_as", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("loaded_as", [jnp.float32, jnp.bfloat16])
def test_values_dtypes_and_progress(tmp_path, shards, stored_as, loaded_as):
    stored = synthetic.tensors(dtype=stored_as)
    synthetic.write_net(tmp_path, stored, shards)
    read = []
    got = values(load(tmp_path, synthetic.Net(dtype=loaded_as), on_tensor=read.append))
    want = synthetic.expected(stored)
    assert got.keys() == want.keys()
    for name, array in got.items():
        dtype = jnp.float32 if name == "blocks.norm.scale" else loaded_as
        assert array.dtype == dtype
        np.testing.assert_array_equal(np.asarray(array), want[name].astype(dtype), err_msg=name)
    assert sorted(read) == sorted(array.nbytes for array in stored.values())


@pytest.mark.parametrize(("fsdp", "tensor"), [(1, 1), (4, 2), (2, 4), (8, 1)])
@pytest.mark.parametrize("strip", [1, 200, 2**20])
def test_every_shard_holds_its_part(tmp_path, monkeypatch, fsdp, tensor, strip):
    monkeypatch.setattr(sources, "STRIP", strip)
    stored = synthetic.tensors()
    synthetic.write_net(tmp_path, stored)
    placement = mesh_placement(fsdp, tensor)
    got = values(load(tmp_path, synthetic.Net(), placement))
    for name, want in synthetic.expected(stored).items():
        for shard in got[name].addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), want[shard.index], err_msg=name)
    assert got["blocks.ffn.kernel"].sharding.is_equivalent_to(
        placement.sharding(axes.LAYERS, axes.EMBED, axes.MLP), ndim=3
    )
    assert got["blocks.ffn.kernel"].addressable_shards[0].data.shape == (3, 16 // fsdp, 24 // tensor)


@pytest.mark.parametrize("request_bytes", [100, 2**20])
def test_a_bucket_gives_each_shard_its_rows(bucket, monkeypatch, request_bytes):
    monkeypatch.setattr(sources, "RANGE", request_bytes)
    stored, there = synthetic.tensors(), paths.parse("gs://bucket/net")
    synthetic.write_net(bucket.root / "bucket" / "net", stored, 3)
    got = values(load(there, synthetic.Net(), mesh_placement(4, 2)))
    for name, want in synthetic.expected(stored).items():
        np.testing.assert_array_equal(np.asarray(got[name]), want, err_msg=name)
    assert bucket.most_at_once > 1


@pytest.mark.parametrize("fault", [OSError(5, "no answer"), ValueError("HTTP 403")])
def test_a_bucket_that_stops_answering_is_one_sentence(bucket, monkeypatch, fault):
    synthetic.write_net(bucket.root / "bucket" / "net", synthetic.tensors())

    def fail(*args, **kwargs):
        raise fault

    monkeypatch.setattr(Bucket, "cat_file", fail)
    with pytest.raises(UserError, match=r"gs://bucket/net/.* cannot be read \((no answer|HTTP 403)\)"):
        load(paths.parse("gs://bucket/net"), synthetic.Net())
    monkeypatch.setattr(Bucket, "cat_file", lambda *args, **kwargs: b"")
    with pytest.raises(UserError, match="ends within"):
        load(paths.parse("gs://bucket/net"), synthetic.Net())


@pytest.mark.parametrize("place", ["here", "gs://bucket/net"])
def test_slot_by_slot_equals_the_whole_stack(tmp_path, bucket, monkeypatch, place):
    """The way of devices other than the CPU, here on CPU devices."""
    stored = synthetic.tensors()
    folder = tmp_path if place == "here" else bucket.root / "bucket" / "net"
    synthetic.write_net(folder, stored)
    placement = mesh_placement(4, 2)
    folder = folder if place == "here" else paths.parse(place)
    whole, by_slot = [], []
    want = values(load(folder, synthetic.Net(), placement, whole.append))
    monkeypatch.setattr(loader, "ALIASING", ())
    got = values(load(folder, synthetic.Net(), placement, by_slot.append))
    assert sorted(by_slot) == sorted(whole)
    for name, array in synthetic.expected(stored).items():
        assert got[name].sharding.is_equivalent_to(want[name].sharding, ndim=array.ndim)
        np.testing.assert_array_equal(np.asarray(got[name]), array, err_msg=name)


@pytest.mark.parametrize("place", [lambda: None, lambda: mesh_placement(2, 4)], ids=["one device", "mesh"])
def test_stacked_bf16_matrices_have_the_layout_of_their_kind_of_device(tmp_path, monkeypatch, place):
    """The CPU's is one of this test; programs take the parameters as they lie. What is split keeps the usual layout."""
    monkeypatch.setattr(loader, "MATRICES", {jax.devices()[0].device_kind: Layout((0, 2, 1))})
    stored = synthetic.tensors()
    synthetic.write_net(tmp_path, stored)
    got = values(load(tmp_path, synthetic.Net(dtype=jnp.bfloat16), place()))
    abstract = values(loader.placed(synthetic.Net(dtype=jnp.bfloat16), place()))
    turned = set()
    for name, want in synthetic.expected(stored).items():
        whole = want.ndim == 3 and got[name].dtype == jnp.bfloat16 and got[name].sharding.is_fully_replicated
        order = (0, 2, 1) if whole else tuple(range(want.ndim))
        turned |= {name} if whole else set()
        assert got[name].format.layout.major_to_minor == order, name
        assert not whole or abstract[name].format.layout.major_to_minor == order, name
        np.testing.assert_array_equal(np.asarray(got[name]), want.astype(got[name].dtype), err_msg=name)
    assert ("blocks.ffn.kernel" in turned) == (place() is None)
    compiled = jax.jit(lambda kernel: kernel * 2).lower(got["blocks.ffn.kernel"]).compile()
    assert compiled.input_formats[0][0].layout == got["blocks.ffn.kernel"].format.layout


def test_strips_are_the_rows_that_are_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "STRIP", 48)
    stored = {"w": np.arange(64, dtype=np.float32).reshape(16, 4)}
    synthetic.write_net(tmp_path, stored)
    tensor = read_tensors(tmp_path)["w"]
    strips = list(sources.strips(tensor, 4, 12))
    assert [(first, len(strip)) for first, strip in strips] == [(4, 3), (7, 3), (10, 2)]
    np.testing.assert_array_equal(np.concatenate([strip for _, strip in strips]), stored["w"][4:12])


def test_the_abstract_net_can_be_loaded_twice(tmp_path):
    synthetic.write_net(tmp_path, synthetic.tensors())
    net = synthetic.Net()
    first, second = load(tmp_path, net), load(tmp_path, net)
    assert isinstance(mapping.parameters(net)["patch.bias"].get_value(), jax.ShapeDtypeStruct)
    first.patch.bias.set_value(first.patch.bias.get_value() + 1)
    np.testing.assert_array_equal(np.asarray(second.patch.bias.get_value()), synthetic.tensors()["patch.bias"])


def test_donating_one_copy_leaves_the_others_alone(tmp_path):
    """On the CPU the replicas of one parameter alias one host buffer, which nobody may then write to."""
    stored = synthetic.tensors()
    synthetic.write_net(tmp_path, stored)
    kernel = load(tmp_path, synthetic.Net(), mesh_placement(1, 1)).blocks.ffn.kernel.get_value()
    first, second = (shard.data for shard in kernel.addressable_shards[:2])
    assert first.unsafe_buffer_pointer() == second.unsafe_buffer_pointer()
    jax.block_until_ready(jax.jit(lambda x: x * 0, donate_argnums=0)(first))
    np.testing.assert_array_equal(np.asarray(second), synthetic.expected(stored)["blocks.ffn.kernel"])


@pytest.mark.parametrize("same", [True, False])
def test_a_tensor_stored_under_both_names_must_agree(tmp_path, same):
    stored = synthetic.tensors()
    stored["encoder.embed_tokens.weight"] = stored["shared.weight"] + (0 if same else np.float32(1e-3))
    synthetic.write_net(tmp_path, stored)
    if same:
        net = load(tmp_path, synthetic.Net())
        np.testing.assert_array_equal(np.asarray(net.embed.embedding.get_value()), stored["shared.weight"])
    else:
        with pytest.raises(UserError, match=r"shared\.weight.*encoder\.embed_tokens\.weight.*differ"):
            load(tmp_path, synthetic.Net())


def test_either_name_will_do(tmp_path):
    stored = synthetic.tensors()
    stored["encoder.embed_tokens.weight"] = stored.pop("shared.weight")
    synthetic.write_net(tmp_path, stored)
    net = load(tmp_path, synthetic.Net())
    np.testing.assert_array_equal(np.asarray(net.embed.embedding.get_value()), stored["encoder.embed_tokens.weight"])


def test_a_file_cut_after_the_check(tmp_path):
    synthetic.write_net(tmp_path, synthetic.tensors())
    net = synthetic.Net()
    headers = read_tensors(tmp_path)
    assignments = mapping.match(headers, synthetic.RULES, net, what="")
    file = next(iter(headers.values())).file
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(UserError, match="changed while loading"):
        loader.materialize(net, assignments)
    file.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        loader.materialize(net, assignments)


def test_axes_and_shape_must_agree(tmp_path):
    synthetic.write_net(tmp_path, synthetic.tensors())
    net = synthetic.Net()
    net.patch.bias.set_metadata(out_sharding=("embed", "mlp"))
    with pytest.raises(ValueError, match=r"patch\.bias"):
        load(tmp_path, net, mesh_placement(1, 1))
