"""Draws docs/wan_tiny_lora.png: rows of frames that the miniature makes without and with its two LoRAs.

From the top: a purple rectangle by the checkpoint alone, then with the concept LoRA; a held-out prompt in twelve guided
steps, in four unguided ones of the checkpoint alone, then of the distilled LoRA. All rows of a prompt share the noise.
"""

import argparse
import pathlib
import sys
import tempfile

import numpy as np
from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parents[1]
RECTANGLE = "prompt=a purple rectangle moving up on a navy background"
TRIANGLE = "prompt=a yellow triangle moving up on a gray background"
ROWS = (
    ("wan_tiny", RECTANGLE),
    ("wan_tiny", RECTANGLE, f"lora={ROOT}/models/wan_tiny/loras/concept.safetensors"),
    ("wan_tiny", TRIANGLE, "flow_shift=5"),
    ("wan_tiny_4step", TRIANGLE, "lora="),
    ("wan_tiny_4step", TRIANGLE),
)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=10)
    parser.add_argument("--columns", type=int, default=9)
    parser.add_argument("--output", type=pathlib.Path, default=ROOT / "docs" / "wan_tiny_lora.png")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from maxdiffusion import generate_wan, request

    rows = []
    for page, *words in ROWS:
        with tempfile.TemporaryDirectory() as folder:
            fixed = [f"seed={args.seed}", "output_format=npy", f"output_dir={folder}", "log_level=warning"]
            job = request.load([str(ROOT / "configs" / f"{page}.yml"), *words, *fixed])
            frames = np.load(generate_wan.run(job)[0])
        chosen = frames[np.linspace(0, len(frames) - 1, args.columns).round().astype(int)]
        rows.append(np.concatenate(chosen, 1))
    Image.fromarray(np.concatenate(rows)).save(args.output, optimize=True)


if __name__ == "__main__":
    main()
