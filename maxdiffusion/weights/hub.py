"""A checkpoint's local folder: one that is here already, or one fetched from a hub."""

from __future__ import annotations

import contextlib
import errno
import glob
import logging
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from maxdiffusion.errors import UserError
from maxdiffusion.runtime.paths import AnyPath, probe
from maxdiffusion.weights.headers import read_json

log = logging.getLogger(__name__)

_PATTERNS = ["*.json", "*.safetensors", "tokenizer/*"]  # the files of the diffusers layout; no pictures, no pickles

TIMEOUT = 30  # seconds that a hub may be silent
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FILE = re.compile(rf"({_HUB_ID.pattern})/(.+\.safetensors)")
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def resolve(name_or_path: str, revision: str | None = None, ignore: Sequence[str] = (), fetch: bool = True) -> AnyPath:
    """The folder of a checkpoint; a folder that exists wins over a hub id of the same spelling.

    Files are fetched into huggingface_hub's cache, where a file has its name only once it is whole. HF_ENDPOINT,
    HF_HUB_OFFLINE, HF_TOKEN and HF_HOME mean the same as for that library. Each of several processes fetches into the
    cache of its own host; where they share one, the library's file locks let one fetch and the others wait.

    Args:
      name_or_path: a folder (gs://... is read in place), or `organisation/name` on the hub.
      revision: branch, tag or commit on the hub; None is its main branch.
      ignore: file names that are not fetched, with wildcards.
      fetch: whether files that are not in the cache may be fetched.

    Raises:
      UserError: neither a folder nor a hub id; no such repository or revision; gated; offline or unreachable and not in
        the cache; the download broke off; the disk is full.
    """
    folder = probe(os.path.expanduser(name_or_path))
    if name_or_path and folder.is_dir():
        return folder
    if name_or_path and folder.exists():
        raise UserError(f"{name_or_path} is a file; give the folder that holds model_index.json, or a hub id.")
    if not _HUB_ID.fullmatch(name_or_path):
        raise UserError(
            f"{name_or_path!r} is neither a folder here nor a hub id; give an existing folder, or organisation/name "
            "such as Wan-AI/Wan2.1-T2V-1.3B-Diffusers."
        )
    return _snapshot(name_or_path, revision, ignore, fetch)


def names_file(location: str) -> bool:
    """Whether `location` has the form of `file`."""
    return _FILE.fullmatch(location) is not None


def file(location: str, beside: Sequence[str] = (), fetch: bool = True) -> Path | None:
    """One file of a repository, `owner/repo/path.safetensors`; None where `location` has another form.

    Args:
      location: the repository and the file's path in it.
      beside: names of files in the same folder that are fetched with it where they exist.
      fetch: whether files that are not in the cache may be fetched.

    Raises:
      UserError: as `resolve`, or the repository has no such file.
    """
    hit = _FILE.fullmatch(location)
    if hit is None:
        return None
    repo, name = hit.groups()
    folder = name.rpartition("/")[0]
    wanted = [glob.escape(each) for each in (name, *(f"{folder}/{other}".lstrip("/") for other in beside))]
    path = _snapshot(repo, None, (), fetch, wanted) / name
    if not path.is_file():
        raise UserError(f"{location} is neither a file here nor in {repo} on the hub; check the spelling.")
    return path


def model_index(name_or_path: str, revision: str | None = None, fetch: bool = True) -> dict[str, Any]:
    """The content of a checkpoint's model_index.json alone, fetched if it may be; empty where it cannot be had.

    Why it cannot is an error of `resolve`, which needs the other files too.

    Raises:
      UserError: the file is not a JSON object.
    """
    path = probe(os.path.expanduser(name_or_path)) / "model_index.json"
    if path.is_file():
        return read_json(path)
    if probe(os.path.expanduser(name_or_path)).exists() or not _HUB_ID.fullmatch(name_or_path):
        return {}
    import huggingface_hub
    from huggingface_hub import errors

    for cached in (True, False) if fetch else (True,):  # the cache first: a second run asks no hub
        with contextlib.suppress(OSError, errors.HTTPError, errors.HFValidationError, errors.XetDownloadError):
            return read_json(
                Path(
                    huggingface_hub.hf_hub_download(name_or_path, path.name, revision=revision, local_files_only=cached)
                )
            )
    return {}


def _bounded(request: Any) -> None:
    """Gives a request that may wait for ever, as huggingface_hub's do, TIMEOUT."""
    given = request.extensions.get("timeout", {})
    request.extensions["timeout"] = {name: given.get(name) or TIMEOUT for name in ("connect", "read", "write", "pool")}


def _snapshot(
    repo: str, revision: str | None, ignore: Sequence[str], fetch: bool, patterns: Sequence[str] = _PATTERNS
) -> Path:
    import huggingface_hub  # imported here: a local folder does not need it
    from huggingface_hub import constants, errors
    from huggingface_hub.utils import disable_progress_bars

    hooks = huggingface_hub.get_session().event_hooks["request"]
    if _bounded not in hooks:
        hooks.append(_bounded)
    if not sys.stderr.isatty():
        disable_progress_bars()
    at = f"{repo} on {constants.ENDPOINT}"
    if fetch and not constants.is_offline_mode():
        log.info("fetching what %s does not hold of %s", constants.HF_HUB_CACHE, at)
    try:
        folder = huggingface_hub.snapshot_download(
            repo,
            revision=revision,
            allow_patterns=list(patterns),
            ignore_patterns=list(ignore),
            local_files_only=not fetch,
        )
        return Path(folder)
    except errors.GatedRepoError:
        raise UserError(
            f"{at} is gated; accept its terms at {constants.ENDPOINT}/{repo} and set HF_TOKEN to your token."
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(f"{at} has no revision {revision!r}; give a branch, tag or commit that it has.") from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"{repo!r} is neither a folder here nor {at}; check the spelling, or set HF_TOKEN if it is private."
        ) from None
    except errors.LocalEntryNotFoundError as error:
        why = "nothing is fetched to be inspected" if not fetch else f"{constants.ENDPOINT} cannot be reached"
        why = "HF_HUB_OFFLINE is set" if constants.is_offline_mode() else why
        part = "only a part of it is" if isinstance(error, errors.IncompleteSnapshotError) else "it is not"
        raise UserError(
            f"{repo!r} is not a folder here, {why} and {part} in the cache {constants.HF_HUB_CACHE}; "
            "connect once to fetch it, or give a local folder."
        ) from None
    except (OSError, ValueError, errors.HTTPError, errors.XetDownloadError) as error:  # ValueError: a name like ../x
        if getattr(error, "errno", None) in _FULL:
            raise UserError(
                f"The download of {at} does not fit on the disk of {constants.HF_HUB_CACHE}; "
                "free some space or point HF_HOME to another disk."
            ) from None
        reason = " ".join(str(error).split())
        raise UserError(f"The download of {at} broke off ({reason}); run again: whole files are kept.") from error
