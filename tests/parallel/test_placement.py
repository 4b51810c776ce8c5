import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from maxdiffusion import parallel
from maxdiffusion.attention.api import self_attention
from maxdiffusion.attention.plan import AttentionPlan
from maxdiffusion.errors import UserError
from maxdiffusion.parallel import axes, rules_for


def placement(ulysses=1, overrides=(), **degrees):
    return parallel.Placement(parallel.make_mesh(parallel.Degrees(**degrees), ulysses=ulysses), rules_for(overrides))


def test_every_logical_axis_has_a_rule():
    names = {value for key, value in vars(axes).items() if key.isupper() and isinstance(value, str)}
    assert names - set(axes.MESH_AXES) == set(rules_for())


@pytest.mark.parametrize(
    ("override", "want"),
    [
        (("batch", "data"), ("data",)),
        (("batch", ["data", "ring"]), ("data", "ring")),
        (("embed", "context"), axes.CONTEXT),
        (("embed", ["fsdp", "context"]), ("fsdp", "ring", "ulysses")),
        (("embed", None), ()),
        (("embed", []), ()),
    ],
)
def test_the_users_rule_wins(override, want):
    table = rules_for([override])
    assert table[override[0]] == want
    assert {k: v for k, v in table.items() if k != override[0]} == {
        k: v for k, v in rules_for().items() if k != override[0]
    }


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([("activation_batch", "data")], "'activation_batch', which is unknown; choose one of batch, sequence"),
        ([("batch", "date")], "'date', which is unknown; choose from data, fsdp, ring, ulysses, tensor or context"),
        ([("batch", ["data", "data"])], "'data' twice"),
        ([("batch", ["context", "ring"])], "'ring' twice"),
        ([("batch", "data"), ("batch", None)], "'batch' twice"),
    ],
)
def test_bad_rules(overrides, words):
    with pytest.raises(UserError, match=words):
        rules_for(overrides)


def test_specs_and_collisions():
    place = placement(ulysses=2, data=2, context=4)
    assert place.spec("batch", "sequence", None) == PartitionSpec(("data", "fsdp"), ("ring", "ulysses"), None)
    with pytest.raises(UserError, match="'fsdp' twice"):
        place.spec("batch", "embed")
    with pytest.raises(UserError, match="'head' is unknown"):
        place.spec("head")


def test_shard_places_and_replicates_a_batch_that_does_not_divide():
    place = placement(data=2, context=4)
    with parallel.use(place):
        even = jax.jit(lambda x: parallel.shard(x, axes.BATCH, axes.SEQUENCE))(jnp.ones((2, 8)))
        odd = jax.jit(lambda x: parallel.shard(x, axes.BATCH, axes.SEQUENCE))(jnp.ones((3, 8)))
    assert even.sharding.shard_shape(even.shape) == (1, 2)
    assert odd.sharding.shard_shape(odd.shape) == (3, 2)
    assert parallel.shard(jnp.ones(3), axes.BATCH).sharding.num_devices == 1


def test_a_function_jitted_once_follows_the_placement():
    run = jax.jit(lambda x: parallel.shard(x, axes.BATCH, axes.SEQUENCE))
    for degrees, shape in (({"context": 8}, (2, 1)), ({"data": 2, "context": 4}, (1, 2))):
        with parallel.use(placement(**degrees)):
            out = run(jnp.ones((2, 8)))
        assert out.sharding.shard_shape(out.shape) == shape
    assert parallel.current() is None and run(jnp.ones((2, 8))).sharding.num_devices == 1


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ({"ulysses": 2, "context": 8}, "ring 2 x ulysses 4, but the mesh has 4 x 2"),
        ({"ulysses": 4, "context": 8, "overrides": [("sequence", None)]}, "needs it on"),
        (None, "but the mesh has 1 x 1"),
    ],
)
def test_a_plan_for_another_mesh_is_refused(place, words):
    q = jnp.ones((1, 16, 8, 4))
    plan = AttentionPlan("ulysses_ring", "chunked", 2, 4, 8)
    with parallel.use(placement(**place) if place else None), pytest.raises(UserError, match=words):
        self_attention(plan, q, q, q)


@pytest.mark.parametrize("mask", [jnp.ones((2, 16), bool), jnp.ones((1, 15), bool), jnp.ones((1, 16))])
def test_a_mask_of_another_shape_or_type_is_refused(mask):
    q = jnp.ones((1, 16, 8, 4))
    with pytest.raises(Exception, match=r"mask is|type-check|Type-check|violates"):
        self_attention(AttentionPlan(), q, q, q, mask)
