"""What the TPU's compiler says of programs, without a TPU; needs libtpu (`pip install libtpu`, x86-64 Linux).

    python scripts/tpu.py memory v6e:2x4 configs/wan2.1_t2v_14b.yml attention=ulysses_ring ulysses_shards=4
    python scripts/tpu.py memory TPU7x:2x2x1 configs/wan2.1_t2v_14b.yml --layers 1 --programs step --hlo step.txt
    python scripts/tpu.py schedule v6e [shape ...] [mode=ulysses_ring] [ulysses_shards=4] [--tune]
    python scripts/tpu.py kernels [v6e ...]

memory: memory and predicted time of a run's programs on a slice. Needs no checkpoint: weights, inputs and shardings are
abstract, and nothing is allocated. `text` is the text encoder on 512 tokens, `image` the image encoder, `audio` the
audio encoder on as much sound as the video lasts, `prepare` what these give every step, `step` one denoise step,
`decode` and `encode` the VAE's chunks: the first, and where there are several one of the others. What is in memory
beside a program (the other expert of two, an input video) is counted as resident. A step takes one to three minutes,
however many layers it has.

schedule: attention of a shape of `bench_attention`. Prints the cycles of a grid step (of `flash`: with a bound as
maximum, with a running one, and masked; of the others unmasked, and masked), of what the first and last step of an
output block add, TF/s and use of the matrix unit in a step of the first kind and over the whole call (padding, masked
tail and statistics included), and which collectives of the mode lie beside a kernel. `kernel=NAME block_q=N block_kv=N
block_kv_compute=N` choose another kernel or blocks, `out=FILE.jsonl` keeps the rows; `--tune` searches the blocks and
prints the fastest.

kernels: the rows of `planning.predict.FLASH`, counted in the kernel alone with the default blocks for 18,900 tokens and
keys, one to three minutes each on one core; then those of `predict.ROWS`, counted with rows of 5,120 features.

All figures are static: cycles of kernels leave out waits for memory, which come to 3 to 4 % where kernels were timed.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench_attention import SHAPES

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from maxdiffusion.hardware.chips import GENERATIONS, slice_of  # noqa: E402
from maxdiffusion.planning import schedule  # noqa: E402
from maxdiffusion.planning.predict import FLASH, ROWS, TILE, predict  # noqa: E402

if TYPE_CHECKING:
    from maxdiffusion.programs import Program

PROGRAMS = ("image", "encode", "audio", "text", "prepare", "step", "decode")
SLICES = {name: slice_of(f"{name}-8") for name in GENERATIONS}  # the smallest of a whole host of each generation
OPTIONS = {"mode": "ulysses_ring", "ulysses_shards": "4", "kernel": "", "out": ""}
DEPTHS = (30, 40)  # layers of the 1.3B and of the 14B models
BLOCKS = ("block_q", "block_kv", "block_kv_compute")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    each = commands.add_parser("memory")
    each.set_defaults(run=memory)
    each.add_argument("topology", help="such as v5e:2x4, v6e:4x4, v5p:2x2x2, TPU7x:2x2x1")
    each.add_argument("config", nargs="+", help="a YAML file and key=value words, as for generate_wan.py")
    each.add_argument("--layers", type=int, help="of the transformer and the encoders of text and image; default: all")
    each.add_argument("--programs", nargs="+", choices=PROGRAMS, default=PROGRAMS)
    each.add_argument("--hlo", type=Path, help="write the scheduled program here (of several: the last)")
    each = commands.add_parser("schedule")
    each.set_defaults(run=schedules_of)
    each.add_argument("generation", choices=SLICES)
    each.add_argument("words", nargs="*", help="shapes and key=value")
    each.add_argument("--tune", action="store_true", help="search the blocks")
    each = commands.add_parser("kernels")
    each.set_defaults(run=kernels)
    each.add_argument("generations", nargs="*", choices=SLICES)
    args = parser.parse_args(argv)
    args.run(args)


# ---- memory


def memory(args: argparse.Namespace) -> None:
    """One line of memory and one of time for each program."""
    for program, seconds, compiled, probability in compile_all(args.topology, args.config, args.programs, args.layers):
        needed = compiled.memory_analysis()
        peak = needed.peak_memory_in_bytes + program.resident
        print(f"{program.name:<8} {gib(peak)} GiB per device at its peak, arguments"
              f" {gib(needed.argument_size_in_bytes)}, temporaries {gib(needed.temp_size_in_bytes)}, resident"
              f" {gib(program.resident)}; compiled in {seconds:.0f} s", flush=True)  # fmt: skip
        steps = schedule.steps(compiled.as_text())
        found = predict(steps, slice_of(args.topology).generation, branch_probability=probability)
        parts = dataclasses.asdict(found.seconds)
        low, high = parts.pop("low"), parts.pop("high")
        shown = ", ".join(f"{name} {part:.3f}" for name, part in parts.items())
        print(f"{'':<8} predicted {low:.3f} to {high:.3f} s: {shown}", flush=True)
        if args.layers:
            for layers in DEPTHS:
                whole, tpu = deepened(steps, args.layers, layers), slice_of(args.topology).generation
                deep = predict(whole, tpu, branch_probability=probability).seconds
                print(f"{'':<8} with its loop over layers {layers} times: {deep.total:.3f} s", flush=True)
        if args.hlo:
            args.hlo.write_text(compiled.as_text())


def deepened(steps: tuple[schedule.Step, ...], layers: int, times: int) -> tuple[schedule.Step, ...]:
    """The steps of a program of so many layers, whose loops over them run `times`."""
    return tuple(
        dataclasses.replace(step, times=times) if isinstance(step, schedule.Loop) and step.times == layers else step
        for step in steps
    )


def gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:6.2f}"


def compile_all(
    topology: str, words: list[str], names: tuple[str, ...], layers: int | None
) -> Iterator[tuple[Program, float, Any, float]]:
    """(program, seconds, jax.stages.Compiled, probability of a branch in its loop) of each program of these names."""
    tpu = slice_of(topology)
    os.environ |= tpu.environment
    devices = tpu.describe()
    from maxdiffusion import request
    from maxdiffusion.programs import programs
    from maxdiffusion.request.nets import read_configs
    from maxdiffusion.request.session import Setup

    job = request.load([*words, "prompt=a cat", "jax_cache_dir="])
    configs = read_configs(job)
    if layers:
        configs = shallow(configs, layers)
    probability = len(configs["transformer"].adapter_layers) / configs["transformer"].num_layers
    for program in programs(Setup.of(job, configs, devices)):
        if program.name in names:
            lowered, start = program.lowered, time.perf_counter()
            compiled = lowered.compile()
            yield program, time.perf_counter() - start, compiled, probability


def shallow(configs: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """The same nets with at most so many layers in the transformers and the encoders of text and image."""

    def cut(config: Any) -> Any:
        depths = {"num_layers", "num_hidden_layers"} & vars(config).keys()
        changes: dict[str, Any] = {depth: min(layers, getattr(config, depth)) for depth in depths}
        adapter = getattr(config, "adapter", None)
        for name in ("vace_layers", "audio_inject_layers"):
            if hasattr(adapter, name):
                kept = tuple(layer for layer in getattr(adapter, name) if layer < layers)
                changes["adapter"] = dataclasses.replace(adapter, **{name: kept})
        return dataclasses.replace(config, **changes)

    # Speech to video has a weight for each layer of the audio encoder.
    return {name: config if name == "audio_encoder" else cut(config) for name, config in configs.items()}


# ---- schedule


def schedules_of(args: argparse.Namespace) -> None:
    """The rows of each shape."""
    options = dict(word.split("=", 1) for word in args.words if "=" in word)
    names = [word for word in args.words if "=" not in word] or ["14b-720p-self"]
    known = OPTIONS | dict.fromkeys(BLOCKS, "")
    unknown = [name for name in names if name not in SHAPES] + [key for key in options if key not in known]
    if unknown:
        sys.exit(f"error: {unknown[0]} is unknown; shapes: {', '.join(SHAPES)}; options: {', '.join(known)}")
    os.environ["JAX_PLATFORMS"] = "cpu"
    options = known | options

    from maxdiffusion.runtime.versions import versions

    made_with = {key: version for key, version in versions().items() if not key.startswith("device")}
    print(", ".join(f"{key} {made_with[key]}" for key in ("jax", "commit")))
    for row in (row for name in names for row in scheduled(name, args.generation, options, args.tune)):
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        if options["out"]:
            with open(options["out"], "a", encoding="utf-8") as file:
                file.write(json.dumps(made_with | row) + "\n")


def kernels(args: argparse.Namespace) -> None:
    """A row of the table for each generation."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    for name in args.generations or SLICES:
        row, width = kernel_schedule(name, "flash", 18_900, 18_900, {}), FLASH[name].width
        rows, span = int(row["blocks"].split("/")[0]), row["span"]
        tiles = -(-rows // width) * width * span / TILE**2
        bound, running = (cycles / tiles for cycles in row["round_cycles"][0])
        start, once = row["step_cycles"][0], row["once_cycles"] * TILE / rows
        merge = kernel_schedule(name, "flash", 18_900, 18_900, {}, merged=True)["once_cycles"] * TILE / rows - once
        counted = (start, bound, running, once, merge)
        print(f'"{name}": Cycles({", ".join(f"{each:.1f}" for each in counted)}, {width}),', flush=True)
        counted = (f'"{kernel}": {row_cycles(name, kernel):.1f}' for kernel in ROWS)
        print(f"{'':<6} rows: {', '.join(counted)}", flush=True)


def row_cycles(generation: str, kernel: str) -> float:
    """Cycles of 1,024 elements in a kernel of `kernels.rows`: of its longest innermost loop."""
    printed, schedules = compiled(generation, _ROWS, json.dumps(kernel))
    jumps = (_parse(text)[1] for name, text in schedules.items() if f"-rows_{kernel}." in name)
    loops = [(start, end) for each in jumps for end, start in each if start < end]
    inner = [(a, b) for a, b in loops if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in loops)]
    return max(b - a for a, b in inner) / (int(printed) / 1024)


