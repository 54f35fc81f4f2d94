"""The one way to build a simulator, for recording and for playing.

    EnvironmentSpec -> gymnasium.make -> our preprocessing -> observations {key: array}, ready for etl.tokenizers

MuJoCo bodies give {"observation": float32 (D,)}, gymnasium-robotics tasks their own keys, minigrid's levels
{"direction": int64 (), "image": uint8 (56, 56, 3), "mission": str}, Atari
{"frame": uint8 (84, 84, 1)}: four emulator frames an action, sticky actions with probability 0.25, the maximum of
the last two grey screens, box-filtered to 84x84 (the convention of the DQN-Replay logs, but for the filter's
treatment of pixels that two output pixels share: OpenCV splits them, Pillow gives them to one). Pillow's filter is
integer arithmetic, so a frame has the same bytes on every processor. Episodes are whole (a lost life ends none), up
to 108,000 emulator frames, rewards unclipped. Ids of the old gym and of d4rl are written gym/ID (simulators/oldgym.py).

Invariant: an agent sees in evaluation exactly what the recorder writes into logs, because both call `make`.
"""

from __future__ import annotations

import importlib
import io
import os
import string
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from difflib import get_close_matches
from importlib import metadata
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from PIL import Image

from schemas.episode import ActionSpec, EnvironmentSpec, FieldSpec
from simulators import drawing, gridworld, oldgym, opengl
from simulators.uninterrupted import uninterrupted

FRAME_SIZE = (84, 84)
RESIZED_FRAME = (64, 80)
FRAMES_PER_ACTION = 4
ATARI_MAX_STEPS = 27_000
NOOP_MAX = 30

# where ids come from, and what to install when the module is missing
SUITES = {
    "atari": ("ale_py", "pip install ale-py"),
    "robotics": ("gymnasium_robotics", "pip install gymnasium-robotics"),
    "minigrid": ("minigrid", "pip install minigrid"),
    "mujoco": ("mujoco", "pip install 'gymnasium[mujoco]'"),
    "gymnasium": ("gymnasium", "pip install gymnasium"),
    "gym": ("gym", "pip install 'gym<0.27', and d4rl for its ids"),
}


class SimulatorError(RuntimeError):
    """A simulator cannot be built or drawn; the message names the id and the remedy."""


def environment_spec(environment: str, **kwargs: Any) -> EnvironmentSpec:
    """The spec of a gymnasium id with version, or of gym/ID, its suite looked up. SimulatorError for an unknown id."""
    if environment.startswith(oldgym.PREFIX):
        return EnvironmentSpec("gym", environment, kwargs)
    if environment.startswith("ALE/"):
        suite = "atari"
    elif environment.startswith(("BabyAI-", "MiniGrid-")):
        suite = "minigrid"
        _register(suite)
    else:
        suite = "mujoco"
        if environment not in gymnasium.registry:
            _register("robotics")
            suite = "robotics"
    _require_known(environment, suite)
    return EnvironmentSpec(suite, environment, kwargs)


def make(
    environment: EnvironmentSpec,
    seed: int | None = None,
    render: bool = False,
    inner: Callable[[gymnasium.Env], gymnasium.Env] | None = None,
) -> gymnasium.Env:
    """Build a simulator whose observations are {key: array of one timestep}.

    Atari reads two `kwargs` of its own: `noop_max` (30), the most no-op frames at a reset, and
    `max_episode_steps` (27,000 actions); all else goes to gymnasium.make. With `seed` the simulator is reset once,
    so that later resets without a seed continue from it. `render`: `env.render()` gives the picture of `frame`.
    `inner` wraps the simulator below our preprocessing (a recorder of raw observations).
    SimulatorError for an unknown id, a missing package or arguments that the simulator refuses.
    """
    _register(environment.suite)
    kwargs, own = _split(environment)
    mode = "rgb_array" if render else None
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*is out of date.*", category=DeprecationWarning)
            if environment.suite == "gym":
                raw = oldgym.make(environment.id.removeprefix(oldgym.PREFIX), kwargs)
            else:
                _require_known(environment.id, environment.suite)
                raw = gymnasium.make(environment.id, render_mode=mode, disable_env_checker=True, **kwargs)
    except SimulatorError:
        raise
    except gymnasium.error.DependencyNotInstalled as error:
        raise SimulatorError(f"{environment.id}: {' '.join(map(str, error.args))}") from None
    except Exception as error:  # a simulator's constructor may raise anything
        detail = f"{type(error).__name__}: {error}; check its kwargs {environment.kwargs}"
        raise SimulatorError(f"{environment.id}: {detail}") from error
    raw = inner(raw) if inner else raw
    env: gymnasium.Env
    if environment.suite == "atari":
        env = gymnasium.wrappers.TimeLimit(AtariFrames(raw, own["noop_max"]), own["max_episode_steps"])
    elif environment.suite == "minigrid":
        env = GridFields(raw)
    else:
        env = FloatFields(raw)
    if seed is not None:
        env.reset(seed=seed)
        env.action_space.seed(seed)
    return env


