"""Trains the miniature WAN 2.1 text-to-video checkpoint in stages: vae, latents, transformer (and text), export.

With `--base FOLDER`, a text-to-video checkpoint, it trains the image-to-video miniature (stages latents, transformer,
export): tokenizer, text encoder and VAE stay those of FOLDER, and its transformer learns to use the further input
channels of WAN 2.2's image-to-video models: mask and encoded video of first frame and zeros.

Every stage keeps its state in --work and resumes from it. The reference's torch classes hold the weights; the training
forward passes below compute the same functions (see `check`) with less overhead: the causal VAE over the whole clip at
once with its 3-D convolutions folded into 2-D ones, and cross-attention with all pad tokens merged into one.
"""

import argparse
import dataclasses
import itertools
import json
import math
import os
import pathlib
import shutil
import time

import numpy as np
import tiny_wan_data as data
import torch
import torch.nn.functional as F

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VAE_CONFIG = dict(
    base_dim=16,
    z_dim=8,
    dim_mult=[1, 2, 2, 2],
    num_res_blocks=1,
    attn_scales=[],
    temperal_downsample=[False, True, True],
    latents_mean=[0.0] * 8,
    latents_std=[1.0] * 8,
)


def log(work, name, **values):
    line = json.dumps({k: (round(v, 6) if isinstance(v, float) else v) for k, v in values.items()})
    print(name, line, flush=True)
    with open(work / f"{name}.jsonl", "a") as file:
        file.write(line + "\n")


def save(path, state):
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


