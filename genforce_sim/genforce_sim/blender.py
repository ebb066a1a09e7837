"""Photoreal frames of the deformed gel, path-traced by Blender (the extra `photo`).

The camera frames of `SimulatedSensor.render` cost milliseconds and are what the live cell and the
data sets use. These cost seconds, and show what the shading model leaves out.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from genforce_collect.errors import ConfigError, DataError
from genforce_sim.optics import HEIGHT_PX, WIDTH_PX
from genforce_sim.sensor import ContactState, SimulatedSensor

Array = NDArray[Any]

# Colour, direction in the sensor's plane and strength (W) of the lamps around a GelSight.
_LAMPS = (
    ((1.0, 0.25, 0.2), (-1.0, 0.0), 3600.0),
    ((0.25, 1.0, 0.3), (0.0, -1.0), 3600.0),
    ((0.25, 0.35, 1.0), (1.0, 0.3), 3600.0),
    ((1.0, 1.0, 1.0), (0.0, 1.0), 2800.0),
)
_AMBIENT = 0.4


def render_photo(
    sensor: SimulatedSensor, state: ContactState, samples: int = 32
) -> NDArray[np.uint8]:
    """The gel of a state as path-traced frame (480, 640, 3) BGR, by an ideal camera.

    Raises `ConfigError` where Blender's module is missing.
    """
    try:
        import bpy
    except ImportError:
        raise ConfigError(
            "photoreal frames need Blender: pip install -r requirements/photo.txt"
        ) from None
    with tempfile.TemporaryDirectory() as folder:
        texture = Path(folder) / "gel.png"
        cv2.imwrite(str(texture), _texture(sensor))
        scene = _scene(bpy, samples)
        scene.collection.objects.link(_gel(bpy, sensor, state, texture))
        _add_lamps(bpy, scene)
        _add_camera(bpy, scene, sensor)
        out = Path(folder) / "frame.png"
        scene.render.filepath = str(out)
        bpy.ops.render.render(write_still=True)
        image = cv2.imread(str(out))
    if image is None:
        raise DataError("Blender wrote no image")
    # The camera looks at the gel from below, where the sensor's x axis points to the left.
    return np.ascontiguousarray(image[:, ::-1], dtype=np.uint8)


def _texture(sensor: SimulatedSensor) -> Array:
    """Gel colour with markers at rest over the solver's grid, y upwards."""
    optics = sensor.sensor.optics
    mask = sensor.reference.mask
    texture = np.where(mask[..., None], np.array(optics.marker_bgr), np.array(optics.gel_bgr))
    return texture.astype(np.uint8)


def _scene(bpy: Any, samples: int) -> Any:
    bpy.ops.wm.read_factory_settings(use_empty=True)
    scene = bpy.context.scene
    scene.render.engine = "CYCLES"
    scene.cycles.device = "CPU"
    scene.cycles.samples = samples
    scene.cycles.use_denoising = False
    scene.render.resolution_x, scene.render.resolution_y = WIDTH_PX, HEIGHT_PX
    scene.view_settings.view_transform = "Standard"
    scene.world = bpy.data.worlds.new("air")
    scene.world.use_nodes = True
    background = scene.world.node_tree.nodes["Background"]
    background.inputs["Strength"].default_value = _AMBIENT
    return scene


def _gel(bpy: Any, sensor: SimulatedSensor, state: ContactState, texture: Path) -> Any:
    grid, gel = sensor.grid, sensor.elastomer
    rows, columns = grid.rows, grid.columns
    at = np.stack([gel.x_mm, gel.y_mm, gel.rest_z_mm]) + state.surface
    corner = np.arange((rows - 1) * columns).reshape(rows - 1, columns)[:, :-1].ravel()
    faces = np.stack([corner, corner + columns, corner + columns + 1, corner + 1], axis=1)
    mesh = bpy.data.meshes.new("gel")
    mesh.from_pydata(at.reshape(3, -1).T.tolist(), [], faces.tolist())
    mesh.shade_smooth()
    scale = sensor.sensor.px_per_mm
    u = (gel.x_mm * scale + WIDTH_PX / 2) / WIDTH_PX
    v = (gel.y_mm * scale + HEIGHT_PX / 2) / HEIGHT_PX
    uv = np.stack([u.ravel(), v.ravel()], axis=1)[faces.ravel()]
    mesh.uv_layers.new(name="rest").data.foreach_set("uv", uv.ravel().astype(np.float32))
    material = bpy.data.materials.new("gel")
    material.use_nodes = True
    nodes, links = material.node_tree.nodes, material.node_tree.links
    picture = nodes.new("ShaderNodeTexImage")
    picture.image = bpy.data.images.load(str(texture))
    picture.extension = "EXTEND"
    surface = nodes["Principled BSDF"]
    surface.inputs["Roughness"].default_value = 0.6
    links.new(picture.outputs["Color"], surface.inputs["Base Color"])
    mesh.materials.append(material)
    return bpy.data.objects.new("gel", mesh)


def _add_lamps(bpy: Any, scene: Any) -> None:
    for colour, (x, y), power in _LAMPS:
        lamp = bpy.data.lights.new("lamp", type="AREA")
        lamp.color, lamp.energy, lamp.size = colour, power, 8.0
        held = bpy.data.objects.new("lamp", lamp)
        held.location = (22 * x, 22 * y, -12.0)
        held.rotation_mode = "QUATERNION"
        # Lamps shine along their -z axis.
        held.rotation_quaternion = (-held.location).to_track_quat("-Z", "Y")
        scene.collection.objects.link(held)


def _add_camera(bpy: Any, scene: Any, sensor: SimulatedSensor) -> None:
    distance = sensor.sensor.optics.camera_distance_mm
    lens = bpy.data.cameras.new("camera")
    lens.angle = 2 * math.atan(WIDTH_PX / sensor.sensor.px_per_mm / 2 / distance)
    camera = bpy.data.objects.new("camera", lens)
    camera.location = (0.0, 0.0, -distance)
    camera.rotation_euler = (0.0, math.pi, 0.0)
    scene.collection.objects.link(camera)
    scene.camera = camera
