"""Trains two LoRAs for the miniature WAN (models/wan_tiny) in stages: latents, concept; trajectories, four_steps.

`concept` teaches the transformer a colour and a shape of which it has seen no clip, by flow matching on their training
combinations (`latents`) and on some of its own. `four_steps` distils guidance and steps: at each of the four levels of
Euler with shift 5 the student's one pass leads to where the teacher, guided UniPC in 12 steps on these levels and two
between each, was at the next (`trajectories`). Text encoder and VAE stay as they are.

States are kept in --work; `latents` and `trajectories` add to what they find there.
"""

import argparse
import pathlib
import time

import numpy as np
import safetensors.torch
import tiny_wan_data as data
import torch
import torch.nn.functional as F
import train_tiny_wan as base
from torch.nn.utils import parametrize

MODEL = pathlib.Path(__file__).resolve().parents[1] / "models" / "wan_tiny"
SHIFT, STEPS, SUBSTEPS = 5.0, 4, 3
TAUGHT = [c for c in data.taught_combinations() if not c.held_out]
PARTS = {
    "attn1": "self_attn", "attn2": "cross_attn", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o",
    "ffn.net.0.proj": "ffn.0", "ffn.net.2": "ffn.2",
}  # fmt: skip


class Update(torch.nn.Module):
    """A weight and its LoRA: W + alpha / rank * up @ down."""

    def __init__(self, weight, rank, alpha):
        super().__init__()
        self.down = torch.nn.Parameter(torch.randn(rank, weight.shape[1]).to(weight) * weight.shape[1] ** -0.5)
        self.up = torch.nn.Parameter(weight.new_zeros(weight.shape[0], rank))
        self.scale = alpha / rank

    def forward(self, weight):
        return weight + self.scale * self.up @ self.down


def add_lora(model, rank, alpha):
    """Freezes the model and adds a LoRA to every linear layer of its blocks: {original name: update}."""
    model.requires_grad_(False)
    updates = {}
    for name, module in list(model.blocks.named_modules(prefix="blocks")):
        if isinstance(module, torch.nn.Linear):
            update = Update(module.weight, rank, alpha)
            parametrize.register_parametrization(module, "weight", update)
            for theirs, ours in PARTS.items():
                name = name.replace(theirs, ours)
            updates[name] = update
    return updates


def write(path, updates, alpha, kohya):
    """fp16, under the names of musubi tuner (kohya) or under those of LightX2V, whose alpha is an integer."""
    tensors = {}
    for name, update in updates.items():
        stem = "lora_unet_" + name.replace(".", "_") if kohya else f"diffusion_model.{name}"
        tensors[f"{stem}.lora_down.weight"] = update.down.detach().half()
        tensors[f"{stem}.lora_up.weight"] = update.up.detach().half()
        tensors[f"{stem}.alpha"] = torch.tensor(float(alpha) if kohya else int(alpha))
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file({k: v.contiguous() for k, v in tensors.items()}, path)


