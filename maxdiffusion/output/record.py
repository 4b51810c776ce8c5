"""The record beside a video: all that is needed to make it again."""

import json
from collections.abc import Mapping
from typing import Any

from maxdiffusion.runtime.atomic import atomic_path
from maxdiffusion.runtime.paths import AnyPath


def write_record(
    path: AnyPath,
    *,
    config: Mapping[str, Any],
    seed: int,
    versions: Mapping[str, Any],
    timings: Mapping[str, Any],
    output: AnyPath,
    overwrite: bool = False,
) -> None:
    """Write `<stem>.json`, whole or not at all.

    Args:
        path: the target.
        config: the resolved config as JSON types.
        seed: the seed of this one video (the config may name several).
        versions: `maxdiffusion.runtime.versions.versions()`.
        timings: `Clock.as_dict()`.
        output: the video; stored by name, since both lie in one folder that may be moved.
        overwrite: replace `path` where it exists.

    Raises:
        UserError: the target exists or cannot be written.
        TypeError, ValueError: a value that JSON cannot hold.
    """
    record = {"output": output.name, "seed": seed, "config": config, "versions": versions, "timings": timings}
    text = json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with atomic_path(path, overwrite) as temporary:
        temporary.write_bytes(text.encode("utf-8", "backslashreplace"))