class Average:
    """Exponential moving average of parameters, with a warm-up of the decay."""

    def __init__(self, parameters, decay):
        self.parameters, self.decay, self.count = list(parameters), decay, 0
        self.values = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self):
        self.count += 1
        decay = min(self.decay, (1 + self.count) / (10 + self.count))
        torch._foreach_lerp_(self.values, [p.detach() for p in self.parameters], 1 - decay)

    @torch.no_grad()
    def swap(self):
        for parameter, value in zip(self.parameters, self.values, strict=True):
            kept = parameter.detach().clone()
            parameter.copy_(value)
            value.copy_(kept)


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised by Newton-Schulz steps for matrices and convolutions, AdamW for everything else."""

    def __init__(self, matrices, others, lr, adam_share=0.1, momentum=0.95, weight_decay=0.01):
        self.adam_share = adam_share
        self.adam = torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.0)
        super().__init__(matrices, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @staticmethod
    def orthogonal(x):
        transposed = x.shape[-2] > x.shape[-1]
        x = x.mT if transposed else x
        x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
        for _ in range(5):
            square = x @ x.mT
            x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
        return x.mT if transposed else x

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = {}
            for p in group["params"]:
                if p.grad is None:
                    continue
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(momentum, group["momentum"]).flatten(1)
                by_shape.setdefault(update.shape, []).append((p, update))
            for (rows, columns), members in by_shape.items():
                updates = self.orthogonal(torch.stack([update for _, update in members]))
                for (p, _), update in zip(members, updates, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update.view_as(p), alpha=-group["lr"] * 0.2 * max(rows, columns) ** 0.5)
        for group in self.adam.param_groups:
            group["lr"] = self.param_groups[0]["lr"] * self.adam_share
        self.adam.step()

    def zero_grad(self, set_to_none=True):
        super().zero_grad(set_to_none)
        self.adam.zero_grad(set_to_none)

    def state_dict(self):
        return dict(muon=super().state_dict(), adam=self.adam.state_dict())

    def load_state_dict(self, state):
        super().load_state_dict(state["muon"])
        self.adam.load_state_dict(state["adam"])


def is_matrix(p):
    return p.ndim >= 2 and min(p.shape[0], p.shape[1]) > 1


# The VAE over a whole clip. Activations are (batch * frames, channels, height, width), channels last.


def causal_conv(module, x, batch):
    """WanCausalConv3d with kernel (3, 3, 3) or (1, 1, 1) as one 2-D convolution over the stacked frames."""
    weight = module.weight
    out, inner, taps, height, width = weight.shape
    if taps > 1:
        clip = x.permute(0, 2, 3, 1).unflatten(0, (batch, -1))
        frames = clip.shape[1]
        clip = (
            torch.cat([torch.zeros_like(clip[:, : taps - 1]), clip], 1)
            if frames >= taps - 1
            else (F.pad(clip, (0, 0, 0, 0, 0, 0, taps - 1, 0)))
        )
        x = torch.cat([clip[:, t : t + frames] for t in range(taps)], -1).flatten(0, 1).permute(0, 3, 1, 2)
        weight = weight.permute(0, 2, 1, 3, 4).reshape(out, taps * inner, height, width)
    else:
        weight = weight[:, :, 0]
    return F.conv2d(x, weight.contiguous(memory_format=torch.channels_last), module.bias, padding=height // 2)


def norm(module, x):
    return F.normalize(x, dim=1) * (module.gamma.reshape(1, -1, 1, 1) * module.scale)


def norm_silu(module, x):
    return fused_norm_silu(x, module.gamma.reshape(1, -1, 1, 1), module.scale)


def plain_norm_silu(x, gamma, scale):
    return F.silu(x * torch.rsqrt(x.square().sum(1, keepdim=True) + 1e-24) * (gamma * scale))


fused_norm_silu = plain_norm_silu


def res_block(module, x, batch):
    shortcut = x if isinstance(module.conv_shortcut, torch.nn.Identity) else causal_conv(module.conv_shortcut, x, batch)
    x = causal_conv(module.conv1, norm_silu(module.norm1, x), batch)
    x = causal_conv(module.conv2, norm_silu(module.norm2, x), batch)
    return x + shortcut


def mid_block(module, x, batch):
    x = res_block(module.resnets[0], x, batch)
    for attention, resnet in zip(module.attentions, module.resnets[1:], strict=True):
        qkv = attention.to_qkv(norm(attention.norm, x)).flatten(2).transpose(1, 2).unsqueeze(1)
        y = F.scaled_dot_product_attention(*qkv.chunk(3, -1)).squeeze(1).transpose(1, 2).reshape(x.shape)
        x = res_block(resnet, x + attention.proj(y), batch)
    return x


def time_conv(module, clip, stride=1):
    """The (3, 1, 1) convolution over (b, t, c, h, w) without padding, as one matrix product."""
    count = (clip.shape[1] - 3) // stride + 1
    parts = [clip[:, t : t + stride * (count - 1) + 1 : stride] for t in range(3)]
    x = torch.cat(parts, 2).flatten(0, 1).contiguous(memory_format=torch.channels_last)
    weight = module.weight[..., 0, 0].permute(0, 2, 1).flatten(1)[..., None, None]
    return F.conv2d(x, weight, module.bias).unflatten(0, (clip.shape[0], count))


def resample(module, x, batch):
    if module.mode == "upsample3d":
        clip = x.unflatten(0, (batch, -1))
        first, rest = clip[:, :1], clip[:, 1:]
        if rest.shape[1]:
            doubled = time_conv(module.time_conv, F.pad(rest, (0, 0, 0, 0, 0, 0, 2, 0)))
            doubled = doubled.unflatten(2, (2, -1)).flatten(1, 2)
            first = torch.cat([first, doubled], 1)
        x = first.flatten(0, 1)
    x = module.resample(x.contiguous(memory_format=torch.channels_last))
    if module.mode == "downsample3d":
        clip = x.unflatten(0, (batch, -1))
        if clip.shape[1] > 1:
            clip = torch.cat([clip[:, :1], time_conv(module.time_conv, clip, 2)], 1)
        x = clip.flatten(0, 1)
    return x


def encode(vae, clips):
    """(b, 3, t, h, w) in [-1, 1] -> mean and log variance, (b, z, t', h', w') each."""
    batch, encoder = clips.shape[0], vae.encoder
    x = clips.transpose(1, 2).flatten(0, 1).contiguous(memory_format=torch.channels_last)
    x = causal_conv(encoder.conv_in, x, batch)
    for block in encoder.down_blocks:
        x = (resample if hasattr(block, "resample") else res_block)(block, x, batch)
    x = mid_block(encoder.mid_block, x, batch)
    x = causal_conv(encoder.conv_out, norm_silu(encoder.norm_out, x), batch)
    x = causal_conv(vae.quant_conv, x, batch)
    mean, log_variance = x.unflatten(0, (batch, -1)).transpose(1, 2).chunk(2, 1)
    return mean, log_variance.clamp(-30, 20)


def decode(vae, latents):
    """(b, z, t', h', w') -> (b, 3, t, h, w), not clamped."""
    batch, decoder = latents.shape[0], vae.decoder
    x = latents.transpose(1, 2).flatten(0, 1).contiguous(memory_format=torch.channels_last)
    x = causal_conv(decoder.conv_in, causal_conv(vae.post_quant_conv, x, batch), batch)
    x = mid_block(decoder.mid_block, x, batch)
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            x = res_block(resnet, x, batch)
        if block.upsamplers is not None:
            x = resample(block.upsamplers[0], x, batch)
    x = causal_conv(decoder.conv_out, norm_silu(decoder.norm_out, x), batch)
    return x.unflatten(0, (batch, -1)).transpose(1, 2)


def build_vae(seed, config=None):
    from diffusers import AutoencoderKLWan

    torch.manual_seed(seed)
    vae = AutoencoderKLWan(**(config or VAE_CONFIG)).to(DEVICE)
    with torch.no_grad():  # torch's default shrinks the residual stream at every resampling
        for name, module in vae.named_modules():
            if isinstance(module, (torch.nn.Conv2d, torch.nn.Conv3d)):
                module.bias.zero_()
                if name.endswith(("conv_in", "conv_shortcut", "quant_conv", "resample.1", "time_conv")):
                    module.weight.mul_(3**0.5)
                if name.endswith("time_conv"):  # start from repeating, or keeping, the newest frame
                    module.weight.mul_(0.3)
                    eye = torch.eye(module.in_channels, device=DEVICE)
                    module.weight[:, :, 2, 0, 0] += eye.repeat(module.out_channels // module.in_channels, 1)
    return vae


def random_colour(rng):
    return tuple(rng.uniform(0, 255, 3))


def vae_clip(rng, crop, frames, plain_share):
    """One training crop: mostly clips of the training combinations, the rest with arbitrary colours; near the shape."""
    combination = TRAINING[rng.integers(len(TRAINING))]
    clip = data.sample_clip(combination, rng)
    if rng.random() < plain_share:
        clip = dataclasses.replace(clip, colour=random_colour(rng), background=random_colour(rng))
    if crop >= data.HEIGHT:
        return data.render(clip, first=0, frames=frames)
    first = int(rng.integers(data.FRAMES - frames + 1))
    centre = np.asarray(clip.positions)[first + frames // 2] + rng.uniform(-0.75, 0.75, 2) * (clip.radius + 4)
    left, top = np.clip(np.round(centre - crop / 2), 0, data.WIDTH - crop).astype(int)
    return data.render(clip, window=(top, left, crop, crop), first=first, frames=frames)


TRAINING = data.training_combinations()


def vae_batch(rng, batch, crop, frames, plain_share):
    clips = np.stack([vae_clip(rng, crop, frames, plain_share) for _ in range(batch)])
    return torch.from_numpy(clips).permute(0, 4, 1, 2, 3).to(DEVICE).div_(127.5).sub_(1)


def stage_vae(args):
    work = args.work
    vae = build_vae(args.seed)
    parameters = list(vae.parameters())
    if args.muon:
        optimizer = Muon(
            [p for p in parameters if is_matrix(p)], [p for p in parameters if not is_matrix(p)], args.vae_lr
        )
    else:
        optimizer = torch.optim.AdamW(parameters, lr=args.vae_lr, betas=(0.9, 0.99), weight_decay=1e-4)
    average = Average(parameters, 0.998)
    path, step, spent = work / "vae.pt", 0, 0.0
    if path.exists():
        state = torch.load(path, map_location=DEVICE)
        vae.load_state_dict(state["vae"])
        optimizer.load_state_dict(state["optimizer"])
        average.values, average.count = state["average"], state["step"]
        step, spent = state["step"], state["spent"]
    start, last_saved = time.time() - spent, time.time()
    minutes = args.vae_minutes
    while True:
        spent = time.time() - start
        progress = spent / (minutes * 60)
        if progress >= 1:
            break
        rate = args.vae_lr * min(1, (step + 1) / 50) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        rng = np.random.default_rng((args.seed, step))
        if progress < 0.45:  # many small crops first, whole clips last
            clips = vae_batch(rng, 2 * args.vae_batch, 24, 5, 0.25)
        elif progress < 0.75:
            clips = vae_batch(rng, args.vae_batch, 48, 9, 0.25)
        else:
            clips = vae_batch(rng, max(1, args.vae_batch // 8), data.HEIGHT, data.FRAMES, 0.1)
        torch.manual_seed(args.seed * 1_000_003 + step)
        mean, log_variance = encode(vae, clips)
        decoded = decode(vae, mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean))
        difference = decoded - clips
        rec = difference.abs().mean()
        mse = difference.square().mean()
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        weight = args.vae_kl * min(1, 0.2 + progress / 0.4)
        loss = rec + 2 * mse + weight * kl
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        gradient = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        average.update()
        step += 1
        if step % 25 == 0 or step == 1:
            log(
                work, "vae", step=step, seconds=time.time() - start, lr=rate, l1=rec.item(), kl=kl.item(),
                psnr=10 * math.log10(4 / mse.item()), gradient=gradient.item(), std=mean.std().item(),
            )  # fmt: skip
        if time.time() - last_saved > 120:
            save_vae(path, vae, optimizer, average, step, time.time() - start)
            last_saved = time.time()
    save_vae(path, vae, optimizer, average, step, time.time() - start)


def save_vae(path, vae, optimizer, average, step, spent):
    state = dict(vae=vae.state_dict(), optimizer=optimizer.state_dict(), average=average.values, step=step, spent=spent)
    save(path, state)


def stage_decoder(args):
    """Sharpens the decoder alone on whole clips: the latents, and so the transformer, stay as they are."""
    path = args.work / "decoder.pt"
    vae = load_vae(args)
    parameters = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]
    optimizer = Muon(
        [p for p in parameters if is_matrix(p)], [p for p in parameters if not is_matrix(p)], args.decoder_lr
    )
    average = Average(parameters, 0.99)
    start, last_saved, step = time.time(), time.time(), 0
    while (progress := (time.time() - start) / (args.decoder_minutes * 60)) < 1:
        rate = args.decoder_lr * min(1, (step + 1) / 20) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        optimizer.param_groups[0]["lr"] = rate
        rng = np.random.default_rng((args.seed, 3, step, int(start)))
        clips = vae_batch(rng, 1, data.HEIGHT, data.FRAMES, 0.05)
        torch.manual_seed(args.seed * 1_000_003 + step)
        with torch.no_grad():
            mean, log_variance = encode(vae, clips)
            latents = mean + 0.5 * torch.exp(0.5 * log_variance) * torch.randn_like(mean)
        difference = decode(vae, latents) - clips
        rec, mse = difference.abs().mean(), difference.square().mean()
        optimizer.zero_grad(set_to_none=True)
        (rec + 4 * mse).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        average.update()
        step += 1
        if step % 25 == 0:
            log(args.work, "decoder", step=step, seconds=time.time() - start, lr=rate, l1=rec.item(),
                psnr=10 * math.log10(4 / mse.item()))  # fmt: skip
        if time.time() - last_saved > 60:
            save(path, dict(average=average.values, step=step))
            last_saved = time.time()
    save(path, dict(average=average.values, step=step))


def load_base(args):
    """The text-to-video pipeline on which the image-to-video miniature is built, in fp32."""
    from diffusers import WanPipeline

    return WanPipeline.from_pretrained(args.base, torch_dtype=torch.float32).to(DEVICE)


def load_vae(args):
    if args.base:
        return load_base(args).vae.eval()
    vae = build_vae(args.seed)
    state = torch.load(args.work / "vae.pt", map_location=DEVICE)
    vae.load_state_dict(state["vae"])
    with torch.no_grad():
        for parameter, value in zip(vae.parameters(), state["average"], strict=True):
            parameter.copy_(value)
        if (args.work / "decoder.pt").exists():
            values = torch.load(args.work / "decoder.pt", map_location=DEVICE)["average"]
            parameters = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]
            for parameter, value in zip(parameters, values, strict=True):
                parameter.copy_(value)
    return vae.eval()


def stage_latents(args):
    """Encodes clips of every training combination and records the latents' statistics in the VAE's config."""
    if args.base:
        return stage_image_latents(args)
    vae = load_vae(args)
    rng = np.random.default_rng((args.seed, 1))
    path = args.work / "latents.pt"
    clips, labels = [], []
    if path.exists():
        state = torch.load(path)
        clips, labels = [state["latents"]], [state["labels"]]
        rng = np.random.default_rng((args.seed, 1, len(state["labels"])))
    start = time.time()
    with torch.no_grad():
        for repeat in range(args.clips_per_combination):
            for first in range(0, len(TRAINING), 6):
                chosen = range(first, min(first + 6, len(TRAINING)))
                batch = np.stack([data.render(data.sample_clip(TRAINING[i], rng)) for i in chosen])
                batch = torch.from_numpy(batch).permute(0, 4, 1, 2, 3).to(DEVICE).div_(127.5).sub_(1)
                clips.append(encode(vae, batch)[0].cpu())
                labels.append(torch.tensor(list(chosen)))
            print(f"encoded {repeat + 1} clips a combination in {time.time() - start:.0f} s", flush=True)
            if repeat % 4 == 3 or repeat + 1 == args.clips_per_combination:
                latents = torch.cat(clips)
                mean, std = latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))
                if not path.exists():  # later additions keep the first statistics
                    statistics = dict(mean=mean.tolist(), std=std.clamp(min=0.1 * std.max()).tolist())
                    (args.work / "statistics.json").write_text(json.dumps(statistics, indent=1))
                    print("std", [round(v, 3) for v in std.tolist()], flush=True)
                save(path, dict(latents=latents, labels=torch.cat(labels)))


