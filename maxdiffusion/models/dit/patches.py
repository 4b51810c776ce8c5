"""Folds latents into tokens and back: each patch is one token, its features in (t, h, w, c) order."""

from __future__ import annotations

from jaxtyping import Array, Float

Size = tuple[int, int, int]


def fold(latents: Float[Array, "b f h w c"], patch: Size) -> Float[Array, "b s p"]:
    """Tokens in (f, h, w) order; the sides divide by the patch."""
    (pt, ph, pw), (b, f, h, w, _) = patch, latents.shape
    x = latents.reshape(b, f // pt, pt, h // ph, ph, w // pw, pw, -1).transpose(0, 1, 3, 5, 2, 4, 6, 7)
    return x.reshape(b, (f // pt) * (h // ph) * (w // pw), -1)


def unfold(tokens: Float[Array, "b s p"], patch: Size, grid: Size) -> Float[Array, "b f h w c"]:
    """The inverse of `fold`, for any number of channels; `grid` is the number of tokens on each axis."""
    (f, h, w), (pt, ph, pw), b = grid, patch, tokens.shape[0]
    x = tokens.reshape(b, f, h, w, pt, ph, pw, -1).transpose(0, 1, 4, 2, 5, 3, 6, 7)
    return x.reshape(b, f * pt, h * ph, w * pw, -1)
