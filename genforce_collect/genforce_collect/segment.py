"""Markers of a video, an image folder or a bag: packed masks, overlay video, summary.

Examples:
  genforce segment clip.mp4
  genforce segment clip.mp4 --sensor gelsight -o runs/clip
  genforce segment runs/collect/20260101-120000
  genforce segment frames/ --sam encoder.onnx decoder.onnx

Without --sensor, what the markers look like is found out from the frames themselves. The folder of
masks is in the original's layout: NNNN.npy a frame (480x640 bits packed) and last.csv with the
last frame of each phase. A folder with one subfolder a phase is numbered on through its phases.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table

from genforce_collect.bags import BagReader
from genforce_collect.config import SegmentationConfig, SensorConfig, load_sensor, parse_section
from genforce_collect.devices.camera_sources import missing_frames, recorded_frames
from genforce_collect.errors import DataError
from genforce_collect.markers.calibration import calibrate
from genforce_collect.markers.frontend import Frontend
from genforce_collect.markers.jpeg import decode_gray
from genforce_collect.markers.overlay import draw
from genforce_collect.markers.packing import pack_mask
from genforce_collect.markers.quality import Flag, explain
from genforce_collect.markers.reference import UNFIT, most_typical
from genforce_collect.markers.sam import SamRefiner
from genforce_collect.markers.segmentation import MarkerFrame, empty_frame
from genforce_collect.markers.tracking import Match, Tracker
from genforce_collect.markers.view import View

PHASES = ("normal_inc", "shear_inc", "shear_dec", "normal_dec", "down", "up")
REFERENCE_NAME = "ref.jpg"  # the no-contact frame in a folder of images
REFERENCE_FRAMES = 10
CALIBRATION_FRAMES = 24
STEADY = 0.02  # part by which a count may differ from the median
OVERLAY_FPS = 30.0


class SourceImage(NamedTuple):
    """One encoded frame, or (rows, columns, axes) taxel counts; its contact and phase."""

    data: bytes | NDArray[np.int32]
    contact: str = ""
    phase: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("source", type=Path, help="video, image, folder of images, or bag")
    parser.add_argument("--sensor", help="sensor, by name or path (default: found out)")
    parser.add_argument("-o", "--output", type=Path, help="folder to write (runs/segment/<name>)")
    parser.add_argument("--topic", help="image or taxel topic of a bag that has several")
    parser.add_argument(
        "--reference", type=Path, help="no-contact image (default: ref.jpg, or the first frames)"
    )
    parser.add_argument(
        "--whole-view",
        action="store_true",
        help="without --sensor: keep markers that the edge of the view may cut",
    )
    parser.add_argument("--no-overlay", action="store_true", help="write no overlay video")
    parser.add_argument(
        "--sam",
        nargs=2,
        type=Path,
        metavar=("ENCODER", "DECODER"),
        help="EfficientSAM as two ONNX files, for masks prompted by the markers found",
    )
    parser.add_argument("--json", action="store_true", help="print the summary as JSON only")


def run(args: argparse.Namespace) -> int:
    """Exit code 0. Raises `GenforceError`; for a video that breaks off, after its good part."""
    images = list(read_source(args.source, args.topic))
    if not images:
        raise DataError(f"{args.source}: holds no frames")
    missing = missing_frames(args.source, len(images))
    output = args.output or Path("runs") / "segment" / args.source.stem
    sensor = load_sensor(args.sensor) if args.sensor else find_out(images, args.whole_view)
    given = args.reference or args.source / REFERENCE_NAME
    if args.reference and not given.is_file():
        raise DataError(f"{given}: no such image (--reference)")
    calm = [SourceImage(data) for data in recorded_frames(given)] if given.is_file() else images
    reference = find_reference(calm, sensor)
    if args.sam and sensor.kind == "taxels":
        raise DataError("--sam is for images; taxels are drawn as they are")
    refiner = SamRefiner(*args.sam) if args.sam else None
    summary = segment(
        images, sensor, output, reference, not args.no_overlay, refiner, quiet=args.json
    )
    print_summary(summary, args.json)
    if missing:
        raise DataError(
            f"{args.source}: breaks off after {len(images)} of {len(images) + missing} frames; "
            f"those before are in {output}"
        )
    return 0


def read_source(source: Path, topic: str | None = None) -> Iterator[SourceImage]:
    """Encoded frames of a video, an image, a folder, a folder of phases or a bag, in order."""
    if not source.exists():
        raise DataError(f"{source}: no such video, folder or bag")
    if source.is_dir() and any(source.glob("*.mcap")):
        yield from _bag_images(source, topic)
        return
    phases = [source / phase for phase in PHASES if (source / phase).is_dir()]
    for folder in phases or [source]:
        for data in recorded_frames(folder, REFERENCE_NAME):
            yield SourceImage(data, "", folder.name if phases else "")


def _bag_images(path: Path, topic: str | None) -> Iterator[SourceImage]:
    with BagReader(path) as bag:
        topics = [name for name in bag.topics if name.endswith(("/image/compressed", "/taxels"))]
        if len(chosen := [name for name in topics if topic in {None, name}]) != 1:
            known = ", ".join(topics) or "none"
            asked = f"no topic {topic}" if topic else "needs one image or taxel topic"
            raise DataError(f"{path}: {asked}, has {known}; choose with --topic")
        topics = chosen
        progress = [name for name in bag.topics if name.endswith("/contact")]
        between = "between" if progress else ""
        contact, phase = between, ""
        names = {2: PHASES[0], 3: PHASES[1], 4: PHASES[2], 5: PHASES[3], 8: "down", 9: "up"}
        for name, _, _, message in bag.messages([*topics, *progress]):
            if name in topics:
                yield SourceImage(_content(message), contact, phase)
            else:
                phase = names.get(message.phase, "")
                contact = f"{message.indenter}/{message.index}" if phase else between


def _content(message: Any) -> bytes | NDArray[np.int32]:
    """What a CompressedImage or a Taxels message holds."""
    if hasattr(message, "data"):
        return bytes(message.data)
    counts = np.asarray(message.counts, np.int32)
    try:
        return counts.reshape(message.rows, message.cols, message.axes)
    except ValueError:
        return counts  # flagged as of a wrong size


def find_out(images: Sequence[SourceImage], whole_view: bool = False) -> SensorConfig:
    """A sensor whose markers look like those of the frames, or with as many taxels."""
    first = images[0].data
    if not isinstance(first, bytes):
        if first.ndim != 3:
            raise DataError("the first sample's counts are not its rows x columns x axes")
        values = load_sensor("uskin").model_dump()
        values["taxels"] |= dict(zip(("rows", "columns", "axes"), first.shape, strict=True))
        return parse_section(values, SensorConfig, "taxels of the first sample")
    step = max(1, len(images) // CALIBRATION_FRAMES)
    gray = [decode_gray(im.data) for im in images[::step] if isinstance(im.data, bytes)]
    found = calibrate([image for image in gray if image is not None], whole_view)
    kind = "pins" if found.segmentation.polarity == "light" else "dots"
    # These frames need not be at rest, so where markers are in them is no place to keep.
    looks = found.segmentation.model_copy(update={"markers_px": ()})
    template = load_sensor("array_1")
    return template.model_copy(update={"name": "found", "kind": kind, "segmentation": looks})


@dataclass
class Tally:
    """What the frames of one run amounted to."""

    counts: list[int]
    flags: list[int]
    contrast: list[float]
    sharpness: list[float]
    tracked: list[float]
    motion_px: list[float]


def segment(
    images: Sequence[SourceImage],
    sensor: SensorConfig,
    output: Path,
    reference: MarkerFrame,
    overlay: bool = True,
    refiner: SamRefiner | None = None,
    *,
    quiet: bool = False,
) -> dict[str, Any]:
    """Write masks, `last.csv`, `reference.npy`, overlay and `summary.json` into a folder."""
    output.mkdir(parents=True, exist_ok=True)
    frontend = Frontend(sensor)
    frontend.set_reference(reference)
    tracker = Tracker(reference.points)
    writer = _Overlay(output / "overlay.mp4", sensor.segmentation) if overlay else None
    masks = _MaskFolders(output)
    tally = Tally([], [], [], [], [], [])
    np.save(output / "reference.npy", pack_mask(reference.mask))
    console = Console(stderr=True, quiet=quiet)
    for image in track(images, "segmenting", console=console, transient=True):
        frame = _process(frontend, image)
        if refiner is not None and frame.count and isinstance(image.data, bytes):
            frame = replace(frame, mask=refiner.refine(image.data, frame, sensor.segmentation))
        motion = tracker.update(frame.points) if reference.count else None
        masks.add(frame, image)
        _count(tally, frame, motion)
        if writer is not None:
            writer.add(image.data, frame, motion)
    masks.close()
    if writer is not None:
        writer.close()
    seen = frontend.way_up(reference).value
    summary = _summary(tally, reference, seen, sensor, output, overlay)
    (output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def find_reference(images: Sequence[SourceImage], sensor: SensorConfig) -> MarkerFrame:
    """The most typical of the first good frames; where none is good, of those with markers."""
    frontend = Frontend(sensor)
    good: list[MarkerFrame] = []
    doubtful: list[MarkerFrame] = []
    for image in images:
        frame = _process(frontend, image)
        if not frame.flags & UNFIT:
            good.append(frame)
        elif frame.count:
            doubtful.append(frame)
        if len(good) == REFERENCE_FRAMES:
            break
    candidates = good or doubtful[:REFERENCE_FRAMES]
    return most_typical(candidates) if candidates else empty_frame(Flag.NO_MARKERS)


def _process(frontend: Frontend, image: SourceImage) -> MarkerFrame:
    if isinstance(image.data, bytes):
        return frontend.process_jpeg(image.data)
    return frontend.process_taxels(image.data)


def _count(tally: Tally, frame: MarkerFrame, motion: Match | None) -> None:
    tally.counts.append(frame.count)
    tally.flags.append(frame.flags)
    tally.contrast.append(frame.contrast)
    tally.sharpness.append(frame.sharpness)
    tally.tracked.append(motion.matched if motion else 0.0)
    lengths = np.linalg.norm(motion.displacement, axis=1) if motion else np.zeros(0)
    lengths = lengths[np.isfinite(lengths)]
    tally.motion_px.append(float(lengths.max()) if len(lengths) else 0.0)


def _summary(
    tally: Tally,
    reference: MarkerFrame,
    seen: str,
    sensor: SensorConfig,
    output: Path,
    overlay: bool,
) -> dict[str, Any]:
    counts = np.array(tally.counts)
    median = float(np.median(counts))
    flagged = {
        flag.name: int(sum(bool(f & flag) for f in tally.flags))
        for flag in Flag
        if any(f & flag for f in tally.flags)
    }
    return {
        "frames": len(counts),
        "markers_reference": reference.count,
        "reference_seen": seen,
        "markers_median": median,
        "markers_min": int(counts.min()),
        "markers_max": int(counts.max()),
        "within_2_percent": float(np.mean(np.abs(counts - median) <= STEADY * median)),
        "tracked": float(np.mean(tally.tracked)),
        "max_motion_px": float(max(tally.motion_px)),
        "contrast": float(np.median(tally.contrast)),
        "sharpness": float(np.median(tally.sharpness)),
        "flagged": flagged,
        "flagged_frames": [i for i, flags in enumerate(tally.flags) if flags],
        "counts": counts.tolist(),
        "segmentation": sensor.segmentation.model_dump(exclude_defaults=True),
        "masks": str(output),
        "overlay": str(output / "overlay.mp4") if overlay else "",
    }


def print_summary(summary: dict[str, Any], as_json: bool) -> None:
    """The summary as a table, or as JSON."""
    if as_json:
        print(json.dumps(summary, indent=2))
        return
    table = Table("", "", show_header=False, box=None)
    found = summary["segmentation"]
    for name, value in (
        ("frames", f"{summary['frames']}"),
        (
            "markers",
            f"{summary['markers_median']:.0f} (median; {summary['markers_min']} to "
            f"{summary['markers_max']}; {summary['markers_reference']} in the reference)",
        ),
        ("reference seen", summary["reference_seen"]),
        ("within 2 % of median", f"{summary['within_2_percent']:.1%} of frames"),
        ("tracked to reference", f"{summary['tracked']:.1%} of markers"),
        ("largest motion", f"{summary['max_motion_px']:.1f} px"),
        ("contrast, sharpness", f"{summary['contrast']:.2f}, {summary['sharpness']:.2f}"),
        ("looked for", f"{found.get('polarity', 'dark')}, {found.get('diameter_px', 14.0)} px"),
        ("flagged", ", ".join(f"{explain(Flag[k])}: {n}" for k, n in summary["flagged"].items())),
        ("written", summary["masks"]),
    ):
        table.add_row(name, value or "none")
    Console(highlight=False).print(table)


class _MaskFolders:
    """One folder of numbered masks a contact, with its `last.csv`."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._number: dict[str, int] = {}
        self._last: dict[str, dict[str, str]] = {}

    def add(self, frame: MarkerFrame, image: SourceImage) -> None:
        contact = image.contact or "frames"
        number = self._number.get(contact, 0)
        self._number[contact] = number + 1
        folder = self._root / contact
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / f"{number:04d}.npy", pack_mask(frame.mask))
        self._last.setdefault(contact, {})[image.phase] = f"{contact}/{number:04d}.npy"

    def close(self) -> None:
        for contact, last in self._last.items():
            (self._root / contact / "last.csv").write_text(
                "".join(f"{path}\n" for path in last.values())
            )


class _Overlay:
    """Video of the views with what was found in them."""

    def __init__(self, path: Path, config: SegmentationConfig) -> None:
        self._path = path
        self._view = View(config)
        self._writer: cv2.VideoWriter | None = None

    def add(
        self, data: bytes | NDArray[np.int32], frame: MarkerFrame, motion: Match | None
    ) -> None:
        gray = decode_gray(data) if isinstance(data, bytes) else None
        view = np.zeros(frame.mask.shape, np.uint8) if gray is None else self._view.apply(gray)
        picture = draw(view, frame, self._view.field_of_view, motion)
        if self._writer is None:
            size = (picture.shape[1], picture.shape[0])
            codec = cv2.VideoWriter.fourcc(*"mp4v")
            self._writer = cv2.VideoWriter(str(self._path), codec, OVERLAY_FPS, size)
            if not self._writer.isOpened():
                raise DataError(f"{self._path}: OpenCV cannot write it; use --no-overlay")
        self._writer.write(picture)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.release()
