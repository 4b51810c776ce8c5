"""The table against the sources that it names."""

import ast
import importlib.util
from pathlib import Path

from maxdiffusion.config import dialects


def test_the_diffusers_arguments_exist() -> None:
    folder = Path(importlib.util.find_spec("diffusers").origin).parent / "pipelines" / "wan"  # type: ignore[union-attr, arg-type]
    calls = [
        node
        for file in folder.glob("pipeline_wan*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name == "__call__"
    ]
    arguments = {argument.arg for call in calls for argument in call.args.args}
    assert len(calls) >= 5
    assert {name for name in dialects.DIFFUSERS.values() if name.isidentifier()} <= arguments


def test_rows_are_those_of_the_schema_in_order() -> None:
    rows = {key: (official, diffusers) for key, official, diffusers in dialects.rows()}
    assert rows["num_frames"] == ("frame_num", "num_frames")
    assert rows["width"] == ("size", "width")
    assert rows["guidance_scale_2"] == ("sample_guide_scale", "guidance_scale_2")
    assert rows["seed"] == ("base_seed", "generator")
    assert rows["image"] == ("image, first_frame, src_root_path", "image")
    assert rows["mode"] == ("replace_flag", "mode")
    assert "plan" not in rows
