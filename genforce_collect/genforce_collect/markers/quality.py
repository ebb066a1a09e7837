"""What can be wrong with a marker image."""

from __future__ import annotations

from enum import IntFlag

REFERENCE_SINCE = "reference_since_ns"  # in the segmenter's diagnostics: its reference is of later


class Flag(IntFlag):
    """The FLAG_* constants of genforce_msgs/Markers; 0 is a good frame."""

    NO_MARKERS = 1
    TOO_FEW = 2
    TOO_MANY = 4
    LOW_CONTRAST = 8
    SATURATED = 16
    BLURRED = 32
    DECODE_ERROR = 64
    WRONG_SIZE = 128
    ROTATED = 256
    WRONG_REFERENCE = 512
    REPEATED = 1024


_REASONS = {
    Flag.NO_MARKERS: "no markers found",
    Flag.TOO_FEW: "fewer markers than the reference has",
    Flag.TOO_MANY: "more markers than the reference has",
    Flag.LOW_CONTRAST: "markers hardly stand out from the gel",
    Flag.SATURATED: "over- or underexposed",
    Flag.BLURRED: "blurred",
    Flag.DECODE_ERROR: "frame could not be decoded",
    Flag.WRONG_SIZE: "frame has another size than the sensor file says",
    Flag.ROTATED: "matches the reference only when turned or mirrored",
    Flag.WRONG_REFERENCE: "does not match the reference",
    Flag.REPEATED: "same frame as the one before",
}


def explain(flags: int) -> str:
    """The reasons behind the flags in words, or "good"."""
    return ", ".join(text for flag, text in _REASONS.items() if flags & flag) or "good"
