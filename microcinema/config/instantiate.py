"""Objects from configs: a node with `_target_` becomes a `Component`, and `build` calls its target with its arguments."""

import contextlib
import inspect
import pkgutil
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError

from microcinema.utils.errors import UserError

# What a config may name as `_target_`; nothing else is ever imported or called, whoever wrote the config.
TARGETS = (
    "microcinema.data.clips.ClipDataset",
    "microcinema.data.joint.JointDataset",
    "microcinema.data.shards.ShardDataset",
    "microcinema.diffusion.noise_prior.NoisePrior",
    "microcinema.evaluation.detectors.VideoDetectorSettings",
    "microcinema.evaluation.protocol.ZeroShotProtocol",
    "microcinema.evaluation.vbench.VBenchSuite",
    "microcinema.sprites.flow.GroundTruthFlow",
    "microcinema.sprites.protocol.SpritesProtocol",
)


@dataclass(frozen=True)
class Component:
    """A class or function of `TARGETS` (another is a UserError) and its arguments: plain values, or components, which are built first."""

    target: str
    arguments: Mapping[str, Any]

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise UserError(f"_target_ '{self.target}' is not allowed; use one of {', '.join(TARGETS)}")

    def parameters(self) -> dict[str, inspect.Parameter]:
        """The named parameters of the target."""
        named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        return {name: p for name, p in inspect.signature(self._callable()).parameters.items() if p.kind in named}

    def build(self, **extra: Any) -> Any:
        """Calls the target with its arguments and with `extra` ones that no config can hold, such as a loaded network. A UserError for an
        unknown or missing argument, a value of the wrong type, or a package that is not installed."""
        built = {key: _build(node) for key, node in self.arguments.items()}
        arguments = extra | self._converted(built, self.target)
        missing = [name for name, p in self.parameters().items() if p.default is p.empty and name not in arguments]
        if missing:
            raise UserError(f"'{self.target}' needs the arguments {', '.join(missing)} as well")
        return self._callable()(**arguments)

    def check(self, name: str) -> None:
        """Refuses, as `build` would, what can be told without building; `name` is that of its group, for messages."""
        arguments = {key: node for key, node in self.arguments.items() if not any(named_components(node))}
        self._converted(arguments, name)
        for key, component in named_components(dict(self.arguments), name):
            component.check(key)
        if is_dataclass(self._callable()):
            self.build()  # settings, which fit one another or not

    def _converted(self, arguments: Mapping[str, Any], group: str) -> dict[str, Any]:
        function, parameters = self._callable(), self.parameters()
        hints: dict[str, Any] = {}
        with contextlib.suppress(NameError):  # annotations that only a type checker can resolve
            typed = function.__init__ if inspect.isclass(function) else function
            hints = typing.get_type_hints(typed, include_extras=True)
        if unknown := [key for key in arguments if key not in parameters]:
            raise UserError(f"'{group}' has no argument '{unknown[0]}'; it has {', '.join(parameters)}")
        return {key: convert(f"{group}.{key}", value, hints.get(key, Any)) for key, value in arguments.items()}

    def _callable(self) -> Any:
        try:
            return pkgutil.resolve_name(self.target)
        except ModuleNotFoundError as error:
            raise UserError(f"_target_ '{self.target}' needs the package '{error.name}'; install it") from None


def components(node: Any) -> Any:
    """A config node with every mapping that has a `_target_` replaced by its component."""
    if isinstance(node, Mapping):
        arguments = {key: components(value) for key, value in node.items() if key != "_target_"}
        return Component(node["_target_"], arguments) if "_target_" in node else arguments
    return [components(item) for item in node] if isinstance(node, list) else node


def named_components(node: Any, name: str = "") -> Iterator[tuple[str, Component]]:
    """The components of a config by their dotted keys, outermost only."""
    if isinstance(node, Component):
        yield name, node
    elif is_dataclass(node) or isinstance(node, Mapping):
        for key, value in node.items() if isinstance(node, Mapping) else vars(node).items():
            yield from named_components(value, f"{name}.{key}".removeprefix("."))


def convert(name: str, value: Any, kind: Any) -> Any:
    """The value as the type `kind`, converted where nothing is lost (1 to a float, a list to a tuple), else a UserError that names both."""
    try:
        adapter = TypeAdapter(kind, config=ConfigDict(arbitrary_types_allowed=True, coerce_numbers_to_str=True))
    except PydanticUserError:  # a dataclass or model with settings of its own; its constructor has checked the value
        return value
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        raise UserError(f"{name} is {value!r}, but {reasons(error.errors())}") from None


def check_fields(settings: Any, prefix: str = "") -> None:
    """Refuses, as `convert` does, a field of a dataclass that is not of its type or out of its bounds: in Python as in a config."""
    hints = typing.get_type_hints(type(settings), include_extras=True)
    for field in fields(settings):
        convert(prefix + field.name, getattr(settings, field.name), hints[field.name])


def reasons(details: typing.Iterable[Any]) -> str:
    """The messages of pydantic's error details, each once, joined by `or`."""
    own = {"missing": "it lacks", "unexpected_keyword_argument": "it has no"}
    messages = [f"{own[d['type']]} '{d['loc'][-1]}'" if d["type"] in own else d["msg"] for d in details]
    return " or ".join(dict.fromkeys(text.removeprefix("Input ").removeprefix("Value error, ") for text in messages))


def _build(node: Any) -> Any:
    if isinstance(node, Component):
        return node.build()
    if isinstance(node, Mapping):
        return {key: _build(value) for key, value in node.items()}
    return [_build(item) for item in node] if isinstance(node, list) else node
