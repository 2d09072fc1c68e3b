"""Configs: composed from `configs/` and the command line, checked against the schema, saved and loaded as YAML.

Hydra composes the files; what travels from here on is one frozen object of `schema`. A text of the command line is literal:
`${...}` refers to another key in the YAML files alone.
"""

import difflib
import os
import re
import threading
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml
from pydantic import TypeAdapter, ValidationError

from microcinema.config import schema
from microcinema.config.help import config_folder, file_of, group_defaults, group_options
from microcinema.config.instantiate import Component, convert, reasons
from microcinema.utils.errors import UserError, first_line, user_errors
from microcinema.utils.files import atomic_path

# Of a text of the command line, which cannot hold a NUL: what stands for its `${` and `???` while references are resolved.
_MARK, _MISSING = "\0{", "\0?"
_ONE_AT_A_TIME = threading.Lock()  # Hydra has one state for all threads, such as those of the studio


def compose(command: str, overrides: Iterable[str] = ()) -> Any:
    """The config of a command: resolved, checked and frozen; a `schema.PrepareLatents` for `prepare latents`.

    Args:
        overrides: `group=option` or `key=value`. Strings are taken literally, other values are parsed as YAML.

    Raises:
        UserError: an unknown key or option (the nearest one is named), a value of the wrong type, a config that does
            not compose.
    """
    return compose_with_choices(command, overrides)[0]


def compose_with_choices(command: str, overrides: Iterable[str] = ()) -> tuple[Any, dict[str, str]]:
    """As `compose`, and the option of each group that was chosen, by an experiment as well."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    kind, groups = schema_of(command), group_defaults(command)
    options: list[str] = []
    values: list[tuple[str, str]] = []
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise UserError(f"{override!r} is not of the form key=value; `microcinema {command} --help` lists the keys")
        if key not in groups:
            values.append((key, value))
        elif value in group_options(key):
            options.append(f"{key}={value}")
        elif value != "null" or groups[key] is not None:
            raise UserError(f"{key} has no option {value!r}; there are {', '.join(group_options(key))}")
    try:
        with _ONE_AT_A_TIME, initialize_config_dir(config_dir=str(config_folder().resolve()), version_base="1.3"):
            composed = hydra_compose(file_of(command), options, return_hydra_config=True)
        choices = dict(composed.hydra.runtime.choices)
        tree: dict[str, Any] = OmegaConf.to_container(composed)  # type: ignore[assignment]
        del tree["hydra"]
        for key, text in values:
            _override(tree, key, text, kind)
        tree = OmegaConf.to_container(OmegaConf.create(tree), resolve=True, throw_on_missing=True)  # type: ignore[assignment]
        for name in (key.removeprefix("data.") for key, _ in values if key.startswith("data.")):
            if name in tree and tree[name] != tree["data"][name]:
                raise UserError(f"data.{name} is {tree['data'][name]}, but {name} is {tree[name]}; set {name} alone")
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise UserError(f"the config of {command} does not compose: {first_line(error)}") from error
    tree = map_strings(tree, lambda text: text.replace(_MARK, "${").replace(_MISSING, "???"))
    return _checked(tree, kind), choices


def schema_of(command: str) -> type:
    """The class in `schema` of a command: `PrepareLatents` of `prepare latents`."""
    return getattr(schema, command.title().replace(" ", ""))


def plain(config: Any) -> Any:
    """A config, or a part of it, as dicts, lists, strings and numbers; a component's target is its `_target_`."""
    if isinstance(config, Component):
        return {"_target_": config.target, **plain(config.arguments)}
    if is_dataclass(config):
        return {field.name: plain(getattr(config, field.name)) for field in fields(config)}
    if isinstance(config, Mapping):
        return {key: plain(value) for key, value in config.items()}
    return [plain(value) for value in config] if isinstance(config, list | tuple) else config


def to_yaml(config: Any) -> str:
    """A config as YAML, with its keys in the order of the schema."""
    return yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True, width=120)


def shareable(config: Any) -> Any:
    """A config as plain values, without the folders of this machine: of their paths the last part only."""
    return map_strings(plain(config), lambda text: Path(text).name if text.startswith(("/", "~")) else text)


def save(config: Any, path: str | os.PathLike[str]) -> None:
    """Writes a config as YAML."""
    with atomic_path(path) as temporary:
        temporary.write_text(to_yaml(config), encoding="utf-8")


def load(path: str | os.PathLike[str], command: str) -> Any:
    """A config of a command that `save` wrote; another file, or none, is a UserError."""
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"config '{path}' cannot be read ({' '.join(str(error).split())})") from None
    if not isinstance(tree, dict):
        raise UserError(f"'{path}' is no config of {command}; it holds no keys")
    try:
        return _checked(tree, schema_of(command))
    except UserError as error:
        raise UserError(f"'{path}' is no config of {command}: {error}") from None


def _checked(tree: Mapping[str, Any], kind: type) -> Any:
    try:
        return TypeAdapter(kind).validate_python(tree)
    except ValidationError as error:
        _refuse_value(error, tree)


