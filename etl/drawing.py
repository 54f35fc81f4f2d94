"""Pictures of MuJoCo bodies without OpenGL.

    geoms in the world -> points on their surface -> parallel projection -> convex hulls, far to near -> uint8 picture

Every MuJoCo primitive and every mesh hull is convex, so the convex hull of its projected points is its outline.
The picture follows the body's root, has a floor with ticks every half metre, and needs numpy and Pillow only.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from PIL import Image, ImageDraw

PIXELS_PER_METRE = 110
# world axes that point right and up, and the sign that makes the third one grow towards the eye
VIEWS = {"side": (0, 2, -1), "above": (0, 1, 1)}
SKY, FLOOR, TICK, OUTLINE = (196, 214, 232), (120, 124, 118), (90, 94, 90), (40, 40, 48)
PLANE, HEIGHT_FIELD, SPHERE, CAPSULE, ELLIPSOID, CYLINDER, BOX, MESH = range(8)
COLLISION_ONLY_GROUP = 3


def draw(
    model: Any, data: Any, view: Literal["side", "above"] = "side", size: tuple[int, int] = (300, 400)
) -> np.ndarray:
    """Picture of mjModel `model` in the state of mjData `data`, uint8 (*size, 3). 'side' looks along +y and follows
    the first body; 'above' looks down and fits the whole scene."""
    height, width = size
    right, up, depth_sign = VIEWS[view]
    depth = 3 - right - up
    shapes = []
    for geom in range(model.ngeom):
        points = _surface(model, geom)
        if points is None or model.geom_rgba[geom, 3] == 0 or model.geom_group[geom] >= COLLISION_ONLY_GROUP:
            continue
        world = points @ data.geom_xmat[geom].reshape(3, 3).T + data.geom_xpos[geom]
        shapes.append((depth_sign * world[:, depth].mean(), world[:, [right, up]], _colour(model, geom)))
    if not shapes:
        return np.full((height, width, 3), SKY, np.uint8)
    if view == "side":
        centre, scale = np.array([data.xpos[min(1, model.nbody - 1), right], 0.9]), float(PIXELS_PER_METRE)
    else:
        everything = np.concatenate([outline for _, outline, _ in shapes])
        low, high = everything.min(0), everything.max(0)
        centre, scale = (low + high) / 2, 0.95 * float(np.min(np.array([width, height]) / (high - low + 1e-6)))

    def pixels(points: np.ndarray) -> list[tuple[float, float]]:
        offset = (points - centre) * scale
        return [(width / 2 + float(x), height / 2 - float(y)) for x, y in offset]

    image = Image.new("RGB", (width, height), SKY)
    canvas = ImageDraw.Draw(image)
    if view == "side":
        ground = height / 2 + centre[1] * scale
        canvas.rectangle((0, ground, width, height), fill=FLOOR)
        reach = width / 2 / scale
        for tick in np.arange(np.ceil(2 * (centre[0] - reach)), 2 * (centre[0] + reach)):
            x = width / 2 + (tick / 2 - centre[0]) * scale
            canvas.line((x, ground, x - 12, height), fill=TICK, width=3 if tick % 2 == 0 else 1)
    for _, outline, colour in sorted(shapes, key=lambda shape: shape[0]):
        canvas.polygon(pixels(convex_hull(outline)), fill=colour, outline=OUTLINE)
    return np.asarray(image)


def convex_hull(points: np.ndarray) -> np.ndarray:
    """Corners (H, 2) of the convex hull of (N, 2) points, counter-clockwise (Andrew's monotone chain)."""
    ordered = sorted(map(tuple, points.tolist()))

    def chain(sequence: list[tuple[float, float]]) -> list[tuple[float, float]]:
        hull: list[tuple[float, float]] = []
        for p in sequence:
            while len(hull) > 1:
                (ax, ay), (bx, by) = hull[-2], hull[-1]
                if (bx - ax) * (p[1] - ay) - (by - ay) * (p[0] - ax) > 0:
                    break
                hull.pop()
            hull.append(p)
        return hull[:-1] if len(hull) > 1 else hull

    return np.array(chain(ordered) + chain(ordered[::-1]))


def _surface(model: Any, geom: int) -> np.ndarray | None:
    """Points (N, 3) on a geom's surface in its own frame; None for the floor and for terrain."""
    kind, size = int(model.geom_type[geom]), model.geom_size[geom]
    if kind in (PLANE, HEIGHT_FIELD):
        return None
    if kind == MESH:
        mesh = model.geom_dataid[geom]
        start, count = model.mesh_vertadr[mesh], model.mesh_vertnum[mesh]
        return model.mesh_vert[start : start + count].astype(np.float64)
    if kind == BOX:
        return _CORNERS * size
    if kind == CYLINDER:
        return np.concatenate([_RIM * [size[0], size[0], 0] + [0, 0, z] for z in (-size[1], size[1])])
    if kind == CAPSULE:
        return np.concatenate([_BALL * size[0] + [0, 0, z] for z in (-size[1], size[1])])
    return _BALL * (size if kind == ELLIPSOID else size[0])


def _colour(model: Any, geom: int) -> tuple[int, int, int]:
    material = model.geom_matid[geom]
    rgba = model.mat_rgba[material] if material >= 0 else model.geom_rgba[geom]
    red, green, blue = (int(255 * value) for value in np.clip(rgba[:3], 0, 1))
    return red, green, blue


def _ball(rings: int = 9, around: int = 16) -> np.ndarray:
    latitude, longitude = np.meshgrid(
        np.linspace(-np.pi / 2, np.pi / 2, rings), np.linspace(0, 2 * np.pi, around, endpoint=False)
    )
    return np.stack(
        [np.cos(latitude) * np.cos(longitude), np.cos(latitude) * np.sin(longitude), np.sin(latitude)], -1
    ).reshape(-1, 3)


_BALL = _ball()
_RIM = np.stack([np.cos(a := np.linspace(0, 2 * np.pi, 24, endpoint=False)), np.sin(a), np.zeros(24)], -1)
_CORNERS = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], float)
