"""The position of the key frame in a clip."""

from microcinema.utils.errors import UserError


def keyframe_index(keyframe_position: str | int, frames: int) -> int:
    """Index of the key frame in a clip, from `first`, `center` or an index; a UserError if it is outside the clip."""
    named: dict[str | int, int] = {"first": 0, "center": frames // 2}
    index = named.get(keyframe_position, keyframe_position)
    if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < frames:
        advice = "use first, center or an index"
        raise UserError(f"keyframe_position={keyframe_position!r} is not in a clip of {frames} frames; {advice}")
    return index
