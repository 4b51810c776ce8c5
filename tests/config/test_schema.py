"""Every key has a reader, a help text and sane bounds."""

import ast
from pathlib import Path
from typing import get_args

import pytest

import maxdiffusion
from maxdiffusion.config import Config, help, schema

PACKAGE = Path(maxdiffusion.__file__).parent
# The config room's own files hold and check the keys; examples.py is what pairs prompts and seeds for the run.
NO_READERS = {PACKAGE / "config" / name for name in ("schema.py", "load.py", "checks.py", "help.py")}

# Chooses the variant together with model_name when the config is loaded, and has done its work then.
AT_LOAD = {"model_type"}
# Read under another spelling than cfg.<key>, which the test cannot see.


def keys_read(source: str) -> set[str]:
    """The attributes that code reads of anything named `cfg`."""
    return {
        node.attr
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
        if getattr(node.value, "id", getattr(node.value, "attr", "")) == "cfg"
    }


def test_every_key_has_a_reader() -> None:
    files = [path for path in PACKAGE.rglob("*.py") if path not in NO_READERS]
    read = set().union(*(keys_read(path.read_text()) for path in files))
    assert {"prompt", "negative_prompt", "seed"} <= read
    assert set(Config.model_fields) - read - AT_LOAD == set()


def test_keys_read_sees_reads_only() -> None:
    assert keys_read("a = cfg.height + self.cfg.width\ncfg.fps = 3\nother.seed\n# cfg.prompt") == {"height", "width"}


def test_help_tells_every_name() -> None:
    text = help.text()
    for name in (*Config.model_fields, *schema.ALIASES, *schema.COMPOUND_ALIASES):
        assert name in text
    assert all(len(line) <= 110 for line in text.splitlines())


def test_names_do_not_collide() -> None:
    others = set(schema.ALIASES) | set(schema.COMPOUND_ALIASES)
    assert not others & set(Config.model_fields)
    assert set(schema.ALIASES.values()) <= set(Config.model_fields)
    assert set(schema.PATHS) | set(schema.LISTS) <= set(Config.model_fields)


def test_every_key_has_a_group_and_a_description() -> None:
    for key, group, _, text in schema.rows():
        assert group and len(text) > 10, key


def test_attention_names_are_those_that_the_plan_parses() -> None:
    from maxdiffusion.attention import plan

    if not hasattr(plan, "NAMES"):
        pytest.skip("the table of attention names is not there yet")
    assert {"auto", *plan.NAMES} == set(get_args(Config.model_fields["attention"].annotation))