_SETUP = """
import functools, json, sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import PartitionSpec as P
from maxdiffusion import parallel
topology, given = sys.argv[1], json.loads(sys.argv[2])
devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
"""

# One device's work between collectives: two heads; keys are counted at run time.
_KERNEL = (
    _SETUP
    + """
import inspect
from maxdiffusion.attention import block_sizes
from maxdiffusion.attention.kernels import KERNELS
from maxdiffusion.attention.options import KernelOptions
tokens, keys, name = given["tokens"], given["keys"], given["kernel"]
options = KernelOptions(**given["blocks"])
choose = block_sizes.flash_blocks if name == "flash" else block_sizes.blocks
sizes = choose(devices[0].device_kind, tokens, keys, options)
place = parallel.Placement(parallel.make_mesh(parallel.Degrees(), devices=devices[:1]), parallel.rules_for())
shape = lambda dims, dtype: jax.ShapeDtypeStruct(dims, dtype, sharding=place.sharding())
q, k = (shape((1, n, 2, 128), jnp.bfloat16) for n in (tokens, keys))
run = jax.shard_map(KERNELS[name].local(options), mesh=place.mesh, in_specs=P(), out_specs=P(),
                    check_vma=False)
other = [(shape((1, tokens, 2, 128), jnp.float32), shape((1, tokens, 2), jnp.float32))] if given["merged"] else []
with parallel.use(place):
    jax.jit(run).lower(q, k, k, shape((1, keys), bool), *other).compile()
print(json.dumps([sizes.q, sizes.kv, sizes.compute, block_sizes.span(sizes)]))
"""
)

