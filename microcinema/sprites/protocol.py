"""What is generated for a measurement: prompts that are fixed once and for all, and what the right answer to each is."""

from dataclasses import asdict, dataclass, field

import numpy as np

from microcinema.config.instantiate import check_fields
from microcinema.config.types import CountOrZero, Fps, Size
from microcinema.pipelines.prompts import PromptItem
from microcinema.sprites import scene
from microcinema.utils.errors import UserError
from microcinema.utils.hashing import hash_json

PARTS = {
    "seen": "text to video, combinations seen in training",
    "heldout": "text to video, combinations held out of training",
    "image": "image to video, from real key frames",
}
_WORLD_SEEDS = {"seen": 231118829, "heldout": 231118829, "image": 240810119}  # never a training seed


@dataclass(frozen=True)
class Task:
    """One clip to make. `sprite` is the right answer; in the part `image` its frame at the place of the model's key frame is given."""

    part: str
    index: int
    sprite: scene.Sprite

    @property
    def name(self) -> str:
        """Unique in the protocol, and a file name."""
        return f"{self.part}-{self.index:05d}"

    @property
    def numbers(self) -> tuple[int, int]:
        """What this clip's random numbers depend on, beside the seed: its own place in the protocol and nothing else."""
        return list(PARTS).index(self.part), self.index

    @property
    def prompt(self) -> str:
        """What a user would type."""
        return scene.combined_caption(self.sprite)

    def item(self, uses_motion_caption: bool, image: np.ndarray | None = None) -> PromptItem:
        """The sampler's item, with a key frame uint8 (h, w, 3), or None: stage 1 draws it.

        Models with a motion caption get the descriptive caption without it, for both stages (arXiv 2408.10119); others the whole.
        """
        content, motion = self.prompt, None
        if uses_motion_caption:
            content, motion = scene.caption(self.sprite), scene.motion_caption(self.sprite)
        part, index = self.numbers
        # Independent of the number of clips of each part, and different for all clips.
        return PromptItem(content, self.name, motion, sample_index=index * len(PARTS) + part, image=image)


@dataclass(frozen=True)
class SpritesProtocol:
    """The Moving Sprites protocol, version 3: before, stage 1 of models with a motion caption read that as well.

    Prompt number i of a part is the same whatever the counts are, so a short run is the beginning of a long one. A UserError if there is
    nothing to generate, or a number is out of range.
    """

    num_prompts: CountOrZero = 200
    num_heldout_prompts: CountOrZero = 60
    num_image_prompts: CountOrZero = 60
    num_frames: Size = 16
    size: Size = 64
    fps: Fps = 8.0
    version: int = field(default=3, init=False)

    def __post_init__(self) -> None:
        check_fields(self)
        if not any(map(self.count, PARTS)):
            raise UserError("all numbers of prompts are 0; ask for at least one")
        if self.num_frames < 2:
            raise UserError(f"num_frames={self.num_frames}; use 2 frames or more")

    def count(self, part: str) -> int:
        """Number of prompts in a part."""
        return {"seen": self.num_prompts, "heldout": self.num_heldout_prompts, "image": self.num_image_prompts}[part]

    def tasks(self) -> list[Task]:
        """All clips to make, part by part."""
        return [
            Task(part, i, scene.sample_attributes(_WORLD_SEEDS[part], i, "heldout" if part == "heldout" else "train"))
            for part in PARTS
            for i in range(self.count(part))
        ]

    def render(self, sprite: scene.Sprite) -> scene.Rendered:
        """The real clip of a sprite at the protocol's length, size and rate."""
        return scene.render(sprite, self.num_frames, self.size, self.fps)

    @property
    def identifier(self) -> str:
        """Equal for two measurements if and only if they asked for the same clips: name, version and a hash of all tasks."""

        def rounded(sprite: scene.Sprite) -> dict[str, object]:  # the last bits of a computation do not count
            return {key: round(value, 6) if isinstance(value, float) else value for key, value in vars(sprite).items()}

        tasks = [(task.name, task.prompt, rounded(task.sprite)) for task in self.tasks()]
        return f"sprites-{self.version}-{hash_json([asdict(self), tasks])[:12]}"