def train(args, name, batch_of):
    """Regresses the velocity with AdamW on the LoRA alone; the schedule is by time. Writes the averaged weights.

    `batch_of(rng)` returns tokens, noise levels, prompts and the velocity wanted.
    """
    pipeline = base.load_base(args)
    model = pipeline.transformer
    pipeline.text_encoder.requires_grad_(False)
    torch.manual_seed(args.seed)
    updates = add_lora(model, args.rank, args.alpha)
    parameters = [p for update in updates.values() for p in update.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    average = base.Average(parameters, args.ema)
    rotations = base.rotary(model, (1, model.config.in_channels, 5, 12, 12))
    start, step, losses = time.time(), 0, []
    while (progress := (time.time() - start) / (args.minutes * 60)) < 1:
        optimizer.param_groups[0]["lr"] = args.lr * min(1, (step + 1) / 50) * 0.5 * (1 + np.cos(np.pi * progress))
        tokens, sigma, prompts, wanted = batch_of(np.random.default_rng((args.seed, 7, step)))
        text, bias = base.embed_each(pipeline.tokenizer, pipeline.text_encoder, prompts, args.text_tokens)
        temb = model.condition_embedder.timesteps_proj(1000 * sigma)
        loss = F.mse_loss(base.transformer_tokens(model, tokens, temb, text, bias, rotations), wanted)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        average.update()
        step += 1
        losses.append(loss.item())
        if step % 50 == 0:
            base.log(args.work, name, step=step, seconds=time.time() - start, loss=float(np.mean(losses)))
            losses = []
    average.swap()
    write(args.output, updates, args.alpha, kohya=name == "concept")
    base.log(args.work, name, step=step, seconds=time.time() - start, parameters=sum(p.numel() for p in parameters))


def load(path):
    return torch.load(path, weights_only=False) if path.exists() else dict(latents=[], labels=[])


def stage_latents(args):
    """Encodes --rounds clips of every taught training combination, and in each round some of the checkpoint's own."""
    vae = base.load_vae(args)
    path = args.work / "latents.pt"
    state = load(path)
    for _ in range(args.rounds):
        number = len(state["latents"])
        rng = np.random.default_rng((args.seed, 1, number))
        chosen = [*TAUGHT, *base.TRAINING[number % 5 :: 5]]
        parts = []
        for first in range(0, len(chosen), 6):
            videos = np.stack([data.render(data.sample_clip(c, rng)) for c in chosen[first : first + 6]])
            videos = torch.from_numpy(videos).permute(0, 4, 1, 2, 3).to(base.DEVICE).div_(127.5).sub_(1)
            with torch.no_grad():
                parts.append(base.encode(vae, videos)[0].cpu())
        state["latents"].append(torch.cat(parts))
        state["labels"].append(chosen)
        base.save(path, state)
        print(f"round {number}", flush=True)


def stage_concept(args):
    state = load(args.work / "latents.pt")
    mean, std = base.load_statistics(args)
    clips = base.patchify((torch.cat(state["latents"]) - mean) / std).to(base.DEVICE)
    labels = [c for part in state["labels"] for c in part]
    taught, known = ([i for i, c in enumerate(labels) if (c in set(TAUGHT)) == new] for new in (True, False))

    def batch_of(rng):
        new = rng.random(args.batch) < 0.6
        index = [int(rng.choice(taught if n else known)) for n in new]
        prompts = ["" if rng.random() < 0.1 else data.vary_prompt(labels[i], rng) for i in index]
        sigma = base.levels(args.batch, args.shift, rng)
        clean = clips[index]
        noise = torch.from_numpy(rng.standard_normal(clean.shape, np.float32)).to(base.DEVICE)
        return clean + sigma[:, None, None] * (noise - clean), sigma, prompts, noise - clean

    train(args, "concept", batch_of)


def stage_trajectories(args):
    """Adds for --minutes the teacher's latents at the student's levels, (n, STEPS + 1, c, t, h, w) in fp16."""
    teacher = base.load_base(args)
    path = args.work / "trajectories.pt"
    state = load(path)
    start = saved = time.time()
    while time.time() - start < args.minutes * 60:
        number = len(state["latents"])
        rng = np.random.default_rng((args.seed, 6, number))
        chosen = rng.choice(len(base.TRAINING), args.batch, replace=False)
        prompts = [data.vary_prompt(base.TRAINING[i], rng) for i in chosen]
        made = base.trajectory(
            teacher.transformer, teacher.tokenizer, teacher.text_encoder, prompts, SHIFT, None, args.guidance,
            10_000 * args.seed + number, sigmas=1 - np.arange(STEPS * SUBSTEPS) / (STEPS * SUBSTEPS),
        )  # fmt: skip
        state["latents"].append(torch.stack(list(made)[::SUBSTEPS], 1).half())
        state["labels"].append(prompts)
        if time.time() - saved > 60 or time.time() - start >= args.minutes * 60:
            base.save(path, state)
            saved = time.time()
            print(f"{args.batch * len(state['latents'])} in {saved - start:.0f} s", flush=True)


def stage_four_steps(args):
    state = load(args.work / "trajectories.pt")
    latents = torch.cat(state["latents"])
    prompts = [prompt for part in state["labels"] for prompt in part]
    print(f"{len(prompts)} trajectories", flush=True)
    levels = 1 - np.arange(STEPS + 1) / STEPS
    levels = SHIFT * levels / (1 + (SHIFT - 1) * levels)

    def batch_of(rng):
        index = rng.integers(len(prompts), size=args.batch)
        level = rng.choice(STEPS, args.batch, p=[0.15, 0.2, 0.25, 0.4])
        here, there = (base.patchify(latents[index, level + i].float()).to(base.DEVICE) for i in (0, 1))
        sigma, following = (torch.tensor(levels[level + i], dtype=torch.float32, device=base.DEVICE) for i in (0, 1))
        return here, sigma, [prompts[i] for i in index], (there - here) / (following - sigma)[:, None, None]

    train(args, "four_steps", batch_of)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    stages = dict(
        latents=stage_latents, concept=stage_concept, trajectories=stage_trajectories, four_steps=stage_four_steps
    )
    parser.add_argument("stage", choices=stages)
    parser.add_argument("--work", type=pathlib.Path, required=True, help="folder for states and logs")
    parser.add_argument("--base", type=pathlib.Path, default=MODEL, help="the checkpoint")
    parser.add_argument("--output", type=pathlib.Path, help="the LoRA's file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--minutes", type=float, default=12)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--alpha", type=float, default=16)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--ema", type=float, default=0.99)
    parser.add_argument("--shift", type=float, default=3.0, help="flow shift of the checkpoint's own training")
    parser.add_argument("--guidance", type=float, default=2.0, help="of the teacher")
    parser.add_argument("--text-tokens", type=int, default=16)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    stages[args.stage](args)


if __name__ == "__main__":
    main()
