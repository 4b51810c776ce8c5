"""The gallery's page, as its HTML says it; what it does in a browser is in test_gallery_browser.py."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

from maxdiffusion import output, request
from maxdiffusion.errors import UserError
from tests.support.bucket import bucket  # noqa: F401
from tests.support.gallery import PAGE, Parsed, make

LINES = [
    {"prompt": "a red circle", "output": "take 2", "seed": 3},
    {"prompt": "a white square", "output": "take 10", "size": "64*96"},
]


@pytest.fixture
def words(tmp_path):
    def words(*more, lines=LINES):
        (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return (f"prompts={tmp_path}/p.jsonl", f"output_dir={tmp_path}", "run_name=out", *more)

    return words


def test_the_page_grows_with_each_video_of_a_prompt_file(tmp_path, words):
    page = tmp_path / "out" / "index.html"
    make(*words(), rows=[1])
    assert [card["name"] for card in Parsed(page).cards] == ["take 10.mp4"]
    make(*words(), rows=[0])
    first, second = Parsed(page).cards
    about = {"size": "96 x 96", "length": "2.12 s, 17 frames", "made after": "12.5 s of its run"}
    assert first == {"prompt": "a red circle", "name": "take 2.mp4", "seed": "3", **about}
    assert second == {"prompt": "a white square", "name": "take 10.mp4", "seed": "0", **about, "size": "64 x 96"}


def test_all_that_the_page_names_lies_beside_it(tmp_path, words):
    make(*words())
    page = Parsed(tmp_path / "out" / "index.html")
    assert all(url.startswith("./") or url == "data:," for url in page.links)
    assert {url.removeprefix("./").replace("%20", " ") for url in page.links} - {"data:,"} == {
        f"{name}.{ending}" for name in ("take 2", "take 10") for ending in ("mp4", "json", "sheet.jpg")
    }
    assert "http" not in (tmp_path / "out" / "index.html").read_text()


def test_settings_are_shown_where_they_differ(tmp_path):
    beside = [f"output_dir={tmp_path}", "run_name=out", "gallery=true", "prompt=a cat"]
    make(*beside, "num_inference_steps=3", "negative_prompt=rain", "log_level=warning")
    make(*beside, "num_inference_steps=5", "negative_prompt=", "lora=models/wan_tiny/loras/concept.safetensors")
    first, second = Parsed(tmp_path / "out" / "index.html").cards
    common = {"prompt", "name", "seed", "size", "length", "made after"}
    assert first.keys() - common == {"num_inference_steps", "negative_prompt", "lora"}
    assert (first["num_inference_steps"], first["negative_prompt"], first["lora"]) == ("3", "rain", "none")
    assert (second["num_inference_steps"], second["negative_prompt"]) == ("5", "none")
    assert "concept.safetensors" in second["lora"]


@pytest.mark.parametrize(
    "prompt",
    [
        "<script>alert(1)</script>",
        '"><img src=x onerror=alert(1)>',
        "</p></article><!--cards--> &amp; 'quoted'",
        "🎬 猫 עברית ‮ العربية",
    ],
)
def test_prompts_and_names_are_text(tmp_path, words, prompt):
    name = "#1 ?a=b%20 & <b> \"猫\" 'x'"
    make(*words(lines=[{"prompt": prompt, "output": name}, {"prompt": "a cat"}]))
    page = Parsed(tmp_path / "out" / "index.html")
    assert page.scripts == 1 and len(page.cards) == 2
    assert {card["prompt"]: card["name"] for card in page.cards}[prompt] == f"{name}.mp4"
    assert "./%231%20%3Fa%3Db%2520%20%26%20%3Cb%3E%20%22%E7%8C%AB%22%20%27x%27.mp4" in page.links


def test_the_page_shows_what_is_there(tmp_path, words):
    folder = tmp_path / "out"
    job = make(*words())
    (folder / "take 2.mp4").rename(folder / "renamed.MP4")
    (folder / "take 10.mp4").unlink()
    shutil.copy(folder / "renamed.MP4", folder / "other.mp4")
    for name, text in {"list": "[]", "broken": "{", "near": '{"output": "other.mp4", "config": {"fps": 0}}'}.items():
        (folder / f"{name}.json").write_text(text)
    output.Gallery(job).write()
    cards = [{"prompt": "", "name": "other.mp4"}, {"prompt": "", "name": "renamed.MP4"}]
    assert Parsed(folder / "index.html").cards == cards
    (folder / "take 2.mp4").touch()
    output.Gallery(job).write()
    assert [card["name"] for card in Parsed(folder / "index.html").cards] == ["other.mp4", "renamed.MP4", "take 2.mp4"]


def test_a_run_that_finds_all_done_brings_the_page_up_to_date(tmp_path, words):
    """The run before was killed between the last record and the page."""
    job = make(*words())
    (tmp_path / "out" / "index.html").unlink()
    assert output.remaining(job).videos == ()
    output.Gallery(job).write()
    assert len(Parsed(tmp_path / "out" / "index.html").cards) == 2


def test_a_video_made_again_is_shown_as_it_is_now(tmp_path, words):
    make(*words())
    make(*words("num_inference_steps=3", "overwrite=true", lines=[{**LINES[0], "seed": 8}]))
    cards = Parsed(tmp_path / "out" / "index.html").cards
    assert [(card["seed"], card["num_inference_steps"]) for card in cards] == [("8", "3"), ("0", "12")]


def test_a_manifest_is_no_record(tmp_path, words):
    """It maps names of outputs, which may be those of a record's fields."""
    lines = [{"prompt": "a cat", "output": name} for name in ("output", "config", "index")]
    make(*words(lines=lines))
    cards = Parsed(tmp_path / "out" / "index.html").cards
    assert [card["name"] for card in cards] == ["config.mp4", "index.mp4", "output.mp4"]


