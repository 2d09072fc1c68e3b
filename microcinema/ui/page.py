"""The page of the studio. What it makes are jobs of `sample`; texts of prompts and errors are shown as text, by templates that escape."""

import json
import os
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, partial, wraps
from hashlib import sha256
from pathlib import Path
from typing import Any
from unittest import mock

from PIL import Image
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from microcinema.config.sampling import PRESETS
from microcinema.config.schema import Ui
from microcinema.data.images import open_image
from microcinema.ui.gallery import Model, Result, keyframes, results
from microcinema.ui.jobs import JobQueue
from microcinema.utils.errors import UserError
from microcinema.utils.files import atomic_path
from microcinema.utils.fingerprint import differences
from microcinema.utils.templates import render

os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
# Gradio would parse its source at every import, for a third of the time that takes, and write interfaces for editors into its folder.
with mock.patch("inspect.getfile", side_effect=OSError):
    import gradio as gr

TEMPLATES = Path(__file__).parent / "templates"
MAX_UPLOAD, MAX_PIXELS = 2**24, 2**25  # bytes of a file, and pixels that it may unpack to
AMOUNTS = ["", "0.1", "0.3", "0.5", "0.7", "0.9"]  # of motion; none: left to the model
_NUM_KEYFRAMES = 4
_SPRITES = [
    ("a large red star", "moving quickly to the left", "on sand"),
    ("a small blue square", "rotating slowly clockwise", "on grass"),
    ("a large yellow moon", "growing slowly", "on water"),
    ("a small green heart", "bouncing quickly", "on brick"),
]
_NATURAL = [
    ("a sailing boat", "drifting slowly to the left", "on a calm lake at sunset"),
    ("a red fox", "turning its head", "in fresh snow"),
    ("waves", "rolling in and breaking", "at a rocky coast"),
]
_QUIET: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}


@dataclass
class Session:
    """What one tab shows. It stays in the server, so that no request can name a file."""

    keyframes: list[tuple[Path, str]] = field(default_factory=list)
    chosen: Path | None = None  # of these
    results: list[Result] = field(default_factory=list)
    shown: list[Result] = field(default_factory=list)  # one of these, or two side by side
    awaited: Path | None = None  # folder of a job whose result is to be shown
    beside: bool = False  # the one that is shown
    running: Any = None  # the job that is shown as running
    notice: str = ""
    version: int = -1  # of the queue, in what is shown
    drawn: Mapping[int, Any] = field(default_factory=dict)  # the values of the view


