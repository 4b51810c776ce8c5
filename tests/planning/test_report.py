"""What a plan says, of one that is made up."""

import dataclasses
import json
import xml.etree.ElementTree as ET

import pytest

from maxdiffusion.planning import picture, report
from maxdiffusion.planning.cache import Cache
from maxdiffusion.planning.results import Change, Plan, Refused, Row, Stage
from maxdiffusion.request.cost import Figures, Seconds


def row(ulysses, gib, seconds, source="compiled", sharded=False):
    words = ("ici_data_parallelism=2", f"ulysses_shards={ulysses}")
    step = Seconds(seconds * 0.5, seconds * 0.2, seconds * 0.2, seconds * 0.1, 0.05, seconds * 0.9, seconds * 1.2)

    def stage(name, times, gib, took, source):
        return Stage(source, (Figures(name, times, gib, took),), gib <= 31.25)

    stages = {
        "text": stage("text", 2, 10.0, Seconds(linear=0.5, low=0.4, high=0.6), "compiled"),
        "denoise": stage("step", 50, gib, step, source),
        "decode": stage("decode", 21, 12.0, Seconds(other=0.2, low=0.2, high=0.3), "compiled"),
    }
    return Row(words, f"data 2 x ring {4 // ulysses} x ulysses {ulysses}", 4 if sharded else 1, 50, stages)


PLAN = Plan(
    command=("configs/a page.yml", "size=832*480"),
    run="wan2.1-t2v-14b: 832 x 480, 81 frames, 50 steps",
    target="v6e:2x4 (8 devices of 31.25 GiB on 8 chips)",
    chips=8,
    gib=31.25,
    rows=(row(4, 24.9, 2.0), row(2, 25.5, 2.5, "modelled", sharded=True), row(1, 40.0, 1.5, "modelled")),
    refused=(Refused("ring 1 x ulysses 8", "ulysses_shards=8 cannot split 12 heads; choose 1 or 2 or 4."),),
    notes=("the checkpoint is not here", "predicted, not measured"),
)


def test_the_summary_comes_first_and_says_what_to_do():
    said = report.text(PLAN, 2.7).split("\n\n")
    assert said[0] == f"{PLAN.run}\non {PLAN.target}"
    assert said[1].splitlines() == [
        "recommended  data 2 x ring 1 x ulysses 4, weights whole (compiled)",
        "  python generate_wan.py 'configs/a page.yml' 'size=832*480' ici_data_parallelism=2 ulysses_shards=4",
        "  predicted  2.00 s a step (1.80 to 2.40); the whole run 1 min 45 s (95 s to 2 min 8 s), 842 chip-seconds, "
        "0.63 at 2.7 a chip-hour",
        "  of which   text 1 s, denoise 1 min 40 s, decode 4.2 s",
        "  memory     24.90 of 31.25 GiB per device at the peak, which is denoise (text 10.00, denoise 24.90, "
        "decode 12.00)",
    ]
    lines = said[2].splitlines()
    assert len(lines) == 5 and len({line.index("compiled") for line in lines if line.endswith("compiled")}) == 1
    assert "NO" in lines[-1] and lines[-1].endswith("modelled") and lines[3].split()[-1] == "modelled"
    assert "ulysses_shards=8 cannot split 12 heads" in said[3] and "predicted, not measured" in said[4]


def test_without_a_price_there_is_none():
    assert "chip-hour" not in report.text(PLAN, None)
    assert report.as_json(PLAN, None)["recommended"]["price"] is None


def test_json_says_the_same():
    found = json.loads(json.dumps(report.as_json(PLAN, 2.7)))
    best = found["recommended"]
    assert best["overrides"] == ["ici_data_parallelism=2", "ulysses_shards=4"] and best["chip_seconds"] == 841.6
    assert best["price"] == pytest.approx(0.6312) and best["step_seconds"]["total"] == 2.0
    assert [each["fits"] for each in found["splits"]] == [True, True, False]
    assert found["refused"][0]["split"] == "ring 1 x ulysses 8" and found["chips"] == 8


def test_where_nothing_fits_the_changes_are_said():
    plan = dataclasses.replace(PLAN, rows=PLAN.rows[2:], changes=(Change(("plan=v6e-16", "ulysses_shards=4"), 22.25),))
    said = report.text(plan, 2.7)
    assert "NOTHING FITS: the nearest split, data 2 x ring 4 x ulysses 1 with weights whole, needs 40.00 GiB" in said
    assert "    plan=v6e-16 ulysses_shards=4   (22.25 GiB)" in said and "recommended" not in said
    assert report.as_json(plan, 2.7)["recommended"] is None
    ET.fromstring(picture.svg(plan))


def test_a_plan_survives_a_file(tmp_path):
    store = Cache(str(tmp_path / "xla"))
    assert store.write("a", PLAN) == "" and store.read("a", Plan) == PLAN
    (tmp_path / "plans" / "a.json").write_text('{"rows": []}')
    assert store.read("a", Plan) is None


def test_the_picture_stacks_the_parts_and_draws_the_limit():
    root = ET.fromstring(picture.svg(PLAN))
    name = "{http://www.w3.org/2000/svg}"
    bars = [bar for bar in root.iter(f"{name}rect") if bar.find(f"{name}title") is not None]
    shown = {bar.find(f"{name}title").text: (float(bar.get("width")), float(bar.get("x"))) for bar in bars}
    attention, linear = shown["attention 1.000 s"], shown["linear 0.400 s"]
    assert attention[0] == pytest.approx(2.5 * linear[0], abs=0.2) and linear[1] == pytest.approx(
        sum(attention), abs=0.2
    )
    assert shown["denoise 40.00 GiB"][0] / shown["denoise 24.90 GiB"][0] == pytest.approx(40 / 24.9, abs=0.01)
    texts = [text.text for text in root.iter(f"{name}text")]
    assert "weights whole, modelled, does not fit" in texts and "2.00 s" in texts
