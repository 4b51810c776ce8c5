"""A run, resolved once from its config. Imports no jax."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from maxdiffusion.attention.options import KernelOptions
from maxdiffusion.config.schema import Config
from maxdiffusion.conventions import CONVENTIONS, Conventions
from maxdiffusion.denoise.windows import Windows
from maxdiffusion.models.dit.config import DiTConfig
from maxdiffusion.request import clips
from maxdiffusion.request.segments import Segments
from maxdiffusion.request.videos import Video, halved
from maxdiffusion.runtime.hosts import Hosts
from maxdiffusion.variants import WanSpec

Shape = tuple[int, int, int, int]  # f h w c of latents


def kernel_options(cfg: Config) -> KernelOptions:
    """The options of the attention kernel.

    Raises:
      UserError: a size that the kernels do not take.
    """
    return KernelOptions(
        **cfg.flash_block_sizes,
        use_base2_exp=cfg.use_base2_exp,
        use_experimental_scheduler=cfg.use_experimental_scheduler,
        attention_vmem_limit_kib=cfg.attention_vmem_limit_kib,
    )


@dataclasses.dataclass(frozen=True)
class Job:
    """One run: its keys and the values resolved from them.

    Attributes:
      cfg: every key, with all defaults filled in.
      spec: the variant.
      videos: the videos to make; of a prompt file, those that are not finished.
      segments: the division of the frames.
      transformer: content of the checkpoint's transformer/config.json; None where it is not a local folder with one.
    """

    cfg: Config
    spec: WanSpec
    videos: tuple[Video, ...]
    segments: Segments
    transformer: Mapping[str, Any] | None = None

    @property
    def conventions(self) -> Conventions:
        """The choices in which the official code and diffusers differ."""
        return CONVENTIONS[self.cfg.conventions]

    @property
    def hosts(self) -> Hosts:
        """The processes that make this run."""
        cfg = self.cfg
        return Hosts(
            cfg.jax_distributed,
            cfg.coordinator_address,
            cfg.num_processes,
            cfg.process_id,
            cfg.initialization_timeout,
        )

    @property
    def suffix(self) -> str:
        """The suffix of a result; none for png of several frames, which is a folder of them."""
        fmt = self.cfg.output_format
        return "" if fmt == "png" and self.cfg.num_frames > 1 else f".{fmt}"

    @property
    def chained(self) -> bool:
        """Whether the segments are clips that start from the frames of one another, see `clips`."""
        return clips.chained(self.cfg)

    def prompt(self, video: Video, segment: int) -> str:
        """The prompt of a segment."""
        return self.cfg.clip_prompts[segment] if self.cfg.clip_prompts else video.prompt

    @property
    def own_seeds(self) -> bool:
        """Whether each segment has a seed of its own: clips, and the segments of S2V; those of Animate share one."""
        return self.chained or self.segments.dropped > 0

    def seed(self, video: Video, segment: int) -> int:
        """The seed of a segment."""
        if self.cfg.clip_seeds:
            return self.cfg.clip_seeds[segment]
        return (video.seed + segment) % 2**32 if self.own_seeds else video.seed

    @property
    def halved(self) -> Job:
        """The run with videos of half height and width, for the shapes of `low_resolution_steps`."""
        return dataclasses.replace(self, videos=tuple(map(halved, self.videos)))

    def latent_grid(self, video: Video) -> tuple[int, int, int]:
        """Latent frames, height and width of one segment, without reference frames."""
        return self.spec.latent_grid(self.segments.length, video.height, video.width)

    def segment_shape(self, video: Video, channels: int) -> Shape:
        """Shape of latents denoised at once, reference frames included."""
        f, h, w = self.latent_grid(video)
        return self.segments.reference_frames + f, h, w, channels

    @property
    def windows(self) -> Windows | None:
        """The windows over which each step is computed; None: the whole video at once, or a segment of it."""
        window, step = self.cfg.context_window, self.spec.vae_stride[0]
        if window is None or window >= self.cfg.num_frames:
            return None
        frames, length = ((number - 1) // step + 1 for number in (self.cfg.num_frames, window))
        return Windows(frames, length, self.cfg.context_overlap // step, self.segments.reference_frames)

    def latents_shape(self, channels: int) -> Shape:
        """Shape of one video's latents, all segments, in the config's size."""
        f, h, w = self.spec.latent_grid(self.segments.length, self.cfg.height, self.cfg.width)
        return f * len(self.segments), h, w, channels

    def tokens(self, network: DiTConfig, video: Video) -> int:
        """Tokens of a video in one pass of the network: those of a window, or of all that is denoised at once.

        Raises:
          UserError: a size does not suit the transformer.
        """
        frames, height, width, _ = self.segment_shape(video, 0)
        if self.windows is not None:
            frames = len(self.windows.frames_of(0))
        return network.tokens(frames, height, width)

    def max_tokens(self, network: DiTConfig) -> int:
        """`tokens` of the largest video.

        Raises:
          UserError: a size does not suit the transformer.
        """
        return max(self.tokens(network, video) for video in self.videos)

    def prompts(self, guided: bool) -> tuple[str, ...]:
        """The different texts to encode: prompts, if any step is guided, negative prompts, and Animate 2's own."""
        negative = [video.negative_prompt for video in self.videos] if guided else []
        shown = (self.prompt(video, segment) for video in self.videos for segment in range(len(self.segments)))
        driving = [self.spec.driving_prompt] if self.spec.driving_prompt else []
        return tuple(dict.fromkeys([*shown, *negative, *driving]))

    def batches(self, data: int, progress: Callable[[int], Any] = lambda row: None) -> Iterator[tuple[list[int], int]]:
        """(rows of `videos`, number without padding) of each batch on a data axis of that degree.

        The videos of a batch have one shape and one `progress`; a last batch that is shorter repeats its last row.
        """
        limit = self.cfg.per_device_batch_size * data
        kinds = [(video.shape, progress(row)) for row, video in enumerate(self.videos)]
        for kind in dict.fromkeys(kinds):
            rows = [row for row, other in enumerate(kinds) if other == kind]
            step = min(len(rows), limit)
            for first in range(0, len(rows), step):
                batch = rows[first : first + step]
                yield batch + batch[-1:] * (step - len(batch)), len(batch)