class Studio:
    """The page, and the handlers of its events."""

    def __init__(self, config: Ui, queue: JobQueue):
        self.config, self.queue, self.folder, self.model = config, queue, Path(config.output_dir), cache(Model.of)
        self.form: dict[str, Any] = {}  # fields by keys of `sample`
        self.view: list[Any] = []  # what `update` gives values to

    def update(self, session: Session) -> list[Any]:
        """The values of the view that have changed."""
        if session.version != self.queue.version:
            session.version = self.queue.version
            session.keyframes, session.results = keyframes(self.folder), results(self.folder)
            if new := [result for result in session.results if result.file.parent == session.awaited][:1]:
                session.shown, session.awaited = (session.shown[:1] if session.beside else []) + new, None
            session.shown = session.shown or session.results[:1]
        jobs, files = list(self.queue.jobs), [file for file, _ in session.keyframes]
        session.running = next((job for job in jobs if job.state == "running"), None)
        can: Mapping[str, bool] = {}
        with suppress(UserError, IndexError):  # a model that is gone, or no result
            can = self.model(session.shown[0].record["config"]["pipeline"]).can
        configs = [{**result.record["config"], "output_dir": "", "image": ""} for result in session.shown]
        differing = differences(configs[-1], configs[0]) if configs else []
        index = files.index(session.chosen) if session.chosen in files else None
        values: list[tuple[Any, dict[str, Any]]] = [
            (gr.HTML, {"value": render(TEMPLATES / "queue.html.jinja", jobs=jobs, notice=session.notice)}),
            (gr.Gallery, {"value": session.keyframes, "selected_index": index}),
            (gr.Button, {"visible": session.chosen is not None}),
            (gr.Accordion, {"visible": session.chosen is not None}),
            (gr.ImageMask, _painting(session.chosen)),
            (gr.Button, {"visible": session.running is not None}),
            (gr.Button, {"visible": len(jobs) > (session.running is not None)}),
            (gr.Gallery, {"value": [(result.path("gif"), result.record["prompt"]) for result in session.results]}),
            (gr.HTML, {"value": render(TEMPLATES / "result.html.jinja", shown=session.shown, differing=differing)}),
            (gr.Column, {"visible": bool(session.shown)}),
            *((gr.Button, {"visible": can.get(key, False)}) for key in ("num_segments", "interpolate")),
        ]
        before, session.drawn = session.drawn, dict(enumerate(values))
        return [gr.skip() if before.get(i) == (kind, new) else kind(**new) for i, (kind, new) in enumerate(values)]

    def handler(self, action: Callable[..., None]) -> Callable[..., list[Any]]:
        """An action as a handler of an event; a UserError is shown in its line."""

        @wraps(action)
        def handle(session: Session, *values: Any) -> list[Any]:
            session.notice = ""
            try:
                action(session, *values)
            except UserError as error:
                session.notice = str(error)
            return self.update(session)

        return handle

    def show_model(self, name: str) -> list[Any]:
        """What the page shows of a model: its line, examples, and the fields that it can use."""
        model = self.model(name)
        texts = [
            [f"{a} {c}", b] if model.can["motion_prompt"] else [f"{a} {b} {c}", ""]
            for a, b, c in (_SPRITES if model.is_embedded else _NATURAL)
        ]
        examples = gr.Dataset(samples=texts, sample_labels=[" · ".join(filter(None, text)) for text in texts])
        return [model.summary, examples, *(gr.update(visible=model.can[key]) for key in model.can)]

    def make(self, session: Session, *values: Any, keyframes_only: bool = False, mask: Path | None = None) -> None:
        """Adds a job of the form, without fields that are empty or that the model cannot use."""
        form = dict(zip(self.form, values, strict=True))
        if not form["prompt"].strip():
            raise UserError("the prompt is empty; write what the video shows, or take an example")
        model, last = self.model(form["pipeline"]), form.pop("last_frame")
        can = model.can
        if last and can["last_frame"]:
            form["keyframes"] = f"0, {model.last}:{self._keep(open_image(last, MAX_PIXELS), 'keyframe')}"
        form |= {"keyframes": f"[{form['keyframes'] or ''}]", "lora": json.dumps(form["lora"])}
        more = [f"image={session.chosen}"] if session.chosen and (mask or not keyframes_only) else []
        more += [f"mask={mask}"] if mask else []
        more += ["keyframes_only=true", f"num_videos_per_prompt={_NUM_KEYFRAMES}"] if keyframes_only else []
        overrides = [
            f"{key}={value}" for key, value in form.items() if value not in (None, "", "[]") and can.get(key, True)
        ]
        self.enqueue(session, [*overrides, *more])

    def enqueue(self, session: Session, overrides: list[str], beside: bool = False) -> None:
        """Adds a job, whose result the tab will show."""
        session.awaited, session.beside = self.queue.add(overrides).folder, beside

    def upload(self, session: Session, file: str) -> None:
        """Keeps a picture as PNG, without its metadata, and chooses it."""
        try:
            image = open_image(file, MAX_PIXELS)
        except UserError as error:
            raise UserError(str(error).replace(file, Path(file).name)) from None
        finally:
            Path(file).unlink()
        session.chosen = self._keep(image, "keyframe")
        session.version = -1

    def _keep(self, image: Image.Image, kind: str) -> Path:
        file = self.folder / "uploads" / f"{sha256(image.tobytes()).hexdigest()[:16]}_{kind}.png"
        with atomic_path(file) as temporary:
            image.save(temporary)
        return file

    def redraw(self, session: Session, painting: Any, *values: Any) -> None:
        """Adds a job that draws anew what is painted over of the picture that is chosen."""
        mask = next((layer.getchannel("A") for layer in (painting or {}).get("layers", ())), None)
        if session.chosen is None or mask is None or mask.getbbox() is None:
            raise UserError("nothing is painted over; choose a picture, and paint over the part to draw anew")
        mask = mask.point(lambda alpha: 255 * (alpha > 0)).resize(open_image(session.chosen).size)
        self.make(session, *values, keyframes_only=True, mask=self._keep(mask, "mask"))

    def choose(self, session: Session, event: gr.SelectData) -> None:
        session.chosen = session.keyframes[event.index][0]

    def clear_choice(self, session: Session) -> None:
        session.chosen = None

    def show(self, session: Session, event: gr.SelectData) -> None:
        session.shown = [session.results[event.index]]

    def stop(self, session: Session) -> None:
        if session.running is not None:
            self.queue.cancel(session.running)

    def clear(self, session: Session) -> None:
        for job in [job for job in self.queue.jobs if job.state != "running"]:
            self.queue.cancel(job)

    def change(self, session: Session, key: str) -> None:
        """Makes the result that is shown with another seed, one more segment, or a higher frame rate."""
        value = session.shown[0].record["config"][key]
        changed = {key: 2 * value if key == "interpolate" else value + 1}
        self.enqueue(session, session.shown[0].overrides(**changed))

    def compare(self, session: Session, pipeline: str, preset: str) -> None:
        """Makes the result that is shown by another model or preset, of the same key frame and seed, and shows both."""
        can = self.model(pipeline).can
        unable = {"motion_prompt": None, "motion": None, "keyframes": None, "num_segments": 1, "interpolate": 1}
        changed = {"pipeline": pipeline, "preset": preset} | {key: x for key, x in unable.items() if not can[key]}
        self.enqueue(session, session.shown[0].overrides(**changed), beside=True)

    def repeat(self, session: Session) -> list[Any]:
        """The values of the form that make the result that is shown; its key frame is chosen."""
        config = session.shown[0].record["config"]
        session.chosen = session.shown[0].path("keyframe")
        entries = [str(entry).partition(":") for entry in config["keyframes"] or ()]
        last = next((file for _, _, file in entries if file), None)
        places = "" if last else ", ".join(place for place, _, _ in entries)
        config = {**config, "keyframes": places, "last_frame": last, "motion": str(config["motion"] or "")}
        return [config[key] for key in self.form]

    def build(self) -> gr.Blocks:
        """The page."""
        models = self.config.pipelines
        with gr.Blocks(title="microcinema studio", analytics_enabled=False, delete_cache=(600, 600)) as page:
            session = gr.State(Session())
            gr.HTML("<h1>microcinema studio</h1><p>First the picture, then its motion.</p>", elem_id="head")
            with gr.Row():
                with gr.Column(scale=4, min_width=320):
                    summary, examples, draw, upload, chosen, redraw, make = self._build_form()
                with gr.Column(scale=5, min_width=320):
                    status = gr.HTML(elem_id="queue")
                    with gr.Row():
                        stop = gr.Button("Stop the job", variant="stop", visible=False)
                        clear = gr.Button("Clear the queue", visible=False)
                    gallery = _gallery("gallery", "Results", 6)
                    detail = gr.HTML(elem_id="detail")
                    with gr.Column(visible=False) as actions:
                        with gr.Row():
                            again, vary = gr.Button("Same again"), gr.Button("Vary")
                            longer, denser = gr.Button("Continue"), gr.Button("Interpolate")
                        with gr.Row():
                            other = gr.Dropdown(models, value=models[-1], label="Other model")
                            preset = gr.Dropdown([*PRESETS], value="quality", label="Other preset")
                        compare = gr.Button("Compare side by side")
            self.view = [status, *chosen, stop, clear, gallery, detail, actions, longer, denser]
            pictures, clear_choice, _, canvas = chosen
            fields, pipeline = [*self.form.values()], self.form["pipeline"]
            for event, action, inputs in (
                (draw.click, partial(self.make, keyframes_only=True), fields),
                (make.click, self.make, fields),
                (redraw.click, self.redraw, [canvas, *fields]),
                (upload.upload, self.upload, [upload]),
                (pictures.select, self.choose, []),
                (clear_choice.click, self.clear_choice, []),
                (gallery.select, self.show, []),
                (stop.click, self.stop, []),
                (clear.click, self.clear, []),
                (vary.click, partial(self.change, key="seed"), []),
                (longer.click, partial(self.change, key="num_segments"), []),
                (denser.click, partial(self.change, key="interpolate"), []),
                (compare.click, self.compare, [other, preset]),
            ):
                event(self.handler(action), [session, *inputs], self.view, **_QUIET)
            again.click(self.repeat, session, fields, **_QUIET)
            of_model = [summary, examples, *(self.form[key] for key in self.model(models[0]).can)]
            gr.on([pipeline.change, page.load], self.show_model, pipeline, of_model, **_QUIET)
            texts = [self.form["prompt"], self.form["motion_prompt"]]
            examples.click(lambda example: example, examples, texts, **_QUIET)
            gr.Timer(0.5).tick(self.update, session, self.view, **_QUIET)
        return page

    def _build_form(self) -> list[Any]:
        """The left column: its parts but the fields, which become `form`."""
        form, models, lora = self.form, self.config.pipelines, self.config.lora
        form["pipeline"] = gr.Dropdown(models, value=models[0], label="Model")
        summary = gr.Markdown(elem_classes="note")
        form["prompt"] = gr.Textbox(label="Prompt", placeholder="what the video shows", lines=2)
        form["motion_prompt"] = gr.Textbox(label="Motion caption", placeholder="what moves, and how", visible=False)
        examples = gr.Dataset(components=[form["prompt"], form["motion_prompt"]], samples=[["", ""]], label="Examples")
        with gr.Row():
            draw = gr.Button(f"Draw {_NUM_KEYFRAMES} key frames")
            upload = gr.UploadButton("Upload a picture", file_types=["image"])
        pictures = _gallery("pictures", "Key frames: choose one, or let the model draw it", 4)
        clear_choice = gr.Button("Without the chosen picture", size="sm", visible=False)
        with gr.Accordion("Draw a part of it anew: paint that over", open=False, visible=False) as part:
            more: dict[str, Any] = {"sources": [], "transforms": [], "buttons": [], "show_label": False}
            canvas = gr.ImageMask(label="The part to draw anew", type="pil", **more)
            canvas.accept_blobs = None  # The page sends files; this way in would hold any number of bytes in memory.
            redraw = gr.Button(f"Redraw it {_NUM_KEYFRAMES} times")
        label = "Last frame; the key frame is then the first"
        more = {"type": "filepath", "sources": ["upload"], "height": 160, "elem_id": "last"}
        form["last_frame"] = gr.Image(label=label, visible=False, **more)
        form["motion"] = gr.Dropdown(AMOUNTS, label="Amount of motion", allow_custom_value=True, visible=False)
        with gr.Accordion("Settings", open=False):
            form["preset"] = gr.Radio([*PRESETS], value="quality", label="Preset")
            with gr.Row():
                form["seed"] = gr.Number(0, label="Seed", precision=0, minimum=0)
                form["num_inference_steps"] = gr.Textbox(label="Steps", placeholder="the preset's")
                form["guidance_scale"] = gr.Textbox(label="Guidance", placeholder="the model's")
            label = "Frame of the key frame, or first and last for a loop"
            form["keyframes"] = gr.Textbox(label=label, placeholder="the model's own", visible=False)
            form["num_segments"] = gr.Number(1, label="Clips that continue one another", precision=0, visible=False)
            form["interpolate"] = gr.Radio([1, 2, 4], value=1, label="Times the frame rate", visible=False)
            form["lora"] = gr.Dropdown(lora, value=[], multiselect=True, label="LoRA", visible=bool(lora))
            form["negative_prompt"] = gr.Textbox(label="Negative prompt", placeholder="what it should not show")
        make = gr.Button("Make the video", variant="primary")
        return [summary, examples, draw, upload, [pictures, clear_choice, part, canvas], redraw, make]


