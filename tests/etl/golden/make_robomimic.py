"""Writes the raw demonstrations of which robomimic's own scripts made this folder's robomimic-lift.hdf5.xz.

    pip install robomimic==0.3.0 robosuite==1.4.1 mujoco==3.2.7, which the project does not need
    python make_robomimic.py raw.hdf5, then of robomimic.scripts, each by python -m:
    conversion.convert_robosuite --dataset raw.hdf5
    dataset_states_to_obs --dataset raw.hdf5 --output_name lift.hdf5 --done_mode 2 --exclude-next-obs
    split_train_val --dataset lift.hdf5 --ratio 0.25

Invariant: the actions are those of `actions`, which the tests draw again; what is seen is the simulator's.
"""

from __future__ import annotations

import json
import sys

import numpy as np

LENGTHS = (6, 9, 5, 7)
VALID = 3  # what split_train_val drew


def actions() -> list[np.ndarray]:
    """(T, 7) of each demo, in [-1, 1]."""
    rng = np.random.default_rng(0)
    return [np.stack([rng.uniform(-1, 1, 7) for _ in range(T)]) for T in LENGTHS]


def main() -> None:
    import h5py
    import robosuite
    from robosuite import load_controller_config

    about = {"robots": "Panda", "env_configuration": "default"}
    about["controller_configs"] = load_controller_config(default_controller="OSC_POSE")
    blind = {"has_renderer": False, "has_offscreen_renderer": False, "use_camera_obs": False, "ignore_done": True}
    env = robosuite.make("Lift", reward_shaping=True, control_freq=20, **blind, **about)
    with h5py.File(sys.argv[1], "w") as file:
        data = file.create_group("data")
        data.attrs["env"], data.attrs["repository_version"] = "Lift", robosuite.__version__
        data.attrs["date"], data.attrs["time"] = "1", "1"
        data.attrs["env_info"] = json.dumps(about | {"env_name": "Lift"})
        for number, taken in enumerate(actions()):
            env.reset()
            demo, states = data.create_group(f"demo_{number}"), []
            demo.attrs["model_file"] = env.sim.model.get_xml()
            for action in taken:
                states.append(env.sim.get_state().flatten())
                env.step(action)
            demo["states"], demo["actions"] = np.array(states), taken


if __name__ == "__main__":
    main()