def image_video(still):
    """The given frame followed by zeros, (1, 3, t, h, w) in [-1, 1]."""
    video = torch.from_numpy(data.render(still)).permute(3, 0, 1, 2)[None].to(DEVICE).div_(127.5).sub_(1)
    video[:, :, 1:] = 0
    return video


def image_clips(rng):
    """One still of every colour, shape and background, and one with arbitrary colours, with all its training clips.

    Yields the still and a list of (labels, clip): colour, shape, direction and background, no colours if arbitrary.
    """
    for colour, shape, background in itertools.product(data.COLOURS, data.SHAPES, data.BACKGROUNDS):
        still = data.sample_still(shape, data.COLOURS[colour], data.BACKGROUNDS[background], rng)
        other = data.sample_still(shape, *data.random_colours(rng), rng)
        for image, names in ((still, (colour, background)), (other, ("", ""))):
            wanted = [data.Combination(names[0], shape, direction, names[1]) for direction in data.DIRECTIONS]
            wanted = [c for c in wanted if not (c.colour and c.held_out)]
            moving = [(dataclasses.astuple(c), data.move(image, c.direction, rng)) for c in wanted]
            yield image, [(labels, clip) for labels, clip in moving if clip]


def stage_image_latents(args):
    """Encodes clips, and for each still the video of its first frame and zeros."""
    vae = load_vae(args)
    path = args.work / "latents.pt"
    state = torch.load(path) if path.exists() else dict(latents=[], conditions=[], stills=[], labels=[], rounds=0)
    state["latents"], state["conditions"] = list(state["latents"]), list(state["conditions"])
    start = time.time()
    for number in range(state["rounds"], state["rounds"] + args.clips_per_combination):
        for still, moving in image_clips(np.random.default_rng((args.seed, 4, number))):
            if not moving:
                continue
            videos = torch.from_numpy(np.stack([data.render(clip) for _, clip in moving]))
            videos = videos.permute(0, 4, 1, 2, 3).to(DEVICE).div_(127.5).sub_(1)
            with torch.no_grad():
                condition, *clips = encode(vae, torch.cat([image_video(still), videos]))[0].cpu()
            state["stills"] += [len(state["conditions"])] * len(clips)
            state["labels"] += [labels for labels, _ in moving]
            state["conditions"].append(condition)
            state["latents"] += clips
        state["rounds"] = number + 1
        print(f"round {number}: {len(state['labels'])} clips in {time.time() - start:.0f} s", flush=True)
        save(path, state | {name: torch.stack(state[name]) for name in ("latents", "conditions")})


