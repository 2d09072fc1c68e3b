"""What the YAML files of `configs/` say of their keys. They are read without Hydra, so that `--help` answers at once."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml


def config_folder() -> Path:
    """The folder of YAML files: inside an installed package, beside the package in a checkout."""
    package = Path(__file__).parents[1]
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def file_of(command: str) -> str:
    """The name of a command's YAML file, without its ending: `prepare_latents` of `prepare latents`."""
    return command.replace(" ", "_")


def group_defaults(command: str) -> dict[str, str | None]:
    """The groups of a command and the default option of each."""
    groups: dict[str, str | None] = {}
    for entry in yaml.safe_load(_text(command)).get("defaults", []):
        if isinstance(entry, dict):
            groups |= entry
        elif entry != "_self_":  # a file that this one extends
            groups |= group_defaults(entry)
    return groups


def group_options(group: str) -> list[str]:
    """The options of a group, sorted."""
    return sorted(path.stem for path in (config_folder() / group).glob("*.yaml"))


def documented_keys(name: str) -> Iterator[tuple[str, str, str]]:
    """Dotted key, value and meaning (the comment on its line) of every key in a file such as `train` or `model/plain`.

    Entries of a defaults list are keys as well: `model`, `microcinema`, `the networks`. A file that extends another file of its
    folder has that one's keys too, at the place that `file@place` names.
    """
    text = _text(name)
    lines = text.splitlines()
    extended: list[str] = []

    def walk(node: yaml.Node, prefix: str) -> Iterator[tuple[str, str, str]]:
        if isinstance(node, yaml.SequenceNode):
            for entry in node.value:
                yield from walk(entry, prefix)
        elif isinstance(node, yaml.ScalarNode) and node.value != "_self_":
            extended.append(node.value)
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

    rows = {row[0]: row for row in walk(yaml.compose(text), "")}
    yield from rows.values()
    for entry in extended:
        file, _, place = entry.partition("@")
        for key, value, meaning in documented_keys("".join((*name.rpartition("/")[:2], file))):
            key = f"{place}.{key}" if place else key
            if key not in rows:
                yield key, value, meaning


def describe_keys(
    command: str, tree: Mapping[str, Any] | None = None, choices: Mapping[str, str] | None = None
) -> Iterator[str]:
    """Lines with the groups of a command, and its keys with their meanings and the values of a composition (default: the defaults)."""
    groups = {group: (choices or {}).get(group, option) for group, option in group_defaults(command).items()}

    def line(key: str, value: str, meaning: str) -> str:
        return f"  {f'{key}={value if tree is None else _value(tree, key)}':40} {meaning}"

    rows = list(documented_keys(command))
    if groups:
        yield "groups:"
        for group, _, meaning in rows:
            if group in groups:
                chosen = f"{group}={groups[group] or 'null'}"
                yield f"  {chosen:40} {meaning}: {', '.join(group_options(group))}"
        yield ""
    yield "keys:"
    yield from (line(*row) for row in rows if row[0] not in groups)
    for group, option in groups.items():
        if option not in (None, "null") and group != "experiment":
            yield ""
            yield f"keys of {group}={option}:"
            # An option that sets keys of other groups, too, names its own in full; the others stand above.
            prefix = "" if _text(f"{group}/{option}").startswith("# @package _global_") else f"{group}."
            for key, value, meaning in documented_keys(f"{group}/{option}"):
                if f"{prefix}{key}" not in {name for name, _, _ in rows}:
                    yield line(f"{prefix}{key}", value, meaning)


def _value(tree: Any, key: str) -> str:
    for part in key.split("."):
        tree = tree[part]
    text = yaml.safe_dump(tree, default_flow_style=True, width=10**6, allow_unicode=True)
    return text.removesuffix("\n...\n").strip()


def _text(name: str) -> str:
    return (config_folder() / f"{file_of(name)}.yaml").read_text(encoding="utf-8")
