"""Which frame of a clip is its key frame."""

from microcinema.utils.errors import UserError


def keyframe_index(keyframe_position: str | int, frames: int) -> int:
    """Which frame of a clip the key frame is: `first`, `center` or an index; the same in training and in sampling.

    Raises:
        UserError: another word, or an index outside the clip.
    """
    named: dict[str | int, int] = {"first": 0, "center": frames // 2}
    index = named.get(keyframe_position, keyframe_position)
    if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < frames:
        raise UserError(
            f"reference frame {keyframe_position!r} is not in a clip of {frames}; use first, center or an index"
        )
    return index
