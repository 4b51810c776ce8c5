"""Generates the held-out combinations with the miniature WAN checkpoint and measures what the clips show.

Colour, shape, direction and background are read from the frames by simple image measurements (tiny_wan_data.measure),
with smoothness figures. The frames come from this project's pipeline (`--backend ours`), from the reference's
(`--backend diffusers`), from a folder of .npy or .mp4 files named after the combination (`--frames`), or from
ground-truth renders (`--backend truth`).
"""

import argparse
import json
import pathlib
import sys
import tempfile
import time

import numpy as np
import tiny_wan_data as data

ATTRIBUTES = ("colour", "direction", "background", "shape")
SMOOTHNESS = (
    "displacement",
    "shape_overlap",
    "track_residual",
    "area_jitter",
    "colour_jitter",
    "background_jitter",
    "visible",
)


def file_name(combination):
    return "-".join((combination.colour, combination.shape, combination.direction, combination.background))


def from_truth(args, chosen):
    rng = np.random.default_rng(args.seed)
    for combination in chosen:
        yield combination, data.render_uint8(data.sample_clip(combination, rng))


def from_folder(args, chosen):
    for combination in chosen:
        stem = args.frames / file_name(combination)
        if stem.with_suffix(".npy").exists():
            yield combination, np.load(stem.with_suffix(".npy"))
        else:
            import imageio.v3 as imageio

            yield combination, np.asarray(imageio.imread(stem.with_suffix(".mp4")))


def from_diffusers(args, chosen):
    import torch
    from diffusers import WanPipeline

    if args.threads:
        torch.set_num_threads(args.threads)
    pipeline = WanPipeline.from_pretrained(args.model, dtype=torch.float32)
    if torch.cuda.is_available():
        pipeline.to("cuda")
    pipeline.set_progress_bar_config(disable=True)
    if args.flow_shift:
        pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, flow_shift=args.flow_shift)
    for first in range(0, len(chosen), args.batch):
        part = chosen[first : first + args.batch]
        generators = [torch.Generator().manual_seed(args.seed + first + i) for i in range(len(part))]
        videos = pipeline(
            prompt=[c.prompt for c in part], negative_prompt=[args.negative_prompt] * len(part), height=data.HEIGHT,
            width=data.WIDTH, num_frames=data.FRAMES, num_inference_steps=args.steps, guidance_scale=args.guidance,
            generator=generators, output_type="np",
        ).frames  # fmt: skip
        yield from zip(part, np.round(np.asarray(videos) * 255).astype(np.uint8), strict=True)


def from_ours(args, chosen):
    """All clips in one run of our own pipeline."""
    root = pathlib.Path(__file__).resolve().parents[1]
    sys.path.insert(0, str(root))
    from maxdiffusion import config, generate_wan

    with tempfile.TemporaryDirectory() as folder:
        words = [
            f"pretrained_model_name_or_path={args.model}",
            f"prompt=[{', '.join(c.prompt for c in chosen)}]",
            f"seed=[{', '.join(str(args.seed + i) for i in range(len(chosen)))}]",
            f"negative_prompt={args.negative_prompt}",
            f"num_inference_steps={args.steps}",
            f"guidance_scale={args.guidance}",
            *([f"flow_shift={args.flow_shift}"] if args.flow_shift else []),
            f"per_device_batch_size={args.batch}",
            "output_format=npy",
            f"output_dir={folder}",
            "log_level=warning",
        ]
        paths = generate_wan.run(config.load([str(root / "configs" / "wan_tiny.yml"), *words]))
        for combination, path in zip(chosen, paths, strict=True):
            yield combination, np.load(path)


BACKENDS = dict(ours=from_ours, diffusers=from_diffusers, truth=from_truth)


def contact_sheet(clips, path, columns=5):
    """One row of frames per clip."""
    from PIL import Image

    rows = [np.concatenate([f[i] for i in np.linspace(0, len(f) - 1, columns).astype(int)], 1) for f in clips]
    while len(rows) % 2:
        rows.append(np.zeros_like(rows[0]))
    half = len(rows) // 2
    Image.fromarray(np.concatenate([np.concatenate(rows[:half]), np.concatenate(rows[half:])], 1)).save(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="models/wan_tiny", help="folder of the checkpoint")
    parser.add_argument("--backend", choices=list(BACKENDS), default="ours")
    parser.add_argument("--frames", type=pathlib.Path, help="measure .npy or .mp4 files in this folder instead")
    parser.add_argument("--trained", type=int, default=0, help="also measure so many combinations seen in training")
    parser.add_argument("--repeats", type=int, default=1, help="clips per combination, each from its own seed")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--flow-shift", type=float, default=0.0, help="0: the checkpoint's own")
    parser.add_argument("--negative-prompt", default="")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=6)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--save", type=pathlib.Path, help="folder for the frames (.npy) and a contact sheet")
    parser.add_argument("--json", type=pathlib.Path, help="file for the table as JSON")
    args = parser.parse_args()

    groups = {"held out": data.held_out_combinations()}
    if args.trained:
        order = np.random.default_rng(0).permutation(len(data.training_combinations()))[: args.trained]
        groups["trained"] = [data.training_combinations()[i] for i in order]
    source = from_folder if args.frames else BACKENDS[args.backend]
    table = {}
    first_seed = args.seed
    for name, chosen in groups.items():
        start, results, clips = time.time(), [], []
        for repeat in range(args.repeats):
            args.seed = first_seed + 1000 * repeat
            for combination, frames in source(args, chosen):
                measured = data.measure(frames)
                results.append((combination, measured))
                clips.append(frames)
                if not all(measured.correct(combination).values()):
                    got = " ".join((measured.colour, measured.shape, measured.direction, measured.background))
                    print(f"  wrong: wanted {file_name(combination).replace('-', ' ')}, got {got}")
                if args.save and repeat == 0:
                    args.save.mkdir(parents=True, exist_ok=True)
                    np.save(args.save / f"{file_name(combination)}.npy", frames)
        if args.save:
            contact_sheet(clips[: len(chosen)], args.save / f"{name.replace(' ', '_')}.png")
        row = {"clips": len(results), "seconds": round(time.time() - start, 1)}
        for attribute in ATTRIBUTES:
            row[attribute] = float(np.mean([m.correct(c)[attribute] for c, m in results]))
        row["all four"] = float(np.mean([all(m.correct(c).values()) for c, m in results]))
        for figure in SMOOTHNESS:
            row[figure] = float(np.nanmean([getattr(m, figure) for _, m in results]))
        table[name] = row
    width = max(len(key) for row in table.values() for key in row) + 2
    print("".ljust(width) + "".join(name.rjust(12) for name in table))
    for key in next(iter(table.values())):
        cells = []
        for row in table.values():
            value = row[key]
            cells.append(f"{100 * value:.1f} %" if key in (*ATTRIBUTES, "all four", "visible") else f"{value:.4g}")
        print(key.ljust(width) + "".join(cell.rjust(12) for cell in cells))
    if args.json:
        args.json.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
