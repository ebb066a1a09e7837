"""Moving-least-squares material point method for a gel under a rigid indenter, in Taichi.

Hu et al. (2018), quadratic B-splines, compressible neo-Hookean solid. Contact is a penalty on the
particles of the surface, so that it acts where the surface is and not a grid cell earlier.
Units: mm, s, tonne, N, MPa. Import through `genforce_sim.mpm`, which explains a missing Taichi.
"""

# Taichi compiles these functions; most annotations on them would mean something else to it.
# mypy: disable-error-code="no-untyped-def"

import math

import numpy as np
import taichi as ti

DENSITY = 1.0e-9  # t/mm^3, silicone
COURANT = 0.3
MARGIN_CELLS = 3


@ti.data_oriented
class MpmSolid:
    """A block of width x height x thickness mm, bonded at z = -thickness, surface at z = 0."""

    def __init__(
        self,
        size_mm: tuple[float, float, float],
        cell_mm: float,
        modulus_mpa: float,
        poisson: float,
        friction: float,
        heights_mm: np.ndarray,
        sample_mm: float,
        grid_cells: int | None = None,
    ) -> None:
        """`grid_cells`: a cube of so many nodes a side instead of one that fits the gel."""
        spacing = cell_mm / 2
        counts = [round(length / spacing) for length in size_mm]
        axes = [(np.arange(n) + 0.5) * spacing - n * spacing / 2 for n in counts[:2]]
        depth = -(np.arange(counts[2]) + 0.5) * spacing
        start = np.stack(np.meshgrid(*axes, depth, indexing="ij"), axis=-1).reshape(-1, 3)
        self.start_mm = start.astype(np.float32)
        self.surface = np.flatnonzero(start[:, 2] > -0.75 * spacing)
        self.lame_mu = modulus_mpa / (2 * (1 + poisson))
        self.lame_lambda = modulus_mpa * poisson / ((1 + poisson) * (1 - 2 * poisson))
        wave = math.sqrt((self.lame_lambda + 2 * self.lame_mu) / DENSITY)
        self.dt_s = COURANT * cell_mm / wave
        # As stiff as the inertia of a particle allows, stiffer than the gel by far.
        self.penalty = DENSITY * spacing**3 / self.dt_s**2
        self.friction = friction
        self.damping = 0.5 * wave / size_mm[2]
        self.cell_mm, self.spacing = cell_mm, spacing
        self.low = np.array([*(-np.array(size_mm[:2]) / 2), -size_mm[2]]) - MARGIN_CELLS * cell_mm
        self.low_x, self.low_y, self.low_z = (float(value) for value in self.low)
        self.base_z = -float(size_mm[2])
        shape = [round(length / cell_mm) + 2 * MARGIN_CELLS + 1 for length in size_mm]
        if grid_cells is not None:
            shape = [grid_cells] * 3

        count = len(start)
        self.x = ti.Vector.field(3, ti.f32, count)
        self.v = ti.Vector.field(3, ti.f32, count)
        self.c = ti.Matrix.field(3, 3, ti.f32, count)
        self.f = ti.Matrix.field(3, 3, ti.f32, count)
        self.slip = ti.Vector.field(3, ti.f32, count)  # stretch of the friction springs, mm
        self.is_surface = ti.field(ti.i32, count)
        self.momentum = ti.Vector.field(3, ti.f32, shape)
        self.mass = ti.field(ti.f32, shape)
        self.heights = ti.field(ti.f32, heights_mm.shape)
        self.force = ti.Vector.field(3, ti.f32, ())
        self.heights.from_numpy(heights_mm.astype(np.float32))
        self.sample_mm = sample_mm
        flags = np.zeros(count, np.int32)
        flags[self.surface] = 1
        self.is_surface.from_numpy(flags)
        self.reset()

    def reset(self) -> None:
        """Back to the undeformed gel at rest."""
        self.x.from_numpy(self.start_mm)
        self.v.fill(0)
        self.c.fill(0)
        self.slip.fill(0)
        self.f.from_numpy(np.tile(np.eye(3, dtype=np.float32), (len(self.start_mm), 1, 1)))

    @ti.func
    def height_behind_tip(self, x, y):
        n = ti.static(self.heights.shape[0])
        i = x / self.sample_mm + (n - 1) / 2
        j = y / self.sample_mm + (n - 1) / 2
        i0 = ti.max(0, ti.min(n - 2, int(ti.floor(i))))
        j0 = ti.max(0, ti.min(n - 2, int(ti.floor(j))))
        a = ti.max(0.0, ti.min(1.0, i - i0))
        b = ti.max(0.0, ti.min(1.0, j - j0))
        low = (1 - a) * self.heights[j0, i0] + a * self.heights[j0, i0 + 1]
        high = (1 - a) * self.heights[j0 + 1, i0] + a * self.heights[j0 + 1, i0 + 1]
        return (1 - b) * low + b * high

    @ti.func
    def contact_force(self, p, tip, tip_velocity):
        # The tool's y axis is opposite to the sensor's (tool turned by pi about x).
        x, y = self.x[p][0] - tip[0], tip[1] - self.x[p][1]
        top = self.x[p][2] + self.f[p][2, 2] * self.spacing / 2
        depth = top - (tip[2] + self.height_behind_tip(x, y))
        force = ti.Vector([0.0, 0.0, 0.0])
        if depth > 0:
            d = self.sample_mm
            slope_x = (self.height_behind_tip(x + d, y) - self.height_behind_tip(x - d, y)) / (
                2 * d
            )
            slope_y = (self.height_behind_tip(x, y - d) - self.height_behind_tip(x, y + d)) / (
                2 * d
            )
            normal = ti.Vector([slope_x, slope_y, -1.0]).normalized()
            # Along the normal the surfaces overlap by less than along z.
            push = self.penalty * depth * -normal[2]
            # Coulomb: a tangential spring of the same stiffness, which slips at its limit.
            slide = self.v[p] - tip_velocity
            spring = self.slip[p] + self.dt_s * (slide - slide.dot(normal) * normal)
            reach = self.friction * push / self.penalty
            if spring.norm() > reach:
                spring *= reach / spring.norm()
            self.slip[p] = spring
            force = push * normal - self.penalty * spring
        else:
            self.slip[p] = ti.Vector([0.0, 0.0, 0.0])
        return force

    @ti.kernel
    def substep(
        self,
        tip_x: ti.f32,
        tip_y: ti.f32,
        tip_z: ti.f32,
        velocity_x: ti.f32,
        velocity_y: ti.f32,
        velocity_z: ti.f32,
    ):
        tip = ti.Vector([tip_x, tip_y, tip_z])
        tip_velocity = ti.Vector([velocity_x, velocity_y, velocity_z])
        low = ti.Vector([self.low_x, self.low_y, self.low_z])
        volume = self.spacing**3
        particle_mass = DENSITY * volume
        inv = 1.0 / self.cell_mm
        for node in ti.grouped(self.mass):
            self.mass[node] = 0.0
            self.momentum[node] = ti.Vector([0.0, 0.0, 0.0])
        self.force[None] = ti.Vector([0.0, 0.0, 0.0])
        for p in self.x:
            self.f[p] = (ti.Matrix.identity(ti.f32, 3) + self.dt_s * self.c[p]) @ self.f[p]
            stretch = self.f[p].determinant()
            left = self.f[p] @ self.f[p].transpose()
            kirchhoff = self.lame_mu * (left - ti.Matrix.identity(ti.f32, 3))
            kirchhoff += self.lame_lambda * ti.log(stretch) * ti.Matrix.identity(ti.f32, 3)
            affine = particle_mass * self.c[p] - self.dt_s * volume * 4 * inv * inv * kirchhoff
            impulse = particle_mass * self.v[p]
            if self.is_surface[p] == 1:
                force = self.contact_force(p, tip, tip_velocity)
                impulse += self.dt_s * force
                self.force[None] += force
            at = (self.x[p] - low) * inv
            base = (at - 0.5).cast(int)
            fx = at - base
            w = [0.5 * (1.5 - fx) ** 2, 0.75 - (fx - 1.0) ** 2, 0.5 * (fx - 0.5) ** 2]
            for i, j, k in ti.static(ti.ndrange(3, 3, 3)):
                offset = ti.Vector([i, j, k])
                weight = w[i][0] * w[j][1] * w[k][2]
                self.momentum[base + offset] += weight * (
                    impulse + affine @ ((offset - fx) * self.cell_mm)
                )
                self.mass[base + offset] += weight * particle_mass
        for node in ti.grouped(self.mass):
            if self.mass[node] > 0:
                self.momentum[node] *= (1 - self.damping * self.dt_s) / self.mass[node]
                if self.low_z + node[2] * self.cell_mm < self.base_z + 1e-4:
                    self.momentum[node] = ti.Vector([0.0, 0.0, 0.0])
        for p in self.x:
            at = (self.x[p] - low) * inv
            base = (at - 0.5).cast(int)
            fx = at - base
            w = [0.5 * (1.5 - fx) ** 2, 0.75 - (fx - 1.0) ** 2, 0.5 * (fx - 0.5) ** 2]
            v = ti.Vector([0.0, 0.0, 0.0])
            c = ti.Matrix.zero(ti.f32, 3, 3)
            for i, j, k in ti.static(ti.ndrange(3, 3, 3)):
                offset = ti.Vector([i, j, k])
                weight = w[i][0] * w[j][1] * w[k][2]
                node_v = self.momentum[base + offset]
                v += weight * node_v
                c += 4 * inv * weight * node_v.outer_product(offset - fx)
            self.v[p], self.c[p] = v, c
            self.x[p] += self.dt_s * v
