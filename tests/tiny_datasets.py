"""Miniature UCF-101 and MSR-VTT in the exact layout of the real ones, with every quirk that is known of them. Import as `import tiny_datasets`."""

import json
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from microcinema.evaluation.ucf101 import descriptive_prompts

FRAMES = 14
CAPTIONS = {
    "video7010": ['a man says "hello, world" to a crowd', "  ein Hund läuft, bellt und springt  ", "女人在唱歌"],
    "video7011": ["a cartoon, with a cat", "it's a cat's life"],
    "video7012": ["cars race; one crashes\tbadly", "a race"],
    "video9999": ["the last one", "people dance — fast", "dancing"],
}


def clip(seed: int, frames: int = FRAMES, height: int = 30, width: int = 40) -> np.ndarray:
    """A bright bar that moves over a coloured ground, uint8 (f, h, w, 3)."""
    rng = np.random.default_rng(seed)
    video = np.broadcast_to(rng.integers(0, 160, 3, np.uint8), (frames, height, width, 3)).copy()
    speed, start = rng.integers(1, 4), rng.integers(0, width)
    for number in range(frames):
        left = int(start + speed * number) % (width - 6)
        video[number, 5:-5, left : left + 6] = 250
    return video


def write(path: Path, frames: np.ndarray, codec: str, rate: int = 25) -> None:
    """A video of any codec that FFmpeg writes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        stream.codec_context.thread_count = 1
        if codec == "mpeg4":
            stream.codec_context.codec_tag = "XVID"
        if codec == "libvpx-vp9":
            stream.options = {"deadline": "realtime", "cpu-used": "8"}
        for number, array in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(array, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def ucf101(root: Path) -> Path:
    """101 classes, two XviD AVIs each (train, test); lists with CRLF; HandstandPushups whose files are called HandStandPushups."""
    classes = list(descriptive_prompts())
    names = {}
    for group in ("g08", "g01"):
        names[group] = []
        for number, name in enumerate(classes):
            file = "HandStandPushups" if name == "HandstandPushups" else name
            path = f"{name}/v_{file}_{group}_c01.avi"
            write(root / "UCF-101" / path, clip(2 * number + (group == "g01")), "mpeg4")
            names[group].append(path)
    lists = root / "ucfTrainTestlist"
    lists.mkdir()
    train = [f"{path} {number}" for number, path in enumerate(names["g08"], 1)]
    content = {"trainlist01": train, "testlist01": names["g01"]}
    content["classInd"] = [f"{number} {name}" for number, name in enumerate(classes, 1)]
    for name, lines in content.items():
        (lists / f"{name}.txt").write_bytes("".join(f"{line}\r\n" for line in lines).encode())
    return root


def msrvtt(root: Path, merged: bool = False) -> Path:
    """Four test videos (one of them a .webm) and one of training; captions with quotes, commas, unicode; sentences out of order."""
    everything = {"video0": ["a man plays"], **CAPTIONS}
    videos, sentences, number = [], [], 0
    for video, captions in everything.items():
        split = "train" if video == "video0" else "test"
        times = {"start time": 1.5, "end time": 12.0}
        entry = {"category": 9, "url": "https://www.youtube.com/watch?v=x", "video_id": video, "split": split, **times}
        videos.append({**entry, "id": int(video[5:])})
        for caption in captions:
            sentences.append({"caption": caption, "video_id": video, "sen_id": number})
            number += 1
    sentences.reverse()
    root.mkdir(parents=True, exist_ok=True)
    files = {"MSRVTT_data.json": ("train", "test")} if merged else {}
    files = files or {"train_val_videodatainfo.json": ("train",), "test_videodatainfo.json": ("test",)}
    for name, splits in files.items():
        some = [video for video in videos if video["split"] in splits]
        ids = {video["video_id"] for video in some}
        content = {"info": {}, "videos": some[::-1], "sentences": [s for s in sentences if s["video_id"] in ids]}
        (root / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    for seed, video in enumerate(CAPTIONS):
        sizes = (30, 40) if seed % 2 else (40, 30)  # MSR-VTT has videos of every size
        name, codec = (f"{video}.webm", "libvpx-vp9") if video == "video7012" else (f"{video}.mp4", "libx264")
        write(root / "TestVideo" / name, clip(seed, FRAMES, *sizes), codec)
    return root