# Prints the elements of one step of the loop.
_ROWS = (
    _SETUP
    + """
from maxdiffusion.kernels import rows
shape = lambda dims, dtype=jnp.float32: jax.ShapeDtypeStruct(dims, dtype)
x, joined = shape((1, 18912, 5120), jnp.bfloat16), shape((1, 40, 18912, 128), jnp.bfloat16)
vectors, tables = shape((1, 1, 5120)), shape((18912, 128))
eight = jnp.float8_e4m3fn if "7x" in topology else jnp.int8
norm = functools.partial(rows.layer_norm, eps=1e-6, dtype=jnp.bfloat16)
join = functools.partial(rows.join_heads, dtype=jnp.bfloat16)
split = lambda x, gain=None, *tables: rows.split_heads(x, 40, gain, tables or None, eps=1e-6)
run, *args = {
    "layer_norm": (norm, x, vectors, vectors),
    "layer_norm_scaled": (functools.partial(norm, dtype=eight, largest=127.0), x, vectors, vectors),
    "split": (split, x),
    "rms_norm": (split, x, shape((5120,))),
    "rotate": (split, x, shape((5120,)), tables, tables),
    "gelu_scaled": (functools.partial(rows.gelu, dtype=eight, largest=127.0), x),
    "join": (join, joined),
    "join_scaled": (functools.partial(join, dtype=eight, largest=127.0), joined),
}[given]
mesh = jax.sharding.Mesh(devices[:1], ("x",))
jax.jit(jax.shard_map(run, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)).lower(*args).compile()
print(rows.STRIP * 5120)
"""
)

