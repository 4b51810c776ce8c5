"""argv -> values as written: one page (a YAML file, or the name of a bundled one) and key=value arguments.

Both sources are read as text, and the type of the key decides what the text means: a prompt that looks like a number
stays a prompt. Within one source a key and its alias may not contradict each other; the command line wins.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from maxdiffusion.config import dashes, dialects, pages, schema
from maxdiffusion.config.schema import Config
from maxdiffusion.errors import UserError
from maxdiffusion.runtime import paths

COMMAND_LINE = "command line"
PROSE = ("prompt", "negative_prompt")  # words in brackets may be meant as they are
_WORD = re.compile(r"([A-Za-z_][\w.-]*)=(.*)", re.DOTALL)
_SIZE = re.compile(r"\s*(\d+)\s*[*xX×]\s*(\d+)\s*")
_NULL = ("", "~", "null", "Null", "NULL")
_SIZES = {"size", "width", "height"}
_LONGEST = 1_000_000  # letters of a config file, and values with their repetitions
_KNOWN = (Config.model_fields, schema.ALIASES, schema.COMPOUND_ALIASES, dialects.SERVED_BY)
_SOURCES = {"image": "src_ref.png", "pose_video": "src_pose.mp4", "face_video": "src_face.mp4"}
_REPLACE_SOURCES = {"background_video": "src_bg.mp4", "mask_video": "src_mask.mp4"}


@dataclasses.dataclass(frozen=True)
class Value:
    """A value as written (text, or nested lists of text) and where it was written."""

    value: Any
    origin: str


Values = dict[str, Value]


def parse(argv: Sequence[str]) -> Values:
    """Reads `PAGE key=value ...`, in any order; `--key value` is another spelling of key=value.

    Args:
      argv: the command line without the program's name.

    Returns:
      Key -> value, aliases replaced, paths expanded; `size` where it decides width and height; and official flags that
      no key takes.

    Raises:
      UserError: an unknown key, contradicting values, a YAML file that cannot be read, a path that cannot exist.
    """
    file, pairs = _split(argv)
    values, words = _canonical(_read_yaml(file)), _canonical(_read_words(pairs))
    for key in _SIZES if "size" in words else {"size"} if _SIZES & words.keys() else ():
        values.pop(key, None)
    values |= words
    _apply_ring_size(values)
    _apply_source_folder(values)
    _expand_paths(values, paths.parse(file).parent)
    return values


def parse_words(words: Sequence[str]) -> Values:
    """Reads key=value arguments alone.

    Raises:
      UserError: as `parse`, or an argument without `=`.
    """
    pairs = [(match[1], match[2]) for match in map(_WORD.fullmatch, words) if match]
    if len(pairs) != len(words):
        raise UserError(f"'{' '.join(words)}' is not a list of key=value arguments; write '[attention=ring]'.")
    return _canonical(_read_words(pairs))


def typed(values: Mapping[str, Value], base: Mapping[str, Any] | None = None) -> Config:
    """The config of these values over those of `base`.

    Raises:
      UserError: a value that its key cannot take.
    """
    try:
        known = {key: entry.value for key, entry in values.items() if key not in dialects.SERVED_BY}
        cfg = Config.model_validate({**(base or {}), **known})
    except ValidationError as error:
        raise UserError(_sentence(error, values)) from None
    cfg._origins = {key: values[key].origin for key in Config.model_fields if key in values}
    cfg._unused = {flag: dialects.SERVED_BY[flag] for flag in values if flag in dialects.SERVED_BY}
    return cfg


def parse_size(value: Any) -> tuple[str, str] | None:
    """Width and height of `832*480`; None for anything else."""
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    return (match[1], match[2]) if match else None


# ---- the two sources


def _split(argv: Sequence[str]) -> tuple[str, list[tuple[str, str]]]:
    """The YAML file and the key=value arguments."""
    files, words = [], []
    for word in dashes.plain(argv):
        match = _WORD.fullmatch(word)
        if match and match[1] == "task":
            files.append(dialects.page(match[2]))
            words += [("num_frames", "1")] if match[2].startswith("t2i") else []
        elif match:
            words.append((match[1], match[2]))
        else:
            files.append(word)
    bare = [file for file in files if not file.endswith((".yml", ".yaml")) and pages.path(file) is None]
    if len(files) > 1 and bare:
        raise UserError(
            f"the argument {bare[-1]!r} has no '='; write {bare[-1]}=VALUE, and a value of several words in quotes."
        )
    if len(files) != 1:
        what = f"the arguments {', '.join(map(repr, files))} are" if files else "no argument is"
        raise UserError(
            f"Exactly one YAML file or page is needed, but {what} given as one; write PAGE key=value ... "
            "(`generate_wan list` shows the pages)."
        )
    page = None if Path(files[0]).is_file() else pages.path(files[0])
    return str(page or files[0]), words


def _read_words(pairs: Sequence[tuple[str, str]]) -> Values:
    values: Values = {}
    for key, text in pairs:
        if key in values:
            raise UserError(
                f"{key} is given twice on the command line, as {values[key].value!r} and {text!r}; give it once."
            )
        value = _list_or_text(key, text)
        kept = key in PROSE and value == text and text.startswith("[") and text.endswith("]")
        note = "; its brackets are text: a list has commas or quotes" if kept else ""
        values[key] = Value(value, f"{COMMAND_LINE}{note}")
    return values


def _list_or_text(key: str, text: str) -> Any:
    """A value in brackets is a YAML list, one in braces a mapping, where the key takes one; anything else is text."""
    name = schema.ALIASES.get(key, key)
    known = name in Config.model_fields
    if known and schema.takes_mapping(name) and text[:1] + text[-1:] == "{}":
        what, example = "mapping", "{name: 1, other: 2}"
    elif (key == "sample_guide_scale" or (known and schema.takes_list(name))) and text[:1] + text[-1:] == "[]":
        what, example = "list", '["one", "two"]'
    else:
        return text
    try:
        node = yaml.compose(text, yaml.BaseLoader)
        if key in PROSE and not _is_list_of_texts(node):
            return text
        return _plain(node, key, mapping=what == "mapping")
    except (yaml.YAMLError, RecursionError):
        if key in PROSE and not text[1:].lstrip().startswith(("'", '"')):
            return text
        raise UserError(
            f"{key}={_short(text)} starts as a {what} but cannot be read as one; write {key}='{example}'."
        ) from None


def _is_list_of_texts(node: yaml.Node | None) -> bool:
    """Whether it is a list of texts rather than words in brackets: several, or one in quotes."""
    if not isinstance(node, yaml.SequenceNode) or not all(isinstance(each, yaml.ScalarNode) for each in node.value):
        return False
    return len(node.value) != 1 or node.value[0].style is not None


def _read_yaml(file: str) -> Values:
    """The keys of the file as text; a null leaves its key at the default."""
    try:
        with paths.probe(file).open(encoding="utf-8") as content:
            text = content.read(_LONGEST)
        root = yaml.compose(text, yaml.BaseLoader)
    except FileNotFoundError:
        raise UserError(_no_file(file)) from None
    except OSError as error:
        raise UserError(f"The config file {file} cannot be read: {error.strerror or error}.") from None
    except UnicodeDecodeError:
        raise UserError(f"The config file {file} is not UTF-8 text; it must be a YAML file.") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        fault = " ".join(filter(None, (error.context, error.problem)))
        raise UserError(f"The config file {file} is not valid YAML: {fault} in line {line}.") from None
    except RecursionError:
        raise UserError(f"The config file {file} nests too deeply; keys are flat, one per line.") from None
    except yaml.YAMLError as error:
        raise UserError(f"The config file {file} is not valid YAML: {' '.join(str(error).split())}.") from None
    if root is None:
        return {}
    if len(text) == _LONGEST or _scalars(root, {}) > _LONGEST:
        raise UserError(f"The config file {file} holds more than {_LONGEST:,} letters or values; a run needs fewer.")
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"The config file {file} holds no key: value lines; write for example `prompt: a cat`.")
    values: Values = {}
    lines: dict[str, int] = {}
    for node, value in root.value:
        key, line = str(node.value), node.start_mark.line + 1
        if key in lines:
            raise UserError(f"The config file {file} gives {key} twice, in lines {lines[key]} and {line}; keep one.")
        lines[key] = line
        mapping = key in Config.model_fields and schema.takes_mapping(key)
        values[key] = Value(_plain(value, f"{file}, line {line}: {key}", mapping=mapping), f"file {file}")
    return values


def _scalars(node: yaml.Node, counted: dict[int, int]) -> int:
    """The number of scalars below a node, each as often as aliases repeat it; `counted` holds those of nodes seen."""
    if id(node) not in counted:
        children = node.value if isinstance(node, yaml.SequenceNode) else ()
        if isinstance(node, yaml.MappingNode):
            children = (child for pair in node.value for child in pair)
        counted[id(node)] = 1  # of a node that holds itself, too
        counted[id(node)] = 1 + sum(_scalars(child, counted) for child in children)
    return counted[id(node)]


def _plain(node: yaml.Node | None, where: str, depth: int = 0, mapping: bool = False) -> Any:
    """Texts, lists of texts, and None for an unquoted null."""
    if isinstance(node, yaml.ScalarNode):
        return None if node.style is None and node.value in _NULL else node.value
    if isinstance(node, yaml.SequenceNode) and depth < 3:
        return [_plain(child, where, depth + 1) for child in node.value]
    if isinstance(node, yaml.MappingNode) and mapping:
        names = [str(name.value) for name, _ in node.value]
        if twice := {name for name in names if names.count(name) > 1}:
            raise UserError(f"{where} names {twice.pop()} twice; keep one.")
        return {name: _plain(value, where, depth + 1) for name, (_, value) in zip(names, node.value, strict=True)}
    raise UserError(f"{where} holds a mapping or lists nested too deeply; keys are flat, their values texts or lists.")


def _no_file(file: str) -> str:
    folder, name = os.path.split(file)
    try:
        others = [other for other in paths.names(paths.parse(folder or ".")) if other.endswith((".yml", ".yaml"))]
    except OSError:
        others = []
    near = [os.path.join(folder, other) for other in difflib.get_close_matches(name, others, n=1)]
    near += difflib.get_close_matches(name.removesuffix(".yml"), pages.names(), n=1)
    hint = f"; did you mean {near[0]}?" if near else "; give the path of a YAML file, or a page of `generate_wan list`."
    return f"The config file {file} does not exist{hint}"


# ---- names


def _canonical(source: Values) -> Values:
    """Aliases under their keys, nulls dropped; `size`, `ring_size`, `src_root_path` stay until sources are merged."""
    result: Values = {}
    for name, entry in source.items():
        if not any(name in known for known in _KNOWN):
            raise UserError(_unknown(name, entry.origin))
        if entry.value is None:
            continue
        for key, value in _unalias(name, entry.value):
            origin = entry.origin if key == name else f"{entry.origin}, {name}={entry.value}"
            value = schema.KEYS[key].values.get(str(value), value) if key in schema.KEYS else value
            other = result.setdefault(key, Value(value, origin))
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
    elif name == "replace_flag":
        yield "mode", {"true": "replace", "false": "animate"}.get(str(value).lower(), value)
    elif name == "src_ref_images" and isinstance(value, str):
        yield "reference_images", value.split(",")
    elif name != "size":
        yield schema.ALIASES.get(name, name), value
    elif value == "auto":
        yield "size", value
    elif size := parse_size(value):
        yield from zip(("size", "width", "height"), (value, *size), strict=True)
    else:
        raise UserError(
            f"size={value} cannot be read; write width*height, width first, such as 1280*720 or 1280x720, or auto."
        )


def _unknown(name: str, origin: str) -> str:
    names = [name for known in _KNOWN for name in known]
    near = difflib.get_close_matches(name.replace("-", "_").lower(), names, n=1, cutoff=0.0)
    return f"unknown key {name} ({origin}); did you mean {near[0]}? (--help lists all keys.)"


def _apply_ring_size(values: Values) -> None:
    """ring_size (official repository) x ulysses_shards devices share the tokens."""
    if "ring_size" not in values:
        return
    ring = values.pop("ring_size")
    ulysses = values.setdefault("ulysses_shards", Value("1", f"{ring.origin}, ring_size without ulysses_size"))
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
    context = values.setdefault("ici_context_parallelism", Value(product, f"{ring.origin}, ring_size={ring.value}"))
    if context.value != product:
        raise UserError(
            f"ici_context_parallelism is given as {context.value} ({context.origin}), but ring_size={ring.value} x "
            f"ulysses_shards={ulysses.value} make {product}; leave one of them out."
        )


def _apply_source_folder(values: Values) -> None:
    """src_root_path (official repository): the folder of Animate's inputs under their official names."""
    if "src_root_path" not in values:
        return
    folder = values.pop("src_root_path")
    replace = "mode" in values and values["mode"].value == "replace"
    files = _SOURCES | (_REPLACE_SOURCES if replace else {})
    for key, file in files.items():
        values.setdefault(key, Value(f"{folder.value}/{file}", f"{folder.origin}, src_root_path={folder.value}"))