def settings(environment: EnvironmentSpec) -> dict[str, Any]:
    """What `make` plays under, for result rows: arguments, time limit, Atari's protocol. SimulatorError as of it."""
    _register(environment.suite)
    kwargs, own = _split(environment)
    if environment.suite == "atari":
        fixed = {"frameskip": FRAMES_PER_ACTION, "ends_on_life_loss": False, "rewards": "unclipped"}
        return {name: kwargs[name] for name in sorted(set(kwargs) - {"obs_type", "frameskip"})} | own | fixed
    if environment.suite == "gym":
        return kwargs
    _require_known(environment.id, environment.suite)
    return {"max_episode_steps": gymnasium.spec(environment.id).max_episode_steps} | kwargs


def _split(environment: EnvironmentSpec) -> tuple[dict[str, Any], dict[str, Any]]:
    """kwargs of gymnasium.make, and those of our own Atari wrappers, defaults filled in."""
    kwargs = dict(environment.kwargs)
    if environment.suite != "atari":
        return kwargs, {}
    own = {"max_episode_steps": ATARI_MAX_STEPS, "noop_max": NOOP_MAX}
    own |= {name: kwargs.pop(name) for name in own if name in kwargs}
    defaults = {"repeat_action_probability": 0.25, "full_action_space": False, "max_num_frames_per_episode": 0}
    return defaults | kwargs | {"obs_type": "grayscale", "frameskip": 1}, own


class FloatFields(gymnasium.Wrapper):
    """Observations as {key: float32 array}, keys sorted; a plain vector is called "observation"."""

    def __init__(self, env: gymnasium.Env):
        super().__init__(env)
        space = env.observation_space
        fields = dict(space.spaces) if isinstance(space, spaces.Dict) else {"observation": space}
        for key, field in fields.items():
            if not isinstance(field, spaces.Box) or field.dtype.kind != "f":
                raise SimulatorError(
                    f"{_id(env)}: observation '{key}' is {field}, only real-valued arrays are supported"
                )
        self.observation_space = spaces.Dict(
            {key: spaces.Box(-np.inf, np.inf, fields[key].shape, np.float32) for key in sorted(fields)}
        )

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        observation, info = self.env.reset(seed=seed, options=options)
        return self._fields(observation), info

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.env.step(action)
        return self._fields(observation), float(reward), bool(terminated), bool(truncated), info

    def render(self) -> Any:
        return frame(self)

    def _fields(self, observation: Any) -> dict[str, np.ndarray]:
        fields = observation if isinstance(observation, dict) else {"observation": observation}
        return {key: np.asarray(fields[key], np.float32) for key in sorted(fields)}


class GridFields(gymnasium.Wrapper):
    """Minigrid's partial view drawn as a picture, the facing and the mission's text."""

    def __init__(self, env: gymnasium.Env):
        super().__init__(env)
        assert isinstance(env.observation_space, spaces.Dict)
        width, height, _ = env.observation_space["image"].shape or ()
        picture = (height * gridworld.TILE, width * gridworld.TILE, 3)
        self.observation_space = spaces.Dict(
            {
                "direction": spaces.Discrete(4),
                "image": spaces.Box(0, 255, picture, np.uint8),
                "mission": spaces.Text(1024, charset=string.printable),
            }
        )

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        with redirect_stdout(io.StringIO()):  # minigrid prints each level that it draws and throws away
            observation, info = self.env.reset(seed=seed, options=options)
        return self._fields(observation), info

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.env.step(int(action))
        return self._fields(observation), float(reward), bool(terminated), bool(truncated), info

    def render(self) -> Any:
        return frame(self)

    def _fields(self, observation: Any) -> dict[str, Any]:
        view = np.asarray(observation["image"], np.uint8)
        return {
            "direction": np.asarray(observation["direction"], np.int64),
            "image": gridworld.draw(view[None])[0],
            "mission": np.asarray(str(observation["mission"])),
        }


class AtariFrames(gymnasium.Wrapper):
    """Four frames an action, maximum of the last two grey screens, 84x84; rewards summed, not clipped.

    A reset plays 0 to `noop_max` no-ops, their number drawn from the reset's seed. FIRE is the agent's business.
    """

    def __init__(self, env: gymnasium.Env, noop_max: int):
        super().__init__(env)
        self.noop_max = noop_max
        self.observation_space = spaces.Dict({"frame": spaces.Box(0, 255, (*FRAME_SIZE, 1), np.uint8)})
        self._generator = np.random.default_rng()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        if seed is not None:
            self._generator = np.random.default_rng(seed)
        screen, info = self.env.reset(seed=seed, options=options)
        for _ in range(int(self._generator.integers(self.noop_max + 1))):
            screen, _, terminated, truncated, info = self.env.step(0)
            if terminated or truncated:
                screen, info = self.env.reset()
        return self._frame(screen), info

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        total, screens = 0.0, []
        for _ in range(FRAMES_PER_ACTION):
            screen, reward, terminated, truncated, info = self.env.step(int(action))
            screens.append(screen)
            total += float(reward)
            if terminated or truncated:
                break
        return self._frame(np.maximum.reduce(screens[-2:])), total, bool(terminated), bool(truncated), info

    def render(self) -> Any:
        return frame(self)

    def _frame(self, screen: np.ndarray) -> dict[str, np.ndarray]:
        small = Image.fromarray(screen).resize(FRAME_SIZE[::-1], Image.Resampling.BOX)
        return {"frame": np.asarray(small)[..., None]}


