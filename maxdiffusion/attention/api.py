"""Self- and cross-attention in every mode, on global arrays that are split over the mesh inside."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from maxdiffusion.attention.dense import Local
from maxdiffusion.attention.eight_bits import eight_bits
from maxdiffusion.attention.frames import FrameKeys, attend_frames
from maxdiffusion.attention.kernels import KERNELS
from maxdiffusion.attention.layout import pad_to_multiple, validity
from maxdiffusion.attention.merge import merge
from maxdiffusion.attention.plan import AttentionPlan
from maxdiffusion.errors import UserError
from maxdiffusion.parallel import TILE_ROWS, Placement, axes, current, token_multiple


def self_attention(
    plan: AttentionPlan,
    q: Float[Array, "b s n d"],
    k: Float[Array, "b s n d"],
    v: Float[Array, "b s n d"],
    valid: Bool[Array, "b s"] | None = None,
    frames: FrameKeys | None = None,
    log_scale: float = 0.0,
) -> Float[Array, "b s n d"]:
    """Self-attention of the video tokens, split by the plan over the mesh of the current placement.

    The tokens are padded to `parallel.token_multiple`, and the padding is masked by its global position. A batch that
    does not divide over its devices is computed by each of them. A False in `valid` masks that key; a row without keys
    gives 0. Logits, softmax and sums are fp32; the result has the dtype of q.

    With `frames` each query has the keys of its frame too, in one softmax, merged by the log-sum-exp; `log_scale` is
    then added to the logits of the keys of frame 1 among the tokens.

    Raises:
      UserError: the mesh or its rules contradict the plan.
    """
    kernel = KERNELS[plan.kernel]
    local = kernel.local(plan.options)
    if plan.quantization == "fp8":
        local = eight_bits(local, native=kernel.eight_bits)
    if plan.ring > 1:
        from maxdiffusion.attention.ring import ring

        unit = TILE_ROWS if kernel.platforms == ("tpu",) else 1
        local = ring(local, plan.ring, two_way=plan.ring_direction == "two_way", unit=unit, merges=kernel.merges)
    if plan.ulysses > 1:
        from maxdiffusion.attention.ulysses import ulysses

        local = ulysses(local, plan.chunks)
    scaled = None
    if frames is not None and log_scale:
        span = slice(frames.per_frame, 2 * frames.per_frame)
        valid = jnp.ones(k.shape[:2], bool) if valid is None else valid
        scaled, valid = (k[:, span], v[:, span]), valid.at[:, span].set(False)
    split = plan.scheme != "local"
    return _attend(plan, local, q, k, v, valid, split_keys=split, frames=frames, scaled=scaled, log_scale=log_scale)


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
    frames: FrameKeys | None = None,
    scaled: tuple[jax.Array, jax.Array] | None = None,
    log_scale: float = 0.0,
) -> jax.Array:
    """Pads, runs `local` on every device's shard, and cuts the padding; masks are replicated over the context axis.

    Without a placement or on one device it only calls `local`. The keys of `frames` and `scaled` are merged.
    """
    placement = current()
    check(plan, placement)
    sequence = () if placement is None or placement.mesh.size == 1 else placement.rules.get(axes.SEQUENCE, ())
    kernel = KERNELS[plan.kernel].local(plan.options)

    def per_device(
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        valid: jax.Array | None,
        frames: FrameKeys | None,
        scaled: tuple[jax.Array, jax.Array] | None,
    ) -> jax.Array:
        out, lse = local(q, k, v, valid)
        if frames is not None:
            shard = jax.lax.axis_index(sequence) if sequence else 0
            other = attend_frames(kernel, q, frames.k[:, 0], frames.v[:, 0], shard, frames.per_frame)
            out, lse = merge(out, lse, *other)
        if scaled is not None:
            scaled_out, scaled_lse = kernel(q, *scaled, None)
            out, lse = merge(out, lse, scaled_out, scaled_lse + log_scale)
        return out.astype(q.dtype)

    if placement is None or placement.mesh.size == 1:
        return per_device(q, k, v, valid, frames, scaled)

    length, keys = q.shape[1], k.shape[1]
    multiple = token_multiple()
    batch = placement.dividing(axes.BATCH, q.shape[0])
    query_spec = placement.spec(batch, axes.SEQUENCE, axes.HEADS, None)
    key_spec = query_spec if split_keys else placement.spec(batch, None, axes.HEADS, None)

    q = pad_to_multiple(q, 1, multiple)
    k, v = (pad_to_multiple(x, 1, multiple if split_keys else 1) for x in (k, v))
    valid = validity(q.shape[0], keys, k.shape[1], valid)
    mask_spec, frame_spec = placement.spec(batch, None), placement.spec(batch, axes.SEQUENCE, None, axes.HEADS, None)
    whole_spec = placement.spec(batch, None, axes.HEADS, None)
    specs = (query_spec, key_spec, key_spec, mask_spec, frame_spec, whole_spec)  # None, a tree without leaves, has any
    # check_vma=False: Pallas kernels do not declare the mesh axes over which their results vary.
    run = jax.shard_map(per_device, mesh=placement.mesh, in_specs=specs, out_specs=query_spec, check_vma=False)
    return run(q, k, v, valid, frames, scaled)[:, :length]