def load_statistics(args):
    if args.base:
        config = json.loads((args.base / "vae" / "config.json").read_text())
        return [torch.tensor(config[name]).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std")]
    statistics = json.loads((args.work / "statistics.json").read_text())
    return [torch.tensor(statistics[name]).view(1, -1, 1, 1, 1) for name in ("mean", "std")]


# Text


WORDS = """the of and to in is it with for as at by from an one two three this that are was be or not over under near
while then between into out very more less big small large tiny huge slow slowly fast quickly left right up down upward
downward upwards downwards toward towards across through along moves move moving goes going slides sliding travels flies
rolls falling rising drifts still static video clip scene camera frame view shot background backdrop foreground color
colour colored coloured bright dark light black white gray grey navy brown red green blue yellow orange purple pink cyan
circle square triangle disc disk ball box block shape object rectangle star person man woman cat dog car tree water sky
sun city street house mountain sea high quality realistic animation blurry low bad worst best detailed smooth simple
plain solid""".split()  # noqa: SIM905


def build_tokenizer():
    """A Unigram tokenizer in T5's style: whole words of the grammar and some English, letters, bytes for the rest."""
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0)] + [(f"<0x{i:02X}>", -18.0) for i in range(256)]
    pieces += [("\u2581" + word, -5.0) for word in dict.fromkeys(["a", "on", *WORDS])]
    pieces += [
        (piece, -7.0) for piece in ("ing", "ed", "er", "es", "ly", "tion", "al", "en", "th", "an", "re", "st", "or")
    ]
    pieces += [("\u2581", -6.0)] + [(chr(code), -9.0) for code in range(33, 127)]
    tokenizer = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="always")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def build_text_encoder(vocabulary, seed):
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(seed + 1)
    config = UMT5Config(
        vocab_size=vocabulary, d_model=64, d_kv=16, num_heads=4, d_ff=160, num_layers=2, num_decoder_layers=0,
        feed_forward_proj="gated-gelu", dropout_rate=0.0, relative_attention_num_buckets=32,
        relative_attention_max_distance=128, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
    )  # fmt: skip
    return UMT5EncoderModel(config).to(DEVICE)


TEXT_LENGTH = 512


