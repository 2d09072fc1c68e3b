"""The studio in Chromium."""

import json
import os
import re
import shlex
import socket
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.ui
ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
PROMPT = "a large red star moving quickly to the left on sand"


class Server:
    """A server in a folder of its own, with jobs that take no time or real ones."""

    def __init__(self, folder, real=False, overrides=()):
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
def start(tmp_path):
    """Starts a server in the test's folder, which ends after the pages."""
    servers = []

    def start(**settings):
        servers.append(Server(tmp_path, **settings))
        return servers[-1]

    yield start
    for server in servers:
        server.kill()


@pytest.fixture
def open_page(browser, start):
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


def test_prompt_to_video_of_a_chosen_key_frame_and_again_by_the_command_that_is_shown(start, tmp_path, open_page):
    """The real models. The command's frames have the same bytes, and so has the seed's next video."""
    server = start(real=True)
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
    assert command[:2] == ["microcinema", "sample"] and f"prompt={PROMPT}" in command
    command = [sys.executable, "-m", *command, "output_dir=again"]
    subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, check=True)
    (again,) = tmp_path.glob("again/*.mp4")
    assert again.read_bytes() == video.read_bytes()
    with page.expect_download() as download:
        page.get_by_role("link", name="GIF").click()
    assert Path(download.value.path()).read_bytes() == video.with_suffix(".gif").read_bytes()


def test_a_part_that_is_painted_over_is_drawn_anew(start, open_page):
    """By the real model: its key frames keep all that is not painted, and name the picture and the mask."""
    server = start(real=True)
    page = open_page(server)
    page.get_by_label("Prompt", exact=True).fill(PROMPT)
    page.get_by_text("Settings").click()
    page.get_by_label("Steps").fill("2")
    page.locator("input[type=file]").first.set_input_files(bars(server.folder / "bars.png"))
    page.get_by_role("button", name="Draw a part of it anew").click()
    canvas = page.locator("canvas").first
    canvas.wait_for()
    click(page, "Redraw it 4 times")
    page.get_by_role("alert").get_by_text("nothing is painted over").wait_for()
    canvas.scroll_into_view_if_needed()
    page.wait_for_timeout(1000)
    box = canvas.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x - 20, y)
    page.mouse.down()
    page.mouse.move(x + 20, y, steps=8)
    page.mouse.up()
    page.wait_for_timeout(500)
    click(page, "Redraw it 4 times")
    page.locator("#pictures button.thumbnail-item").nth(4).wait_for(timeout=120_000)
    (picture,), (mask,) = server.samples.glob("uploads/*_keyframe.png"), server.samples.glob("uploads/*_mask.png")
    before, white = np.asarray(Image.open(picture)), np.asarray(Image.open(mask)) > 0
    rows, columns = np.nonzero(white)
    assert 5 < np.ptp(rows) < np.ptp(columns) < 48 and abs(rows.mean() - 31.5) < 4 and abs(columns.mean() - 31.5) < 4
    drawn = sorted(server.samples.glob("0001/*_keyframe.png"))
    assert len(drawn) == len({file.read_bytes() for file in drawn}) == 4
    for file in drawn:
        after, record = np.asarray(Image.open(file)), json.loads(file.with_suffix(".json").read_text())
        assert np.array_equal(after[~white], before[~white]) and (after[white] != before[white]).mean() > 0.8
        sources = [Path(record["redrawn"][part]["source"]).name for part in ("image", "mask")]
        assert sources == [picture.name, mask.name] and record["prompt"] == PROMPT
    page.locator("#pictures button.thumbnail-item").first.click()
    assert not list(server.samples.glob("*/*.mp4"))


def trained_for_places(folder):
    """The config files of an embedded model as if it were trained for other places of the key frame: all that the page reads."""
    for name, more in (("model_index.json", {}), ("unet/config.json", {"keyframe_places": True})):
        config = json.loads((ROOT / "microcinema/assets/sprites-microcinema" / name).read_text())
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(config | more))
    return folder


def test_a_last_frame_and_a_loop(start, tmp_path, open_page):
    server = start(overrides=[f"pipelines=[{trained_for_places(tmp_path / 'places')}, sprites-microcinema]"])
    page = open_page(server)

    def make(prompt):
        page.get_by_label("Prompt", exact=True).fill(prompt)
        click(page, "Make the video")
        page.locator("#detail figcaption").get_by_text(prompt).wait_for()
        (record,) = server.samples.glob(f"{len(list(server.samples.glob('0*'))):04d}/*seed0-0.json")
        return json.loads(record.read_text())["config"]["keyframes"]

    assert make("a heart") is None
    field = page.get_by_label("first and last for a loop")
    page.get_by_text("Settings").click()
    field.fill("0, 15")
    assert make("a loop") == [0, 15]
    page.locator("#last input[type=file]").set_input_files(bars(tmp_path / "bars.png"))
    page.locator("#last img").wait_for()
    first, last = make("two pictures")
    assert first == 0 and re.fullmatch(r"15:runs/ui/uploads/\w+_keyframe\.png", last)
    assert np.array_equal(Image.open(tmp_path / last[3:]), Image.open(tmp_path / "bars.png"))
    field.fill("3")
    click(page, "Same again")
    wait(lambda: field.input_value() == "")
    assert make("two pictures again") == [first, last]
    page.get_by_label("Model").first.click()
    page.get_by_role("option", name="sprites-microcinema").click()
    page.get_by_text("Not trained for a motion caption, an amount of motion, other places, a last frame").wait_for()
    assert not field.is_visible() and make("without places") is None


