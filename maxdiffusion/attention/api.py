"""Self- and cross-attention in every mode, on global arrays that are split over the mesh inside."""

from __future__ import annotations

import jax
from jaxtyping import Array, Bool, Float

from maxdiffusion.attention.dense import Local
from maxdiffusion.attention.kernels import KERNELS
from maxdiffusion.attention.layout import pad_to_multiple, validity
from maxdiffusion.attention.plan import AttentionPlan
from maxdiffusion.errors import UserError
from maxdiffusion.parallel import Placement, axes, current


def self_attention(
    plan: AttentionPlan,
    q: Float[Array, "b s n d"],
    k: Float[Array, "b s n d"],
    v: Float[Array, "b s n d"],
    valid: Bool[Array, "b s"] | None = None,
) -> Float[Array, "b s n d"]:
    """Self-attention of the video tokens, split by the plan over the mesh of the current placement.

    The tokens are padded to a multiple of the context devices, and the padding is masked by its global position. A
    batch that does not divide over its devices is computed by each of them. A False in `valid` masks that key; a row
    without keys gives 0. Logits, softmax and sums are fp32; the result has the dtype of q.

    Raises:
      UserError: the mesh or its rules contradict the plan.
    """
    local = KERNELS[plan.kernel].local(plan.options)
    if plan.ring > 1:
        from maxdiffusion.attention.ring import ring

        local = ring(local, plan.ring, two_way=plan.ring_direction == "two_way")
    if plan.ulysses > 1:
        from maxdiffusion.attention.ulysses import ulysses

        local = ulysses(local, plan.chunks)
    return _attend(plan, local, q, k, v, valid, split_keys=plan.scheme != "local")


def cross_attention(
    plan: AttentionPlan,
    q: Float[Array, "b s n d"],
    k: Float[Array, "b k n d"],
    v: Float[Array, "b k n d"],
    valid: Bool[Array, "b k"] | None = None,
) -> Float[Array, "b s n d"]:
    """Attention of the video tokens to keys of text or images, which are replicated over the context devices.

    Queries are not moved, in any scheme; there is no communication if the keys arrive replicated. Otherwise as
    `self_attention`.
    """
    local = KERNELS[plan.kernel].local(plan.options)
    return _attend(plan, local, q, k, v, valid, split_keys=False)


def check(plan: AttentionPlan, placement: Placement | None) -> None:
    """Checks that the plan can run under the placement.

    Raises:
      UserError: the mesh or its rules contradict the plan.
    """
    if plan.scheme == "local":
        return
    mesh = {} if placement is None else dict(placement.mesh.shape)
    given = mesh.get(axes.RING, 1), mesh.get(axes.ULYSSES, 1)
    if given != (plan.ring, plan.ulysses):
        raise UserError(
            f"The attention plan is for ring {plan.ring} x ulysses {plan.ulysses}, but the mesh has {given[0]} x "
            f"{given[1]}; make the mesh with ulysses={plan.ulysses} and a context of {plan.context}."
        )
    if placement is not None and placement.rules.get(axes.SEQUENCE) != axes.CONTEXT:
        raise UserError(
            f"The logical axis {axes.SEQUENCE!r} is mapped to {placement.rules.get(axes.SEQUENCE) or None}, but "
            f"attention={plan.scheme} needs it on {axes.CONTEXT!r}; remove that rule or choose attention=dot_product."
        )


def _attend(
    plan: AttentionPlan,
    local: Local,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    valid: jax.Array | None,
    *,
    split_keys: bool,
) -> jax.Array:
    """Pads, runs `local` on every device's shard, and cuts the padding; masks are replicated over the context axis.

    Without a placement or on one device it only calls `local`.
    """

    def per_device(q: jax.Array, k: jax.Array, v: jax.Array, valid: jax.Array | None) -> jax.Array:
        return local(q, k, v, valid)[0].astype(q.dtype)

    placement = current()
    check(plan, placement)
    if placement is None or placement.mesh.size == 1:
        return per_device(q, k, v, valid)

    length, keys = q.shape[1], k.shape[1]
    context = placement.degree(axes.SEQUENCE)
    batch = placement.dividing(axes.BATCH, q.shape[0])
    query_spec = placement.spec(batch, axes.SEQUENCE, axes.HEADS, None)
    key_spec = query_spec if split_keys else placement.spec(batch, None, axes.HEADS, None)

    q = pad_to_multiple(q, 1, context)
    k, v = (pad_to_multiple(x, 1, context if split_keys else 1) for x in (k, v))
    valid = validity(q.shape[0], keys, k.shape[1], valid)
    specs = (query_spec, key_spec, key_spec, None if valid is None else placement.spec(batch, None))
    # check_vma=False: Pallas kernels do not declare the mesh axes over which their results vary.
    run = jax.shard_map(per_device, mesh=placement.mesh, in_specs=specs, out_specs=query_spec, check_vma=False)
    return run(q, k, v, valid)[:, :length]
