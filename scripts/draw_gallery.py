"""Draws docs/gallery.png: the gallery of six videos that the miniature makes in four steps, in a headless Chromium."""

import argparse
import json
import pathlib
import shutil
import sys
import tempfile

from playwright.sync_api import sync_playwright

ROOT = pathlib.Path(__file__).resolve().parents[1]
PROMPTS = (
    "a red circle moving left on a navy background",
    "a white square moving down on a brown background",
    "a yellow triangle moving up on a gray background",
    "a blue circle moving right on a brown background",
    "a green triangle moving left on a black background",
    "a white circle moving up on a navy background",
)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--browser", default=shutil.which("chromium"), help="path of a Chromium")
    parser.add_argument("--output", type=pathlib.Path, default=ROOT / "docs" / "gallery.png")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from maxdiffusion import generate_wan, request

    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        lines = [json.dumps({"prompt": text, "seed": 10, "output": f"take {i}"}) for i, text in enumerate(PROMPTS, 1)]
        prompts = pathlib.Path(folder, "takes.jsonl")
        prompts.write_text("\n".join(lines))
        page = str(ROOT / "configs" / "wan_tiny_4step.yml")
        made = generate_wan.run(request.load([page, f"prompts={prompts}", f"output_dir={folder}"]))
        browser = playwright.chromium.launch(executable_path=args.browser, args=["--no-sandbox"])
        shown = browser.new_page(viewport={"width": 1100, "height": 850})
        shown.goto((made[0].parent / "index.html").as_uri())
        shown.add_style_tag(content=".stage[style] { --most: 15rem !important }")
        shown.locator(".stage").nth(1).hover()
        shown.wait_for_function("document.querySelectorAll('video')[1].currentTime > 1")
        shown.screenshot(path=args.output, full_page=True)
        browser.close()


if __name__ == "__main__":
    main()
