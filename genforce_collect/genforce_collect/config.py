"""Cell and sensor files, read into validated, frozen models.

A *cell* says what hardware there is and where (hosts, frames, limits); a *sensor* says what is
pressed (geometry, material, markers, segmentation, plan). Both are YAML. A key that is unknown,
missing or out of range raises `ConfigError` with file, key and allowed values.

Files are found by path, or by name in `config/{cells,sensors}` of the folders in
`$GENFORCE_CONFIG_PATH` and of the installed `genforce_bringup` package.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from genforce_collect.errors import ConfigError

Point2 = tuple[float, float]
Vector3 = tuple[float, float, float]
Pose = tuple[float, float, float, float, float, float]
Positive = Annotated[float, Field(gt=0)]


class Section(BaseModel):
    """Base of every section: immutable, unknown keys refused, no silent NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


# --- cell -------------------------------------------------------------------------------------


class RobotConfig(Section):
    """A UR controller reached with ur_rtde (ports 30004, 30003, 29999 are fixed by it)."""

    host: str
    frequency_hz: float = Field(500.0, ge=10, le=500)
    tcp: Pose = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0)  # m, rotation vector rad, flange frame
    payload_kg: float = Field(0.2, ge=0, le=5)
    payload_cog_m: Vector3 = (0.0, 0.0, 0.03)
    watchdog_hz: float = Field(10.0, ge=1, le=50)  # controller stops without a kick at this rate
    connect_timeout_s: float = Field(5.0, gt=0, le=60)


class NidaqConfig(Section):
    """An ATI transducer on an NI-DAQ card: gauge voltages, made forces by a calibration file."""

    device: str = "Dev1"
    channels: str = "ai0:5"  # the six gauges, in order
    calibration: Path  # ATI's .cal file of this transducer


class NetftConfig(Section):
    """An ATI Net F/T box (RDT over UDP, configuration over HTTP)."""

    host: str
    rdt_port: int = Field(49152, ge=1, le=65535)
    http_port: int = Field(80, ge=1, le=65535)
    rate_hz: float = Field(1000.0, gt=0, le=7000)
    rotation: Vector3 = (0.0, 0.0, 0.0)  # rotation vector, transducer frame -> sensor frame (rad)
    origin_m: Vector3 = (0.0, 0.0, 0.0)  # of the transducer frame, in the sensor frame
    # +1: the transducer feels what the indenter does to the gel (it sits under the sensor);
    # -1: it feels the reaction (it sits between flange and indenter).
    sign: Literal[1, -1] = 1
    tare_samples: int = Field(50, ge=1, le=10000)
    nidaq: NidaqConfig | None = None  # read the transducer through this card and not the box


class CameraConfig(Section):
    """Where frames come from: device path or number, http/rtsp URL, video file or folder."""

    source: str
    width: int = Field(640, ge=16, le=8192)
    height: int = Field(480, ge=16, le=8192)
    fps: float = Field(30.0, gt=0, le=240)
    latency_s: float = Field(0.0, ge=0, le=1)  # capture to arrival, as measured
    loop: bool = False  # start a file or folder anew at its end


class UskinConfig(Section):
    """The websocket of the program that reads a uSkin."""

    url: str = "ws://127.0.0.1:5000"
    rate_hz: float = Field(100.0, gt=0, le=1000)


class LimitsConfig(Section):
    """What the guard stops at. Force limits stay below the Nano17 SI-12-0.12 rating."""

    force_n: Vector3 = (8.0, 8.0, 12.0)  # |Fx|, |Fy|, |Fz|
    torque_nm: Vector3 = (0.1, 0.1, 0.1)
    stale_s: float = Field(0.1, gt=0, le=5)  # newest wrench or pose older than this: stop
    workspace_min_m: Vector3  # TCP box in the sensor frame
    workspace_max_m: Vector3
    speed_m_s: float = Field(0.25, gt=0, le=1)  # the reduced speed of ISO 10218-1
    acceleration_m_s2: float = Field(1.0, gt=0, le=5)
    tracking_m: float = Field(0.003, gt=0, le=0.05)  # measured from commanded TCP position
    retract_m: float = Field(0.003, ge=0, le=0.05)  # out of the gel, after too much force

    @model_validator(mode="after")
    def _ordered(self) -> LimitsConfig:
        if any(
            low >= high
            for low, high in zip(self.workspace_min_m, self.workspace_max_m, strict=True)
        ):
            raise ValueError("workspace_min_m must be below workspace_max_m on every axis")
        return self


class SpeedsConfig(Section):
    """Tool speeds of a collection."""

    contact_m_s: float = Field(0.01, gt=0, le=0.1)  # while touching
    transfer_m_s: float = Field(0.05, gt=0, le=0.5)  # between contacts
    acceleration_m_s2: float = Field(0.1, gt=0, le=2)


class SimulationConfig(Section):
    """Only for virtual cells: what the protocol servers pretend."""

    time_scale: float = Field(1.0, gt=0, le=20)  # robot and gel run this much faster
    seed: int = Field(0, ge=0)
    camera_port: int = Field(8080, ge=1, le=65535)


