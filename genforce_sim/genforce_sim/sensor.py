"""One simulated tactile sensor: tip pose in; wrench, gel displacement and camera frame out."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from genforce_collect.config import SensorConfig
from genforce_collect.errors import ConfigError, DataError
from genforce_collect.markers.layouts import marker_positions
from genforce_collect.markers.taxels import render_taxels
from genforce_sim.compliance import Grid
from genforce_sim.elastomer import Elastomer, RigidMotion
from genforce_sim.indenters import Indenter, load_indenter
from genforce_sim.optics import (
    CENTRE_PX,
    HEIGHT_PX,
    WIDTH_PX,
    Camera,
    Imperfections,
    Scene,
    draw_ellipses,
    draw_mask,
    field_of_view,
    mask_of,
)
from genforce_sim.taxels import counts_from, draw_rest_counts

FIELD_ROWS, FIELD_COLUMNS = 30, 40
CELLS_ACROSS = 80  # of the solver over the gel's longer side
PADDING = 1.2  # periodic images of the contact stay this factor of the gel apart
SUBSTEP_MM = 0.25  # longest motion of the tip solved in one go while touching
MAX_TRAVEL_MM = 10.0  # a longer step is a jump to another contact, not a motion
MAX_TILT_DEG = 45.0

Array = NDArray[Any]


@dataclass(frozen=True)
class ContactState:
    """What the gel feels and how it lies, in the sensor frame."""

    wrench: Array  # (6,) N and N.m by the indenter on the gel about the sensor origin
    # (3, 30, 40) mm: displacement x, y, z of the material that at rest lies behind the centre of
    # each 16 x 16 px block of the ideal image; row 0 is the top row of the image.
    displacement: NDArray[np.float32]
    in_contact: bool
    depth_m: float  # of the tip below the rest surface, 0 above it
    surface: NDArray[np.float32]  # (3, rows, columns) mm of the surface, solver grid, y ascending
    at_markers: NDArray[np.float32]  # the same at the depth of the markers
    pressure_mpa: NDArray[np.float32]  # (rows, columns), solver grid


@dataclass(frozen=True)
class Frame:
    """One camera frame with its truth."""

    image: NDArray[np.uint8]  # (480, 640, 3) BGR
    mask: NDArray[np.bool_]  # (480, 640), exact
    markers: NDArray[np.float32]  # (N, 2) px (u, v)


@dataclass(frozen=True)
class MaskFlaws:
    """What segmentation does to a mask, drawn anew for every frame."""

    lost: float = 0.01  # part of the markers not found
    jitter_px: float = 0.15  # standard deviation of a centre
    size_spread: float = 0.03  # relative, of each marker
    threshold: float = 0.06  # relative, of all markers together


class SimulatedSensor:
    """A gel with markers, a camera, and an indenter over it."""

    def __init__(
        self,
        sensor: SensorConfig,
        indenter: str | Path | Indenter,
        seed: int = 0,
        imperfections: bool | Imperfections = True,
    ) -> None:
        """`seed` draws what sets this instance apart. Raises `ConfigError` on a bad indenter."""
        self.sensor = sensor
        self.indenter = indenter if isinstance(indenter, Indenter) else load_indenter(indenter)
        rng = np.random.default_rng([seed, 0])
        if isinstance(imperfections, bool):
            imperfections = Imperfections.draw(rng) if imperfections else Imperfections()
        if sensor.kind != "dots":  # pins and magnets are moulded in, none is missing
            imperfections = replace(imperfections, missing=0.0)
        self.imperfections = imperfections
        gel = sensor.gel
        cell = max(gel.width_mm, gel.height_mm) / CELLS_ACROSS
        self.grid = Grid.over(PADDING * gel.width_mm, PADDING * gel.height_mm, cell)
        self.elastomer = Elastomer(gel, self.grid)
        self.camera = Camera(sensor.px_per_mm, sensor.optics.camera_distance_mm, imperfections)
        self._visible = field_of_view(sensor.optics, self.camera)
        places = marker_positions(sensor.layout, gel)
        if sensor.kind == "taxels":
            places = places[np.lexsort((places[:, 0], -places[:, 1]))]
            if len(places) * 3 != sensor.taxels.size:
                raise ConfigError(
                    f"sensor {sensor.name}: layout puts {len(places)} taxels on the gel, taxels "
                    f"describes {sensor.taxels.size} counts; make rows and columns fit, axes: 3"
                )
            self._rest_counts = draw_rest_counts(rng, len(places))
        places = places[rng.random(len(places)) >= imperfections.missing]
        places = places + rng.normal(0, 1, places.shape) * imperfections.jitter_mm
        spread = 1 + imperfections.size_spread * np.clip(rng.normal(0, 1, len(places)), -2, 2)
        self._radius_mm = sensor.layout.diameter_mm / 2 * spread
        self._places_mm = places
        # Each marker is followed with four points around it, which give its shape.
        self._delta_mm = sensor.layout.diameter_mm / 4
        spokes = self._delta_mm * np.array([[0, 0], [1, 0], [-1, 0], [0, 1], [0, -1]])
        probes = (places[None] + spokes[:, None]).astype(np.float32)
        self._probes_mm = probes
        self._probe_cells = self._cells_of(probes[..., 0], probes[..., 1])
        u, v = np.meshgrid(
            (np.arange(FIELD_COLUMNS) + 0.5) * (WIDTH_PX / FIELD_COLUMNS) - 0.5 - CENTRE_PX[0],
            (np.arange(FIELD_ROWS) + 0.5) * (HEIGHT_PX / FIELD_ROWS) - 0.5 - CENTRE_PX[1],
        )
        self._field_cells = self._cells_of(u / sensor.px_per_mm, -v / sensor.px_per_mm)
        self._noise = np.random.default_rng([seed, 1])
        self._scene_rng = np.random.default_rng([seed, 2])
        self._tip: tuple[Array, Rotation] | None = None

    @cached_property
    def scene(self) -> Scene:
        """The gel without markers, as this instance's camera sees it."""
        return Scene(self.sensor.optics, self.camera, self._scene_rng)

    @cached_property
    def _shade_cells(self) -> tuple[Array, Array]:
        u, v = np.meshgrid(
            np.arange(2, WIDTH_PX, 4) - 0.5 - CENTRE_PX[0],
            np.arange(2, HEIGHT_PX, 4) - 0.5 - CENTRE_PX[1],
        )
        return self._cells_of(u / self.sensor.px_per_mm, -v / self.sensor.px_per_mm)

    def reset(self) -> None:
        """Forget friction, relaxation and where the tip was."""
        self.elastomer.reset()
        self._tip = None

    def step(self, tip_pose: Array, dt: float) -> ContactState:
        """Move the tip to `tip_pose` (x, y, z m and rotation vector rad) within `dt` s of gel time.

        Raises `DataError` where the pose is not finite or the tool leans by more than 45 degrees.
        """
        pose = np.asarray(tip_pose, dtype=np.float64)
        if pose.shape != (6,) or not np.isfinite(pose).all() or not dt >= 0:
            raise DataError(f"tip pose must be six finite numbers (m, rad), found {tip_pose}")
        tip, turn = pose[:3] * 1e3, Rotation.from_rotvec(pose[3:])
        lean = math.degrees(math.acos(np.clip(-turn.as_matrix()[2, 2], -1, 1)))
        if lean > MAX_TILT_DEG:
            raise DataError(
                f"the tool leans by {lean:.0f} degrees from the sensor's normal; "
                f"up to {MAX_TILT_DEG:.0f} are simulated (tool z points into the gel)"
            )
        last_tip, last_turn = (tip, turn) if self._tip is None else self._tip
        self._tip = tip, turn
        if np.linalg.norm(tip - last_tip) > MAX_TRAVEL_MM:
            last_tip, last_turn = tip, turn
        near = self.elastomer.in_contact or tip[2] < 1.0
        travel = float(np.linalg.norm(tip - last_tip))
        parts = max(1, math.ceil(travel / SUBSTEP_MM)) if near else 1
        spin = (turn * last_turn.inv()).as_rotvec()
        for part in range(1, parts + 1):
            self._advance(
                last_tip + (tip - last_tip) * (part / parts),
                Rotation.from_rotvec(spin * (part / parts)) * last_turn,
                RigidMotion(
                    shift_mm=tuple((tip - last_tip)[:2] / parts),
                    turn_rad=float(spin[2]) / parts,
                    centre_mm=tuple((last_tip + (tip - last_tip) * ((part - 1) / parts))[:2]),
                ),
                dt / parts,
            )
        return self._state(float(tip[2]))

    def render(self, state: ContactState, rng: np.random.Generator | None = None) -> Frame:
        """The camera frame of a state. `rng` draws the noise; the instance's own without one."""
        rng = self._noise if rng is None else rng
        if self.sensor.kind == "taxels":
            return self._render_taxels(self.taxels(state, rng))
        if state.surface.any() or state.at_markers.any():
            return self._render(state.surface, state.at_markers, rng)
        still = self.reference
        return Frame(self.scene.add_noise(still.image, rng), still.mask, still.markers)

    @cached_property
    def reference(self) -> Frame:
        """The frame without contact and without noise."""
        if self.sensor.kind == "taxels":
            return self._render_taxels(self._rest_counts)
        still = np.zeros((3, self.grid.rows, self.grid.columns), np.float32)
        return self._render(still, still, None)

    def mask(
        self,
        state: ContactState | None,
        rng: np.random.Generator | None = None,
        flaws: MaskFlaws | None = None,
    ) -> NDArray[np.bool_]:
        """The marker mask (480, 640) alone, at a third of the cost of a frame; None: no contact.

        `flaws` adds what a segmentation of real frames would do to it; taxels need none.
        """
        rng = self._noise if rng is None else rng
        if self.sensor.kind == "taxels":
            return self.reference.mask if state is None else self.render(state, rng).mask
        if state is None:
            still = np.zeros((3, self.grid.rows, self.grid.columns), np.float32)
            centres, axes = self._project_markers(still)
        else:
            centres, axes = self._project_markers(state.at_markers)
        if flaws is not None:
            found = rng.random(len(centres)) >= flaws.lost
            centres, axes = centres[found], axes[found]
            centres = centres + rng.normal(0, flaws.jitter_px, centres.shape)
            axes = axes * (1 + rng.normal(0, flaws.size_spread, (len(axes), 1, 1)))
            axes = axes * (1 + rng.uniform(-1, 1) * flaws.threshold)
        return draw_mask(centres, axes, self._visible)

    def taxels(self, state: ContactState, rng: np.random.Generator | None = None) -> Array:
        """Raw counts (taxels, 3) int32 of a taxel sensor, row-major from the top left."""
        moved = _sample(state.at_markers, self._probe_cells).mean(axis=1)
        return counts_from(moved.T, self._rest_counts, self._noise if rng is None else rng)

    # --- contact ------------------------------------------------------------------------------

    def _advance(self, tip: Array, turn: Rotation, motion: RigidMotion, dt: float) -> None:
        matrix = turn.as_matrix()

        def surface_over(x: Array, y: Array) -> Array:
            return tool_height(self.indenter, tip, matrix, x, y)

        self.elastomer.step(surface_over, motion, dt)

    def _state(self, tip_z_mm: float) -> ContactState:
        gel = self.elastomer
        return ContactState(
            wrench=gel.wrench * np.array([1, 1, 1, 1e-3, 1e-3, 1e-3]),
            displacement=_sample(gel.displacement, self._field_cells),
            in_contact=gel.in_contact,
            depth_m=max(0.0, -tip_z_mm * 1e-3),
            surface=gel.displacement,
            at_markers=gel.displacement_at(self.sensor.layout.depth_mm),
            pressure_mpa=-gel.traction[2],
        )

    # --- image --------------------------------------------------------------------------------

    def _render(
        self,
        surface: NDArray[np.float32],
        at_markers: NDArray[np.float32],
        noise: np.random.Generator | None,
    ) -> Frame:
        slopes = None
        if surface.any():
            slopes = _sample(self._slopes(surface), self._shade_cells)
        centres, axes = self._project_markers(at_markers)
        drawing = draw_ellipses(centres, axes, self.sensor.optics.blur_px, self._visible)
        image = self.scene.paint(drawing, slopes, noise)
        return Frame(image, mask_of(drawing), centres.astype(np.float32))

    def _slopes(self, surface: NDArray[np.float32]) -> NDArray[np.float32]:
        slope_y, slope_x = np.gradient(surface[2], self.grid.cell_mm)
        return np.stack([slope_x, slope_y])

    def _project_markers(self, at_markers: NDArray[np.float32]) -> tuple[Array, Array]:
        """Pixel centres (N, 2) and axes (N, 2, 2) of the markers carried along by the gel."""
        x, y = self._probes_mm[..., 0], self._probes_mm[..., 1]
        z = np.zeros_like(x)
        pins = self.sensor.kind == "pins"
        if at_markers.any():
            moved = _sample(at_markers, self._probe_cells)
            x, y, z = x + moved[0], y + moved[1], moved[2]
            if pins:
                # A pin stands on the inside of the skin, along its normal: its tip swings with
                # the slope there.
                slopes = _sample(self._slopes(at_markers), self._probe_cells)
                swing = self.sensor.layout.lever_mm * slopes
                x, y = x + swing[0], y + swing[1]
        if pins:  # rigid: the points around a pin's axis move with it
            spokes = self._probes_mm - self._probes_mm[:1]
            x, y, z = (
                x[:1] + spokes[..., 0],
                y[:1] + spokes[..., 1],
                np.broadcast_to(z[:1], x.shape),
            )
        u, v = self.camera.project(x, y, z)
        along = np.stack([u[1] - u[2], v[1] - v[2]], axis=-1)
        across = np.stack([u[3] - u[4], v[3] - v[4]], axis=-1)
        axes = np.stack([along, across], axis=-1)
        axes *= self._radius_mm[:, None, None] / (2 * self._delta_mm)
        return np.stack([u[0], v[0]], axis=-1), axes

    def _render_taxels(self, counts: Array) -> Frame:
        drawn = render_taxels(counts, self._rest_counts, self.sensor.taxels)
        mask = drawn.mask.astype(bool)
        image = np.repeat(mask[..., None] * np.uint8(255), 3, axis=2)
        return Frame(image, mask, np.stack([drawn.x, drawn.y], axis=1))

    def _cells_of(self, x_mm: Array, y_mm: Array) -> tuple[Array, Array]:
        column = x_mm / self.grid.cell_mm + (self.grid.columns - 1) / 2
        row = y_mm / self.grid.cell_mm + (self.grid.rows - 1) / 2
        return column.astype(np.float32), row.astype(np.float32)


