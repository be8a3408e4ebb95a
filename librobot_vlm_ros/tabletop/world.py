"""The bodies of the tabletop world and its camera, rendered with PyBullet's software renderer.

PyBullet is optional (its wheels stop at Python 3.11): nothing outside this module and its callers
in this package needs it, and importing this module does not import it. Meshes and textures are
those that the ``pybullet`` wheel itself carries; nothing of them is shipped with this package.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

from librobot_vlm_ros.tabletop.labels import COLOURS

TABLE_TOP = 0.625  # metres, of pybullet_data's table.urdf
_HIDDEN = (0.0, 0.0, -50.0)


@dataclass(frozen=True)
class Shape:
    """How a kind is built: a mesh of pybullet_data with its scale, or a primitive."""

    mesh: str | None
    scale: tuple[float, float, float]
    texture: str | None = None
    rgba: tuple[float, float, float, float] | None = None
    #: rest poses as (roll, pitch) in radians, with the weight of each
    rests: tuple[tuple[float, float, float], ...] = ((0.0, 0.0, 1.0),)
    round: bool = False  # may be turned any way (a ball)


_HALF = math.pi / 2
SHAPES: dict[str, Shape] = {
    "cube": Shape(None, (0.062, 0.062, 0.062)),
    "ball": Shape(None, (0.072, 0.072, 0.072), round=True),
    "cylinder": Shape(None, (0.046, 0.046, 0.105), rests=((0, 0, 0.7), (_HALF, 0, 0.3))),
    "lego brick": Shape("lego/lego.obj", (0.27,) * 3, rests=((_HALF, 0, 1.0),)),
    "mug": Shape("objects/mug.obj", (0.95,) * 3, rgba=(0.93, 0.92, 0.88, 1), rests=((0, 0, 1.0),)),
    "duck": Shape("duck.obj", (0.062,) * 3, "duckCM.png", rests=((_HALF, 0, 1.0),)),
    "teddy bear": Shape(
        "teddy2_VHACD_CHs.obj", (0.125,) * 3, rgba=(0.55, 0.33, 0.16, 1), rests=((_HALF, 0, 1.0),)
    ),
    "soccer ball": Shape("soccerball.obj", (0.085,) * 3, "colors16.png", round=True),
    "jenga block": Shape(
        "jenga/jenga.obj",
        (0.12, 0.042, 0.03),
        "jenga/jenga.png",
        rests=((0, 0, 0.7), (_HALF, 0, 0.3)),
    ),
    "domino": Shape(
        "domino/domino.obj", (2.1,) * 3, "domino/domino.jpg", rests=((_HALF, 0, 0.6), (0, 0, 0.4))
    ),
}


@dataclass(frozen=True)
class Camera:
    """A pinhole camera looking at a point of the table; angles in degrees, lengths in metres."""

    target: tuple[float, float, float]
    distance: float
    yaw: float
    pitch: float
    roll: float
    fov: float


@dataclass(frozen=True)
class Light:
    """Light of the renderer: direction to the light, colour, and the Phong coefficients."""

    direction: tuple[float, float, float]
    colour: tuple[float, float, float]
    ambient: float
    diffuse: float
    specular: float
    shadow: bool


@dataclass(frozen=True)
class Pose:
    """Where a body stands: its base on the table at (x, y) metres, turned by ``euler`` radians."""

    x: float
    y: float
    euler: tuple[float, float, float]


@dataclass(frozen=True)
class Rendering:
    """rgb uint8 [H, W, 3], depth float32 [H, W] in metres, body int32 [H, W], -1 for none."""

    rgb: np.ndarray
    depth: np.ndarray
    body: np.ndarray


def solid(
    kind: str, size: tuple[float, float, float], steps: int = 28
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Vertices [N, 3], normals [N, 3], triangles [M, 3] of a cube, ball or cylinder of ``size``."""
    patches: list[tuple[np.ndarray, np.ndarray]] = []  # grids of points and of their normals
    turn = np.linspace(0, 2 * math.pi, steps + 1)
    if kind == "cube":
        grid = np.array([[[-1, -1], [-1, 1]], [[1, -1], [1, 1]]], float)
        for axis in range(3):
            for sign in (-1.0, 1.0):
                face = np.full((2, 2, 3), sign)
                face[..., [(axis + 1) % 3, (axis + 2) % 3]] = grid
                normal = np.zeros((2, 2, 3))
                normal[..., axis] = sign
                patches.append((face / 2, normal))
    elif kind == "ball":
        rise = np.linspace(-math.pi / 2, math.pi / 2, steps // 2 + 1)[:, None]
        up = np.sin(rise) * np.ones_like(turn)
        normal = np.stack([np.cos(rise) * np.cos(turn), np.cos(rise) * np.sin(turn), up], axis=-1)
        patches.append((normal / 2, normal))
    else:
        ring = np.stack([np.cos(turn), np.sin(turn), np.zeros_like(turn)], axis=-1)
        up = np.array([0.0, 0.0, 1.0])
        patches.append((np.stack([ring - up, ring + up]) / 2, np.stack([ring, ring])))
        for sign in (-1.0, 1.0):
            cap = np.stack([np.zeros_like(ring) + sign * up, ring + sign * up]) / 2
            patches.append((cap, np.zeros_like(cap) + sign * up))
    vertices, normals, faces, base = [], [], [], 0
    for points, normal in patches:
        rows, columns = points.shape[:2]
        index = base + np.arange(rows * columns).reshape(rows, columns)
        a, b, c, d = (
            q.ravel() for q in (index[:-1, :-1], index[:-1, 1:], index[1:, :-1], index[1:, 1:])
        )
        triangles = np.concatenate([np.stack([a, b, c], 1), np.stack([b, d, c], 1)])
        flat, flat_normal = points.reshape(-1, 3), normal.reshape(-1, 3)
        corner = flat[triangles - base]
        facing = np.cross(corner[:, 1] - corner[:, 0], corner[:, 2] - corner[:, 0])
        inward = (facing * flat_normal[triangles - base].mean(1)).sum(1) < 0
        triangles[inward] = triangles[inward][:, ::-1]
        vertices.append(flat)
        normals.append(flat_normal)
        faces.append(triangles)
        base += rows * columns
    return np.concatenate(vertices) * np.array(size), np.concatenate(normals), np.concatenate(faces)


@cache
def _points(kind: str, data: Path) -> np.ndarray:
    shape = SHAPES[kind]
    if shape.mesh is None:
        return solid(kind, shape.scale)[0]
    with open(data / shape.mesh, encoding="utf-8", errors="replace") as lines:
        rows = [line.split()[1:4] for line in lines if line.startswith("v ")]
    points: np.ndarray = np.array(rows, dtype=np.float64) * np.array(shape.scale)
    return points


def shape_extent(
    kind: str, euler: tuple[float, float, float], data: Path
) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper corner [3] of the kind turned by ``euler``, around its own origin, metres."""
    points = Rotation.from_euler("xyz", euler).apply(_points(kind, data))
    return points.min(0), points.max(0)


class World:
    """A PyBullet client with the table, the arm and any number of objects.

    Raises ImportError, with the line that installs it, where PyBullet is missing.
    """

    def __init__(self, width: int = 320, height: int = 240) -> None:
        try:
            import pybullet
            import pybullet_data
            from pybullet_utils import bullet_client
        except ImportError as error:
            raise ImportError(
                "rendering the tabletop needs PyBullet (wheels up to Python 3.11): "
                "pip install 'librobot-vlm-ros[tabletop]'"
            ) from error
        self._bullet: Any = bullet_client.BulletClient(connection_mode=pybullet.DIRECT)
        self._pb = pybullet
        self.data = Path(pybullet_data.getDataPath())
        self._bullet.setAdditionalSearchPath(str(self.data))
        self.width, self.height = width, height
        self._textures: dict[str, int] = {}
        self._pool: dict[str, list[int]] = {}
        self._used: dict[str, int] = {}
        self.plane = self._bullet.loadURDF("plane.urdf")
        self.table = self._bullet.loadURDF("table/table.urdf", useFixedBase=1)
        self.mat = self._box((0.5, 0.4, 0.001))
        self.arm: int | None = None

    def _box(self, half: tuple[float, float, float]) -> int:
        visual = self._bullet.createVisualShape(self._pb.GEOM_BOX, halfExtents=half)
        return int(self._bullet.createMultiBody(0, -1, visual, _HIDDEN))

    def _stand(
        self,
        body: int,
        position: tuple[float, float, float] = _HIDDEN,
        euler: tuple[float, float, float] = (0.0, 0.0, 0.0),
    ) -> None:
        """Put a body somewhere; out of sight without a position."""
        turn = self._bullet.getQuaternionFromEuler(euler)
        self._bullet.resetBasePositionAndOrientation(body, position, turn)

    def _texture(self, name: str) -> int:
        if name not in self._textures:
            self._textures[name] = self._bullet.loadTexture(str(self.data / name))
        return self._textures[name]

    def _create(self, kind: str) -> int:
        shape, pb = SHAPES[kind], self._pb
        if shape.mesh is not None:
            visual = self._bullet.createVisualShape(
                pb.GEOM_MESH, fileName=str(self.data / shape.mesh), meshScale=shape.scale,
                rgbaColor=shape.rgba or (1, 1, 1, 1),
            )  # fmt: skip
        else:
            # The renderer's own sphere and cylinder are coarse and shaded alike; these are not.
            vertices, normals, faces = solid(kind, shape.scale)
            visual = self._bullet.createVisualShape(
                pb.GEOM_MESH, vertices=vertices.tolist(), normals=normals.tolist(),
                indices=faces.ravel().tolist(), uvs=[[0.0, 0.0]] * len(vertices),
            )  # fmt: skip
        body = int(self._bullet.createMultiBody(0, -1, visual, _HIDDEN))
        if shape.texture is not None:
            self._bullet.changeVisualShape(body, -1, textureUniqueId=self._texture(shape.texture))
        return body

    def clear(self) -> None:
        """Put every object, the mat and the clutter out of sight."""
        for bodies in self._pool.values():
            for body in bodies:
                self._stand(body)
        self._stand(self.mat)
        if self.arm is not None:
            self._bullet.removeBody(self.arm)
            self.arm = None
        self._used.clear()

    def _next_body(self, pool: str, create: Any) -> int:
        index = self._used.get(pool, 0)
        bodies = self._pool.setdefault(pool, [])
        if index == len(bodies):
            bodies.append(create())
        self._used[pool] = index + 1
        return bodies[index]

    def place(self, kind: str, colour: str | None, pose: Pose, tint: float = 1.0) -> int:
        """Stand an object on the table; returns its body number. ``tint`` scales its brightness."""
        body = self._next_body(kind, lambda: self._create(kind))
        low, _ = shape_extent(kind, pose.euler, self.data)
        self._stand(body, (pose.x, pose.y, TABLE_TOP + 0.001 - float(low[2])), pose.euler)
        base = COLOURS[colour] if colour is not None else (SHAPES[kind].rgba or (1, 1, 1, 1))[:3]
        rgba = [min(1.0, channel * tint) for channel in base] + [1.0]
        self._bullet.changeVisualShape(body, -1, rgbaColor=rgba)
        return body

    def hide_last(self, kind: str, body: int) -> None:
        """Put the object placed last of its kind out of sight again."""
        self._stand(body)
        self._used[kind] -= 1

    def place_slab(
        self, size: tuple[float, float, float], xy: tuple[float, float], yaw: float,
        rgb: tuple[float, float, float],
    ) -> None:  # fmt: skip
        """Lay an unlabelled box (clutter) of ``size`` metres on the table."""
        key = "slab " + ",".join(f"{side:.3f}" for side in size)
        half = (size[0] / 2, size[1] / 2, size[2] / 2)
        body = self._next_body(key, lambda: self._box(half))
        self._stand(body, (*xy, TABLE_TOP + 0.0015 + half[2]), (0, 0, yaw))
        self._bullet.changeVisualShape(body, -1, rgbaColor=(*rgb, 1.0))

    def dress(
        self, table_rgb: tuple[float, float, float], floor_rgb: tuple[float, float, float],
        mat_rgb: tuple[float, float, float] | None,
    ) -> None:  # fmt: skip
        """Tint table and floor, and lay a mat of a colour on the table (None for no mat)."""
        for link in range(-1, self._bullet.getNumJoints(self.table)):
            self._bullet.changeVisualShape(self.table, link, rgbaColor=(*table_rgb, 1.0))
        self._bullet.changeVisualShape(self.plane, -1, rgbaColor=(*floor_rgb, 1.0))
        if mat_rgb is not None:
            self._stand(self.mat, (0, 0, TABLE_TOP))
            self._bullet.changeVisualShape(self.mat, -1, rgbaColor=(*mat_rgb, 1.0))

    def place_arm(self, base: tuple[float, float, float], yaw: float, joints: list[float]) -> None:
        """Mount the Panda arm with its base at (x, y, z) metres and seven joint angles, radians."""
        turn = self._bullet.getQuaternionFromEuler((0, 0, yaw))
        self.arm = self._bullet.loadURDF("franka_panda/panda.urdf", base, turn, useFixedBase=1)
        for index, angle in enumerate(joints):
            self._bullet.resetJointState(self.arm, index, angle)

    def matrices(self, camera: Camera) -> tuple[list[float], list[float]]:
        """View and projection matrix of a camera, 16 floats each, column-major as OpenGL's."""
        view = self._bullet.computeViewMatrixFromYawPitchRoll(
            camera.target, camera.distance, camera.yaw, camera.pitch, camera.roll, 2
        )
        projection = self._bullet.computeProjectionMatrixFOV(
            camera.fov, self.width / self.height, 0.05, 6.0
        )
        return view, projection

    def project(self, camera: Camera, points: np.ndarray) -> np.ndarray:
        """World points [N, 3] in metres to pixels [N, 2] of the image (origin top left)."""
        view, projection = (np.array(m).reshape(4, 4).T for m in self.matrices(camera))
        homogeneous = np.concatenate([points, np.ones((len(points), 1))], axis=1)
        clip = (projection @ view @ homogeneous.T).T
        ndc = clip[:, :2] / np.maximum(clip[:, 3:4], 1e-6)
        return np.stack(
            [(ndc[:, 0] + 1) / 2 * self.width, (1 - ndc[:, 1]) / 2 * self.height], axis=1
        )

    def render(self, camera: Camera, light: Light) -> Rendering:
        """Render what stands on the table."""
        view, projection = self.matrices(camera)
        _, _, rgba, depth, body = self._bullet.getCameraImage(
            self.width, self.height, view, projection, shadow=int(light.shadow),
            lightDirection=light.direction, lightColor=light.colour, lightDistance=2.0,
            lightAmbientCoeff=light.ambient, lightDiffuseCoeff=light.diffuse,
            lightSpecularCoeff=light.specular, renderer=self._pb.ER_TINY_RENDERER,
        )  # fmt: skip
        size = (self.height, self.width)
        near, far = 0.05, 6.0
        buffer = np.asarray(depth, dtype=np.float32).reshape(size)
        metres = far * near / (far - (far - near) * buffer)
        rgb = np.asarray(rgba, dtype=np.uint8).reshape(*size, 4)[..., :3].copy()
        return Rendering(rgb, metres, np.asarray(body, dtype=np.int32).reshape(size))
