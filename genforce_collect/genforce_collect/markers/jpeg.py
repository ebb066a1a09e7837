"""Encoded frames: whether they are whole, and their grey values."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

START, END = b"\xff\xd8", b"\xff\xd9"
TRAILER = 64  # bytes some cameras pad a JPEG with


def is_whole_jpeg(data: bytes) -> bool:
    """Whether the data has a JPEG's first and last marker."""
    return data.startswith(START) and END in data[-TRAILER:]


def decode_gray(data: bytes) -> NDArray[np.uint8] | None:
    """Grey image of an encoded one, (h, w) uint8; None if it is no image or a cut-off JPEG."""
    if not data or (data.startswith(START) and not is_whole_jpeg(data)):
        return None
    try:
        return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE)
    except cv2.error:
        return None
