"""The gallery in a real browser, from a folder: what its script does."""

import json

import pytest

from tests.support.browser import browser  # noqa: F401
from tests.support.gallery import make

pytestmark = pytest.mark.slow

HOSTILE = '</p><script>window.broken = 1</script><img src=x onerror="window.broken = 1"> 🎬 עברית'
SECONDS = 60_000  # a machine under load


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gallery #1 ?")
    for fmt, words, prompt in (
        ("mp4", (), "a red circle"),
        ("mp4", ("num_frames=33", "contact_sheet=0"), HOSTILE),
        ("gif", (), "a white square"),
        ("png", (), "a white circle"),
    ):
        name = f"{fmt} {len(words)} 100%"
        (folder / "p.jsonl").write_text(json.dumps({"prompt": prompt, "output": name}))
        make(f"prompts={folder}/p.jsonl", f"output_dir={folder}", "run_name=out", f"output_format={fmt}", *words)
    return folder / "out"


@pytest.fixture
def page(browser, folder):  # noqa: F811
    """The page; it asks for files of its folder alone and raises no error."""
    page = browser.new_page()
    page.set_default_timeout(SECONDS)
    asked, errors = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: errors.append(error))
    page.goto((folder / "index.html").as_uri())
    yield page
    assert not errors and all(url.startswith(folder.as_uri()) or url == "data:," for url in asked)
    page.close()


def card(page, name):
    return page.locator("main .card", has=page.get_by_text(name))


def until(page, card, condition):
    """Wait until `condition` holds of the card's video or picture, `m`."""
    media = card.locator("video, img").element_handle()
    page.wait_for_function(f"m => {condition}", arg=media)


@pytest.mark.parametrize("name", ["mp4 0", "mp4 2"])
def test_a_video_plays_while_the_pointer_is_on_it(page, name):
    one = card(page, name)
    until(page, one, "m.paused && m.currentTime === 0")
    one.locator(".stage").hover()
    until(page, one, "!m.paused && m.currentTime > 0.3")
    until(page, one, "m.currentTime < 0.3")  # it has begun again
    until(page, one, "m.currentTime > 0.3")
    page.mouse.move(0, 0)
    until(page, one, "m.paused && m.currentTime === 0")


def test_frames_and_animations_play_too(page):
    for name, playing in (("gif 0", ".gif"), ("png 0", "/0005.png")):
        one = card(page, name)
        until(page, one, "m.src.endsWith('.sheet.jpg') && m.naturalWidth === 6 * 96")
        one.locator(".stage").hover()
        until(page, one, f"m.src.endsWith('{playing}') && m.naturalWidth === 96")
        page.mouse.move(0, 0)
        until(page, one, "m.src.endsWith('.sheet.jpg')")


def test_the_still_picture_is_the_first_frame(page):
    """The frames are grey levels from black to white: none but the first may be seen of the sheet."""
    from io import BytesIO

    from PIL import Image

    for name in ("mp4 0", "png 0"):
        shown = Image.open(BytesIO(card(page, name).locator(".stage").screenshot())).convert("L")
        assert shown.crop((8, 8, shown.width - 8, shown.height - 8)).getextrema()[1] < 8


def test_the_filter_takes_words_of_prompt_and_settings(page):
    box, cards = page.get_by_role("searchbox"), page.locator("main .card:visible")
    for words, left in (("WHITE  circle", 1), ("white", 2), ("gif", 1), ("seed 0", 4), ("green", 0), ("", 4)):
        box.fill(words)
        assert cards.count() == left
        assert page.locator(".count").inner_text() == (f"{left} of 4 videos" if words else "4 videos")


def test_two_videos_are_compared_in_step(page):
    first, second = (card(page, name).get_by_role("checkbox") for name in ("mp4 0", "mp4 2"))
    first.check()
    assert not page.get_by_role("dialog").is_visible()
    second.click()
    dialog = page.get_by_role("dialog")
    assert dialog.locator(".card").count() == 2
    times = "[...document.querySelectorAll('dialog video')].map(v => v.currentTime)"
    for after in (0.3, 1.0):
        page.wait_for_function(f"Math.min(...{times}) > {after}")
        one, other = page.evaluate(times)
        assert one == pytest.approx(other, abs=0.2)
    dialog.get_by_role("slider").fill("1.25")
    page.wait_for_function(f"{times}.every(t => Math.abs(t - 1.25) < 0.002)")
    assert page.evaluate("[...document.querySelectorAll('dialog video')].every(v => v.paused)")
    dialog.get_by_role("slider").fill("3.5")  # beyond the end of the shorter one, which stays at its last frame
    page.wait_for_function(f"Math.abs({times}[0] - 2.125) < 0.01 && Math.abs({times}[1] - 3.5) < 0.01")
    dialog.get_by_role("button", name="play").click()
    page.wait_for_function(f"Math.max(...{times}) < 2")  # both begin again
    dialog.get_by_role("button", name="close").click()
    assert not dialog.is_visible() and not first.is_checked() and not second.is_checked()


def test_a_prompt_is_text(page):
    assert page.get_by_text(HOSTILE, exact=True).is_visible()
    assert page.evaluate("window.broken") is None


def test_light_and_dark(page):
    seen = set()
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        seen.add(page.evaluate("getComputedStyle(document.querySelector('header')).backgroundColor"))
    assert len(seen) == 2


def test_a_video_that_was_removed_meanwhile_is_said_to_be(browser, folder, tmp_path):  # noqa: F811
    import shutil

    copy = shutil.copytree(folder, tmp_path / "copy")
    page = browser.new_page()
    page.set_default_timeout(SECONDS)
    page.goto((copy / "index.html").as_uri())
    (copy / "mp4 0 100%.mp4").unlink()
    card(page, "mp4 0").locator(".stage").hover()
    page.locator("main .stage.gone").wait_for()
    assert page.locator("main .stage.gone").count() == 1
    page.close()