def embed_prompts(tokenizer, text_encoder, prompts):
    """Hidden states (n, longest + 1, d), the last token standing for all pads, and attention bias (n, longest + 1)."""
    tokens = tokenizer(prompts, padding=True, return_tensors="pt").to(DEVICE)
    mask = tokens.attention_mask
    hidden = text_encoder(input_ids=tokens.input_ids, attention_mask=mask).last_hidden_state * mask[..., None]
    bias = torch.where(mask.bool(), 0.0, -torch.inf)
    pads = torch.log(TEXT_LENGTH - mask.sum(1, keepdim=True).float())
    return F.pad(hidden, (0, 0, 0, 1)), torch.cat([bias, pads], 1)


def embed_each(tokenizer, text_encoder, prompts, length):
    """As embed_prompts, each distinct prompt encoded once; a fixed length keeps one compiled program."""
    unique = list(dict.fromkeys(prompts))
    which = torch.tensor([unique.index(p) for p in prompts], device=DEVICE)
    text, bias = embed_prompts(tokenizer, text_encoder, unique)
    if text.shape[1] < length:
        pad = length - text.shape[1]
        text = torch.cat([F.pad(text[:, :-1], (0, 0, 0, pad)), text[:, -1:]], 1)
        bias = torch.cat([F.pad(bias[:, :-1], (0, pad), value=-torch.inf), bias[:, -1:]], 1)
    return text[which], bias[which]


def levels(count, shift, rng):
    """Noise levels of a batch, spread evenly and then shifted."""
    uniform = (rng.permutation(count) + rng.random(count)) / count
    return torch.from_numpy(shift * uniform / (1 + (shift - 1) * uniform)).float().to(DEVICE)


# The transformer


def build_transformer(seed, layers, heads=8, head_dim=16):
    from diffusers import WanTransformer3DModel

    torch.manual_seed(seed + 2)
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=heads, attention_head_dim=head_dim, in_channels=VAE_CONFIG["z_dim"],
        out_channels=VAE_CONFIG["z_dim"], text_dim=64, freq_dim=256, ffn_dim=4 * heads * head_dim, num_layers=layers,
        cross_attn_norm=True, qk_norm="rms_norm_across_heads", eps=1e-6,
    ).to(DEVICE)  # fmt: skip
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.xavier_uniform_(module.weight)
            torch.nn.init.zeros_(module.bias)
    torch.nn.init.xavier_uniform_(model.patch_embedding.weight.flatten(1))
    for block in model.blocks:  # residual branches start small
        for linear in (block.attn1.to_out[0], block.attn2.to_out[0], block.ffn.net[2]):
            with torch.no_grad():
                linear.weight.mul_(0.5)
        with torch.no_grad():
            block.scale_shift_table[:, (2, 5)] += 0.3
    torch.nn.init.normal_(model.condition_embedder.time_proj.weight, std=0.02)
    torch.nn.init.zeros_(model.proj_out.weight)
    return model


def take_images(model):
    """Further input channels for mask and encoded video, at first without any effect."""
    old, factor = model.patch_embedding, 4
    channels = 2 * old.in_channels + factor
    new = torch.nn.Conv3d(channels, old.out_channels, old.kernel_size, old.stride).to(DEVICE)
    with torch.no_grad():
        new.weight.zero_()
        new.weight[:, : old.in_channels] = old.weight
        new.bias.copy_(old.bias)
    model.patch_embedding = new
    model.register_to_config(in_channels=channels)
    return model


def image_channels(args, encoded):
    """Mask (1 on the given frame) and normalised latents of first frame and zeros: (b, 4 + z, t, h, w)."""
    mean, std = load_statistics(args)
    mask = torch.zeros_like(encoded[:, :4])
    mask[:, :, 0] = 1
    return torch.cat([mask, (encoded - mean) / std], 1)


def patchify(latents):
    """(b, c, t, h, w) -> (b, tokens, c * 4)."""
    return latents.unflatten(4, (-1, 2)).unflatten(3, (-1, 2)).permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(1, 3)


def unpatchify(tokens, shape):
    batch, channels, frames, height, width = shape
    x = tokens.reshape(batch, frames, height // 2, width // 2, channels, 2, 2)
    return x.permute(0, 4, 1, 2, 5, 3, 6).reshape(shape)


def rotary(model, shape):
    """Complex rotations (tokens, 1, head_dim / 2)."""
    cos, sin = model.rope(torch.empty(shape, device=DEVICE))
    return torch.complex(cos[0, :, :, 0::2].float(), sin[0, :, :, 1::2].float())


def transformer_tokens(model, tokens, temb, text, bias, rotations):
    """The transformer on patchified latents; `text` and `bias` come from embed_prompts, already per example."""
    heads = model.config.num_attention_heads
    eps = model.config.eps
    condition = model.condition_embedder
    batch, count, _ = tokens.shape
    dim = model.patch_embedding.out_channels
    x = F.linear(tokens, model.patch_embedding.weight.flatten(1), model.patch_embedding.bias)
    temb = condition.time_embedder(temb)
    modulation = condition.time_proj(F.silu(temb)).unflatten(1, (6, dim))
    text = condition.text_embedder(text)
    bias = bias[:, None, None, :].expand(-1, -1, count, -1)

    for block in model.blocks:
        shift, scale, gate, shift2, scale2, gate2 = (block.scale_shift_table + modulation).chunk(6, 1)
        y = F.layer_norm(x, (dim,), eps=eps) * (1 + scale) + shift
        attn = block.attn1
        weight = torch.cat([attn.to_q.weight, attn.to_k.weight, attn.to_v.weight])
        q, k, v = F.linear(y, weight, torch.cat([attn.to_q.bias, attn.to_k.bias, attn.to_v.bias])).chunk(3, -1)
        qk = torch.stack(
            [F.rms_norm(q, (dim,), attn.norm_q.weight, eps), F.rms_norm(k, (dim,), attn.norm_k.weight, eps)]
        )
        qk = torch.view_as_complex(qk.view(2, batch, count, heads, -1, 2)) * rotations
        q, k = torch.view_as_real(qk).flatten(4).transpose(2, 3).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v.unflatten(2, (heads, -1)).transpose(1, 2))
        x = x + attn.to_out[0](y.transpose(1, 2).flatten(2)) * gate

        attn = block.attn2
        y = F.layer_norm(x, (dim,), block.norm2.weight, block.norm2.bias, eps)
        q = F.rms_norm(attn.to_q(y), (dim,), attn.norm_q.weight, eps)
        k = F.rms_norm(attn.to_k(text), (dim,), attn.norm_k.weight, eps)
        q, k, v = (z.unflatten(2, (heads, -1)).transpose(1, 2) for z in (q, k, attn.to_v(text)))
        logits = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5) + bias
        y = logits.softmax(-1) @ v
        x = x + attn.to_out[0](y.transpose(1, 2).flatten(2))

        y = F.layer_norm(x, (dim,), eps=eps) * (1 + scale2) + shift2
        y = F.gelu(block.ffn.net[0].proj(y), approximate="tanh")
        x = x + block.ffn.net[2](y) * gate2

    shift, scale = (model.scale_shift_table + temb[:, None]).chunk(2, 1)
    x = model.proj_out(F.layer_norm(x, (dim,), eps=eps) * (1 + scale) + shift)
    return x.unflatten(-1, (4, -1)).transpose(-1, -2).flatten(-2)


