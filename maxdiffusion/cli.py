"""The command: runs its arguments and returns an exit code.

0 done, 2 a mistake that the user can correct (one sentence on stderr), 75 stopped by SIGTERM, 130 interrupted; any
other exception is a bug and keeps its traceback. jax is imported only once the config is known to be good.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import maxdiffusion
from maxdiffusion.config import completion, dashes, listing
from maxdiffusion.config import help as config_help
from maxdiffusion.errors import UserError


def main() -> None:
    """Console entry `generate_wan`; also `python generate_wan.py`."""
    words = sys.argv[1:]
    try:
        answer = _answer(words)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    if answer is not None:
        print(answer)
    elif not words:
        print(f"{config_help.USAGE}\n--help lists all keys", file=sys.stderr)
        sys.exit(2)
    else:
        from absl import app  # 0.06 s, not needed to show help

        app.run(lambda argv: command(argv[1:]), flags_parser=_no_flags)


def _answer(words: Sequence[str]) -> str | None:
    """What is printed where the words ask for no run: help, version, the list of pages, a completion script."""
    if {"-h", "--help"} & set(words):
        given = ("-h", "--help")
        return config_help.text(
            [word for word in words if word not in given and not word.endswith(".yml") and "=" not in word]
        )
    if "--version" in words:
        return f"maxdiffusion {maxdiffusion.__version__}"
    if words[:1] == ["list"]:
        return listing.text(*words[1:2])
    if words[:1] == ["completion"]:
        return completion.script(" ".join(words[1:]))
    return None


def command(words: Sequence[str]) -> int:
    """Runs one command line and returns the exit code."""
    from maxdiffusion.runtime import peers
    from maxdiffusion.runtime.stop import Stopped, listening

    try:
        with listening():
            _run(words)
    except UserError as error:
        return peers.end(2, f"error: {error}")
    except Stopped as stopped:
        return peers.end(stopped.exit_code, str(stopped))
    except KeyboardInterrupt:
        return peers.end(130, "interrupted")
    except Exception:
        peers.crashed()
        raise
    return 0


def _run(words: Sequence[str]) -> None:
    from maxdiffusion import request  # not needed to show help

    words = dashes.plain(words)
    job = request.load(words)
    if job.cfg.inspect:  # before jax is imported
        from maxdiffusion import inspection

        inspection.run(job)
    elif job.cfg.plan:  # without jax if the plan is cached
        from maxdiffusion.planning import command as planning

        planning.run(job, words)
    elif job.cfg.verify:
        _import_jax()
        from maxdiffusion import verify

        verify.run(job)
    elif job.cfg.compare:
        _import_jax()
        from maxdiffusion import comparison

        comparison.run(job)
    else:
        _import_jax()
        from maxdiffusion import generate_wan

        generate_wan.run(job)


def _import_jax() -> None:
    """Raises: UserError: jax refuses an environment variable."""
    try:
        import jax  # noqa: F401
    except ValueError as error:
        raise UserError(f"jax refuses its environment variables: {error}; correct or unset it.") from None


def _no_flags(argv: Sequence[str]) -> Sequence[str]:
    """Settings are key=value arguments, not absl flags; absl's own flags keep their defaults."""
    from absl import flags

    flags.FLAGS.mark_as_parsed()
    return argv
