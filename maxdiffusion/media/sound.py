"""The sound of a file, beside the pictures of an mp4."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import av
from av.audio.frame import AudioFrame
from av.audio.stream import AudioStream
from av.container import InputContainer, OutputContainer
from av.filter import Graph

from maxdiffusion.media.fetch import VIDEO_BYTES, local

log = logging.getLogger(__name__)

_RATES = (96000, 88200, 64000, 48000, 44100, 32000, 24000, 22050, 16000, 12000, 11025, 8000)  # of AAC
_USUAL_RATE = 48000
_CHANNELS = {1: "mono", 6: "5.1"}


@dataclass(frozen=True)
class Sound:
    """Some seconds of a file's sound.

    Attributes:
      path: a file or an http(s) URL.
      seconds: how much of it, at most.
      start: where in the sound it begins, in seconds; None: at the file's first picture, or where it has none at 0.
    """

    path: str
    seconds: Fraction
    start: Fraction | None = None


def add(container: OutputContainer, sound: Sound) -> None:
    """Adds the sound to an mp4 whose other streams are there and of which no packet is written yet.

    AAC is copied, packet by packet; all else is encoded as AAC. What cannot be decoded is left out, and a warning.
    """
    damaged = 0
    try:
        with av.open(f"file:{local(sound.path, VIDEO_BYTES)}") as source:
            stream = source.streams.best("audio")
            if not isinstance(stream, AudioStream):
                log.warning("%s has no sound, and the video has none", sound.path)
                return
            start = _start(source) if sound.start is None else _beginning(stream) + sound.start
            if stream.codec_context.name == "aac" and stream.codec_context.extradata:
                _copy(source, stream, container, start, sound.seconds)
            else:
                damaged = _encode(source, stream, container, start, sound.seconds)
    except av.FFmpegError as error:
        log.warning("the sound of %s is kept up to where it can be read (%s)", sound.path, error.strerror)
    if damaged:
        log.warning("%d packets of the sound of %s are damaged and left out", damaged, sound.path)


def _start(source: InputContainer) -> Fraction:
    """When the first picture is shown, in seconds; 0 of a file without pictures."""
    pictures = source.streams.best("video")
    if pictures is None or pictures.start_time is None or pictures.time_base is None:
        return Fraction(0)
    return pictures.start_time * pictures.time_base


def _beginning(stream: AudioStream) -> Fraction:
    """When the sound begins, in seconds."""
    return (stream.start_time or 0) * (stream.time_base or Fraction(0))


def _copy(
    source: InputContainer, stream: AudioStream, container: OutputContainer, start: Fraction, seconds: Fraction
) -> None:
    """The packet before the first picture is kept, from which the decoder starts; the mp4's edit list hides it."""
    copy = container.add_stream_from_template(stream)
    base = stream.time_base or Fraction(1, stream.rate)
    shift = round(start / base)
    for packet in source.demux(stream):
        if packet.pts is None or packet.dts is None or packet.pts + (packet.duration or 0) < shift:
            continue
        if (packet.pts - shift) * base >= seconds:
            return
        packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, copy
        container.mux(packet)


def _encode(
    source: InputContainer, stream: AudioStream, container: OutputContainer, start: Fraction, seconds: Fraction
) -> int:
    """Returns how many packets could not be decoded."""
    rate = stream.rate if stream.rate in _RATES else _USUAL_RATE
    layout = _CHANNELS.get(stream.channels, "stereo")
    encoder = container.add_stream("aac", rate, layout=layout)
    graph, damaged = Graph(), 0
    graph.link_nodes(
        graph.add_abuffer(template=stream),
        graph.add("asetpts", f"PTS-({float(start)})/TB"),
        graph.add("atrim", f"start=0:end={float(seconds)}"),
        graph.add("aformat", f"sample_fmts=fltp:sample_rates={rate}:channel_layouts={layout}"),
        graph.add("abuffersink"),
    ).configure()
    for packet in source.demux(stream):
        if packet.dts is None:
            break
        try:
            frames = packet.decode()
        except av.InvalidDataError:
            damaged += 1
            continue
        for frame in frames:
            if frame.time is not None and frame.time - start >= seconds:
                break
            graph.push(frame)
            for made in _pulled(graph):
                container.mux(encoder.encode(made))
    graph.push(None)
    for made in _pulled(graph):
        container.mux(encoder.encode(made))
    container.mux(encoder.encode(None))
    return damaged


def _pulled(graph: Graph) -> Iterator[AudioFrame]:
    """The frames that are ready."""
    while True:
        try:
            frame = graph.pull()
        except (av.BlockingIOError, av.EOFError):
            return
        if isinstance(frame, AudioFrame):
            yield frame
