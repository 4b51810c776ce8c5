"""How alike two videos are: PSNR, and SSIM by ffmpeg's filter."""

from __future__ import annotations

from fractions import Fraction

import av
import numpy as np
from av.filter import Graph
from jaxtyping import UInt8

_TICK = Fraction(1, 25)  # of frames that are compared one by one, whatever their rate


def psnr(a: UInt8[np.ndarray, "f h w c"], b: UInt8[np.ndarray, "f h w c"]) -> float:
    """The peak signal-to-noise ratio of all frames, dB; infinite where they are equal."""
    error = np.mean([np.mean(np.square(x.astype(np.float32) - y)) for x, y in zip(a, b, strict=True)], dtype=np.float64)
    return float(np.inf) if error == 0 else float(10 * np.log10(255**2 / error))


def ssim(a: UInt8[np.ndarray, "f h w 3"], b: UInt8[np.ndarray, "f h w 3"]) -> float:
    """The mean structural similarity of frames and colours (Wang et al., 2004), 1 where they are equal."""
    graph, (height, width) = Graph(), a.shape[1:3]
    rgb = av.VideoFormat("rgb24", width, height)
    inputs = [graph.add_buffer(width=width, height=height, format=rgb, time_base=_TICK) for _ in range(2)]
    compared, sink = graph.add("ssim"), graph.add("buffersink")
    for number, source in enumerate(inputs):
        source.link_to(compared, 0, number)
    compared.link_to(sink)
    graph.configure()
    found = []
    for number, pair in enumerate(zip(a, b, strict=True)):
        for source, pixels in zip(inputs, pair, strict=True):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame.pts, frame.time_base = number, _TICK
            source.push(frame)
        found.append(float(sink.pull().metadata["lavfi.ssim.All"]))
    return float(np.mean(found))