def action_spec(env: gymnasium.Env) -> ActionSpec:
    """The action space in our terms. SimulatorError for a space that is neither bounded nor discrete."""
    space = env.action_space
    if isinstance(space, spaces.Discrete):
        return ActionSpec.discrete(int(space.n), int(space.start))
    if isinstance(space, spaces.MultiDiscrete) and space.nvec.ndim == 1:
        return ActionSpec.discrete(space.nvec.tolist(), space.start.tolist())
    if isinstance(space, spaces.Box) and len(space.shape) == 1 and space.is_bounded():
        return ActionSpec.continuous(space.low.tolist(), space.high.tolist())
    raise SimulatorError(f"{_id(env)}: action space {space} is not supported; wrap it into a bounded Box or a Discrete")


def observation_fields(env: gymnasium.Env) -> tuple[FieldSpec, ...]:
    """The fields of one observation, keys in lexicographic order. A text's length is that of the task: 0 here."""
    assert isinstance(env.observation_space, spaces.Dict)
    fields = []
    for key, space in sorted(env.observation_space.spaces.items()):
        shape = space.shape or ()
        if isinstance(space, spaces.Text):
            fields.append(FieldSpec(key, "text", (0,)))
        elif isinstance(space, spaces.Discrete):
            fields.append(FieldSpec(key, "discrete", (), choices=(int(space.n),), start=(int(space.start),)))
        elif isinstance(space, spaces.Box) and space.dtype == np.uint8:
            fields.append(FieldSpec(key, "image", shape, resized=RESIZED_FRAME))
        else:
            fields.append(FieldSpec(key, "continuous", shape))
    return tuple(fields)


def frame(env: gymnasium.Env) -> np.ndarray:
    """A picture of the current state, uint8 (H, W, 3), on any machine.

    Atari: the emulator's colour screen. MuJoCo: our own drawing of the body's geoms, which needs no OpenGL; where
    MUJOCO_GL names a backend and the simulator was made with `render`, MuJoCo's renderer. SimulatorError where
    that backend does not work.
    """
    raw: Any = env.unwrapped
    if hasattr(raw, "ale"):
        return raw.ale.getScreenRGB()
    if hasattr(raw, "get_frame"):  # minigrid draws itself
        return raw.get_frame(tile_size=24)
    if os.environ.get("MUJOCO_GL") and raw.render_mode == "rgb_array":
        try:
            return np.asarray(raw.render())
        except Exception as error:
            backend = os.environ["MUJOCO_GL"]
            raise SimulatorError(
                f"{_id(env)}: MUJOCO_GL={backend} cannot render here ({type(error).__name__}); "
                "unset MUJOCO_GL to get the drawing that needs no OpenGL"
            ) from error
    # mazes keep the body in a simulator of its own
    raw = raw if hasattr(raw, "model") else next((part for part in vars(raw).values() if hasattr(part, "model")), None)
    if raw is None:
        raise SimulatorError(f"{_id(env)}: neither Atari, minigrid nor a MuJoCo body, so there is no picture of it")
    return drawing.draw(raw.model, raw.data, view="above" if "Maze" in _id(env) else "side")


def versions() -> dict[str, str]:
    """Installed versions of what decides a simulator's behaviour."""
    found = {}
    for package in ("gymnasium", "mujoco", "ale-py", "gymnasium-robotics", "minigrid", "gym", "d4rl", "mujoco-py"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _register(suite: str) -> None:
    """Import what provides a suite's ids. SimulatorError names the package to install."""
    if suite not in SUITES:
        raise SimulatorError(f"unknown suite '{suite}'; known: {', '.join(sorted(SUITES))}")
    module, remedy = SUITES[suite]
    try:
        with uninterrupted():
            gymnasium.register_envs(opengl.import_module(module))
    except ImportError as error:
        raise SimulatorError(f"suite '{suite}' needs the package {module} ({error}); {remedy}") from None
    if suite == "atari":
        ale_py = importlib.import_module(module)
        ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)


def _require_known(environment: str, suite: str) -> None:
    if suite == "atari":
        _register(suite)
    if environment in gymnasium.registry:
        return
    near = get_close_matches(environment, gymnasium.registry, n=3, cutoff=0.4)
    if not near:
        near = get_close_matches(f"ALE/{environment}", gymnasium.registry, n=3, cutoff=0.4)
    examples = ", ".join(near) or "Hopper-v4"
    raise SimulatorError(f"unknown environment '{environment}'; use a gymnasium id with its version, e.g. {examples}")


def _id(env: gymnasium.Env) -> str:
    return env.spec.id if env.spec else type(env.unwrapped).__name__
