"""The command `watch`: a page over training runs, written into their folder, and served from there to this machine."""

import re
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from microcinema.config.schema import Watch
from microcinema.training.run_page import Run, read_runs, render_page
from microcinema.utils.errors import UserError
from microcinema.utils.files import atomic_path

PAGE = "watch.html"
_SERVED = re.compile(rf"{PAGE}|([^\0]+/)?validation/step-\d+/\d+\.mp4")


class Handler(SimpleHTTPRequestHandler):
    """Serves the page, as `/` too, and validation videos: no other file, none outside the folder, and no page from elsewhere."""

    def send_head(self) -> Any:
        self.path = f"/{PAGE}" if self.path == "/" else self.path
        path = Path(self.translate_path(self.path))  # in the folder, but for links
        here = self.headers.get("Host", "").split(":")[0] in ("127.0.0.1", "localhost")
        served = here and _SERVED.fullmatch(path.relative_to(self.directory).as_posix())
        if served and Path(self.directory) in path.resolve().parents:
            return super().send_head()
        return self.send_error(404)

    def log_message(self, *_: Any) -> None:
        """Says nothing of requests."""


def run(config: Watch) -> None:
    """Writes the page; serves it, and writes it anew, until it is interrupted.

    Raises:
        UserError: the folder cannot be written, or the port is taken.
    """
    root, runs = Path(config.folder), dict[Path, Run]()
    if config.serve:
        try:
            server = ThreadingHTTPServer(("127.0.0.1", config.port), partial(Handler, directory=str(root.resolve())))
        except OSError as error:
            raise UserError(f"port {config.port} is not to be had ({error.strerror}); choose another") from None
        threading.Thread(target=server.serve_forever, daemon=True).start()
        print(f"http://127.0.0.1:{server.server_port}/", flush=True)
    while True:
        runs = read_runs(root, runs)
        with atomic_path(root / PAGE) as temporary:
            temporary.write_text(render_page(root, list(runs.values()), config.refresh), encoding="utf-8")
        if not config.serve:
            return print(root / PAGE)
        time.sleep(config.refresh)
