"""Opening saved models: names become folders, hub repositories are downloaded, and components are checked as they are read.

A name is an embedded model, a folder in the diffusers layout, a hub repository (`owner/name`) or a single file (single_file.py).
"""

import os
import re
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from huggingface_hub import constants, snapshot_download
from huggingface_hub import errors as hub_errors
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from microcinema.models.weights import check_keys
from microcinema.pipelines.single_file import config_source, is_single_file, open_single_file
from microcinema.utils.errors import UserError, first_line, user_errors

ASSETS = Path(__file__).parents[1] / "assets"
INDEX = "model_index.json"
F = TypeVar("F", bound=Callable[..., Any])
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def user_error_if_damaged(open_model: F) -> F:
    """Decorates a function that opens the model of its first argument: what libraries raise for damaged files becomes a UserError."""

    @wraps(open_model)
    def checked(*args: Any, **kwargs: Any) -> Any:
        name = next(iter((*args, *kwargs.values())), None)
        with user_errors(f"'{name}' cannot be opened ({{reason}}); are its files complete?"):
            return open_model(*args, **kwargs)

    return cast(F, checked)


def resolve_model_path(name: str | os.PathLike[str]) -> str:
    """The folder of a local or embedded model; the name of a hub repository is returned unchanged, any other refused.

    For a single file it is where its configs are, see `config_source`.
    """
    text = os.fspath(name)
    if Path(text).is_dir():
        return text
    if is_embedded(text):
        return str(ASSETS / text)
    if is_single_file(text):
        return config_source(text)
    if text.endswith(_PICKLES):
        conversion = f"StableDiffusionPipeline.from_single_file('{text}').save_pretrained(folder)"
        fault = f"model '{text}' is a pickle, which can run code when it is loaded"
        raise UserError(f"{fault}; if you trust it, convert it once with {conversion}, and give that folder")
    if text.count("/") == 1 and not text.startswith((".", "/", "~")):
        return text
    names = ", ".join(sorted(index.parent.name for index in ASSETS.glob(f"*/{INDEX}")))
    raise UserError(f"model '{text}' is neither a folder nor an embedded model ({names}) nor an owner/name of the hub")


def is_embedded(name: str | os.PathLike[str]) -> bool:
    """Whether the name is that of an embedded model, and no local folder hides it."""
    return not Path(name).is_dir() and (ASSETS / name).is_dir() and Path(name).name == os.fspath(name)


def resolve_snapshot(
    name: str | os.PathLike[str],
    components: Iterable[str] = (),
    revision: str | None = None,
    variant: str | None = None,
) -> str:
    """The folder of a local or embedded model, or the cached folder of a hub repository, see `download_snapshot`."""
    source = resolve_model_path(name)
    if not Path(source).is_dir():
        components = () if is_single_file(name) else components
        return download_snapshot(source, components, revision, variant)
    if revision is not None:
        raise UserError(f"'{name}' is a local folder and has no revision '{revision}'; set revision=null")
    return source


def download_snapshot(
    repository: str, components: Iterable[str] = (), revision: str | None = None, variant: str | None = None
) -> str:
    """The cached folder of a hub repository; files that the cache lacks are downloaded, unless the hub is offline.

    Args:
        repository: `owner/name`.
        components: subfolders whose weights are needed, as safetensors of this variant; "." is the repository's root. Configs and
            vocabularies are always included.
        revision: a branch, tag or commit.

    Raises:
        UserError: it is neither cached nor available; the message says how to download it.
    """
    weights = f"*model.{variant}" if variant else "*model"
    folders = ["" if name == "." else f"{name}/" for name in components]
    patterns = [f"{folder}{weights}{end}.safetensors" for folder in folders for end in ("", "-*")]
    patterns += ["*.json", "*.txt", "*spiece.model"]
    try:
        # Some releases ask the hub for the files of a commit, even offline, unless they are told so.
        offline = constants.HF_HUB_OFFLINE
        return snapshot_download(repository, revision=revision, allow_patterns=patterns, local_files_only=offline)
    except Exception as error:  # from several libraries: no connection, no such repository, disk full
        title = f"'{repository}'" + (f" (revision {revision})" if revision else "")
        command = f"hf download {repository}" + (f" --revision {revision}" if revision else "")
        command += "".join(f' --include "{pattern}"' for pattern in ("*.json", "*.txt", f"{weights}.safetensors"))
        raise UserError(_download_error(title, command, error)) from error


def _download_error(title: str, command: str, error: Exception) -> str:
    if isinstance(error, hub_errors.RevisionNotFoundError):
        return f"the hub has no {title}; name a branch, tag or commit of that repository"
    if isinstance(error, hub_errors.GatedRepoError):
        return f"{title} is gated; accept its terms on its page at the hub, then run `hf auth login`"
    if isinstance(error, hub_errors.RepositoryNotFoundError | hub_errors.HFValidationError):
        return f"{title} is neither a folder nor a public repository of the hub; check the name, or run `hf auth login`"
    if isinstance(error, hub_errors.LocalEntryNotFoundError):
        reason = "the hub is offline (HF_HUB_OFFLINE=1)" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
        cache = os.path.expanduser(constants.HF_HUB_CACHE)
        return f"{title} is not a folder and not complete in the hub's cache '{cache}', and {reason}; run: {command}"
    return f"cannot download {title} from the hub ({first_line(error)}); try again, or run: {command}"


