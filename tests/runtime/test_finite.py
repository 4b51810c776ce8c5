import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from maxdiffusion.runtime.finite import fault

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([1, 2], ""),
        ([NAN, 2], "1 NaN"),
        ([INF, -INF], "2 infinite"),
        ([NAN, INF], "1 NaN and 1 infinite"),
        ([3e38, 1], ""),
    ],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_values_that_are_not_finite_are_counted(values, words, dtype):
    tree = {"a": jnp.asarray(values, dtype), "ids": jnp.arange(3), "none": None, "b": (np.ones((2, 2), np.float32),)}
    assert fault(tree) == words


def test_one_value_on_one_of_eight_devices_is_found():
    sharding = NamedSharding(Mesh(jax.devices(), "x"), P("x"))
    array = np.ones((16, 3), np.float32)
    assert fault(jax.device_put(array, sharding)) == ""
    array[13, 1] = NAN
    assert fault(jax.device_put(array, sharding)) == "1 NaN"


def test_nothing_has_no_fault():
    assert fault(()) == ""