def velocity(model, latents, timestep, text, bias, rotations, condition=None):
    temb = model.condition_embedder.timesteps_proj(timestep)
    tokens = patchify(latents if condition is None else torch.cat([latents, condition], 1))
    return unpatchify(transformer_tokens(model, tokens, temb, text, bias, rotations), latents.shape)


def scheduler_config(shift):
    from diffusers import UniPCMultistepScheduler

    return UniPCMultistepScheduler(
        num_train_timesteps=1000, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift,
        solver_order=2, solver_type="bh2", predict_x0=True, lower_order_final=True, final_sigmas_type="zero",
    )  # fmt: skip


def generate(*args, **options):
    """The last latents of a `trajectory`."""
    *_, latents = trajectory(*args, **options)
    return latents


@torch.no_grad()
def trajectory(model, tokenizer, text_encoder, prompts, shift, steps, guidance, seed, condition=None, sigmas=None):
    """Normalised latents for the prompts, and for the images' channels if the model takes images: noise, every step.

    `sigmas`: noise levels before the shift, in place of the scheduler's own.
    """
    text, bias = embed_prompts(tokenizer, text_encoder, [*prompts, ""])
    count = len(prompts)
    index = torch.tensor([count] * count + list(range(count)), device=DEVICE)
    scheduler = scheduler_config(shift)
    scheduler.set_timesteps(steps, device=DEVICE, sigmas=sigmas)
    latents = torch.randn(count, VAE_CONFIG["z_dim"], 5, 12, 12, generator=torch.Generator().manual_seed(seed)).to(
        DEVICE
    )
    rotations = rotary(model, latents.shape)
    condition = None if condition is None else condition.repeat(2, 1, 1, 1, 1)
    yield latents
    for t in scheduler.timesteps:
        pair, times = latents.repeat(2, 1, 1, 1, 1), t.float().expand(2 * count)
        both = velocity(model, pair, times, text[index], bias[index], rotations, condition)
        without, guided = both.chunk(2)
        latents = scheduler.step(without + guidance * (guided - without), t, latents, return_dict=False)[0]
        yield latents


@torch.no_grad()
def preview(args, vae, model, tokenizer, text_encoder, chosen, steps=16, guidance=2.0, seed=0):
    """Shares of right attributes over the chosen combinations, and mean smoothness figures; also the frames."""
    prompts, stills, condition = [c.prompt for c in chosen], [], None
    if args.base:
        rng = np.random.default_rng(args.seed)
        prompts = [f"moving {c.direction}" for c in chosen]
        stills = [
            data.sample_movable(c.shape, data.COLOURS[c.colour], data.BACKGROUNDS[c.background], rng) for c in chosen
        ]
        condition = torch.cat([image_channels(args, encode(vae, image_video(still))[0].cpu()) for still in stills])
    latents = generate(
        model, tokenizer, text_encoder, prompts, args.shift, steps, guidance, seed,
        None if condition is None else condition.to(DEVICE),
    )  # fmt: skip
    mean, std = load_statistics(args)
    frames = []
    for part in (latents.cpu() * std + mean).split(4):
        frames.append((decode(vae, part.to(DEVICE)).clamp(-1, 1) + 1).mul(127.5).round().permute(0, 2, 3, 4, 1))
    frames = torch.cat(frames).cpu().numpy().astype(np.uint8)
    measured = [data.measure(f) for f in frames]
    result = {}
    for name in ("colour", "direction", "background", "shape"):
        result[name] = float(np.mean([m.correct(c)[name] for m, c in zip(measured, chosen, strict=True)]))
    for name in ("displacement", "track_residual", "area_jitter", "colour_jitter", "background_jitter"):
        result[name] = float(np.nanmean([getattr(m, name) for m in measured]))
    kept = [data.compare(f, still) for f, still in zip(frames, stills, strict=False)]
    for name in ("first_psnr", "colour_error", "background_error") if kept else ():
        result[name] = float(np.mean([getattr(k, name) for k in kept]))
    return result, frames


def build_model(args):
    """Tokenizer, text encoder and transformer, before training."""
    if args.base:
        base = load_base(args)
        return base.tokenizer, base.text_encoder.requires_grad_(False), take_images(base.transformer)
    tokenizer = build_tokenizer()
    return tokenizer, build_text_encoder(len(tokenizer), args.seed), build_transformer(args.seed, args.layers)