class CellConfig(Section):
    """One robot cell, real or virtual. Frames: base = robot base; sensor = gel surface centre,
    x and y along the image, z out of the gel."""

    name: str
    robot: RobotConfig
    netft: NetftConfig
    camera: CameraConfig
    uskin: UskinConfig = UskinConfig()
    sensor_pose: Pose  # sensor frame in the base frame (m, rotation vector rad)
    limits: LimitsConfig
    speeds: SpeedsConfig = SpeedsConfig()
    simulation: SimulationConfig | None = None


# --- sensor -----------------------------------------------------------------------------------


class GelConfig(Section):
    """The elastomer: a bonded layer, seen by the camera through its base."""

    width_mm: Positive
    height_mm: Positive
    thickness_mm: Positive
    youngs_modulus_pa: float = Field(ge=1e3, le=1e8)  # instantaneous, before relaxation
    poisson_ratio: float = Field(0.48, ge=0, lt=0.5)
    friction: float = Field(0.8, ge=0, le=3)
    relaxation_ratio: float = Field(0.15, ge=0, lt=1)  # part of the stress that relaxes
    relaxation_time_s: float = Field(0.5, gt=0)
    dome_radius_mm: float | None = Field(None, gt=1)  # flat without one


class LayoutConfig(Section):
    """The markers on the gel at rest."""

    pattern: Literal[
        "array", "staggered", "circle", "diamond", "hexagon", "spiral", "scattered", "image"
    ]
    rows: int = Field(11, ge=1, le=200)  # rings of circle and hexagon
    columns: int = Field(15, ge=1, le=200)  # markers of spiral and scattered
    pitch_mm: Positive = 1.4
    diameter_mm: Positive = 0.6
    depth_mm: float = Field(0.0, ge=0)  # below the surface
    lever_mm: float = Field(0.0, ge=0, le=10)  # length of pins that stand on the skin's inside
    seed: int = Field(0, ge=0)  # of spiral and scattered
    image: str | None = None  # of pattern "image": white markers on black
    image_width_mm: float | None = Field(None, gt=0)  # what the image spans


class OpticsConfig(Section):
    """How the camera sees the gel. Colours are blue, green, red, 0 to 255."""

    camera_distance_mm: float = Field(40.0, ge=5)  # optical, lens to rest surface
    gel_bgr: Vector3 = (205.0, 165.0, 180.0)
    marker_bgr: Vector3 = (70.0, 55.0, 50.0)
    shading: float = Field(60.0, ge=0, le=500)  # grey levels per unit slope of the surface
    vignette: float = Field(0.15, ge=0, le=1)  # light lost in the corners
    blur_px: float = Field(1.2, ge=0.3, le=10)
    noise: float = Field(2.0, ge=0, le=50)  # standard deviation in grey levels
    view_radius_mm: float | None = Field(None, gt=0)  # round field of view, dark outside


class SegmentationConfig(Section):
    """How camera frames become 640x480 marker images, and markers are told from the gel.

    A frame is undistorted, then its `corners_px` or its `crop_px` (else all of it) are fitted into
    640x480 with the aspect ratio kept; what `fov_*` leaves out is black. The defaults fit dark dots
    on a light gel.
    """

    polarity: Literal["dark", "light"] = "dark"
    diameter_px: float = Field(14.0, gt=2, le=200)  # of a marker, in the 640x480 image
    min_area: float = Field(0.4, gt=0, lt=1)  # of the smallest marker, in discs of that diameter
    max_area: float = Field(2.5, gt=1, le=10)  # of the largest
    frame_width: int = Field(640, ge=16, le=8192)  # what the camera sends
    frame_height: int = Field(480, ge=16, le=8192)
    distortion: tuple[float, float] = (0.0, 0.0)  # radial k1, k2 over the half diagonal
    crop_px: tuple[int, int, int, int] | None = None  # left, top, width, height in the frame
    # Top left, top right, bottom right, bottom left of the gel in the frame, to be made square.
    corners_px: tuple[Point2, Point2, Point2, Point2] | None = None
    fov_circle_px: Vector3 | None = None  # centre x, y and radius in the 640x480 image
    fov_polygon_px: tuple[Point2, ...] = ()  # in the 640x480 image
    min_contrast: float = Field(0.03, ge=0, le=1)  # marker against gel, of full scale
    # Places of this very sensor's markers at rest, in the 640x480 image; a reference that matches
    # them only when turned or mirrored is told by them.
    markers_px: tuple[Point2, ...] = ()

    @model_validator(mode="after")
    def _crop_inside_frame(self) -> SegmentationConfig:
        if self.crop_px is not None:
            left, top, width, height = self.crop_px
            inside = left >= 0 and top >= 0 and width > 0 and height > 0
            if not (
                inside and left + width <= self.frame_width and top + height <= self.frame_height
            ):
                raise ValueError(
                    f"crop_px must lie inside the {self.frame_width}x{self.frame_height} frame"
                )
        return self


