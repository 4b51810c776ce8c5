"""The samples of the sound of any file that ffmpeg's libraries read, a video's too."""

from __future__ import annotations

import itertools
import logging
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import av
import numpy as np
from av.audio.stream import AudioStream
from av.container import InputContainer
from jaxtyping import Float

from maxdiffusion.errors import UserError
from maxdiffusion.media import kinds
from maxdiffusion.media.fetch import VIDEO_BYTES, local

log = logging.getLogger(__name__)

LONGEST = 3600  # seconds that are read; more is a mistake


@dataclass(frozen=True)
class Samples:
    """A sound as one channel.

    Attributes:
      values: in -1..1, fp32; channels are averaged.
      rate: samples per second.
      stored: codec, rate and channels in the file, in words.
    """

    values: Float[np.ndarray, " samples"]
    rate: int
    stored: str

    @property
    def seconds(self) -> float:
        return len(self.values) / self.rate

    @property
    def silent(self) -> bool:
        """Whether all samples are equal."""
        return bool(np.ptp(self.values) == 0)


def read_samples(location: str, rate: int) -> Samples:
    """Read the main sound of a file or an http(s) URL, resampled to `rate` and averaged over its channels.

    Raises:
      UserError: it is missing, cannot be fetched, has no sound, is damaged, or is longer than LONGEST.
    """
    found = _read(location, rate)
    log.info("%s: %.2f s of sound (%s), made %d Hz mono", location, found.seconds, found.stored, rate)
    if found.silent:
        log.warning("%s is silent from beginning to end", location)
    return found


def seconds(location: str) -> Fraction:
    """How long the sound that `read_samples` reads lasts; logs nothing.

    Raises:
      UserError: as `read_samples`.
    """
    return Fraction(len(_read(location, _RATE).values), _RATE)


_RATE = 16000  # at which a sound is measured


def _read(location: str, rate: int) -> Samples:
    file = local(location, VIDEO_BYTES)
    if file.is_dir():
        raise UserError(f"{location} is a folder; give a sound file, or a video with sound.")
    try:
        options = {"protocol_whitelist": "none"}  # a playlist may not open other files
        with open(file, "rb") as data, av.open(data, "r", options=options, metadata_errors="replace") as container:
            return _decoded(container, location, rate)
    except FileNotFoundError:
        raise UserError(f"{location} does not exist; give a sound file, or a video with sound.") from None
    except av.FFmpegError as error:
        kind = kinds.kind(file)
        what = f"it is {kind.name}" if kind else error.strerror
        raise UserError(
            f"{location} cannot be read as a sound ({what}); give a sound file, or a video with sound."
        ) from None
    except OSError as error:
        raise UserError(f"{location} cannot be read ({error.strerror}); give another file.") from None


def _decoded(container: InputContainer, location: str, rate: int) -> Samples:
    stream = container.streams.best("audio")  # as the mp4 has it, see `sound.add`
    if not isinstance(stream, AudioStream):
        raise UserError(f"{location} has no sound; give a sound file, or a video with sound.")
    stored = f"{stream.codec_context.name}, {stream.codec_context.rate} Hz, {stream.codec_context.channels} channels"
    resampler, parts = av.AudioResampler(format="fltp", rate=rate), [np.zeros(0, np.float32)]
    faults, length, ended, packets = 0, 0, False, container.demux(stream)
    while not ended:
        try:
            packet = next(packets, None)
            ended = packet is None
            # At the end the resampler lets go of what its filter holds back.
            frames: list[Any] = ([None] if length else []) if packet is None else packet.decode()
        except av.FFmpegError:
            faults += 1
            continue
        for frame in itertools.chain.from_iterable(map(resampler.resample, frames)):
            parts.append(frame.to_ndarray().mean(axis=0, dtype=np.float32))
            length += parts[-1].size
        if length > LONGEST * rate:
            raise UserError(f"{location} has more than {LONGEST} s of sound; give a part of it.")
    if faults or not length:
        what = f"{faults} of its packets cannot be decoded" if faults else "no sound can be decoded"
        raise UserError(f"{location} is damaged or not whole ({what}); save or download it again.")
    return Samples(np.concatenate(parts), rate, stored)
