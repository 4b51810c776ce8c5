"""Every key has a reader, a help text and sane bounds."""

import ast
from pathlib import Path
from typing import get_args

import maxdiffusion
from maxdiffusion import variants
from maxdiffusion.attention.plan import names
from maxdiffusion.config import Config, help, schema

PACKAGE = Path(maxdiffusion.__file__).parent
# They hold and check the keys.
NO_READERS = {PACKAGE / name for name in ("config/schema.py", "config/parse.py", "config/help.py", "request/checks.py")}

# Chooses the variant together with model_name when the config is loaded, and has done its work then.
AT_LOAD = {"model_type"}


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
    others = [key.alias for key in schema.KEYS.values() if key.alias] + list(schema.COMPOUND_ALIASES)
    assert len({*others, *Config.model_fields}) == len(others) + len(Config.model_fields)


def test_what_a_key_is_names_keys_and_values_that_exist() -> None:
    for name, key in schema.KEYS.items():
        other, _, example = key.needs.partition("=")
        assert not other or (other in Config.model_fields and example), name
        choices = get_args(Config.model_fields[name].annotation)
        assert set(key.values.values()) <= set(choices), name
        assert key.is_video <= (key.path == "input"), name


def test_the_variants_give_what_the_schema_takes_from_them() -> None:
    for spec in variants.VARIANTS.values():
        for name, key in schema.KEYS.items():
            assert hasattr(spec, name) or not key.from_variant, name
        control = {*schema.group("control"), "image", "last_image"}
        assert set(spec.task.needs) <= set(spec.task.takes) <= control
        assert spec.task.shaped_by in spec.task.takes


def test_every_input_may_lie_elsewhere_on_another_host() -> None:
    """Contents are compared, not names."""
    assert all(key.per_host for key in schema.KEYS.values() if key.path and not key.needs.startswith("plan"))


def test_every_key_has_a_group_and_a_description() -> None:
    for key, group, _, text in schema.rows():
        assert group and len(text) > 10, key


def test_attention_names_are_those_that_the_plan_parses() -> None:
    assert get_args(Config.model_fields["attention"].annotation) == ("auto", *names())
