"""Generates the held-out combinations with a miniature WAN checkpoint and measures what the clips show.

Colour, shape, direction and background are read from the frames by simple image measurements (tiny_wan_data.measure),
with smoothness figures. An image-to-video checkpoint is given an image and "moving {direction}": of every held-out
combination, the same images with the opposite direction, and the same shapes and directions in arbitrary colours; how
well the clips keep to their images is measured as well.

`--taught` adds the held-out combinations of the colour and the shape that the concept LoRA teaches, each and both;
`--lora` gives a LoRA, and further words of the command (`solver=euler sigmas=[...]`) follow after `--words`.

`--chains` measures videos of three clips instead, each from the last frame of the one before: there, back and there
again, from ten of the held-out images.

The frames come from this project's pipeline (`--backend ours`), from the reference's (`--backend diffusers`), from a
folder of .npy or .mp4 files named after the combination (`--frames`), or from ground-truth renders (`--backend truth`).
"""

import argparse
import dataclasses
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
FIDELITY = ("first_psnr", "colour_error", "background_error")
OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}


@dataclasses.dataclass(frozen=True)
class Case:
    """One clip to make: what it should show, and the still clip whose frame is given, if one is."""

    combination: data.Combination
    still: data.Clip | None = None
    group: str = ""

    @property
    def prompt(self):
        return f"moving {self.combination.direction}" if self.still else self.combination.prompt

    @property
    def name(self):
        return pathlib.Path(self.group, "-".join(dataclasses.astuple(self.combination)))


def image_groups(args):
    """The groups of an image-to-video checkpoint."""
    rng = np.random.default_rng((args.seed, 5))
    groups = {"held out": [], "opposite": [], "any colours": []}
    for c in data.held_out_combinations():
        still = data.sample_movable(c.shape, data.COLOURS[c.colour], data.BACKGROUNDS[c.background], rng)
        opposite = dataclasses.replace(c, direction=OPPOSITE[c.direction])
        other = data.sample_movable(c.shape, *data.random_colours(rng), rng)
        groups["held out"].append(Case(c, still, "held_out"))
        groups["opposite"].append(Case(opposite, still, "opposite"))
        groups["any colours"].append(Case(dataclasses.replace(c, colour="any", background="any"), other, "any_colours"))
    return groups


def taught_groups():
    """The held-out combinations of the taught colour with known shapes, of the taught shape, and of both."""
    groups = {"new colour": [], "new shape": [], "both new": []}
    for c in data.taught_combinations():
        known = "new colour" if c.shape in data.SHAPES else "new shape" if c.colour in data.COLOURS else "both new"
        if c.held_out:
            groups[known].append(Case(c))
    return groups


def from_truth(args, chosen):
    rng = np.random.default_rng(args.seed)
    for case in chosen:
        c, still = case.combination, case.still
        yield case, data.render_uint8(data.move(still, c.direction, rng) if still else data.sample_clip(c, rng))


def from_folder(args, chosen):
    for case in chosen:
        stem = args.frames / case.name
        if stem.with_suffix(".npy").exists():
            yield case, np.load(stem.with_suffix(".npy"))
        else:
            from maxdiffusion.media.read import read_video

            yield case, read_video(stem.with_suffix(".mp4"))


def from_diffusers(args, chosen):
    import diffusers
    import torch
    from PIL import Image

    if args.threads:
        torch.set_num_threads(args.threads)
    kind = diffusers.WanImageToVideoPipeline if chosen[0].still else diffusers.WanPipeline
    pipeline = kind.from_pretrained(args.model, dtype=torch.float32)
    if torch.cuda.is_available():
        pipeline.to("cuda")
    pipeline.set_progress_bar_config(disable=True)
    if args.lora:
        pipeline.load_lora_weights(args.lora)
    if args.flow_shift:
        pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, flow_shift=args.flow_shift)
    batch = 1 if chosen[0].still else args.batch  # the reference takes one image at a time
    for first in range(0, len(chosen), batch):
        part = chosen[first : first + batch]
        images = [Image.fromarray(data.render_uint8(case.still, frames=1)[0]) for case in part if case.still]
        generators = [torch.Generator().manual_seed(args.seed + first + i) for i in range(len(part))]
        videos = pipeline(
            prompt=[c.prompt for c in part], negative_prompt=[args.negative_prompt] * len(part), height=data.HEIGHT,
            width=data.WIDTH, num_frames=data.FRAMES, num_inference_steps=args.steps, guidance_scale=args.guidance,
            generator=generators, output_type="np", **({"image": images[0]} if images else {}),
        ).frames  # fmt: skip
        yield from zip(part, np.round(np.asarray(videos) * 255).astype(np.uint8), strict=True)


def from_ours(args, chosen):
    """All clips in one run of our own pipeline."""
    root = pathlib.Path(__file__).resolve().parents[1]
    sys.path.insert(0, str(root))
    from PIL import Image

    from maxdiffusion import generate_wan, request

    with tempfile.TemporaryDirectory() as folder:
        images = [f"{folder}/{number}.png" for number, case in enumerate(chosen) if case.still]
        prompts = [case.prompt for case in chosen]
        for path, case in zip(images, chosen, strict=False):
            Image.fromarray(data.render_uint8(case.still, frames=1)[0]).save(path)
        words = [
            *([f"image=[{', '.join(images)}]"] if images else []),
            f"pretrained_model_name_or_path={args.model}",
            f"prompt=[{', '.join(prompts)}]" if len(set(prompts)) > 1 else f"prompt={prompts[0]}",
            f"seed=[{', '.join(str(args.seed + i) for i in range(len(chosen)))}]",
            f"negative_prompt={args.negative_prompt}",
            f"num_inference_steps={args.steps}",
            f"guidance_scale={args.guidance}",
            *([f"flow_shift={args.flow_shift}"] if args.flow_shift else []),
            f"per_device_batch_size={args.batch}",
            "output_format=npy",
            f"output_dir={folder}",
            "log_level=warning",
            *([f"lora={args.lora}"] if args.lora else []),
            *args.words,
        ]
        page = root / "configs" / ("wan_tiny_i2v.yml" if images else "wan_tiny.yml")
        paths = generate_wan.run(request.load([str(page), *words]))
        for case, path in zip(chosen, paths, strict=True):
            yield case, np.load(path)


