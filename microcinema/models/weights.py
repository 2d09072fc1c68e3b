"""Loading weights strictly: a missing or unexpected key is an error that names it, not a warning."""

from collections.abc import Collection

from microcinema.utils.errors import UserError


def check_keys(missing: Collection[str], unexpected: Collection[str], source: str) -> None:
    """Refuses weights whose keys are not the network's with a UserError that names all missing and unexpected ones."""
    named = {"missing": missing, "unexpected": unexpected}
    problems = [f"{kind} keys: {', '.join(sorted(keys))}" for kind, keys in named.items() if keys]
    if problems:
        raise UserError(f"the weights of {source} do not fit the network; {'; '.join(problems)}")
