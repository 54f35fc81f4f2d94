"""Importing what would draw with OpenGL, where nothing may be drawn.

    MUJOCO_GL=osmesa, no OSMesa -> import mujoco raises -> import it again without a backend
    import glfw, which gymnasium's bodies do -> PYGLFW_LIBRARY -> loaded by name

mujoco imports its backend at once, though only its own renderer needs one. glfw asks an interpreter that it starts for
the version of each library it finds; an interrupt in that moment leaves its traceback on the terminal.

Invariant: a missing backend fails where a picture is drawn with it, never in an import; an import starts no process.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from pathlib import Path
from types import ModuleType

VARIABLE = "MUJOCO_GL"
GLFW = "PYGLFW_LIBRARY"


def name_glfw() -> None:
    """Have glfw load the library of its own wheel, unless the user named one or the wheel has none."""
    found = importlib.util.find_spec("glfw")
    if found is None or found.origin is None or os.environ.get(GLFW):
        return
    usual = "wayland" if os.environ.get("XDG_SESSION_TYPE") == "wayland" else "x11"
    variant = os.environ.get("PYGLFW_LIBRARY_VARIANT", "").lower()
    library = Path(found.origin).parent / (variant if variant in ("x11", "wayland") else usual) / "libglfw.so"
    if library.is_file():
        os.environ[GLFW] = str(library)


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