class Clips:
    """The encoded clips of a work folder as tokens, what they are called, and the tokens of their images' channels."""

    def __init__(self, args):
        path = args.work / "latents.pt"
        self.args, self.stamp = args, path.stat().st_mtime
        state = torch.load(path)
        mean, std = load_statistics(args)
        self.latents = patchify((state["latents"] - mean) / std).to(DEVICE)
        self.labels = state["labels"]
        if args.base:
            self.stills = torch.tensor(state["stills"])
            self.channels = patchify(image_channels(args, state["conditions"])).to(DEVICE)
        print(f"{len(self.labels)} clips", flush=True)

    def prompt(self, number, rng):
        if self.args.base:
            return data.image_prompt(data.Combination(*self.labels[number]), rng)
        return data.vary_prompt(TRAINING[self.labels[number]], rng)

    def condition(self, tokens, index):
        return torch.cat([tokens, self.channels[self.stills[index]]], -1) if self.args.base else tokens

    def renewed(self):
        """These, or those that were encoded meanwhile."""
        return self if (self.args.work / "latents.pt").stat().st_mtime == self.stamp else Clips(self.args)


def stage_transformer(args):
    work = args.work
    tokenizer, text_encoder, model = build_model(args)
    parameters = [p for p in (*model.parameters(), *text_encoder.parameters()) if p.requires_grad]
    tables = ("shared", "embed_tokens", "relative_attention_bias", "proj_out")
    named = [*model.named_parameters(), *text_encoder.named_parameters()]
    named = [(name, p) for name, p in named if p.requires_grad]
    matrices = [p for name, p in named if is_matrix(p) and not any(table in name for table in tables)]
    others = [p for p in parameters if not any(p is q for q in matrices)]
    if args.muon:
        optimizer = Muon(matrices, others, args.lr, adam_share=0.5)
    else:
        groups = [dict(params=matrices, weight_decay=0.01), dict(params=others, weight_decay=0.0)]
        optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), fused=True)
    average = Average(parameters, args.ema)
    clips = Clips(args)
    print(f"{sum(p.numel() for p in parameters)} parameters", flush=True)
    vae = load_vae(args)
    held_out = data.held_out_combinations()
    rotations = rotary(model, (1, VAE_CONFIG["z_dim"], 5, 12, 12))
    forward = torch.compile(transformer_tokens) if args.compile else transformer_tokens

    path, step, spent = work / "transformer.pt", 0, 0.0
    if path.exists():
        state = torch.load(path, map_location=DEVICE)
        model.load_state_dict(state["transformer"])
        text_encoder.load_state_dict(state["text_encoder"])
        optimizer.load_state_dict(state["optimizer"])
        average.values, average.count = state["average"], state["step"]
        step, spent = state["step"], state["spent"]
    start, last_saved, last_preview = time.time() - spent, time.time(), time.time()
    losses = []

    def checkpoint():
        save(path, dict(
            transformer=model.state_dict(), text_encoder=text_encoder.state_dict(), optimizer=optimizer.state_dict(),
            average=average.values, step=step, spent=time.time() - start, layers=args.layers,
        ))  # fmt: skip

    while True:
        seconds = time.time() - start
        progress = seconds / (args.minutes * 60)
        if progress >= 1 or (args.steps and step >= args.steps):
            break
        warm = min(1, (step + 1) / 200)
        rate = args.lr * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        rng = np.random.default_rng((args.seed, 2, step))
        index = torch.from_numpy(rng.integers(len(clips.labels), size=args.batch))
        prompts = [clips.prompt(i, rng) for i in index]
        prompts = ["" if rng.random() < 0.1 else p for p in prompts]
        text, bias = embed_each(tokenizer, text_encoder, prompts, args.text_tokens)
        sigma = levels(args.batch, args.shift, rng)
        clean = clips.latents[index.to(DEVICE)]
        torch.manual_seed(args.seed * 1_000_003 + step)
        noise = torch.randn_like(clean)
        temb = model.condition_embedder.timesteps_proj(1000 * sigma)
        noised = clean + sigma[:, None, None] * (noise - clean)
        predicted = forward(model, clips.condition(noised, index), temb, text, bias, rotations)
        loss = F.mse_loss(predicted, noise - clean)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        gradient = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        average.update()
        step += 1
        losses.append(loss.item())
        if step % 100 == 0 or step in (1, 10, 50):
            log(work, "transformer", step=step, seconds=time.time() - start, lr=rate, loss=float(np.mean(losses)),
                gradient=gradient.item())  # fmt: skip
            losses = []
        if time.time() - last_saved > 180:
            checkpoint()
            last_saved = time.time()
            clips = clips.renewed()
        if time.time() - last_preview > args.preview_minutes * 60:
            average.swap()
            result, frames = preview(args, vae, model, tokenizer, text_encoder, held_out)
            average.swap()
            np.save(work / "preview.npy", frames)
            log(work, "preview", step=step, seconds=time.time() - start, **result)
            last_preview = time.time()
    checkpoint()
    average.swap()
    result, frames = preview(args, vae, model, tokenizer, text_encoder, held_out)
    np.save(work / "preview.npy", frames)
    log(work, "preview", step=step, seconds=time.time() - start, **result)


