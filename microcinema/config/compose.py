"""Configs: composed from `configs/` and the command line, checked, made into objects, saved.

Hydra composes the groups. `schema` knows the types of the top-level keys; below them the files themselves say which
keys there are.
"""

import difflib
import importlib
import inspect
import os
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from microcinema.utils.errors import UserError
from microcinema.utils.files import atomic_path

if TYPE_CHECKING:
    from omegaconf import DictConfig

ALLOWED_PACKAGES = ("microcinema", "torch", "diffusers", "transformers", "accelerate")
COMMANDS = (
    "train",
    "sample",
    "evaluate",
    "prepare",
    "prepare check",
    "prepare preview",
    "prepare latents",
    "export",
    "doctor",
)
# Commands whose keys are in a file of another name.
KEYS_OF = {
    "doctor": "train",
    "prepare": "prepare_sprites",
    "prepare check": "prepare_check",
    "prepare preview": "prepare_preview",
    "prepare latents": "prepare_latents",
}


def compose(command: str, overrides: Iterable[str] = ()) -> "DictConfig":
    """The config of a command: resolved, checked and read-only.

    Args:
        command: one of `COMMANDS`.
        overrides: `group=option` or `key=value`. Where a text is wanted the value is taken as it stands, elsewhere it is
            read as YAML.

    Raises:
        UserError: an unknown key or option (the nearest one is named), a value of the wrong type, a config that does
            not compose.
    """
    import yaml
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from microcinema.config import schema

    kinds = typing.get_type_hints(schema.COMMANDS[command], include_extras=True)
    groups = group_defaults(command)
    choices: list[str] = []
    values: list[tuple[str, str]] = []
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise UserError(f"'{override}' is not of the form key=value; `microcinema {command} --help` lists the keys")
        if key in groups:
            choices.append(f"{key}={_known_option(key, value)}")
        else:
            values.append((key, value))
    try:
        with initialize_config_dir(config_dir=str(config_folder().resolve()), version_base="1.3"):
            composed = hydra_compose(config_name=KEYS_OF.get(command, command), overrides=choices)
        tree: dict[str, Any] = OmegaConf.to_container(composed)  # type: ignore[assignment]
        for key, text in values:
            _override(tree, key, text, kinds)
        tree = OmegaConf.to_container(OmegaConf.create(tree), resolve=True, throw_on_missing=True)  # type: ignore[assignment]
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise UserError(f"the config of {command} does not compose: {_one_line(error)}") from error
    for key in tree:  # a file of the group `experiment` may hold any key
        if key not in kinds:
            _refuse(key, kinds)
    config = OmegaConf.create({key: _checked(key, tree.get(key), kind) for key, kind in kinds.items()})
    OmegaConf.set_struct(config, True)
    OmegaConf.set_readonly(config, True)
    return config


def instantiate(node: "DictConfig | Mapping[str, Any]", **extra: Any) -> Any:
    """The object that a node with `_target_` describes. Constructors get plain values, never a config object.

    Args:
        node: `_target_` is the dotted name of a class, function or class method in one of `ALLOWED_PACKAGES`; the other
            keys are its arguments. Nested nodes with a `_target_` are made first.
        extra: arguments that no config can hold, such as a loaded network; they are passed on as they are.

    Raises:
        UserError: a name that is not allowed or not there, an unknown or missing argument, a value of the wrong type.
    """
    from omegaconf import OmegaConf

    tree = node if OmegaConf.is_config(node) else OmegaConf.create(dict(node))
    return _build(OmegaConf.to_container(tree, resolve=True), extra)


def parameters(target: str) -> dict[str, inspect.Parameter]:
    """The arguments by name that a `_target_` takes; what would vanish in `**kwargs` is not among them.

    Raises:
        UserError: as in `instantiate`.
    """
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    signature = inspect.signature(_locate(target))
    return {name: parameter for name, parameter in signature.parameters.items() if parameter.kind in named}