def bars(path):
    """A picture of the model's size."""
    Image.fromarray(np.uint8(np.indices((64, 64, 3))[1] // 8 % 2 * 200)).save(path)
    return path


def test_two_tabs_cancel_and_reload(server, open_page):
    first, second = open_page(server), open_page(server)
    first.get_by_label("Prompt", exact=True).fill("a long video")
    click(first, "Make the video")
    second.get_by_text("video: a long video").wait_for()
    second.get_by_label("Prompt", exact=True).fill("a short one")
    click(second, "Make the video")
    first.get_by_text("video: a short one").wait_for()
    first.get_by_text(re.compile("step .* of 3000")).wait_for()
    first.reload()
    first.get_by_text(re.compile("step .* of 3000")).wait_for()
    click(first, "Stop the job")
    first.get_by_text("Nothing is being made.").wait_for()
    second.locator("#detail").get_by_text("a short one").first.wait_for()
    first.locator("#detail").get_by_text("a short one").first.wait_for()
    assert len(list(server.samples.glob("*/*.mp4"))) == 1


def test_errors_are_shown_and_html_is_text(server, open_page):
    page = open_page(server)
    attack = "fail <img src=x onerror=alert(1)><script>alert(2)</script> ${alert(3)} {{7*7}}"
    click(page, "Make the video")
    page.get_by_role("alert").get_by_text("the prompt is empty; write what the video shows").wait_for()
    page.get_by_label("Prompt", exact=True).fill(attack)
    click(page, "Make the video")
    page.get_by_text("failed: the prompt says so in two lines").wait_for()
    assert page.get_by_text(attack, exact=False).first.inner_text().endswith(attack)
    page.get_by_label("Prompt", exact=True).fill(attack.removeprefix("fail "))
    click(page, "Make the video")
    page.locator("#detail figcaption").get_by_text(attack.removeprefix("fail ")).wait_for()
    click(page, "Clear the queue")
    page.get_by_text("Nothing is being made.").wait_for()


def test_again_varied_and_compared(server, open_page):
    """The gallery's results: the form filled anew, another seed, and another model beside it, all of the same key frame."""
    page = open_page(server)
    page.get_by_label("Prompt", exact=True).fill("a heart")
    click(page, "Make the video")
    page.locator("#detail").get_by_text("a heart").first.wait_for()
    assert not page.get_by_role("button", name="Continue").is_visible()  # the model cannot
    click(page, "Vary")
    page.locator("#detail").get_by_text("seed 1").wait_for()
    page.get_by_label("Prompt", exact=True).fill("")
    click(page, "Same again")
    wait(lambda: page.get_by_label("Prompt", exact=True).input_value() == "a heart")
    page.get_by_role("button", name="Without the chosen picture").wait_for()
    click(page, "Compare side by side")
    page.get_by_text("pipeline was sprites-microcinema and is sprites-factorized-dreamer").wait_for()
    assert page.locator("#detail video").count() == 2
    page.locator("#detail summary", has_text="Command line").last.click()
    command = page.locator("#detail pre").nth(3).inner_text()
    assert "seed=1" in command and "image=" in command and "pipeline=sprites-factorized-dreamer" in command


def test_keyboard_alone(server, open_page):
    """From field to field to the button, and on to a result, without a pointer; what has the focus is marked."""
    page = open_page(server)

    def tab_to(text):
        for _ in range(80):
            page.keyboard.press("Tab")
            focused = page.evaluate(
                "() => { const e = document.activeElement; return [e.tagName, e.ariaLabel ?? '', e.innerText ?? '', "
                "e.closest('label')?.innerText ?? '', getComputedStyle(e).outlineStyle + getComputedStyle(e).boxShadow].join('|') }"
            )
            if text in focused:
                return focused
        raise AssertionError(f"{text} is not reached")

    tab_to("Prompt")
    page.keyboard.type("a heart by keys")
    focused = tab_to("Make the video")
    assert not focused.endswith("nonenone")
    page.keyboard.press("Enter")
    page.locator("#detail").get_by_text("a heart by keys").first.wait_for()
    tab_to("Vary")
    page.keyboard.press("Space")
    page.locator("#detail").get_by_text("seed 1").wait_for()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_width_of_a_phone(server, open_page, scheme, tmp_path):
    page = open_page(server, viewport={"width": 390, "height": 844}, color_scheme=scheme)
    page.get_by_label("Prompt", exact=True).fill("a heart on a phone " + "x" * 200)
    click(page, "Make the video")
    page.locator("#detail").get_by_text("a heart on a phone").first.wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g)[0] < 64")
    assert dark == (scheme == "dark")


def bomb(path, side):
    """A PNG of a few kilobytes that unpacks to so many pixels squared."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    row = zlib.compress(bytes((side // 8 + 1) * side), 9)
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", row) + chunk(b"IEND", b""))
    return path


def test_uploads(server, open_page, tmp_path):
    """A picture becomes the key frame; a bomb, a file of another kind and one above the limit do not, nor does any stay on the disk."""
    page = open_page(server)
    before = set(server.samples.glob("uploads/*"))
    for file, said in (
        (bomb(tmp_path / "bomb.png", 7000), "it has 7000x7000 pixels, above the limit of 33554432"),
        (bomb(tmp_path / "large.png", 20000), "400000000 pixels"),
        (tmp_path / "page.png", "not an image of the kinds BMP, GIF"),
    ):
        if file.name == "page.png":
            file.write_text("<script>alert(1)</script>")
        page.locator("input[type=file]").first.set_input_files(file)
        page.get_by_role("alert").get_by_text(said).wait_for()
    assert str(server.folder) not in page.get_by_role("alert").inner_text()
    assert set(server.samples.glob("uploads/*")) == before
    Image.effect_noise((40, 30), 90).convert("RGB").save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0")
    page.locator("input[type=file]").first.set_input_files(tmp_path / "a.jpg")
    page.get_by_role("button", name="Without the chosen picture").wait_for()
    (kept,) = set(server.samples.glob("uploads/*")) - before
    assert Image.open(kept).format == "PNG" and np.array_equal(Image.open(kept), Image.open(tmp_path / "a.jpg"))
    assert list(server.samples.glob(".gradio/*/*.png")) == list(server.samples.glob(".gradio/*/*.jpg")) == []


def test_an_upload_above_the_limit_is_refused(server):
    line = b"--x\r\nContent-Disposition: form-data; name=files; filename=a.png\r\n\r\n"
    body = line + bytes(2**24 + 1) + b"\r\n--x--\r\n"
    head = {"Content-Type": "multipart/form-data; boundary=x"}
    with pytest.raises((urllib.error.HTTPError, ConnectionError)) as refused:
        urllib.request.urlopen(urllib.request.Request(f"{server.url}gradio_api/upload", body, head))
    assert getattr(refused.value, "code", 413) == 413
    assert not [path for path in server.samples.rglob("*") if path.is_file() and path.stat().st_size > 2**20]


def test_fifty_jobs_and_a_server_that_is_killed(start, open_page):
    """The job that was being made is told as lost; those before it are in the gallery, those after it are made by the next server."""
    server = start()
    page = open_page(server)
    for prompt, count in (("first", 1), ("long", 2), ("later", 50)):
        page.get_by_label("Prompt", exact=True).fill(prompt)
        while len(list(server.samples.glob("0*"))) < count:
            click(page, "Make the video")
            page.wait_for_timeout(200)
    page.get_by_text(re.compile("and 4[0-9] more")).wait_for()
    page.get_by_text(re.compile("step .* of 3000")).wait_for()
    page.close()
    server.kill()
    assert len(list(server.samples.glob("*/*.mp4"))) == 1
    server = start()
    page = open_page(server)
    page.get_by_text("failed: the server ended while it was made; make it again").wait_for()
    wait(lambda: len(list(server.samples.glob("*/job.json"))) == 1, 120)
    assert len(list(server.samples.glob("*/*.mp4"))) == len(list(server.samples.glob("0*"))) - 1 >= 49
    page.locator("#detail").get_by_text("later").first.wait_for()


def test_files_outside_the_folder_are_not_served(server):
    (server.folder / "secret").write_text("secret")
    urls = ["/etc/passwd", str(server.folder / "secret"), f"{server.samples}/../../secret", "../../secret"]
    urls += [url.replace("/", "%2f").replace("..", "%2e%2e") for url in urls]
    for url in urls:
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{server.url}gradio_api/file={url}")
        assert refused.value.code in (403, 404)
    parts = json.load(urllib.request.urlopen(f"{server.url}config"))["components"]
    (canvas,) = [part["id"] for part in parts if part["type"] == "imageeditor"]
    call = json.dumps({"data": {}, "component_id": canvas, "fn_name": "accept_blobs", "session_hash": "x"}).encode()
    request = urllib.request.Request(
        f"{server.url}gradio_api/component_server", call, {"Content-Type": "application/json"}
    )
    with pytest.raises(urllib.error.HTTPError, match="404"):  # it would keep what it is sent
        urllib.request.urlopen(request)
    request = urllib.request.Request(server.url, headers={"Host": "evil.example"})
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(request)
