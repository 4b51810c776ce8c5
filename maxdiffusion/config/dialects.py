"""The official repositories' (Wan2.1, Wan2.2) and diffusers' names for the keys, as one table: `rows`.

An official flag that stands for one key is that key's `alias` in the schema; the rest of the table is here.
Sources: generate.py of both repositories; diffusers 0.42.1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from maxdiffusion.config import schema
from maxdiffusion.errors import UserError

# --task of generate.py -> the page.
TASKS: Mapping[str, str] = {
    "t2v-1.3B": "wan2.1_t2v_1.3b",
    "t2v-14B": "wan2.1_t2v_14b",
    "t2i-14B": "wan2.1_t2v_14b",
    "i2v-14B": "wan2.1_i2v_14b_720p",
    "flf2v-14B": "wan2.1_flf2v_14b",
    "vace-1.3B": "wan2.1_vace_1.3b",
    "vace-14B": "wan2.1_vace_14b",
    "t2v-A14B": "wan2.2_t2v_a14b",
    "i2v-A14B": "wan2.2_i2v_a14b",
    "ti2v-5B": "wan2.2_ti2v_5b",
    "animate-14B": "wan2.2_animate_14b",
    "s2v-14B": "wan2.2_s2v_14b",
}

_SPREAD = "logical_axis_rules='[[embed, [fsdp, context]]]' spreads weights over the devices"
_AS_WRITTEN = "prompts are used as they are written"
_NO_SPEECH = "no text is spoken here; audio=FILE takes its sound"

# Official flags that no key takes -> what serves instead.
SERVED_BY: Mapping[str, str] = {
    "offload_model": "encoders are freed after use, and expert_residency=in_turn holds one of two experts at a time",
    "convert_model_dtype": "weights are converted to weights_dtype while they load",
    "fp8": "transformer_file=FILE takes fp8 weights",
    "t5_cpu": "the text encoder is freed before the transformer loads",
    "t5_fsdp": _SPREAD,
    "dit_fsdp": _SPREAD,
    "use_prompt_extend": _AS_WRITTEN,
    "prompt_extend_method": _AS_WRITTEN,
    "prompt_extend_model": _AS_WRITTEN,
    "prompt_extend_target_lang": _AS_WRITTEN,
    "use_relighting_lora": "lora=FILE merges it",
    "num_clip": "num_frames says how long the video is: 80 n - 3 frames are n clips",
    "enable_tts": _NO_SPEECH,
    "tts_prompt_audio": _NO_SPEECH,
    "tts_prompt_text": _NO_SPEECH,
    "tts_text": _NO_SPEECH,
    "start_from_ref": "the first frame is made of image and sound, not given",
}

# Official names that stand for several keys or for another spelling of a value -> the keys.
COMPOUNDS: Mapping[str, tuple[str, ...]] = {
    "size": ("height", "width"),
    "sample_guide_scale": ("guidance_scale", "guidance_scale_2"),
    "ring_size": ("ici_context_parallelism",),
    "src_ref_images": ("reference_images",),
    "replace_flag": ("mode",),
    "src_root_path": ("image", "pose_video", "face_video", "background_video", "mask_video"),
}

# Keys whose official name is the same.
SAME = {"prompt", "image", "audio", "pose_video", "save_file"}

# Official flags that have no value.
FLAGS = {"convert_model_dtype", "fp8", "t5_cpu", "t5_fsdp", "dit_fsdp", "use_prompt_extend"}
FLAGS |= {"use_relighting_lora", "replace_flag", "enable_tts", "start_from_ref"}

# Key -> what takes it in diffusers: the argument of a pipeline's call where no function is named.
DIFFUSERS: Mapping[str, str] = {
    "pretrained_model_name_or_path": "from_pretrained(pretrained_model_name_or_path)",
    "revision": "from_pretrained(revision)",
    "transformer_file": "WanTransformer3DModel.from_single_file()",
    "vae_file": "AutoencoderKLWan.from_single_file()",
    "lora": "load_lora_weights(), set_adapters()",
    "lora_2": "load_lora_weights(load_into_transformer_2=True)",
    "prompt": "prompt",
    "negative_prompt": "negative_prompt",
    "seed": "generator",
    "image": "image",
    "last_image": "last_image",
    "height": "height",
    "width": "width",
    "num_frames": "num_frames",
    "fps": "export_to_video(fps)",
    "video": "video",
    "strength": "strength",
    "mask": "mask",
    "reference_images": "reference_images",
    "conditioning_scale": "conditioning_scale",
    "pose_video": "pose_video",
    "face_video": "face_video",
    "mode": "mode",
    "background_video": "background_video",
    "mask_video": "mask_video",
    "segment_frame_length": "segment_frame_length",
    "prev_segment_conditioning_frames": "prev_segment_conditioning_frames",
    "num_inference_steps": "num_inference_steps",
    "sigmas": "scheduler.set_timesteps(sigmas)",
    "guidance_scale": "guidance_scale",
    "guidance_scale_2": "guidance_scale_2",
    "boundary_ratio": "WanPipeline(boundary_ratio)",
    "expert_residency": "enable_model_cpu_offload()",
    "flow_shift": "UniPCMultistepScheduler(flow_shift)",
    "solver": "WanPipeline(scheduler)",
    "initial_latents": "latents",
    "attention": "transformer.set_attention_backend()",
    "ulysses_shards": "ContextParallelConfig(ulysses_degree)",
    "ici_context_parallelism": "ContextParallelConfig(ring_degree, ulysses_degree)",
    "weights_dtype": "from_pretrained(torch_dtype)",
    "save_file": "export_to_video(output_video_path)",
    "output_format": "output_type",
}


def page(task: str) -> str:
    """The name of the page of an official task.

    Raises:
      UserError: there is no such task.
    """
    if task not in TASKS:
        raise UserError(f"task={task} is not an official task; choose one of {', '.join(TASKS)}.")
    return TASKS[task]


def rows() -> Iterator[Sequence[str]]:
    """(key, official name, diffusers' name) of every key that has one of the two, in the order of the schema."""
    for key, about in schema.KEYS.items():
        names = [key if key in SAME else "", about.alias, *(name for name, keys in COMPOUNDS.items() if key in keys)]
        official = ", ".join(filter(None, names))
        if official or key in DIFFUSERS:
            yield key, official, DIFFUSERS.get(key, "")