def save(config: "DictConfig", path: str | os.PathLike[str]) -> None:
    """Writes the config as YAML."""
    from omegaconf import OmegaConf

    with atomic_path(path) as temporary:
        OmegaConf.save(config, temporary)


# What the files state. Read without Hydra, since `--help` has to answer at once.


def config_folder() -> Path:
    """The folder of YAML files: inside an installed package, beside the package in a checkout."""
    package = Path(__file__).parents[1]
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def group_defaults(command: str) -> dict[str, str | None]:
    """The groups of a command, and the option that each has unless told otherwise."""
    import yaml

    found: dict[str, str | None] = {}
    for entry in yaml.safe_load(_read(command)).get("defaults", []):
        if isinstance(entry, dict):
            found |= entry
        elif entry != "_self_":  # a file that this one builds on
            found |= group_defaults(entry)
    return found


def group_options(group: str) -> list[str]:
    """The options of a group, sorted."""
    return sorted(path.stem for path in (config_folder() / group).glob("*.yaml"))


def documented_keys(name: str) -> Iterator[tuple[str, str, str]]:
    """Dotted key, value and meaning (the comment on its line) of every key in a file such as `train` or `model/plain`.

    Entries of a defaults list come as keys as well: `model`, `microcinema`, `the networks`. A file that builds on another one of its
    folder has that one's keys too.
    """
    import yaml

    text = _read(name)
    lines = text.splitlines()
    below: list[str] = []

    def walk(node: yaml.Node, prefix: str) -> Iterator[tuple[str, str, str]]:
        if isinstance(node, yaml.SequenceNode):
            for entry in node.value:
                yield from walk(entry, prefix)
        elif isinstance(node, yaml.ScalarNode) and node.value != "_self_" and "@" not in node.value:
            below.append("".join((*name.rpartition("/")[:2], node.value)))
        elif isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if key.value == "defaults":
                    yield from walk(value, prefix)
                elif key.value.startswith("override "):
                    continue
                elif isinstance(value, yaml.MappingNode) and value.value:
                    yield from walk(value, f"{prefix}{key.value}.")
                elif key.value != "_target_":
                    comment = re.search(r"\s#\s*(.*)$", lines[key.start_mark.line])
                    source = text[value.start_mark.index : value.end_mark.index]
                    yield prefix + key.value, " ".join(source.split()), comment.group(1) if comment else ""

    own = list(walk(yaml.compose(text), ""))
    yield from own
    for other in below:
        yield from (row for row in documented_keys(other) if row[0] not in {key for key, *_ in own})


def _read(name: str) -> str:
    return (config_folder() / f"{KEYS_OF.get(name, name)}.yaml").read_text(encoding="utf-8")


# Checks.


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _known_option(group: str, option: str) -> str:
    options = group_options(group)
    if option not in (*options, "null"):
        raise UserError(f"{group} has no option '{option}'; there are {', '.join(options)}")
    return option


def _refuse(key: str, known: Iterable[str]) -> NoReturn:
    """Names the known key that is nearest: one that ends in the same word, or one that is spelled alike."""
    known = sorted(known, key=lambda name: (name.count("."), name))
    same_word = [name for name in known if name.endswith(f".{key}")]
    near = same_word or difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    raise UserError(f"unknown key '{key}'" + (f"; did you mean '{near[0]}'?" if near else "; --help lists the keys"))


