"""The package's log: one handler on stderr, set up once."""

import logging
import os
import sys

from tqdm import tqdm

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


class _AboveBars(logging.Handler):
    """Writes to stderr above the progress bar on the last line."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stderr)
        except Exception:
            self.handleError(record)


class _Short(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        record.prefix = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        return super().format(record)


def setup(level: str) -> None:
    """Send the `maxdiffusion` loggers to stderr from `level` ("debug", "info", "warning", "error") up.

    Call it before jax starts its devices. A second call only changes the level. Silences harmless words of other
    libraries: jax's about missing accelerators, transformers' about missing torch, orbax' forty lines for each save.
    """
    logger = logging.getLogger("maxdiffusion")
    logger.setLevel(LEVELS[level])
    logger.propagate = False  # absl puts its own handler on the root
    if not any(isinstance(handler, _AboveBars) for handler in logger.handlers):
        handler = _AboveBars()
        handler.setFormatter(_Short("%(asctime)s %(prefix)s%(message)s", "%H:%M:%S"))
        logger.addHandler(handler)
        logging.getLogger("jax._src.xla_bridge").addFilter(_no_missing_tpu)
        logging.getLogger("jax._src.distributed").setLevel(logging.WARNING)
    logging.getLogger("absl").setLevel(logging.ERROR)  # orbax' logger
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA's C++ log


def _no_missing_tpu(record: logging.LogRecord) -> bool:
    """Filter out warnings about TPUs, but keep jax's hint that a GPU needs another build of jax."""
    text = record.getMessage().lower()
    return record.levelno >= logging.ERROR or "tpu" not in text