def test_runs_at_once_lose_no_video(tmp_path, words):
    lines = [{"prompt": "a cat", "seed": seed, "output": f"v{seed}"} for seed in range(6)]
    given = words(lines=lines)
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda row: make(*given, rows=[row]), range(6)))
    assert [card["name"] for card in Parsed(tmp_path / "out" / "index.html").cards] == [f"v{i}.mp4" for i in range(6)]


@pytest.mark.parametrize("gallery", [(), ("gallery=true",)])
def test_without_a_prompt_file_it_is_asked_for(tmp_path, gallery):
    make("prompt=a cat", f"save_file={tmp_path}/cat.mp4", *gallery)
    assert (tmp_path / "index.html").exists() == bool(gallery)


def test_a_page_of_someone_else_is_kept(tmp_path, words):
    page = tmp_path / "out" / "index.html"
    page.parent.mkdir()
    page.write_text("<h1>mine</h1>")
    job = request.load([PAGE, *words()])
    with pytest.raises(UserError, match=r"index\.html is not a page of this program"):
        output.Gallery(job).write()
    assert page.read_text() == "<h1>mine</h1>"
    output.Gallery(request.load([PAGE, *words("gallery=false")])).write()


def test_videos_are_whole_where_the_page_cannot_be_written(tmp_path, words, caplog):
    (tmp_path / "out" / "index.html").mkdir(parents=True)
    make(*words())
    assert "index.html" in caplog.text and (tmp_path / "out" / "take 10.json").exists()


def test_in_a_bucket(tmp_path, words, bucket):  # noqa: F811
    (tmp_path / "buckets" / "b").mkdir(parents=True)
    job = make(*words("output_dir=gs://b/videos")[::2], "output_dir=gs://b/videos")
    page = tmp_path / "buckets" / "b" / "videos" / "out" / "index.html"
    assert len(Parsed(page).cards) == 2
    read = bucket.reads
    output.Gallery(job).write()
    assert bucket.reads - read <= 5  # the page's head, two records, the manifest


@pytest.mark.parametrize("fmt", ["mp4", "gif", "webp", "png", "npy"])
def test_the_sheet_beside_a_video_of_each_format(tmp_path, words, fmt):
    make(*words(f"output_format={fmt}", "contact_sheet=5"), rows=[0])
    with Image.open(tmp_path / "out" / "take 2.sheet.jpg") as sheet:
        assert sheet.size == (5 * 96, 96)
        levels = [sheet.getpixel((x, 48))[0] for x in range(48, 480, 96)]
    assert levels == pytest.approx([0, 63, 127, 191, 255], abs=2)
    assert json.loads((tmp_path / "out" / "take 2.json").read_text())["contact_sheet"] == "take 2.sheet.jpg"
    page = Parsed(tmp_path / "out" / "index.html")
    assert [card["prompt"] for card in page.cards] == ["a red circle"]
    assert "./take%202.sheet.jpg" in page.links


@pytest.mark.parametrize("words_", [["contact_sheet=0"], ["num_frames=1", "output_format=jpg"]])
def test_without_a_sheet(tmp_path, words, words_):
    make(*words(*words_))
    assert not list(tmp_path.glob("out/*.sheet.jpg"))
    assert "contact_sheet" not in json.loads((tmp_path / "out" / "take 2.json").read_text())
    assert len(Parsed(tmp_path / "out" / "index.html").cards) == 2


def test_an_image_of_the_sheets_name_is_kept(tmp_path, words):
    for place, more in ((tmp_path, ("prompt=a cat", f"save_file={tmp_path}/a.mp4")), (tmp_path / "out", words())):
        place.mkdir(exist_ok=True)
        for name in ("a.sheet.jpg", "take 2.sheet.jpg"):
            (place / name).write_bytes(b"mine")
        with pytest.raises(UserError, match=r"sheet\.jpg exists already"):
            job = request.load([PAGE, *more])
            output.Outputs(output.remaining(job), "model")
    assert Path(tmp_path / "a.sheet.jpg").read_bytes() == b"mine"