def stage_export(args):
    """Writes the averaged weights as a diffusers folder: matrices in fp16, vectors in fp32."""
    import safetensors.torch
    from diffusers import WanImageToVideoPipeline, WanPipeline

    vae = load_vae(args)
    if not args.base and (args.work / "statistics.json").exists():
        mean, std = load_statistics(args)
        vae.register_to_config(latents_mean=mean.flatten().tolist(), latents_std=std.flatten().tolist())
    path = args.work / "transformer.pt"
    state = torch.load(path, map_location="cpu") if path.exists() else {}
    args.layers = state.get("layers", args.layers)
    tokenizer, text_encoder, model = build_model(args)
    with torch.no_grad():
        parameters = [p for p in (*model.parameters(), *text_encoder.parameters()) if p.requires_grad]
        for parameter, value in zip(parameters, state.get("average", parameters), strict=True):
            parameter.copy_(value)
    folder = args.output
    parts = dict(
        tokenizer=tokenizer, text_encoder=text_encoder.cpu(), transformer=model.cpu(), vae=vae.cpu(),
        scheduler=scheduler_config(args.shift),
    )  # fmt: skip
    (WanImageToVideoPipeline if args.base else WanPipeline)(**parts).save_pretrained(folder)
    if not args.fp32:
        for path in folder.glob("*/*.safetensors"):
            tensors = safetensors.torch.load_file(path)
            for name, tensor in tensors.items():
                if tensor.ndim >= 2 and min(tensor.shape[:2]) > 1:
                    tensors[name] = tensor.half()
            safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    path = folder / "tokenizer" / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(config, indent=2) + "\n")
    path = folder / "model_index.json"
    config = json.loads(path.read_text())
    config["tokenizer"] = ["transformers", "PreTrainedTokenizerFast"]
    path.write_text(json.dumps(config, indent=2) + "\n")
    path = folder / "transformer" / "config.json"
    config = json.loads(path.read_text())
    config.pop("_name_or_path", None)
    path.write_text(json.dumps(config, indent=2) + "\n")
    for name in ("tokenizer", "text_encoder", "vae") if args.base else ():  # byte for byte
        shutil.copytree(args.base / name, folder / name, dirs_exist_ok=True)
    print(folder, state.get("step"), sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()), "bytes")


def stage_check(args):
    """The training forward passes equal the reference's."""
    vae = build_vae(args.seed)
    with torch.no_grad():
        clips = vae_batch(np.random.default_rng(0), 2, 96, 17, 0.5)[..., :48, :64]
        posterior = vae.encode(clips).latent_dist
        mean, log_variance = encode(vae, clips)
        print(
            "encode", (posterior.mean - mean).abs().max().item(), (posterior.logvar - log_variance).abs().max().item()
        )
        reference = vae.decode(posterior.mean).sample
        print("decode", (reference - decode(vae, mean).clamp(-1, 1)).abs().max().item(), tuple(reference.shape))
        tokenizer = build_tokenizer()
        text_encoder = build_text_encoder(len(tokenizer), args.seed)
        model = build_transformer(args.seed, 2)
        torch.nn.init.normal_(model.proj_out.weight)
        for block in model.blocks:
            torch.nn.init.normal_(block.scale_shift_table)
        prompts = [TRAINING[0].prompt, "", "a red circle"]
        text, bias = embed_prompts(tokenizer, text_encoder, prompts)
        latents = torch.randn(3, VAE_CONFIG["z_dim"], 5, 8, 12)
        timestep = torch.tensor([999.0, 500.0, 3.0])
        ours = velocity(model, latents, timestep, text, bias, rotary(model, latents.shape))
        tokens = tokenizer(prompts, padding="max_length", max_length=TEXT_LENGTH, return_tensors="pt")
        mask = tokens.attention_mask
        full = text_encoder(input_ids=tokens.input_ids, attention_mask=mask).last_hidden_state * mask[..., None]
        theirs = model(latents, timestep, full, return_dict=False)[0]
        print("transformer", (ours - theirs).abs().max().item(), "of", theirs.abs().max().item(), mask.sum(1).tolist())
        torch.nn.init.normal_(take_images(model).patch_embedding.weight, std=0.1)
        condition = torch.randn(3, VAE_CONFIG["z_dim"] + 4, 5, 8, 12)
        ours = velocity(model, latents, timestep, text, bias, rotary(model, latents.shape), condition)
        theirs = model(torch.cat([latents, condition], 1), timestep, full, return_dict=False)[0]
        print("with images", (ours - theirs).abs().max().item(), "of", theirs.abs().max().item())


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=["check", "vae", "latents", "transformer", "decoder", "export"])
    parser.add_argument("--work", type=pathlib.Path, required=True, help="folder for states and logs")
    parser.add_argument("--base", type=pathlib.Path, help="text-to-video checkpoint: train image-to-video on it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (0: torch's default)")
    parser.add_argument("--vae-minutes", type=float, default=24, help="the schedule is by time")
    parser.add_argument("--vae-batch", type=int, default=8)
    parser.add_argument("--muon", action="store_true")
    parser.add_argument("--vae-lr", type=float, default=2e-3)
    parser.add_argument("--vae-kl", type=float, default=5e-4)
    parser.add_argument("--decoder-minutes", type=float, default=10)
    parser.add_argument("--decoder-lr", type=float, default=2e-3)
    parser.add_argument("--clips-per-combination", type=int, default=20)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--minutes", type=float, default=85, help="length of the transformer's schedule")
    parser.add_argument("--steps", type=int, default=0, help="stop after so many steps (0: by time alone)")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--ema", type=float, default=0.999)
    parser.add_argument("--shift", type=float, default=3.0, help="flow shift of training and inference")
    parser.add_argument("--text-tokens", type=int, default=16)
    parser.add_argument("--preview-minutes", type=float, default=12)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--output", type=pathlib.Path, help="folder to export to")
    parser.add_argument("--fp32", action="store_true", help="export in fp32 throughout")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.threads:
        torch.set_num_threads(args.threads)
    stages = dict(
        check=stage_check,
        vae=stage_vae,
        latents=stage_latents,
        transformer=stage_transformer,
        decoder=stage_decoder,
        export=stage_export,
    )
    stages[args.stage](args)


if __name__ == "__main__":
    main()
