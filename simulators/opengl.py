"""Importing MuJoCo where MUJOCO_GL names an OpenGL backend that this machine lacks.

    MUJOCO_GL=osmesa, no OSMesa -> import mujoco raises -> import it again without a backend

mujoco imports its backend at once, though only its own renderer needs one. Invariant: a missing backend fails where a
picture is drawn with it, never in an import.
"""

from __future__ import annotations

import importlib
import os
from types import ModuleType

VARIABLE = "MUJOCO_GL"


def import_module(name: str) -> ModuleType:
    """Import a package that may import mujoco. ImportError, or what the package itself raises, where OpenGL is not the
    reason."""
    backend = os.environ.get(VARIABLE)
    try:
        return importlib.import_module(name)
    except Exception:
        if not backend:
            raise
        os.environ[VARIABLE] = "disable"
        try:
            return importlib.import_module(name)
        finally:
            os.environ[VARIABLE] = backend
