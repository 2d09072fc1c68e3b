"""The command `watch`: what its server gives, and what it does not."""

import threading
import urllib.request
from pathlib import Path
from urllib.error import HTTPError

import pytest

from microcinema.commands import cli, watch


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run without figures, with a video, and files that are nobody's business."""
    for name in (
        "run/environment.json",
        "run/validation/step-10/0.mp4",
        "run/checkpoint-1/optimizer.bin",
        "secret.mp4",
    ):
        (tmp_path / "runs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "runs" / name).write_text("[]")
    (tmp_path / "outside.mp4").touch()
    (tmp_path / "runs/run/validation/step-10/1.mp4").symlink_to(tmp_path / "outside.mp4")
    return tmp_path / "runs"


class Stopped(Exception):
    pass


@pytest.fixture
def address(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """Of a server that has written the page once; it is stopped in the end."""
    servers = []

    class Server(watch.ThreadingHTTPServer):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            servers.append(self)

    def stop(seconds: float) -> None:
        assert seconds == 10
        raise Stopped

    monkeypatch.setattr(watch, "ThreadingHTTPServer", Server)
    monkeypatch.setattr(watch.time, "sleep", stop)
    with pytest.raises(Stopped):
        cli.main(["watch", str(folder), "port=0"])
    yield capsys.readouterr().out.strip()
    servers[0].shutdown()
    servers[0].server_close()


def status(url: str, host: str | None = None) -> int:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers={"Host": host} if host else {})) as answer:
            return answer.status
    except HTTPError as error:
        return error.code


def test_the_page_and_its_videos_are_served_and_nothing_else(address: str, folder: Path):
    assert address.startswith("http://127.0.0.1:")
    with urllib.request.urlopen(address) as answer:
        assert (
            answer.read() == (folder / "watch.html").read_bytes()
            and b"No run" not in (folder / "watch.html").read_bytes()
        )
    assert status(address + "run/validation/step-10/0.mp4") == status(address + "watch.html") == 200
    refused = [
        "run/environment.json",
        "run/checkpoint-1/optimizer.bin",
        "secret.mp4",
        "run/",
        "run/validation/step-10/",
    ]
    refused += ["../outside.mp4", "%2e%2e/outside.mp4", "run/validation/step-10/1.mp4", "run/validation/step-10/2.mp4"]
    refused += ["run/validation/step-10/../../environment.json", "//etc/passwd", "%00"]
    assert [status(address + link) for link in refused] == [404] * len(refused)
    assert status(address, "evil.example:80") == 404 and status(address, "localhost:1") == 200


def test_a_page_is_written_once(folder: Path, capsys: pytest.CaptureFixture):
    assert cli.main(["watch", f"folder={folder}", "serve=false"]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "watch.html") and (folder / "watch.html").is_file()


def test_bad_input_is_one_line(folder: Path, capsys: pytest.CaptureFixture):
    with watch.ThreadingHTTPServer(("127.0.0.1", 0), watch.Handler) as taken:
        assert cli.main(["watch", str(folder), f"port={taken.server_port}"]) == 2
    assert f"error: port {taken.server_port} is not to be had" in capsys.readouterr().err
    assert cli.main(["watch", f"output_dir={folder}"]) == 2
    assert "unknown key 'output_dir'" in capsys.readouterr().err
    assert cli.main(["watch", str(folder / "none")]) == 2
    assert capsys.readouterr().err.strip().endswith("is not there; check the path")
    assert threading.active_count() < 10
