"""Marker masks by a foundation model, offline: EfficientSAM, given as two ONNX files.

The interface is that of EfficientSAM's own export:

- encoder: `batched_images` (1, 3, H, W) float32 RGB in 0 to 1 → `image_embeddings`
- decoder: `image_embeddings`, `batched_point_coords` (1, Q, 2, 2) float32 px,
  `batched_point_labels` (1, Q, 2) float32, `orig_im_size` (2,) int64 → `output_masks`
  (1, Q, M, H, W) logits and `iou_predictions` (1, Q, M)

A box is prompted as its two corners with the labels 2 and 3.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from genforce_collect.config import SegmentationConfig
from genforce_collect.errors import DataError
from genforce_collect.markers.packing import HEIGHT, WIDTH
from genforce_collect.markers.segmentation import MarkerFrame
from genforce_collect.markers.view import View

QUERIES = 16  # prompts at once; each takes several whole masks of memory
BOX_HALF = 0.9  # of a box, in diameters of the marker in it
MIN_OVERLAP = 0.3  # with the marker that prompted it; a mask below it is of something else
ENCODER_INPUTS = {"batched_images"}
DECODER_INPUTS = {
    "image_embeddings",
    "batched_point_coords",
    "batched_point_labels",
    "orig_im_size",
}
DECODER_OUTPUTS = ["output_masks", "iou_predictions"]


class SamRefiner:
    """Redraws the mask of each marker that was found; one the model misses keeps its own."""

    def __init__(self, encoder: Path, decoder: Path) -> None:
        """Raises `DataError` where a file is no such model."""
        self._encoder = _session(encoder, ENCODER_INPUTS)
        self._decoder = _session(decoder, DECODER_INPUTS)

    def refine(
        self, data: bytes, frame: MarkerFrame, config: SegmentationConfig
    ) -> NDArray[np.uint8]:
        """(480, 640) uint8 mask of the markers of `frame`, found in the encoded image `data`."""
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        view = View(config)
        rgb = cv2.cvtColor(view.apply(image), cv2.COLOR_BGR2RGB)
        batch = np.ascontiguousarray(rgb.transpose(2, 0, 1)[None], np.float32) / 255
        (embeddings,) = self._encoder.run(["image_embeddings"], {"batched_images": batch})
        _, labels = cv2.connectedComponents(frame.mask, connectivity=8)
        mask = np.zeros_like(frame.mask)
        half = BOX_HALF * 2 * np.sqrt(frame.area / np.pi)
        boxes = np.stack([frame.points - half[:, None], frame.points + half[:, None]], axis=1)
        for start in range(0, frame.count, QUERIES):
            part = slice(start, start + QUERIES)
            drawn = self._decode(embeddings, boxes[part])
            for found, (x, y) in zip(drawn, frame.points[part], strict=True):
                own = labels == _label_at(labels, x, y)
                overlap = np.count_nonzero(found & own) / max(1, np.count_nonzero(found | own))
                mask |= found if overlap >= MIN_OVERLAP else own
        return mask & (view.field_of_view > 0)

    def _decode(
        self, embeddings: NDArray[np.float32], boxes: NDArray[np.float32]
    ) -> list[NDArray[np.bool_]]:
        queries = {
            "image_embeddings": embeddings,
            "batched_point_coords": boxes[None].astype(np.float32),
            "batched_point_labels": np.tile(np.float32([2, 3]), (1, len(boxes), 1)),
            "orig_im_size": np.array([HEIGHT, WIDTH], np.int64),
        }
        masks, quality = self._decoder.run(DECODER_OUTPUTS, queries)
        best = quality[0].argmax(axis=-1)
        return [masks[0, query, choice] >= 0 for query, choice in enumerate(best)]


def _label_at(labels: NDArray[np.int32], x: float, y: float) -> int:
    """Label of the component nearest to a point; a centroid may lie in a notch."""
    u, v = round(float(x)), round(float(y))
    near = labels[max(0, v - 2) : v + 3, max(0, u - 2) : u + 3]
    return int(np.bincount(near[near > 0]).argmax()) if near.any() else -1


def _session(path: Path, inputs: set[str]) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise DataError("--sam needs onnxruntime: pip install onnxruntime") from error
    if not path.is_file():
        raise DataError(f"{path}: no such model (--sam)")
    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own errors share no public base
        raise DataError(f"{path}: not an ONNX model that onnxruntime can run (--sam)") from error
    missing = inputs - {value.name for value in session.get_inputs()}
    if missing:
        raise DataError(f"{path}: no EfficientSAM model, it lacks {', '.join(sorted(missing))}")
    return session