def _expand_paths(values: Values, yaml_folder: paths.AnyPath) -> None:
    """~ and $VARIABLES in paths; ./ and ../ of an input in the YAML file are relative to that file."""
    for key, about in schema.KEYS.items():
        if not about.path or key not in values:
            continue
        entry = values[key]
        relative = about.path == "input" and not entry.origin.startswith(COMMAND_LINE)
        expand = functools.partial(_expand_path, key, entry.origin, yaml_folder if relative else None)
        if isinstance(entry.value, dict):
            value: Any = {expand(path): other for path, other in entry.value.items()}
            if len(value) < len(entry.value):
                raise UserError(f"{key} ({entry.origin}) names a file twice; keep one.")
        else:
            value = [expand(path) for path in entry.value] if isinstance(entry.value, list) else expand(entry.value)
        values[key] = dataclasses.replace(entry, value=value)


def _expand_path(key: str, origin: str, relative_to: paths.AnyPath | None, given: Any) -> Any:
    if not isinstance(given, str):
        return given
    if relative_to is not None and given.startswith(("./", "../")):
        whole = relative_to / given
        given = os.path.abspath(whole) if isinstance(whole, Path) else str(whole.resolve())
    return paths.expanded(given, f"{key} ({origin})")


# ---- errors


def _sentence(error: ValidationError, values: Mapping[str, Value]) -> str:
    """The first thing that pydantic found, as one sentence with key, value, origin and bound."""
    first = error.errors()[0]
    key = str(first["loc"][0])
    entry = values[key]
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
