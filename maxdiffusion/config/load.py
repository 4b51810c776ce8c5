"""argv -> Config: one YAML file, then key=value words, then what the variant says, then the schema's defaults.

Both sources are read as text, and the type of the key decides what the text means: a prompt that looks like a number
stays a prompt. Within one source a key and its alias may not contradict each other; the command line wins.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from maxdiffusion import variants
from maxdiffusion.config import checks, schema
from maxdiffusion.config.schema import Config
from maxdiffusion.errors import UserError
from maxdiffusion.media.fetch import open_image, size_within
from maxdiffusion.runtime import paths
from maxdiffusion.weights import dimensions
from maxdiffusion.weights.checkpoint import official_layout

COMMAND_LINE = "command line"
_WORD = re.compile(r"([A-Za-z_][\w.-]*)=(.*)", re.DOTALL)
_SIZE = re.compile(r"\s*(\d+)\s*[*xX×]\s*(\d+)\s*")


@dataclasses.dataclass(frozen=True)
class _Given:
    """A value as written (text, or nested lists of text) and where it was written."""

    value: Any
    origin: str


_Layer = dict[str, _Given]


def load(argv: Sequence[str]) -> Config:
    """Reads `CONFIG.yml key=value ...`, in any order.

    Args:
      argv: the words of the command line, without the program's name.

    Returns:
      A complete Config whose `origins` tell where each value came from.

    Raises:
      UserError: anything that can be seen to be wrong before weights are loaded.
    """
    file, words = _split(argv)
    given = _canonical(_read_yaml(file)) | _canonical(_read_words(words))
    _apply_ring_size(given)
    _expand_paths(given, paths.parse(file).parent)
    spec = _variant(given)
    _apply_auto_size(given, spec)
    for key, (value, origin) in _defaults(spec, given).items():
        given.setdefault(key, _Given(value, origin))
    try:
        cfg = Config.model_validate({key: entry.value for key, entry in given.items()})
    except ValidationError as error:
        raise UserError(_sentence(error, given)) from None
    order = [key for key in Config.model_fields if key in given]
    cfg._origins = {key: given[key].origin for key in order}
    checks.check(cfg, spec)
    replaced(cfg, cfg.verify_against)
    return cfg


def replaced(cfg: Config, words: Sequence[str]) -> Config:
    """`cfg` on another mesh: key=value words of the group "attention and parallelism" win over it.

    Raises:
      UserError: a word of another kind, or one that `load` would refuse.
    """
    pairs = [(match[1], match[2]) for match in map(_WORD.fullmatch, words) if match]
    if len(pairs) != len(words):
        raise UserError(f"verify_against={' '.join(words)} is no list of key=value words; write '[attention=ring]'.")
    given = _canonical(_read_words(pairs))
    for key in given:
        extra: Any = Config.model_fields[key].json_schema_extra
        if extra["group"] != schema.PARALLELISM:
            raise UserError(f"{key} is no key of {schema.PARALLELISM}, so that a second mesh cannot change it.")
    try:
        other = Config.model_validate(cfg.model_dump() | {key: entry.value for key, entry in given.items()})
    except ValidationError as error:
        raise UserError(_sentence(error, given)) from None
    checks.check(other, variants.get(cfg.model_name))
    return other


# ---- the two sources


def _split(argv: Sequence[str]) -> tuple[str, list[tuple[str, str]]]:
    """The YAML file and the key=value words."""
    files, words = [], []
    for word in argv:
        if word.startswith("-"):
            raise UserError(f"{word!r} is no option here; write key=value without dashes, or --help for the keys.")
        match = _WORD.fullmatch(word)
        if match:
            words.append((match[1], match[2]))
        else:
            files.append(word)
    if len(files) != 1:
        what = f"the words {', '.join(map(repr, files))} are" if files else "no word of the command line is"
        raise UserError(f"Exactly one YAML file is needed, but {what} given as one; write CONFIG.yml key=value ...")
    return files[0], words


def _read_words(words: Sequence[tuple[str, str]]) -> _Layer:
    layer: _Layer = {}
    for key, text in words:
        if key in layer:
            raise UserError(
                f"{key} is given twice on the command line, as {layer[key].value!r} and {text!r}; give it once."
            )
        layer[key] = _Given(_list_or_text(key, text), COMMAND_LINE)
    return layer


def _list_or_text(key: str, text: str) -> Any:
    """A value in brackets is a YAML list, one in braces a mapping, where the key takes one; anything else is text."""
    ends, what, example = "[]", "list", '["one", "two"]'
    if key in schema.MAPPINGS:
        ends, what, example = "{}", "mapping", "{name: 1, other: 2}"
    elif schema.ALIASES.get(key, key) not in (*schema.LISTS, "sample_guide_scale"):
        return text
    if not (text.startswith(ends[0]) and text.endswith(ends[1])):
        return text
    try:
        return _plain(yaml.compose(text, _TextLoader), key, mapping=what == "mapping")
    except (yaml.YAMLError, RecursionError):
        raise UserError(
            f"{key}={_short(text)} starts as a {what} but cannot be read as one; write {key}='{example}'."
        ) from None


class _TextLoader(yaml.SafeLoader):
    """Leaves every scalar a text except an unquoted null."""

    yaml_implicit_resolvers: dict[str, Any] = {  # noqa: RUF012 - the name is PyYAML's
        first: [("tag:yaml.org,2002:null", re.compile(r"(?:~|null|Null|NULL|)$"))] for first in ("~", "n", "N", "")
    }


def _read_yaml(file: str) -> _Layer:
    """The keys of the file as text; a null leaves its key at the default."""
    try:
        root = yaml.compose(paths.reach(file).read_text(encoding="utf-8"), _TextLoader)
    except FileNotFoundError:
        raise UserError(_no_file(file)) from None
    except OSError as error:
        raise UserError(f"The config file {file} cannot be read: {error.strerror or error}.") from None
    except UnicodeDecodeError:
        raise UserError(f"The config file {file} is not UTF-8 text; it must be a YAML file.") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        fault = " ".join(filter(None, (error.context, error.problem)))
        raise UserError(f"The config file {file} is no valid YAML: {fault} in line {line}.") from None
    except RecursionError:
        raise UserError(f"The config file {file} nests too deeply; keys are flat, one per line.") from None
    except yaml.YAMLError as error:
        raise UserError(f"The config file {file} is no valid YAML: {' '.join(str(error).split())}.") from None
    if root is None:
        return {}
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"The config file {file} holds no key: value lines; write for example `prompt: a cat`.")
    layer: _Layer = {}
    lines: dict[str, int] = {}
    for node, value in root.value:
        key, line = str(node.value), node.start_mark.line + 1
        if key in lines:
            raise UserError(f"The config file {file} gives {key} twice, in lines {lines[key]} and {line}; keep one.")
        lines[key] = line
        layer[key] = _Given(
            _plain(value, f"{file}, line {line}: {key}", mapping=key in schema.MAPPINGS), f"file {file}"
        )
    return layer


def _plain(node: yaml.Node | None, where: str, depth: int = 0, mapping: bool = False) -> Any:
    if isinstance(node, yaml.ScalarNode):
        return None if node.tag.endswith(":null") else node.value
    if isinstance(node, yaml.SequenceNode) and depth < 3:
        return [_plain(child, where, depth + 1) for child in node.value]
    if isinstance(node, yaml.MappingNode) and mapping:
        return {str(name.value): _plain(value, where, depth + 1) for name, value in node.value}
    raise UserError(f"{where} holds a mapping or lists nested too deeply; keys are flat, their values texts or lists.")


def _no_file(file: str) -> str:
    folder, name = os.path.split(file)
    try:
        others = [other for other in paths.names(paths.parse(folder or ".")) if other.endswith((".yml", ".yaml"))]
    except OSError:
        others = []
    near = difflib.get_close_matches(name, others, n=1)
    hint = f"; did you mean {os.path.join(folder, near[0])}?" if near else "; give the path of a YAML file."
    return f"The config file {file} does not exist{hint}"


# ---- names


def _canonical(layer: _Layer) -> _Layer:
    """Aliases under their keys, nulls dropped; `ring_size` and `size=auto` stay until both sources are merged."""
    result: _Layer = {}
    for name, entry in layer.items():
        if name not in Config.model_fields and name not in schema.ALIASES and name not in schema.COMPOUND_ALIASES:
            raise UserError(_unknown(name, entry.origin))
        if entry.value is None:
            continue
        for key, value in _unalias(name, entry.value):
            origin = entry.origin if key == name else f"{entry.origin}, {name}={entry.value}"
            value = schema.VALUE_ALIASES.get(key, {}).get(str(value), value)
            other = result.setdefault(key, _Given(value, origin))
            if other.value != value:
                raise UserError(
                    f"{key} is given as {other.value} ({other.origin}) and as {value} ({origin}); keep one of the two."
                )
    return result


def _unalias(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if name == "sample_guide_scale" and isinstance(value, list) and len(value) == 2:
        yield "guidance_scale_2", value[0]  # low noise first, as the official repository has it
        yield "guidance_scale", value[1]
    elif name == "sample_guide_scale":
        yield "guidance_scale", value
    elif name != "size":
        yield schema.ALIASES.get(name, name), value
    elif value == "auto":
        yield "size", value
    elif match := _SIZE.fullmatch(value) if isinstance(value, str) else None:
        yield "width", match[1]
        yield "height", match[2]
    else:
        raise UserError(
            f"size={value} cannot be read; write width*height, width first, such as 1280*720 or 1280x720, or auto."
        )


def _unknown(name: str, origin: str) -> str:
    names = [*Config.model_fields, *schema.ALIASES, *schema.COMPOUND_ALIASES]
    near = difflib.get_close_matches(name.replace("-", "_").lower(), names, n=1, cutoff=0.0)
    return f"{name} ({origin}) is no config key; did you mean {near[0]}? (--help lists all keys.)"


def _apply_ring_size(given: _Layer) -> None:
    """ring_size (official repository) x ulysses_shards devices share the tokens."""
    if "ring_size" not in given:
        return
    ring = given.pop("ring_size")
    ulysses = given.setdefault("ulysses_shards", _Given("1", f"{ring.origin}, ring_size without ulysses_size"))
    try:
        degrees = [int(ring.value), int(ulysses.value)]
    except (TypeError, ValueError):
        degrees = [0]
    if min(degrees) < 1:
        raise UserError(
            f"ring_size={ring.value} with ulysses_shards={ulysses.value} cannot be multiplied; "
            "both must be positive integers, such as ring_size=2 ulysses_size=4."
        )
    product = str(degrees[0] * degrees[1])
    context = given.setdefault("ici_context_parallelism", _Given(product, f"{ring.origin}, ring_size={ring.value}"))
    if context.value != product:
        raise UserError(
            f"ici_context_parallelism is given as {context.value} ({context.origin}), but ring_size={ring.value} x "
            f"ulysses_shards={ulysses.value} make {product}; leave one of them out."
        )


def _apply_auto_size(given: _Layer, spec: variants.WanSpec) -> None:
    """`size=auto`, the default where an image or video is given: width and height in its proportions.

    The command line wins over the file, in either direction.
    """
    auto = given.pop("size", None)
    sides = [given[key].origin for key in ("width", "height") if key in given]
    if auto is not None and auto.origin in sides:
        raise UserError(f"size=auto and a width or height ({auto.origin}) contradict each other; keep one of them.")
    if sides and (auto is None or COMMAND_LINE not in auto.origin or any(COMMAND_LINE in side for side in sides)):
        return
    entry = given[spec.shaped_by].value if spec.shaped_by in given else []
    shape = entry if isinstance(entry, str) else next(iter(entry), None)
    if not shape:
        if auto is not None:
            raise UserError(f"size=auto ({auto.origin}) takes the proportions of {spec.shaped_by}, which is not given.")
        return
    shown = _shown(spec.shaped_by, shape)
    steps = {spec.vae_stride[axis] * spec.patch[axis] for axis in (1, 2)}
    size = size_within(spec.width * spec.height, shown, max(steps))
    for key, side in zip(("width", "height"), size, strict=True):
        given[key] = _Given(str(side), f"size=auto, the {spec.shaped_by} has {shown[0]} x {shown[1]} pixels")


def _shown(key: str, location: str) -> tuple[int, int]:
    """Width and height of an image or a video."""
    if key == "image":
        return open_image(location).size
    from maxdiffusion.media.read import read_video  # numpy, which no other check needs

    _, height, width, _ = read_video(location, 1).shape
    return width, height


def _expand_paths(given: _Layer, yaml_folder: paths.AnyPath) -> None:
    """~ and $VARIABLES in paths; ./ and ../ of an input in the YAML file are relative to that file."""
    for key in schema.PATHS:
        entry = given.get(key)
        if entry is None:
            continue
        inside = key in schema.INPUT_PATHS and not entry.origin.startswith(COMMAND_LINE)
        expand = functools.partial(_expand_path, key, entry.origin, yaml_folder if inside else None)
        value = [expand(path) for path in entry.value] if isinstance(entry.value, list) else expand(entry.value)
        given[key] = dataclasses.replace(entry, value=value)


def _expand_path(key: str, origin: str, relative_to: paths.AnyPath | None, given: Any) -> Any:
    if not isinstance(given, str):
        return given
    path = paths.expanded(given, f"{key} ({origin})")
    if relative_to is not None and path.startswith(("./", "../")):
        whole = relative_to / path
        path = os.path.abspath(whole) if isinstance(whole, Path) else str(whole.resolve())
    return path


# ---- the variant and its defaults


def _variant(given: _Layer) -> variants.WanSpec:
    """The variant: the one named, or the one of the named family to which the checkpoint belongs."""
    named = given.get("model_name", _Given(Config.model_fields["model_name"].default, "default"))
    name = _text(given, "model_name") or str(named.value)
    found = variants.candidates(name, _text(given, "model_type"))
    path = _text(given, "pretrained_model_name_or_path")
    file = _text(given, "transformer_file")
    checkpoint = _transformer_config(path, file) if path else None
    if file:
        path, checkpoint = file, dimensions.read_config(paths.reach(file), checkpoint or {})
    if len(found) == 1:
        if checkpoint is not None:
            variants.check(found[0], checkpoint)
        given["model_name"] = dataclasses.replace(named, value=found[0].name)
        return found[0]
    if checkpoint is not None:
        found = variants.matching(checkpoint, found) or found
    spec = found[0] if len(found) == 1 else _by_hub_id(path, found)
    if spec is None:
        names = ", ".join(each.name for each in found)
        what = f"the checkpoint {path} does not tell which" if path else "no checkpoint is given that tells which"
        raise UserError(f"model_name {name} stands for several variants and {what}; write model_name: one of {names}.")
    given["model_name"] = _Given(spec.name, f"family {name}, identified by {path}")
    return spec


def _text(given: _Layer, key: str) -> str | None:
    value = given[key].value if key in given else None
    if value is not None and not isinstance(value, str):
        raise UserError(f"{key} ({given[key].origin}) is a list, but it takes one value.")
    return value


def _by_hub_id(path: str | None, found: Sequence[variants.WanSpec]) -> variants.WanSpec | None:
    """The variant with that hub id, or of whose hub id a folder has the name."""
    ids = {spec.hub_id.lower(): spec for spec in found if spec.hub_id}
    folders = {each.partition("/")[2]: spec for each, spec in ids.items()}
    given = (path or "").lower()
    return ids.get(given) or folders.get(os.path.basename(given.rstrip("/")))


def _transformer_config(path: str, file: str | None) -> Mapping[str, Any] | None:
    """transformer/config.json of a local checkpoint; None for a hub id, whose files are checked once they are here.

    Beside a `transformer_file` it may be absent.
    """
    folder = paths.reach(path)
    if isinstance(folder, Path) and not folder.is_dir():
        if folder.is_file():
            raise UserError(
                f"pretrained_model_name_or_path={path} is a file; give a folder or a hub id, and a transformer in one "
                f"file as transformer_file={path}."
            )
        if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path):
            raise UserError(
                f"pretrained_model_name_or_path={path} is no existing folder and no hub id of the form "
                "organisation/name; give one of the two."
            )
        return None
    config = folder / "transformer" / "config.json"
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
    except OSError as error:
        if file:
            return None
        raise UserError(
            official_layout(folder)
            or f"The checkpoint {path} has no readable transformer/config.json ({error.strerror or error}); "
            "give the folder of a checkpoint in the diffusers layout."
        ) from None
    except (ValueError, RecursionError):
        raise UserError(f"{config} is no valid JSON; fetch the checkpoint's config.json again.") from None
    if not isinstance(content, dict):
        raise UserError(f"{config} holds no JSON object; fetch the checkpoint's config.json again.")
    return content


_FROM_VARIANT = (
    "model_type",
    "negative_prompt",
    "height",
    "width",
    "num_frames",
    "fps",
    "num_inference_steps",
    "guidance_scale",
    "guidance_scale_2",
    "boundary_ratio",
    "flow_shift",
)


def _defaults(spec: variants.WanSpec, given: _Layer) -> Mapping[str, tuple[Any, str]]:
    """What follows from the variant and from other keys: key -> (value, origin)."""
    origin = f"variant {spec.name}"
    result = {key: (getattr(spec, key), origin) for key in _FROM_VARIANT if getattr(spec, key) is not None}
    result["run_name"] = (spec.name, origin)
    if spec.flow_shift_480p is not None and _pixels(spec, given) <= 832 * 480:
        result["flow_shift"] = (spec.flow_shift_480p, f"{origin} up to 832 x 480 pixels")
    if spec.guidance_scale_2 is not None and "guidance_scale" in given:  # as both references read one scale
        result["guidance_scale_2"] = (given["guidance_scale"].value, "guidance_scale")
    if "pretrained_model_name_or_path" not in given:
        if spec.hub_id is None:
            raise UserError(
                f"The variant {spec.name} has no official checkpoint; give pretrained_model_name_or_path=FOLDER."
            )
        result["pretrained_model_name_or_path"] = (spec.hub_id, origin)
    if _text(given, "jax_distributed") != "off":
        for key in ("coordinator_address", "num_processes", "process_id"):
            if value := os.environ.get(f"JAX_{key.upper()}"):
                result[key] = (value, f"environment, JAX_{key.upper()}")
    extension = os.path.splitext(_text(given, "save_file") or "")[1].lower().lstrip(".")
    if extension:
        result["output_format"] = (extension, "save_file")
    return result


def _pixels(spec: variants.WanSpec, given: _Layer) -> float:
    """Of a frame; of sides that are no numbers, which the schema will refuse, infinitely many."""
    sides = (given[side].value if side in given else getattr(spec, side) for side in ("width", "height"))
    try:
        return float(math.prod(map(int, sides)))
    except (TypeError, ValueError):
        return math.inf


# ---- errors


def _sentence(error: ValidationError, given: _Layer) -> str:
    """The first thing that pydantic found, as one sentence with key, value, origin and bound."""
    first = error.errors()[0]
    key = str(first["loc"][0])
    entry = given[key]
    fault = first["msg"].removeprefix("Value error, ").removeprefix("Input ").removeprefix("String ")
    if first["type"] == "literal_error":
        choices = re.findall(r"'([^']*)'", first["ctx"]["expected"])
        near = difflib.get_close_matches(str(first["input"]).lower(), choices, n=1)
        fault += f" (did you mean {near[0]}?)" if near else ""
    if key == "logical_axis_rules":
        fault = "should be a list of pairs, such as [[mlp, tensor], [embed, null]]"
    if first["type"] == "dict_type":
        fault = "should be a mapping, such as {block_q: 2048, block_kv: 1024}"
    shown = first["input"] if isinstance(first["input"], str | int | float) else entry.value
    return f"{key}={_short(str(shown))} ({entry.origin}) cannot be used: it {fault}."


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:80]}..."