def measure_chains(args):
    """Prints for each chain what its clips show, and how many chains are right in all three clips."""
    cases, words, good, kept_on, clips = image_groups(args)["held out"][::3], args.words, 0, 0, []
    for shape, direction in dict.fromkeys((case.combination.shape, case.combination.direction) for case in cases):
        chosen = [case for case in cases if (case.combination.shape, case.combination.direction) == (shape, direction)]
        ways = (direction, OPPOSITE[direction], direction)
        args.words = [*words, "clips=3", f"clip_prompts=[{', '.join(f'a {shape} moving {way}' for way in ways)}]"]
        for case, frames in from_ours(args, chosen):
            parts = [frames[first : first + data.FRAMES] for first in range(0, len(frames) - 1, data.FRAMES - 1)]
            found = [(data.measure(part), data.compare(part, case.still)) for part in parts]
            moved = all(
                measured.direction == way and kept.colour_error < 20 and kept.background_error < 12
                for way, (measured, kept) in zip(ways, found, strict=True)
            )
            shapes = [measured.shape for measured, _ in found]
            good += moved and set(shapes) == {case.combination.shape}
            kept_on += moved and len(set(shapes)) == 1
            clips.append(frames)
            shown = (
                f"{m.shape} {m.direction}, colour {k.colour_error:.1f}, ground {k.background_error:.1f}"
                for m, k in found
            )
            print(f"{case.name}: {'; '.join(shown)}", flush=True)
    if args.save:
        args.save.mkdir(parents=True, exist_ok=True)
        contact_sheet(clips, args.save / "chains.png", columns=7)
    print(f"{kept_on} of {len(cases)} chains keep colour, direction and the shape of clip 1, {good} that of the image")


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
    parser.add_argument("--taught", action="store_true", help="also measure what the concept LoRA teaches")
    parser.add_argument("--chains", action="store_true", help="measure videos of three clips instead")
    parser.add_argument("--lora", help="file of a LoRA")
    parser.add_argument("--words", nargs="*", default=[], metavar="key=value", help="further words of the command")
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

    kind = json.loads((pathlib.Path(args.model) / "model_index.json").read_text())["_class_name"]
    takes_images = kind == "WanImageToVideoPipeline"
    if args.chains:
        return measure_chains(args)
    groups = image_groups(args) if takes_images else {"held out": [Case(c) for c in data.held_out_combinations()]}
    if args.trained and not takes_images:
        order = np.random.default_rng(0).permutation(len(data.training_combinations()))[: args.trained]
        groups["trained"] = [Case(data.training_combinations()[i]) for i in order]
    groups |= taught_groups() if args.taught else {}
    source = from_folder if args.frames else BACKENDS[args.backend]
    attributes = ("direction", "shape") if takes_images else ATTRIBUTES  # colours are compared with the image's
    table = {}
    first_seed = args.seed
    for name, chosen in groups.items():
        start, results, clips, kept = time.time(), [], [], []
        for repeat in range(args.repeats):
            args.seed = first_seed + 1000 * repeat
            for case, frames in source(args, chosen):
                measured = data.measure(frames)
                results.append((case.combination, measured))
                clips.append(frames)
                if case.still:
                    kept.append(data.compare(frames, case.still))
                correct = measured.correct(case.combination)
                if not all(correct[attribute] for attribute in attributes):
                    got = " ".join((measured.colour, measured.shape, measured.direction, measured.background))
                    print(f"  wrong: wanted {case.name}, got {got}")
                if args.save and repeat == 0:
                    (args.save / case.name).parent.mkdir(parents=True, exist_ok=True)
                    np.save(args.save / f"{case.name}.npy", frames)
        if args.save:
            contact_sheet(clips[: len(chosen)], args.save / f"{name.replace(' ', '_')}.png")
        row = {"clips": len(results), "seconds": round(time.time() - start, 1)}
        for attribute in attributes:
            row[attribute] = float(np.mean([m.correct(c)[attribute] for c, m in results]))
        row["all of them"] = float(np.mean([all(m.correct(c)[a] for a in attributes) for c, m in results]))
        for figure in FIDELITY if kept else ():
            values = [getattr(k, figure) for k in kept]
            row[figure] = float(np.mean(values))
            row[f"{figure}, worst"] = float(min(values) if figure == "first_psnr" else max(values))
        for figure in SMOOTHNESS:
            row[figure] = float(np.nanmean([getattr(m, figure) for _, m in results]))
        table[name] = row
    width = max(len(key) for row in table.values() for key in row) + 2
    print("".ljust(width) + "".join(name.rjust(12) for name in table))
    for key in next(iter(table.values())):
        cells = []
        for row in table.values():
            value = row[key]
            cells.append(f"{100 * value:.1f} %" if key in (*ATTRIBUTES, "all of them", "visible") else f"{value:.4g}")
        print(key.ljust(width) + "".join(cell.rjust(12) for cell in cells))
    if args.json:
        args.json.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