def load_index(source: str, revision: str | None = None) -> dict[str, Any]:
    """Contents of a saved pipeline's `model_index.json`."""
    folder = resolve_snapshot(source, revision=revision)
    with user_errors(f"cannot read '{folder}/{INDEX}' ({{reason}}); give a diffusers pipeline"):
        return dict(DiffusionPipeline.load_config(folder))


def component_class(index: Mapping[str, Any], name: str) -> str | None:
    """Class name of a component by `model_index.json`; None if the pipeline has no such component."""
    return (index.get(name) or (None, None))[1]


def load_scheduler_config(folder: str) -> dict[str, Any]:
    """Config of a saved pipeline's scheduler."""
    with user_errors(f"cannot read the scheduler of '{folder}' ({{reason}})"):
        return dict(DDPMScheduler.load_config(folder, subfolder="scheduler"))


def load_components(
    folder: str,
    classes: Mapping[str, Any],
    variant: str | None = None,
    dtype: torch.dtype = torch.float32,
    weights: bool = True,
    source: str | os.PathLike[str] = "",
) -> dict[str, Any]:
    """Components of a saved pipeline by name, each of the given class and loaded as by `load_component`, or from a single file `source`."""
    index = load_index(folder)
    components, whole = {}, weights and is_single_file(source) and open_single_file(source, folder, dtype)
    for name, cls in classes.items():
        actual = component_class(index, name)
        if actual is None:
            raise UserError(f"'{folder}' has no {name}; a model of this kind needs {', '.join(classes)}")
        if actual.removesuffix("Fast") != cls.__name__.removesuffix("Fast"):
            raise UserError(f"'{folder}' has a {actual} as {name}, which is not supported; it must be a {cls.__name__}")
        if whole:
            part = whole.components[name]
            components[name] = freeze(part, dtype) if isinstance(part, torch.nn.Module) else part
        else:
            components[name] = load_component(Path(folder, name), cls, variant, dtype, weights)
    return components


def load_component(
    path: Path,
    cls: Any,
    variant: str | None = None,
    dtype: torch.dtype = torch.float32,
    weights: bool = True,
    ignore_prefixes: tuple[str, ...] = (),
) -> Any:
    """A tokenizer, or a frozen network in evaluation mode, from the component's folder.

    Args:
        cls: a network class of diffusers or transformers, or a tokenizer class.
        dtype: of the weights in memory, whatever they are stored in.
        weights: False: newly initialized from the config, in torch's default dtype.
        ignore_prefixes: stored weights whose names begin so are skipped.

    Raises:
        UserError: it cannot be opened, or its weights do not match the network exactly.
    """
    fault = f"cannot load the {path.name} of '{path.parent}' ({{reason}})"
    with user_errors(f"{fault}; give a complete model of safetensors"):
        if issubclass(cls, PreTrainedTokenizerBase):
            return cls.from_pretrained(path)
        if not weights:
            config = cls.config_class.from_pretrained(path) if issubclass(cls, PreTrainedModel) else None
            network = cls.from_config(cls.load_config(path)) if config is None else cls(config)
            return network.eval().requires_grad_(False)
        check_weight_files(path, variant, needed=not cls.__module__.startswith("microcinema."))
        network, info = cls.from_pretrained(path, output_loading_info=True, variant=variant, use_safetensors=True)
        keys = [key for key in info["unexpected_keys"] if not key.startswith(ignore_prefixes)]
        # Older files hold position_ids, which is a constant and no longer a weight.
        keys = [key for key in keys if not key.endswith("position_ids")]
        check_keys(info["missing_keys"], keys, f"'{path}'")
    return freeze(network, dtype)


def freeze(network: torch.nn.Module, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """The network in evaluation mode, without gradients, with its weights in this dtype."""
    # diffusers' own `to` warns about layers that must stay float32 even where there are none.
    return torch.nn.Module.to(network, dtype).eval().requires_grad_(False)


def refuse_pickles(path: Path) -> None:
    """Refuses a component's folder whose weights are pickles only, and says how to convert them."""
    pickles = sorted(file.name for file in path.glob("*") if file.suffix in _PICKLES)
    if pickles and not any(path.glob("*.safetensors")):
        raise UserError(
            f"'{path}' has its weights as a pickle ({pickles[0]}), which can run code when it is loaded, and not as safetensors; "
            'if you trust it, convert it: python -c "from diffusers import DiffusionPipeline as P; '
            f"P.from_pretrained('{path.parent}').save_pretrained('{path.parent}-safetensors')\""
        )


def check_weight_files(path: Path, variant: str | None, needed: bool = True) -> None:
    """Refuses, without reading them, a component's folder with pickles, without weights (if needed) or of another variant."""
    refuse_pickles(path)
    variants = weight_variants(path)
    if not variants and needed:
        raise UserError(f"'{path}' has no weights (.safetensors); complete the model's folder")
    if variants and variant not in variants:
        available = " and ".join(sorted(f"variant={name or 'null'}" for name in variants))
        raise UserError(f"'{path}' has no weights of variant={variant or 'null'}; it has {available}")


def weight_variants(path: Path) -> set[str | None]:
    """The variants of a component's weight files, such as `fp16`; None is that without a name."""
    names = [file.name for file in path.glob("*.safetensors")]
    # model.safetensors, model.fp16.safetensors, model.fp16-00001-of-00002.safetensors
    return {match[1] for name in names if (match := re.match(r"[^.]*\.(?:([^.]*?)(?:-\d+-of-\d+)?\.)?", name))}
