"""The studio in Chromium."""

import os
import re
import shlex
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

pytestmark = pytest.mark.ui
ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
PROMPT = "a large red star moving quickly to the left on sand"


class Server:
    """A server in a folder of its own, with jobs that take no time or real ones."""

    def __init__(self, folder, real=False, *overrides):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.folder, self.samples, self.url = folder, folder / "runs/ui", f"http://127.0.0.1:{port}/"
        command = ["-m", "microcinema", "ui"] if real else [ROOT / "tests/fixtures/studio.py", "output_dir=runs/ui"]
        command = [sys.executable, *command, f"port={port}", *overrides]
        self.process = subprocess.Popen(command, cwd=folder, env=ENVIRONMENT)
        wait(self._answers, 120)

    def _answers(self):
        assert self.process.poll() is None
        try:
            return urllib.request.urlopen(self.url, timeout=5).status == 200
        except OSError:
            return False

    def kill(self):
        self.process.kill()
        self.process.wait()


def wait(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("studio"))
    yield server
    server.kill()


@pytest.fixture
def open_page(browser):
    """Opens the page of a server; in the end there must be no error in a console, and no request to another host."""
    faults, pages = [], []

    def open_page(server, **settings):
        page = browser.new_page(**{"viewport": {"width": 1280, "height": 900}, **settings})
        page.on("console", lambda m: faults.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda r: r.url.startswith((server.url, "data:", "blob:")) or faults.append(r.url))
        page.on("dialog", lambda dialog: faults.append(dialog.message))
        page.goto(server.url)
        page.get_by_text("Not trained for").wait_for()
        pages.append(page)
        return page

    yield open_page
    for page in pages:
        page.close()
    assert faults == []


def click(page, name):
    page.get_by_role("button", name=name, exact=True).click()


def test_prompt_to_video_of_a_chosen_key_frame_and_again_by_the_command_that_is_shown(tmp_path, open_page):
    """The real models. The command's frames have the same bytes, and so has the seed's next video."""
    server = Server(tmp_path, real=True)
    try:
        page = open_page(server)
        page.get_by_text(PROMPT).click()
        wait(lambda: page.get_by_label("Prompt", exact=True).input_value() == PROMPT)
        page.get_by_text("Settings").click()
        page.get_by_label("Steps").fill("2")
        click(page, "Draw 4 key frames")
        page.locator("#pictures button.thumbnail-item").nth(3).wait_for(timeout=120_000)
        page.locator("#pictures button.thumbnail-item").nth(1).click()
        click(page, "Without the chosen picture")
        page.locator("#pictures button.thumbnail-item").nth(1).click()
        page.get_by_role("button", name="Without the chosen picture").wait_for()
        click(page, "Make the video")
        page.locator("#detail video").wait_for(timeout=120_000)
        chosen = sorted(server.samples.glob("0001/*_keyframe.png"))[2]  # the latest is first
        (video,) = server.samples.glob("0002/*.mp4")
        (keyframe,) = server.samples.glob("0002/*_keyframe.png")
        assert keyframe.read_bytes() == chosen.read_bytes()
        page.get_by_text("Command line").click()
        command = shlex.split(page.locator("#detail pre").first.inner_text())
        assert command[:3] == ["microcinema", "sample", f"prompt={PROMPT}"]
        command = [sys.executable, "-m", *command, "output_dir=again"]
        subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, check=True)
        (again,) = tmp_path.glob("again/*.mp4")
        assert again.read_bytes() == video.read_bytes()
        with page.expect_download() as download:
            page.get_by_role("link", name="GIF").click()
        assert Path(download.value.path()).read_bytes() == video.with_suffix(".gif").read_bytes()
    finally:
        server.kill()


def test_two_tabs_cancel_and_reload(server, open_page):
    first, second = open_page(server), open_page(server)
    first.get_by_label("Prompt", exact=True).fill("a long video")
    click(first, "Make the video")
    second.get_by_text("video: a long video").wait_for()
    second.get_by_label("Prompt", exact=True).fill("a short one")
    click(second, "Make the video")
    first.get_by_text("video: a short one").wait_for()
    first.get_by_text(re.compile("step .* of 600")).wait_for()
    first.reload()
    first.get_by_text(re.compile("step .* of 600")).wait_for()
    click(first, "Stop the job")
    first.get_by_text("Nothing is being made.").wait_for()
    second.locator("#detail").get_by_text("a short one").first.wait_for()
    first.locator("#detail").get_by_text("a short one").first.wait_for()
    assert len(list(server.samples.glob("*/*.mp4"))) == 1


def test_errors_are_shown_and_html_is_text(server, open_page):
    page = open_page(server)
    attack = "fail <img src=x onerror=alert(1)><script>alert(2)</script> ${alert(3)} {{7*7}}"
    click(page, "Make the video")
    page.get_by_role("alert").get_by_text("prompt").wait_for()
    page.get_by_label("Prompt", exact=True).fill(attack)
    click(page, "Make the video")
    page.get_by_text("failed: the prompt says so in two lines").wait_for()
    assert page.get_by_text(attack, exact=False).first.inner_text().endswith(attack)
    page.get_by_label("Prompt", exact=True).fill(attack.removeprefix("fail "))
    click(page, "Make the video")
    page.locator("#detail figcaption").get_by_text(attack.removeprefix("fail ")).wait_for()
    click(page, "Clear the queue")
    page.get_by_text("Nothing is being made.").wait_for()


def test_files_outside_the_folder_are_not_served(server):
    (server.folder / "secret").write_text("secret")
    urls = ["/etc/passwd", str(server.folder / "secret"), f"{server.samples}/../../secret", "../../secret"]
    urls += [url.replace("/", "%2f").replace("..", "%2e%2e") for url in urls]
    for url in urls:
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{server.url}gradio_api/file={url}")
        assert refused.value.code in (403, 404)
    request = urllib.request.Request(server.url, headers={"Host": "evil.example"})
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(request)
