"""The ranges of setup.py hold the pins that CI installs, and name the same packages."""

import ast
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]


def pins() -> dict[str, str]:
    lines = (line.partition("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines())
    return dict(line.split("==") for line in lines if line)


def ranges() -> dict[str, Requirement]:
    tree = ast.parse((ROOT / "setup.py").read_text())
    values = {node.targets[0].id: node.value for node in tree.body if isinstance(node, ast.Assign)}
    jax = ast.literal_eval(values["JAX"])
    entries = [entry.value if isinstance(entry, ast.Constant) else jax.format("") for entry in values["RUNTIME"].elts]
    return {requirement.name: requirement for requirement in map(Requirement, entries)}


def test_every_pin_lies_in_its_range() -> None:
    found = ranges()
    for name, version in pins().items():
        if name != "jaxlib":  # jax asks for its own
            assert found[name].specifier.contains(version), name
    assert set(found) | {"jaxlib"} == set(pins())