_MODE = (
    _SETUP
    + """
from maxdiffusion.attention.api import cross_attention, self_attention
from maxdiffusion.attention.plan import AttentionPlan
count = len(devices)
plan = AttentionPlan.parse(given["mode"], heads=given["heads"], context=count, ulysses_shards=given["ulysses_shards"],
                           platform="tpu")
mesh = parallel.make_mesh(parallel.Degrees(context=count), ulysses=plan.ulysses, devices=devices)
place = parallel.Placement(mesh, parallel.rules_for())
attend = self_attention if given["tokens"] == given["keys"] else cross_attention
def shape(tokens, axis):
    sharding = place.sharding(None, axis if tokens % count == 0 else None, None, None)
    return jax.ShapeDtypeStruct((1, tokens, given["heads"], 128), jnp.bfloat16, sharding=sharding)
q, k = shape(given["tokens"], "sequence"), shape(given["keys"], "sequence" if attend is self_attention else None)
with parallel.use(place):
    print(jax.jit(lambda *a: attend(plan, *a)).lower(q, k, k).compile().as_text())
"""
)


def collectives(program: tuple[schedule.Step, ...]) -> Iterator[tuple[schedule.Collective, int]]:
    """Each collective of a program's text once, with how many kernels lie between its start and its end."""
    begun: dict[str, tuple[schedule.Collective, int]] = {}
    kernels = 0
    for step in program:
        match step:
            case schedule.Kernel():
                kernels += 1
            case schedule.Collective(key=""):
                yield step, 0
            case schedule.Collective():
                begun[step.key] = step, kernels
            case schedule.Done():
                started, before = begun.pop(step.key)
                yield started, kernels - before
            case schedule.Loop():
                yield from collectives(step.body)
            case schedule.Choice():
                for branch in step.branches:
                    yield from collectives(branch)


