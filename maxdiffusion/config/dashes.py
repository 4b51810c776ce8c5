"""Arguments with dashes, as the official command has them, rewritten as key=value."""

from __future__ import annotations

from collections.abc import Sequence

from maxdiffusion.config import dialects, schema
from maxdiffusion.errors import UserError

_BOOLEANS = {"true", "false", "yes", "no", "on", "off", "1", "0"}


def plain(argv: Sequence[str]) -> list[str]:
    """Rewrites `--KEY VALUE`, `--KEY=VALUE` and a `--KEY` that needs no value as `KEY=VALUE`; leaves other words.

    A dash within a name stands for an underscore: --num-frames 81 is num_frames=81.

    Raises:
      UserError: a value is missing, or an option has one dash.
    """
    words, left = [], list(argv)
    while left:
        word = left.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if not word.startswith("-"):
            words.append(word)
            continue
        if not word.startswith("--") or not name:
            raise UserError(f"unknown option {word!r}; write KEY=VALUE or --KEY VALUE, or --help for the keys.")
        if not equals:
            follows = left[0] if left else "--"
            if name in dialects.FLAGS or schema.is_bool(name):
                value = left.pop(0) if follows.lower() in _BOOLEANS else "true"
            elif follows.startswith("--"):
                raise UserError(f"--{name} has no value; write --{name} VALUE or {name}=VALUE.")
            else:
                value = left.pop(0)
        words.append(f"{name}={value}")
    return words
