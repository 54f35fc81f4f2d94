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
UNSET = (0.5, 0.5, 0.5, 1.0)  # MuJoCo's colour of what was given none
HIDDEN_GROUP = 3  # MuJoCo's viewer hides groups 3 and up too


def draw(
    model: Any, data: Any, view: Literal["side", "above"] = "side", size: tuple[int, int] = (300, 400)
) -> np.ndarray:
    """Picture of mjModel `model` in the state of mjData `data`, uint8 (*size, 3). 'side' looks along +y and follows
    the first body; 'above' looks down and fits the whole scene."""
    height, width = size
    right, up, depth_sign = VIEWS[view]
    depth = 3 - right - up
    shapes = _shapes(model, data, "geom")
    if view == "above":
        # point mazes show body and goal as sites
        shapes += _shapes(model, data, "site")
    if not shapes:
        return np.full((height, width, 3), SKY, np.uint8)
    if view == "side":
        centre, scale = np.array([data.xpos[min(1, model.nbody - 1), right], 0.9]), float(PIXELS_PER_METRE)
    else:
        everything = np.concatenate([points[:, [right, up]] for points, _ in shapes])
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
    for points, colour in sorted(shapes, key=lambda shape: depth_sign * shape[0][:, depth].mean()):
        canvas.polygon(pixels(convex_hull(points[:, [right, up]])), fill=colour, outline=OUTLINE)
    return np.asarray(image)


def convex_hull(points: np.ndarray) -> np.ndarray:
    """Corners (H, 2) of the convex hull of (N, 2) points, counter-clockwise (Andrew's monotone chain)."""
    ordered = sorted(map(tuple, _outer(points).tolist()))

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


def _outer(points: np.ndarray) -> np.ndarray:
    """Those of (N, 2) points that may be corners of the hull: of a fine mesh, whose hull takes seconds, some 1 %."""
    if len(points) < 100:
        return points
    furthest = points[np.argmax(points @ _DIRECTIONS.T, axis=0)]
    way = np.roll(furthest, -1, axis=0) - furthest
    offset = points[:, None] - furthest
    left = way[:, 0] * offset[..., 1] - way[:, 1] * offset[..., 0] > 1e-9
    return points[~left[:, np.abs(way).any(axis=1)].all(axis=1)]


def _shapes(model: Any, data: Any, what: Literal["geom", "site"]) -> list[tuple[np.ndarray, tuple[int, int, int]]]:
    """Surface points (N, 3) in the world and colour of every visible geom or site."""
    kinds, sizes, groups = (getattr(model, f"{what}_{name}") for name in ("type", "size", "group"))
    positions, rotations = getattr(data, f"{what}_xpos"), getattr(data, f"{what}_xmat")
    shapes = []
    for n, kind in enumerate(kinds):
        material, rgba = getattr(model, f"{what}_matid")[n], getattr(model, f"{what}_rgba")[n]
        if material >= 0 and np.allclose(rgba, UNSET):  # a colour of its own wins, as in MuJoCo's renderer
            rgba = model.mat_rgba[material]
        if kind in (PLANE, HEIGHT_FIELD) or rgba[3] == 0 or groups[n] >= HIDDEN_GROUP:
            continue
        if kind == MESH:
            mesh = model.geom_dataid[n]
            start, count = model.mesh_vertadr[mesh], model.mesh_vertnum[mesh]
            points = model.mesh_vert[start : start + count].astype(np.float64)
        else:
            points = _surface(kind, sizes[n])
        red, green, blue = (int(255 * value) for value in np.clip(rgba[:3], 0, 1))
        shapes.append((points @ rotations[n].reshape(3, 3).T + positions[n], (red, green, blue)))
    return shapes


def _surface(kind: int, size: np.ndarray) -> np.ndarray:
    """Points (N, 3) on a primitive's surface in its own frame."""
    if kind == BOX:
        return _CORNERS * size
    if kind == CYLINDER:
        return np.concatenate([_RIM * [size[0], size[0], 0] + [0, 0, z] for z in (-size[1], size[1])])
    if kind == CAPSULE:
        return np.concatenate([_BALL * size[0] + [0, 0, z] for z in (-size[1], size[1])])
    return _BALL * (size if kind == ELLIPSOID else size[0])


def _ball(rings: int = 9, around: int = 16) -> np.ndarray:
    latitude, longitude = np.meshgrid(
        np.linspace(-np.pi / 2, np.pi / 2, rings), np.linspace(0, 2 * np.pi, around, endpoint=False)
    )
    return np.stack(
        [np.cos(latitude) * np.cos(longitude), np.cos(latitude) * np.sin(longitude), np.sin(latitude)], -1
    ).reshape(-1, 3)


_BALL = _ball()
_DIRECTIONS = np.stack([np.cos(a := np.linspace(0, 2 * np.pi, 16, endpoint=False)), np.sin(a)], -1)
_RIM = np.stack([np.cos(a := np.linspace(0, 2 * np.pi, 24, endpoint=False)), np.sin(a), np.zeros(24)], -1)
_CORNERS = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], float)
