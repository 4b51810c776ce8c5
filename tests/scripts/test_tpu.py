"""Reading of compiler output, on texts of the form that libtpu writes; the real thing is compiled in the slow tests."""

import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from maxdiffusion import variants
from maxdiffusion.planning.schedule import Choice, Collective, Done, Kernel, Loop
from maxdiffusion.weights import official

SCRIPTS = Path(__file__).parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

bench_attention = importlib.import_module("bench_attention")
tpu = importlib.import_module("tpu")


def schedule(length, products, branches):
    """A line per cycle; products at some cycles, branches from a cycle to another."""
    lines = ["// a comment"]
    for at in range(length):
        text = f"%{at} = vadd.f32 %v1, %v2 ;; "
        text += "%v3 = vmatmul.mubr.bf16.gmra.mxu0 %v4 ;; " * products.get(at, 0)
        text += "".join(
            f"%b = sbr.rel (!%p{at}_p2) target bundleno = {to} (0x{to:x}), region = 4" for to in branches.get(at, [])
        )
        lines.append(f"  {hex(at) if at else '0'} {'LB' if at == 10 else '  '}: > {{ {text} }}")
    return "\n".join(lines)


def test_a_grid_step_with_a_masked_alternative_and_a_first_and_a_last_part():
    # The loop is 10..200 with the branch's 5 cycles; 15..35 and 160..180 are skipped mostly, 45..85 and 95..155 are
    # alternatives.
    text = schedule(210, {50: 3, 60: 1, 100: 2, 120: 3}, {10: [35], 40: [85], 90: [155], 155: [180], 195: [10]})
    steps = tpu.kernel_steps([schedule(5, {}, {}), text])
    straight = 190 - 20 - 40 - 60 - 20
    assert steps == tpu.Steps([straight + 40, straight + 60], 40, [], 9)


def test_loops_inside_a_grid_step_are_rounds_with_their_own_alternatives():
    # Two loops, 50..125 and 130..165, within what 20..170 is skipped for no keys; the first has two alternatives.
    branches = {15: [170], 55: [85], 90: [115], 120: [50], 160: [130], 195: [10]}
    text = schedule(210, {30: 1, 70: 4, 100: 4, 140: 2}, branches)
    steps = tpu.kernel_steps([text])
    assert steps.rounds == [[75 - 25 - 20 + 25, 75 - 25 - 20 + 20], [35]]
    assert steps.steady == [190 - 75 - 35] and steps.once == 0


def test_a_program_without_a_kernel_is_refused():
    with pytest.raises(ValueError, match="no kernel"):
        tpu.kernel_steps([schedule(20, {}, {15: [3]})])


def test_the_kernels_between_the_start_and_the_end_of_a_collective_are_counted():
    ring, exchange = (Collective("collective-permute", 9, (0, 1), "a"), Collective("all-to-all", 9, (0, 1)))
    program = (exchange, Loop(3, (ring, Kernel("k", ()), Kernel("k", ()), Done("a"))), Choice(((exchange,), ())))
    assert list(tpu.collectives(program)) == [(exchange, 0), (ring, 2), (exchange, 0)]


def test_shallow_nets_keep_the_hints_of_the_layers_they_have():
    whole = official.configs(variants.get("wan2.1-vace-14b"))
    nets = tpu.shallow(whole, 6)
    assert nets["transformer"].num_layers == 6 and nets["transformer"].adapter.vace_layers == (0, 5)
    assert nets["text_encoder"].num_layers == 6 and nets["vae"] == whole["vae"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["huge"], "huge is unknown; shapes: tiny-self"),
        (["speed=9"], "speed is unknown; .*options: dtype"),
    ],
)
def test_bad_words_are_refused(words, message):
    with pytest.raises(SystemExit, match=message):
        bench_attention.main(words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required"),
        (["speed"], "invalid choice: 'speed' (choose from 'memory', 'schedule', 'kernels')"),
        (["schedule"], "the following arguments are required: generation"),
        (["schedule", "v9"], "invalid choice: 'v9' (choose from 'v5e', 'v6e', 'v5p', 'TPU7x')"),
        (["kernels", "v9"], "invalid choice: 'v9'"),
        (["memory", "v6e:2x4"], "the following arguments are required: config"),
    ],
)
def test_bad_commands_are_refused(words, message, capsys):
    with pytest.raises(SystemExit):
        tpu.main(words)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("word", ["huge", "dtype=bfloat16"])
def test_bad_words_of_a_schedule_are_refused(word):
    with pytest.raises(SystemExit, match="is unknown; shapes: tiny-self"):
        tpu.main(["schedule", "v6e", word])


def test_a_row_per_kernel_says_what_it_was_made_with():
    command = [sys.executable, str(SCRIPTS / "bench_attention.py"), "tiny-self", "repeats=0"]
    environment = {**os.environ, "PYTHONPATH": str(SCRIPTS.parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[0].startswith("device_kind cpu, device_count 1, jax ") and "commit" in lines[0]
    assert any("kernel chunked" in line and "ratio" in line for line in lines)
    assert not any("kernel flash" in line for line in lines)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_a_ring_hop_with_masked_tail_and_statistics_is_fast():
    assert tpu.kernel_schedule("v6e", "flash", 18_900, 18_900, {})["tflops"] > 400