def kernel_schedule(
    generation: str, kernel: str, tokens: int, keys: int, blocks: dict[str, int], merged: bool = False
) -> dict[str, Any]:
    """Static figures of one call of a kernel with a masked tail and statistics, for one head of dim 128 in bf16.

    With `merged` it is given the result for other keys.

    Raises:
      RuntimeError: it does not compile.
    """
    device = SLICES[generation].generation
    given = {"kernel": kernel, "tokens": tokens, "keys": keys, "blocks": blocks, "merged": merged}
    printed, schedules = compiled(generation, _KERNEL, json.dumps(given))
    q, kv, compute, span = json.loads(printed)
    steps = kernel_steps(list(schedules.values()))
    rows, columns = -(-tokens // q), -(-keys // kv)
    if steps.rounds:  # of `span` keys, and of the parts that are left over in a block
        parts, seen = span // compute, [min(kv, keys - at) for at in range(0, keys, kv)]
        full, rest = (sum(f(-(-n // compute), parts) for n in seen) for f in (int.__floordiv__, int.__mod__))
        of_row = columns * steps.steady[0] + full * steps.rounds[0][0] + rest * steps.rounds[-1][0]
        unit, busy = [way / span for way in steps.rounds[0]], full * span + rest * compute
    else:
        of_row = (columns - 1) * steps.steady[0] + steps.steady[-1 if keys % kv else 0]
        unit, busy = [way / kv for way in steps.steady], columns * kv
    cycles = rows * (of_row + steps.once)

    def rate(products: float, cycles: float) -> int:
        return round(device.tensor_cores * 4 * products * 128 / cycles * device.ghz / 1e3)

    ceiling = device.speed.ceiling / 1e12
    return {
        "blocks": f"{q}/{kv}/{compute}",
        "span": span,
        "padding": f"{rows * q * busy / (tokens * keys) - 1:.1%}",
        "step_cycles": steps.steady,
        "once_cycles": steps.once,
        "round_cycles": steps.rounds,
        "step_tflops": [rate(q, each) for each in unit],
        "tflops": rate(tokens * keys, cycles),
        "of_ceiling": f"{rate(tokens * keys, cycles) / ceiling:.0%}",
    }


def scheduled(name: str, generation: str, options: dict[str, str], tune: bool) -> list[dict[str, Any]]:
    """Rows of the kernel that a mode runs on one device of a generation, and of the mode's collectives."""
    from maxdiffusion.attention.plan import AttentionPlan

    _, tokens, keys, heads, _ = SHAPES[name]
    devices = SLICES[generation].devices
    given = {key: int(options[key]) for key in BLOCKS if options[key]}
    degree = int(options["ulysses_shards"])
    plan = AttentionPlan.parse(options["mode"], heads=heads, context=devices, ulysses_shards=degree, platform="tpu")
    # Ulysses gathers the tokens of its group for some heads; local and cross-attention keep their queries.
    whole = plan.scheme == "local" or keys != tokens
    queries, seen = (-(-tokens // devices), keys) if whole else (-(-tokens // plan.ring), -(-keys // plan.ring))
    kernel = options["kernel"] or plan.kernel
    split = f"{plan.scheme} ring {plan.ring} x ulysses {plan.ulysses}"
    row = {"shape": name, "tpu": generation, "mode": split, "kernel": kernel, "tokens": queries, "keys": seen}
    rows = []
    for blocks in _candidates() if tune else [given]:
        try:
            rows.append(row | kernel_schedule(generation, kernel, queries, seen, blocks))
        except RuntimeError as error:
            if not tune:
                raise
            rows.append(row | {"blocks": blocks, "failed": str(error)[:200]})
        if tune:
            print(rows[-1], flush=True)
    if tune:
        return sorted(rows, key=lambda row: -row.get("tflops", 0))[:1]
    mode = {"mode": options["mode"], "heads": heads, "tokens": tokens, "keys": keys, "ulysses_shards": degree}
    hlo, _ = compiled(generation, _MODE, json.dumps(mode))
    found = list(collectives(schedule.steps(hlo)))
    for each in sorted({one.kind for one, _ in found}):
        beside = [kernels > 0 for one, kernels in found if one.kind == each]
        rows.append(
            {"shape": name, "tpu": generation, "mode": split, each: f"{sum(beside)} of {len(beside)} beside a kernel"}
        )
    return rows


def _candidates() -> list[dict[str, int]]:
    return [
        {"block_q": q, "block_kv": kv, "block_kv_compute": compute}
        for q, kv, compute in itertools.product((2048, 3200, 4736), (2048, 6400), (256, 512, 1024))
        if kv % compute == 0
    ]


def compiled(generation: str, program: str, *arguments: str, timeout: float = 600) -> tuple[str, dict[str, str]]:
    """What a Python program prints that compiles for a generation, and the schedules (`kernels`) of its Pallas kernels.

    The schedules are by the names of their files, which hold those of the kernels.

    Raises:
      RuntimeError: it fails or takes longer than `timeout` seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        dump = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true "
        dump += "--xla_jf_dump_llo_pass_label_regex=packed-bundles-post-ra"
        environment = os.environ | SLICES[generation].environment | {"LIBTPU_INIT_ARGS": dump}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        command = [sys.executable, "-c", program, SLICES[generation].topology, *arguments]
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"compiling for {generation} took longer than {timeout:.0f} s") from None
        if done.returncode:
            raise RuntimeError(f"compiling for {generation} failed: {_reason(done.stderr)}")
        files = sorted(Path(folder).glob("*-packed-bundles-post-ra.txt"))
        return done.stdout, {f.name: f.read_text(errors="replace") for f in files if "schedule-analysis" not in f.name}


def _reason(log: str) -> str:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Oom)\b", line) or "RESOURCE_EXHAUSTED" in line]
    return (named or lines or ["no message"])[-1][:1000]


# ---- kernels: one line of a schedule is one cycle


@dataclasses.dataclass(frozen=True)
class Steps:
    """Cycles of a kernel's grid step.

    Attributes:
      steady: of a step, one figure per alternative branch that has matrix products, in the order of the program.
      once: of what a step can skip and has no products, the first and last step of an output block: both together.
      rounds: of each loop with products inside a step, in the order of the program, one figure per alternative branch
        of its body; they are no part of `steady`.
      products: instructions of the matrix unit in a step, loops counted once and with all branches.
    """

    steady: list[int]
    once: int
    rounds: list[list[int]]
    products: int


_BRANCH = re.compile(r"sbr\.rel \(!?%\w+\) target bundleno = (\d+)")
_CYCLE = re.compile(r"^\s*(0x[0-9a-f]+|0)\s+(?:[A-Z]{2})?: ")
_DELAY = 5  # the branch and its delay slots
_PRODUCT = "vmatmul."


def kernel_steps(schedules: list[str]) -> Steps:
    """The grid step of the kernel with the most matrix products among the schedules.

    The grid is the loop with most products. A forward branch in it skips a region: regions with products are taken for
    alternatives (masked or not), others for the first or last step's.

    Raises:
      ValueError: none of them has a loop with products.
    """
    parsed = [_parse(text) for text in schedules]
    found = [_steps(*one) for one in parsed if sum(one[0])]
    if not any(found):
        raise ValueError("no kernel with matrix products in a loop was compiled")
    return max((steps for steps in found if steps), key=lambda steps: steps.products)


def _parse(schedule: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Products per cycle, and (first cycle, end) of what branches jump over or, with the end first, repeat."""
    products, jumps = [], []
    for line in schedule.splitlines():
        cycle = _CYCLE.match(line)
        if cycle:
            at = int(cycle.group(1), 0)
            products += [0] * (at + 1 - len(products))
            products[at] += line.count(_PRODUCT)
            jumps += [(at + _DELAY, int(target)) for target in _BRANCH.findall(line)]
    return products, jumps


def _steps(products: list[int], jumps: list[tuple[int, int]]) -> Steps | None:
    def work(region: tuple[int, int]) -> int:
        return sum(products[slice(*region)])

    loops = [(target, end) for end, target in jumps if target < end]
    if not loops:
        return None
    grid = max(loops, key=lambda loop: (work(loop), loop[1] - loop[0]))

    def outermost(regions: list[tuple[int, int]], within: tuple[int, int]) -> list[tuple[int, int]]:
        low, high = within
        some = [(a, b) for a, b in regions if low <= a and b <= high and (a, b) != within]
        return [s for s in some if not any(o != s and o[0] <= s[0] and s[1] <= o[1] for o in some)]

    inner = outermost([loop for loop in loops if work(loop)], grid)
    skips = [(a, b) for a, b in jumps if a < b]
    # What jumps over one such loop alone asks whether it has a round.
    skips = [skip for skip in skips if not any(0 <= a - skip[0] < 16 and 0 <= skip[1] - b < 16 for a, b in inner)]

    def costs(region: tuple[int, int]) -> tuple[list[tuple[int, int]], int]:
        """(cycles, products) of every way through it, and the cycles that only some steps take."""
        base, once, busy = region[1] - region[0], 0, work(region)
        ways: list[tuple[int, int]] = []
        apart = [loop for loop in inner if loop != region]
        here = outermost([skip for skip in skips if not any(a <= skip[0] and skip[1] <= b for a, b in apart)], region)
        for loop in outermost(apart, region):
            if not any(a <= loop[0] and loop[1] <= b for a, b in here):
                base, busy = base - (loop[1] - loop[0]), busy - work(loop)
        for skip in here:
            base -= skip[1] - skip[0]
            busy -= work(skip)
            if work(skip):
                some, more = costs(skip)
                ways += some
                once += more
            else:
                once += skip[1] - skip[0]
        return [(base + cycles, busy + count) for cycles, count in ways or [(0, 0)]], once

    ways, once = costs(grid)
    rounds = [[cycles for cycles, _ in costs(loop)[0]] for loop in inner]
    return Steps([cycles for cycles, _ in ways], once, rounds, work(grid))


if __name__ == "__main__":
    main()
