"""Both stages: a prompt becomes a key frame, the key frame a video (arXiv 2311.18829)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils import BaseOutput

from microcinema.pipelines.image_to_video import ImageToVideoPipeline
from microcinema.pipelines.keyframe import Keyframe, KeyframePipeline


@dataclass
class TextToVideoOutput(BaseOutput):
    """Videos and what they were made from.

    Attributes:
        frames: as in `ImageToVideoOutput`.
        keyframes: one for every video, with its provenance.
    """

    frames: Any
    keyframes: list[Keyframe]


class TextToVideoPipeline:
    """A key frame pipeline before an image-to-video pipeline.

    Args:
        keyframe: stage 1.
        video: stage 2.
    """

    def __init__(self, keyframe: KeyframePipeline, video: ImageToVideoPipeline):
        self.keyframe = keyframe
        self.video = video

    @property
    def networks(self) -> dict[str, torch.nn.Module]:
        """All networks: those of stage 2 by their names, those of stage 1 as `keyframe.` and their names."""
        parts = {**self.video.components, **{f"keyframe.{name}": part for name, part in self.keyframe.networks.items()}}
        return {name: part for name, part in parts.items() if isinstance(part, torch.nn.Module)}

    def to(self, device: torch.device | str) -> "TextToVideoPipeline":
        """Moves both stages."""
        self.keyframe.to(device)
        self.video.to(device)
        return self

    def __call__(
        self,
        prompt: str | Sequence[str],
        motion_prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        fps: float | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        num_videos_per_prompt: int = 1,
        generator: Sequence[torch.Generator] | None = None,
        num_segments: int = 1,
        window_overlap: int | None = None,
        keyframe_arguments: dict[str, Any] | None = None,
        **arguments: Any,
    ) -> TextToVideoOutput:
        """Makes videos; each has a key frame of its own.

        Args:
            generator: one for every video: it draws first the key frame's noise, then the video's.
            keyframe_arguments: for `KeyframePipeline.__call__`, such as `guidance_scale` and `draw_height`.
            arguments: for `ImageToVideoPipeline.__call__`, as all the others are.

        Raises:
            UserError: bad input; an empty prompt, sizes, frames and clips are found before the first stage starts.
        """
        size_and_length = (height, width, num_frames, fps, num_segments, window_overlap)
        prompts, height, width, num_frames, fps = self.video.check(prompt, *size_and_length)
        self.video.check_motion_prompt(motion_prompt)

        def for_each_video(texts: str | Sequence[str] | None) -> str | list[str] | None:
            if texts is None or isinstance(texts, str):
                return texts
            return [text for text in texts for _ in range(num_videos_per_prompt)]

        prompts = [text for text in prompts for _ in range(num_videos_per_prompt)]
        with torch.no_grad():
            keyframes = self.keyframe(prompts, height, width, generator, **(keyframe_arguments or {}))
        output = self.video(
            prompts,
            [keyframe.image for keyframe in keyframes],
            for_each_video(motion_prompt),
            height,
            width,
            num_frames,
            fps,
            negative_prompt=for_each_video(negative_prompt),
            generator=generator,
            num_segments=num_segments,
            window_overlap=window_overlap,
            **arguments,
        )
        return TextToVideoOutput(output.frames, keyframes)
