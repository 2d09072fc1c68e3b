"""Repositories of the hub as folders of its cache: what is not there is fetched, unless the hub is offline."""

import os
from collections.abc import Iterable

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from microcinema.utils.errors import UserError, first_line


def fetch(
    repository: str, components: Iterable[str] = (), revision: str | None = None, variant: str | None = None
) -> str:
    """The cached folder of a repository, with at least all of its settings and vocabularies.

    Args:
        repository: `owner/name`.
        components: folders to have with their weights: safetensors of this variant, and nothing else; "." is the repository's own.
        revision, variant: a branch, tag or commit; which weight files, such as `fp16`.

    Raises:
        UserError: it is neither in the cache nor to be had; how to fetch it is said.
    """
    weights = f"*model.{variant}" if variant else "*model"
    files = ["*.json", "*.txt", "*spiece.model"]
    for name in components:
        folder = "" if name == "." else f"{name}/"
        files += [f"{folder}{weights}.safetensors", f"{folder}{weights}-*.safetensors"]
    try:
        return snapshot_download(repository, revision=revision, allow_patterns=files)
    except Exception as error:  # of several libraries: no connection, no such repository, no room
        what = f"'{repository}'" + (f" (revision {revision})" if revision else "")
        command = f"hf download {repository}" + (f" --revision {revision}" if revision else "")
        command += "".join(f' --include "{pattern}"' for pattern in ("*.json", "*.txt", f"{weights}.safetensors"))
        raise UserError(_explain(what, command, error)) from error


def _explain(what: str, command: str, error: Exception) -> str:
    if isinstance(error, RevisionNotFoundError):
        return f"the hub has no {what}; name a branch, tag or commit of that repository"
    if isinstance(error, GatedRepoError):
        return f"{what} is gated; accept its terms on its page at the hub, then `hf auth login`"
    if isinstance(error, RepositoryNotFoundError | HFValidationError):
        return f"there is no folder {what}, nor a public repository of the hub; check the name, or `hf auth login`"
    if isinstance(error, LocalEntryNotFoundError):
        why = "the hub is offline (HF_HUB_OFFLINE=1)" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
        there = os.path.expanduser(constants.HF_HUB_CACHE)
        return (
            f"{what} is no folder, nor whole in the hub's cache '{there}', and {why}; where it can be, run: {command}"
        )
    return f"cannot fetch {what} from the hub ({first_line(error)}); try again, or run: {command}"