@cache
def _painting(picture: Path | None) -> dict[str, Any]:
    """Settings of the canvas for a picture: a brush of a sixth of it, through which it can be seen."""
    if picture is None:
        return {"value": None}
    brush = gr.Brush(min(open_image(picture).size) // 6 or 1, [("#e11d48", 0.6)], color_mode="fixed")
    return {"value": str(picture), "brush": brush}


def _gallery(name: str, title: str, columns: int) -> gr.Gallery:
    gr.Markdown(f"### {title}")
    settings: dict[str, Any] = {"show_label": False, "allow_preview": False, "elem_classes": "gallery", "buttons": []}
    return gr.Gallery(label=title, columns=columns, height=None, elem_id=name, fit_columns=False, **settings)


def serve(config: Ui, queue: JobQueue) -> None:
    """Serves the page until the process is interrupted; a UserError at a port that is taken."""
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS  # what Gradio opens: Pillow refuses twice as many
    os.environ["GRADIO_TEMP_DIR"] = str(Path(config.output_dir, ".gradio").resolve())
    gr.set_static_paths([config.output_dir])
    hosts = ["127.0.0.1", "localhost"] if config.host == "127.0.0.1" and not config.share else ["*"]
    # Other names that lead to this machine are those of web pages that try to reach it.
    middleware = [Middleware(TrustedHostMiddleware, allowed_hosts=hosts)]
    theme = gr.themes.Soft(
        primary_hue="indigo", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )
    page = Studio(config, queue).build()
    try:
        page.launch(
            server_name=config.host,
            server_port=config.port,
            share=config.share,
            max_file_size=MAX_UPLOAD,
            app_kwargs={"middleware": middleware},
            theme=theme,
            css_paths=TEMPLATES / "style.css",
            footer_links=[],
            ssr_mode=False,
            pwa=False,
            enable_monitoring=False,
            quiet=True,
            prevent_thread_lock=True,
        )
    except OSError:
        raise UserError(
            f"port {config.port} of {config.host} cannot be used; give another, such as port=7861"
        ) from None
    print(f"the studio is at {page.share_url or page.local_url}", flush=True)
    threading.Event().wait()
