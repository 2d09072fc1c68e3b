"""Loading weights strictly: a missing or unexpected key is an error that names it, not a warning."""

from collections.abc import Callable, Collection
from typing import Any

from microcinema.utils.errors import UserError, user_errors


def load_checked(from_pretrained: Callable[..., Any], path: Any, **kwargs: Any) -> Any:
    """Calls a `from_pretrained` of diffusers and refuses a checkpoint whose keys are not exactly the network's; these, and a folder that
    cannot be read, are a UserError."""
    with_info = kwargs.pop("output_loading_info", False)
    fault = f"cannot load a network from '{path}' ({{reason}})"
    with user_errors(f"{fault}; give one written by save_pretrained"):
        network, info = from_pretrained(path, output_loading_info=True, **kwargs)
    check_keys(info["missing_keys"], info["unexpected_keys"], f"'{path}'")
    return (network, info) if with_info else network


def check_keys(missing: Collection[str], unexpected: Collection[str], source: str) -> None:
    """Refuses weights whose keys are not the network's with a UserError that names all missing and unexpected ones."""
    named = {"missing": missing, "unexpected": unexpected}
    problems = [f"{kind} keys: {', '.join(sorted(keys))}" for kind, keys in named.items() if keys]
    if problems:
        raise UserError(f"the weights of {source} do not fit the network; {'; '.join(problems)}")
