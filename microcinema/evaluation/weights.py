"""Weight files of detectors: given by path or by URL, held against their sha256, fetched once."""

import os
import re
from pathlib import Path
from urllib.parse import urlsplit

from torch.hub import download_url_to_file

from microcinema.utils.errors import UserError
from microcinema.utils.files import make_folder
from microcinema.utils.hashing import hash_file

CACHE_VARIABLE = "MICROCINEMA_CACHE"
_URL_SCHEMES = ("http", "https", "file")


def weight_file(source: str, sha256: str | None, key: str) -> tuple[Path, str]:
    """The file on disk and its sha256. A URL, which needs a `sha256`, is fetched into the cache unless a file of this sha256 is there.

    The cache is `$MICROCINEMA_CACHE`, otherwise `~/.cache/microcinema`. `key` of the config is for messages: `evaluation.video`. A UserError
    if there is no such file or page, or it has another sha256, or that is none.
    """
    if sha256 is not None and not re.fullmatch("[0-9a-fA-F]{64}", sha256):
        raise UserError(f"{key}.sha256='{sha256}' is no sha256; give all of its 64 hexadecimal digits, or null")
    if urlsplit(source).scheme not in _URL_SCHEMES:
        path = Path(source)
        if not path.is_file():
            raise UserError(f"{key}.weights='{source}' is no file; give a path, or a URL and {key}.sha256")
        found = hash_file(path)
        if sha256 is not None and found != sha256.lower():
            raise UserError(f"'{path}' has sha256 {found}, not {sha256}; fetch it again, or correct {key}.sha256")
        return path, found
    if sha256 is None:
        raise UserError(f"{key}.weights is a URL; say which file is expected with {key}.sha256")
    cache = Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "microcinema")
    path = cache / sha256.lower() / Path(urlsplit(source).path).name
    if not path.is_file() or hash_file(path) != sha256.lower():
        _download(source, path, sha256.lower(), key)
    return path, sha256.lower()


def _download(url: str, path: Path, sha256: str, key: str) -> None:
    make_folder(path.parent)
    try:  # this writes beside the file, and renames if the sha256 is right
        download_url_to_file(url, str(path), hash_prefix=sha256, progress=False)
    except (OSError, RuntimeError) as error:  # RuntimeError: another sha256
        path.unlink(missing_ok=True)
        reason = " ".join(str(error).split())
        raise UserError(f"cannot fetch {key}.weights='{url}' ({reason}); check the address and {key}.sha256") from None