def _refuse_value(error: ValidationError, tree: Mapping[str, Any]) -> NoReturn:
    """Names the first key that is wrong, its value, and every type that it may have."""
    paths = []
    for detail in error.errors():
        node: Any = tree
        path = []
        for part in detail["loc"]:  # which also names members of unions and indices of lists
            if isinstance(node, Mapping) and part in node:
                path.append(str(part))
                node = node[part]
        paths.append((".".join(path), node, detail))
    key, value, first = paths[0]
    if first["type"] == "unexpected_keyword_argument":
        _refuse_key(key, (name for name in _dotted(tree) if name != key))
    if first["type"] == "missing":
        raise UserError(f"the key '{'.'.join(filter(None, (key, str(first['loc'][-1]))))}' is missing")
    message = reasons(detail for name, _, detail in paths if name == key)
    said = first["type"] == "value_error" and isinstance(value, Mapping)  # by a group, of how its keys go together
    raise UserError(message if said else f"{key} is {value!r}, but {message}") from None


def _refuse_key(key: str, names: Iterable[str]) -> NoReturn:
    """Names the key that is near, if one is: it ends in the same word, in one that is spelled alike, or in a longer one."""
    names, word = sorted(names, key=lambda name: (name.count("."), name)), key.rpartition(".")[2]
    words = {name.rpartition(".")[2]: name for name in reversed(names)}
    near = [name for name in names if name.endswith(f".{key}")]
    near = near or [words[alike] for alike in difflib.get_close_matches(word, words, n=1, cutoff=0.75)]
    if not near and len(longer := [name for name in names if len(word) > 2 and name.startswith(key)]) == 1:
        near = longer
    raise UserError(f"unknown key '{key}'" + (f"; did you mean '{near[0]}'?" if near else "; --help lists the keys"))


def _dotted(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        yield prefix + key
        if isinstance(value, dict):
            yield from _dotted(value, f"{prefix}{key}.")


def _override(tree: dict[str, Any], key: str, text: str, kind: Any) -> None:
    """Sets the value of a dotted key that the tree has, as the type that the schema declares or, in an open group, of the old value."""
    *path, name = key.split(".")
    node: Any = tree
    for i, part in enumerate(path):
        node, kind = node.get(part) if isinstance(node, dict) else None, _keys_of(kind).get(part)
        if node is None and (names := list(_keys_of(kind))):
            group = ".".join(path[: i + 1])
            raise UserError(
                f"{group} is null, so it has no key '{name}'; set the whole, '{group}={{{': , '.join(names)}: }}'"
            )
    kind = _keys_of(kind).get(name)
    if not isinstance(node, dict) or name not in node or name == "_target_":
        _refuse_key(key, _dotted(tree))
    old = node[name]
    whole = (old is None or isinstance(old, dict)) and _keys_of(kind) and type(None) in typing.get_args(kind)
    if isinstance(old, dict) and not whole:
        inside = [name for name in _dotted(old, f"{key}.") if not name.endswith("._target_")]
        raise UserError(f"'{key}' is a group of keys; set one of {', '.join(inside)}")
    if kind is not None and _is_text(kind):
        node[name] = None if type(None) in typing.get_args(kind) and text == "null" else _literal(key, text)
    elif kind is None and isinstance(old, str) and not re.fullmatch(r"\$\{\w+}", old):
        # A text may give way to null or a number; what the argument really takes is checked where the object is built.
        is_number = re.fullmatch(r"0|[1-9][0-9]{0,99}", text)
        node[name] = None if text == "null" else int(text) if is_number else _literal(key, text)
    else:
        node[name] = value = _parse(key, text)
        if kind is None and isinstance(old, bool | int | float | list) and value is not None:
            is_flag = isinstance(value, bool) and not isinstance(old, bool)  # which Python would take for 0 or 1
            node[name] = convert(key, str(value) if is_flag else value, type(old))


def _keys_of(kind: Any) -> dict[str, Any]:
    """The keys of a schema class, or of a class that may be None, and their types; none for anything else."""
    members = [member for member in typing.get_args(kind) if member is not type(None)] or [kind]
    closed = len(members) == 1 and is_dataclass(members[0]) and members[0] is not Component
    return typing.get_type_hints(members[0], include_extras=True) if closed else {}


def _is_text(kind: Any) -> bool:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return _is_text(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return all(argument is type(None) or _is_text(argument) for argument in arguments)
    if origin is typing.Literal:
        return all(isinstance(argument, str) for argument in arguments)
    return kind is str


def _parse(key: str, text: str) -> Any:
    if not _literal(key, text).strip():
        raise UserError(f"{key} is empty; give a value, or null where there may be none")
    if re.fullmatch(r"[-+]?(0[0-9_]+|[0-9_]+(:[0-9_]+)+)", text):  # octal and sexagesimal in YAML 1.1
        return text
    with user_errors(f"{key}={text} is not valid YAML; put quotes round each text in a list"):
        return map_strings(yaml.safe_load(text), lambda text: _literal(key, text))


def _literal(key: str, text: str) -> str:
    """A text of the command line, whose `${` refers to nothing and whose `???` is no gap; one that no file can hold is refused."""
    if "\0" in text or text.encode("utf-8", "ignore").decode() != text:
        raise UserError(f"{key} is {text!r}, which is no text in UTF-8; leave such characters out")
    return text.replace("${", _MARK).replace("???", _MISSING)


def map_strings(node: Any, function: Callable[[str], str]) -> Any:
    """A config as plain values, with a function applied to its texts."""
    if isinstance(node, dict):
        return {key: map_strings(value, function) for key, value in node.items()}
    if isinstance(node, list):
        return [map_strings(value, function) for value in node]
    return function(node) if isinstance(node, str) else node
