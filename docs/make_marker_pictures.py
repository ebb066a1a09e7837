"""Makes the pictures of docs/markers.md: python docs/make_marker_pictures.py"""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from genforce_collect.config import load_sensor
from genforce_collect.devices.camera_sources import encode_jpeg
from genforce_collect.markers.frontend import Frontend
from genforce_collect.markers.jpeg import decode_gray
from genforce_collect.markers.overlay import draw
from genforce_collect.markers.tracking import Tracker
from genforce_collect.markers.view import View
from genforce_sim.sensor import SimulatedSensor

FOLDER = Path(__file__).parent / "images"
SIZE = (640, 480)
Image = NDArray[np.uint8]


class Rig:
    """A virtual sensor and its front end."""

    def __init__(self, name: str, indenter: str) -> None:
        self.sensor = load_sensor(name)
        self.simulated = SimulatedSensor(self.sensor, indenter, seed=1)
        self.frontend = Frontend(self.sensor)
        self.frontend.set_reference(
            self.frontend.process_jpeg(encode_jpeg(self.simulated.reference.image))
        )

    def press(self, x_mm: float, depth_mm: float) -> Image:
        """The camera's image of a press sheared by x."""
        frame = None
        for part in (0.3, 0.6, 1.0):
            tip = [x_mm * max(0.0, 2 * part - 1) * 1e-3, 0.0, -depth_mm * part * 1e-3]
            frame = self.simulated.render(self.simulated.step(np.array([*tip, np.pi, 0, 0]), 0.2))
        assert frame is not None
        return frame.image

    def picture(self, image: Image, motion: bool = True) -> Image:
        """What the front end makes of it."""
        data = encode_jpeg(image)
        frame = self.frontend.process_jpeg(data)
        view = View(self.sensor.segmentation)
        gray = decode_gray(data)
        assert gray is not None
        assert self.frontend.reference is not None
        found = Tracker(self.frontend.reference.points).update(frame.points) if motion else None
        return cv2.resize(draw(view.apply(gray), frame, view.field_of_view, found), SIZE)


def main() -> None:
    """Write every picture."""
    FOLDER.mkdir(exist_ok=True)
    gel, circle, pins = (
        Rig("array_1", "sphere"), Rig("circle_1", "moon"), Rig("tactip", "sphere"),
    )  # fmt: skip
    pressed = gel.press(1.0, 1.0)
    lit = np.clip(pressed.astype(float) * np.linspace(0.35, 1.35, 640)[None, :, None], 0, 255)
    blurred = cv2.blur(pressed, (1, 15))
    overexposed = np.clip(pressed.astype(float) * 1.8, 0, 255)
    capped = np.random.default_rng(0).normal(2, 1, pressed.shape).clip(0, 255)
    _write("contacts", [gel.picture(pressed), circle.picture(circle.press(0.8, 1.0)),
                        pins.picture(pins.press(1.0, 2.0))])  # fmt: skip
    _write("light", [gel.picture(lit.astype(np.uint8)), gel.picture(overexposed.astype(np.uint8))])
    _write("faults", [gel.picture(blurred), gel.picture(capped.astype(np.uint8), motion=False)])
    _write("limits", [pins.picture(pins.press(1.5, 4.5))])


def _write(name: str, pictures: list[Image]) -> None:
    path = FOLDER / f"markers_{name}.jpg"
    cv2.imwrite(str(path), np.hstack(pictures), [cv2.IMWRITE_JPEG_QUALITY, 80])
    print(path)


if __name__ == "__main__":
    main()