def _dotted(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        yield prefix + key
        if isinstance(value, dict):
            yield from _dotted(value, f"{prefix}{key}.")


def _override(tree: dict[str, Any], key: str, text: str, kinds: Mapping[str, Any]) -> None:
    """Sets the value of a dotted key that is there already."""
    *path, name = key.split(".")
    node: Any = tree
    for part in path:
        node = node.get(part) if isinstance(node, dict) else None
    if not isinstance(node, dict) or name not in node or name == "_target_":
        _refuse(key, _dotted(tree))
    old = node[name]
    if isinstance(old, dict):
        inside = [name for name in _dotted(old, f"{key}.") if not name.endswith("._target_")]
        raise UserError(f"'{key}' is a group of keys; set one of {', '.join(inside)}")
    if not path:
        kind = kinds[key]
        optional = type(None) in typing.get_args(kind)
        node[name] = (None if optional and text == "null" else text) if _is_text(kind) else _yaml(key, text)
    elif isinstance(old, str) and "${" not in old:
        # Below the top level no type is declared: that of the value in the file stands for it, and a text may give way to
        # null or a number (`keyframe_position=3`). What the argument really takes is checked in `instantiate`.
        node[name] = None if text == "null" else int(text) if re.fullmatch(r"0|[1-9]\d*", text) else text
    else:
        value = _yaml(key, text)
        known = isinstance(old, bool | int | float | list) and value is not None
        node[name] = _checked(key, value, type(old)) if known else value


def _yaml(key: str, text: str) -> Any:
    """A value of the command line as YAML, in which OmegaConf takes 1e-4 for a number."""
    import yaml
    from omegaconf import OmegaConf

    try:
        return OmegaConf.to_container(OmegaConf.create(f"value: {text}"))["value"]  # type: ignore[index, call-overload]
    except yaml.YAMLError:
        raise UserError(f"{key}={text} is not valid YAML; put quotes round each text in a list") from None


def _is_text(kind: Any) -> bool:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return all(argument is type(None) or _is_text(argument) for argument in arguments)
    if origin is typing.Literal:
        return all(isinstance(argument, str) for argument in arguments)
    return kind is str


def _checked(key: str, value: Any, kind: Any) -> Any:
    """The value as the type `kind`, converted where nothing is lost (1 for a float, a list for a tuple).

    Raises:
        UserError: names key, value and the type wanted.
    """
    from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError

    try:
        adapter = TypeAdapter(kind, config=ConfigDict(arbitrary_types_allowed=True, coerce_numbers_to_str=True))
    except PydanticUserError:  # a type that describes itself; its constructor has checked it
        return value
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        wanted = " or ".join(dict.fromkeys(detail["msg"].removeprefix("Input ") for detail in error.errors()))
        raise UserError(f"{key} is {value!r}, but {wanted}") from None


# Objects.


def _locate(name: str) -> Any:
    package = name.split(".")[0]
    if package not in ALLOWED_PACKAGES:
        raise UserError(f"_target_ '{name}' is not allowed; it has to be in one of {', '.join(ALLOWED_PACKAGES)}")
    parts = name.split(".")
    for length in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:length])
        try:
            found: Any = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name and not module.startswith(error.name):
                raise UserError(f"_target_ '{name}' needs the package '{error.name}'; install it") from None
            continue
        for part in parts[length:]:
            found = getattr(found, part, None)
        # The second condition keeps out what an allowed module has merely imported, such as torch.os.system.
        if callable(found) and str(getattr(found, "__module__", "")).split(".")[0] in ALLOWED_PACKAGES:
            return found
        break
    raise UserError(f"_target_ '{name}' names no class or function; check its spelling")


def _build(node: Any, extra: Mapping[str, Any]) -> Any:
    if isinstance(node, list):
        return [_build(item, {}) for item in node]
    if not isinstance(node, Mapping):
        return node
    if "_target_" not in node:
        return {key: _build(value, {}) for key, value in node.items()}
    name = node["_target_"]
    target = _locate(name)
    takes = parameters(name)
    try:
        kinds = typing.get_type_hints(target.__init__ if inspect.isclass(target) else target, include_extras=True)
    except NameError:  # annotations of another library that only its type checker can resolve
        kinds = {}
    arguments = dict(extra)
    for key, value in node.items():
        if key == "_target_":
            continue
        if key not in takes:
            raise UserError(f"'{name}' takes no argument '{key}'; it takes {', '.join(takes)}")
        value = _build(value, {})
        arguments[key] = _checked(f"{key} of '{name}'", value, kinds[key]) if key in kinds else value
    missing = [key for key, taken in takes.items() if taken.default is taken.empty and key not in arguments]
    if missing:
        raise UserError(f"'{name}' needs the arguments {', '.join(missing)} as well")
    return target(**arguments)
