"""Scripts that complete keys, values, pages and files in bash and zsh; made from the schema, they start no process."""

from __future__ import annotations

import shlex

from maxdiffusion import variants
from maxdiffusion.config import dialects, help, pages, schema
from maxdiffusion.errors import UserError

# bash: `=` is among COMP_WORDBREAKS, where it is a word of its own, unless the user has taken it out.
_BASH = """\
_generate_wan() {
  local cur="${COMP_WORDS[COMP_CWORD]}" prev="${COMP_WORDS[COMP_CWORD-1]}" key="" head="" values
  if [[ $cur == "=" ]]; then key=$prev cur=""
  elif [[ $prev == "=" ]]; then key=${COMP_WORDS[COMP_CWORD-2]}
  elif [[ $cur == *=* ]]; then key=${cur%%=*} head=$key= cur=${cur#*=}
  elif [[ $prev == --?* ]]; then key=$prev
  fi
  COMPREPLY=()
  if [[ -z $key ]]; then
    local first=""
    (( COMP_CWORD == 1 )) && first=1
    mapfile -t COMPREPLY < <(
      compgen -W "$(_generate_wan_words "$cur" "$first")" -- "$cur"
      compgen -f -X '!*.y*ml' -- "$cur"
      compgen -d -S / -- "$cur"
    )
    [[ ${#COMPREPLY[@]} == 1 && ${COMPREPLY[0]} == *[=/] ]] && compopt -o nospace
    return
  fi
  key=${key#--}
  values=$(_generate_wan_values "${key//-/_}")
  if [[ $values == "@file" ]]; then
    compopt -o filenames
    mapfile -t COMPREPLY < <(compgen -f -P "$head" -- "$cur")
  else
    mapfile -t COMPREPLY < <(compgen -P "$head" -W "$values" -- "$cur")
  fi
}
complete -F _generate_wan generate_wan
"""

_ZSH = """\
_generate_wan() {
  local key="" values first=""
  if [[ $PREFIX == *=* ]]; then
    key=${PREFIX%%=*}
    compset -P '*='
  elif [[ ${words[CURRENT-1]} == --?* ]]; then key=${words[CURRENT-1]}
  fi
  if [[ -z $key ]]; then
    (( CURRENT == 2 )) && first=1
    values=(${=$(_generate_wan_words "$PREFIX" "$first")})
    compadd -S '' -- ${(M)values:#*=}
    compadd -- ${values:#*=}
    _files -g '*.(yml|yaml)'
    return
  fi
  key=${key#--}
  values=$(_generate_wan_values "${key//-/_}")
  if [[ $values == "@file" ]]; then _files; else compadd -- ${=values}; fi
}
compdef _generate_wan generate_wan
"""


def script(shell: str) -> str:
    """The script for `bash` or `zsh`, to be read by `eval "$(generate_wan completion bash)"`.

    Raises:
      UserError: another shell.
    """
    ends = {"bash": _BASH, "zsh": _ZSH}
    if shell not in ends:
        raise UserError(f"completion {shell!r} is not known; write generate_wan completion bash or zsh.")
    return "\n".join([*_words(), *_values(), ends[shell]])


def _words() -> list[str]:
    """The function that prints the words that may begin: --KEY after dashes, else pages, KEY= and, first, the verbs."""
    keys = [*schema.KEYS, *schema.ALIASES, *schema.COMPOUND_ALIASES, "task"]
    dashed = [*(f"--{key}" for key in (*keys, *dialects.SERVED_BY)), "--help", "--version"]
    return [
        "_generate_wan_words() {",
        "  case $1 in",
        f"    -*) echo {shlex.quote(' '.join(dashed))} ;;",
        f"    *) echo {shlex.quote(' '.join([*pages.names(), *(f'{key}=' for key in keys)]))} "
        "${2:+list completion --help --version} ;;",
        "  esac",
        "}",
    ]


def _values() -> list[str]:
    """The function that prints the values of a key; `@file` where it takes a path."""
    values = {key: schema.choices(key) for key in schema.KEYS}
    values |= {key: ["@file"] for key, about in schema.KEYS.items() if about.path}
    values["model_name"] = list(variants.VARIANTS)
    sizes = sorted({size for spec in variants.VARIANTS.values() for size in spec.sizes})
    values["size"] = ["auto", *(f"{width}*{height}" for width, height in sizes)]
    values["task"] = list(dialects.TASKS)
    values["src_root_path"] = values["src_ref_images"] = ["@file"]
    values["help"] = [*(word for group in help.groups() for word in group.split()), *schema.KEYS, *pages.names()]
    for key, about in schema.KEYS.items():
        values[key] = [*values[key], *about.values]
        if about.alias:
            values[about.alias] = values[key]
    cases: dict[str, list[str]] = {}
    for key, words in values.items():
        if words:
            cases.setdefault(" ".join(words), []).append(key)
    lines = [f"    {'|'.join(keys)}) echo {shlex.quote(words)} ;;" for words, keys in cases.items()]
    return ["_generate_wan_values() {", "  case $1 in", *lines, "  esac", "}"]