class TaxelsConfig(Section):
    """A taxel array; only for sensors of kind taxels."""

    rows: int = Field(4, ge=1, le=64)
    columns: int = Field(4, ge=1, le=64)
    axes: Literal[1, 3] = 3  # z alone, or x, y, z
    port: str = "1"  # sensor key in the device's messages

    @property
    def size(self) -> int:
        """Counts in one sample."""
        return self.rows * self.columns * self.axes


class PlanConfig(Section):
    """The indentation plan: points, depths and shear directions about the start pose."""

    step_x_mm: float = Field(3.0, ge=0)
    step_y_mm: float = Field(4.0, ge=0)
    step_z_mm: Positive = 0.25
    max_z_mm: Positive = 1.0
    directions: int = Field(8, ge=1, le=64)
    radius_mm: Positive = 1.0
    dwell_s: float = Field(0.0, ge=0)
    speed_mm_s: float | None = Field(None, gt=0)  # in contact, where slower than the cell's
    clearance_mm: Positive = 2.0  # height above the gel between contacts
    start_mm: Vector3 = (0.0, 0.0, 0.0)  # start pose in the sensor frame: the tip just touches
    # Where the start pose is not taught that well: find its height by pressing until this force.
    touch_n: float = Field(0.0, ge=0, le=2)  # 0: take start_mm as it is
    touch_search_mm: float = Field(1.0, gt=0, le=10)  # this far above and below start_mm


class SensorConfig(Section):
    """One tactile sensor."""

    name: str
    kind: Literal["dots", "pins", "taxels"]
    px_per_mm: Positive  # scale of the 640x480 image on the undeformed gel
    gel: GelConfig
    layout: LayoutConfig
    optics: OpticsConfig = OpticsConfig()
    segmentation: SegmentationConfig = SegmentationConfig()
    taxels: TaxelsConfig = TaxelsConfig()
    plan: PlanConfig = PlanConfig()


# --- reading ----------------------------------------------------------------------------------

_Model = TypeVar("_Model", bound=Section)


def load_cell(name_or_path: str | Path) -> CellConfig:
    """Read `config/cells/<name>.yaml` or a path. Raises `ConfigError`."""
    return read_section(find_config("cells", name_or_path), CellConfig)


def load_sensor(name_or_path: str | Path) -> SensorConfig:
    """Read `config/sensors/<name>.yaml` or a path. Raises `ConfigError`."""
    return read_section(find_config("sensors", name_or_path), SensorConfig)


def find_config(kind: str, name_or_path: str | Path) -> Path:
    """Path of the cell or sensor file; `kind` is "cells" or "sensors". Raises `ConfigError`."""
    path = Path(name_or_path)
    if path.suffix in {".yaml", ".yml"}:
        if path.is_file():
            return path
        raise ConfigError(f"{path}: no such {kind[:-1]} file")
    known = known_configs(kind)
    if str(name_or_path) in known:
        return known[str(name_or_path)]
    raise ConfigError(
        f"unknown {kind[:-1]} '{name_or_path}': known are {', '.join(known) or 'none'}; "
        f"or give the path of a .yaml file"
    )


def known_configs(kind: str) -> dict[str, Path]:
    """Files that have a name, by name in order; `kind` is "cells" or "sensors"."""
    known: dict[str, Path] = {}
    for folder in reversed(_config_folders()):
        known |= {found.stem: found for found in (folder / kind).glob("*.yaml")}
    return dict(sorted(known.items()))


def read_section(path: Path, model: type[_Model]) -> _Model:
    """Read one YAML file into a model. Raises `ConfigError` naming file, key and allowed values."""
    return parse_section(read_mapping(path), model, str(path))


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises `ConfigError`."""
    try:
        data = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    # Beside its own errors, yaml lets those of numbers, dates, text and depth through.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a mapping of keys, found {type(data).__name__}")
    return data


def parse_section(data: dict[str, Any], model: type[_Model], origin: str) -> _Model:
    """Validate a mapping; `origin` names where it came from in the `ConfigError`."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise ConfigError(f"{origin}: " + "; ".join(map(_explain, error.errors()))) from error


def _explain(problem: Any) -> str:
    key = ".".join(map(str, problem["loc"])) or "(whole file)"
    if problem["type"] == "extra_forbidden":
        return f"{key}: unknown key"
    if problem["type"] == "missing":
        return f"{key}: missing"
    return f"{key}: {problem['msg']}, found {problem['input']!r}"


def _config_folders() -> list[Path]:
    folders = [Path(p) for p in os.environ.get("GENFORCE_CONFIG_PATH", "").split(os.pathsep) if p]
    try:
        from ament_index_python.packages import (
            PackageNotFoundError,
            get_package_share_directory,
        )
    except ImportError:
        return folders
    try:
        folders.append(Path(get_package_share_directory("genforce_bringup")) / "config")
    except (PackageNotFoundError, OSError):  # not built, or no AMENT_PREFIX_PATH
        return folders
    return folders