def tool_height(
    indenter: Indenter, tip_mm: Array, turn: Array, x_mm: Array, y_mm: Array
) -> NDArray[np.float32]:
    """Sensor-frame z (mm) of the tool's face over points x, y; `turn` is the tool's rotation."""
    flat = np.linalg.inv(turn[:2, :2])
    behind: Any = np.float32(0)
    lean = turn[:2, 2]
    for _ in range(1 if np.abs(lean).max() < 1e-6 else 3):
        # A point of the face lies at tip + turn (X, Y, -behind): fixed point for X, Y.
        dx = x_mm - np.float32(tip_mm[0]) + np.float32(lean[0]) * behind
        dy = y_mm - np.float32(tip_mm[1]) + np.float32(lean[1]) * behind
        tool_x = np.float32(flat[0, 0]) * dx + np.float32(flat[0, 1]) * dy
        tool_y = np.float32(flat[1, 0]) * dx + np.float32(flat[1, 1]) * dy
        behind = indenter.behind_tip(tool_x, tool_y)
    z = tip_mm[2] + turn[2, 0] * tool_x + turn[2, 1] * tool_y - turn[2, 2] * behind
    return z.astype(np.float32)


def _sample(fields: Array, cells: tuple[Array, Array]) -> Array:
    """Bilinear values (n, ...) of fields (n, rows, columns) at fractional cells."""
    stacked = np.ascontiguousarray(np.moveaxis(fields, 0, -1), dtype=np.float32)
    column, row = cells
    flat = cv2.remap(
        stacked,
        column.reshape(column.shape[0], -1),
        row.reshape(row.shape[0], -1),
        cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_REPLICATE,
    )
    return np.moveaxis(flat, -1, 0).reshape(fields.shape[0], *column.shape)
