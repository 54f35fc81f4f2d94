"""The shipped weights in a loop of your own: one environment, then several that start together; prints returns.

    python -m examples.own_loop --task hopper-medium-v4 --episodes 3 --steps 1000

Only gymnasium and `gato.load` are used: any code that gives observations and takes actions can replace gymnasium.
"""

import argparse

import gymnasium
import numpy as np

import gato


def play_one(agent, env, steps, seed):
    """One episode in one environment; its return."""
    observation, _ = env.reset(seed=seed)
    agent.reset(seed=seed)  # at the start of every episode
    total = 0.0
    for _ in range(steps):
        observation, reward, terminated, truncated, _ = env.step(agent.act(observation))
        total += float(reward)
        if terminated or truncated:
            break
    return total


def play_batch(agent, envs, steps, seed):
    """One episode in each of B environments, asked for B actions at once; returns (B,)."""
    seeds = [seed + n for n in range(len(envs))]
    observations = np.stack([env.reset(seed=one)[0] for env, one in zip(envs, seeds)])  # (B, ...)
    agent.reset(batch=len(envs), seed=seeds)
    totals, active = np.zeros(len(envs)), np.ones(len(envs), bool)
    for _ in range(steps):
        actions = agent.act(observations, active=active)  # (B, A)
        for n in np.flatnonzero(active):  # ended ones keep their last observation, and are left alone
            observations[n], reward, terminated, truncated, _ = envs[n].step(actions[n])
            totals[n] += reward
            active[n] = not (terminated or truncated)
        if not active.any():
            break
    return totals


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="a shipped name, the folder of an export, or its URL")
    parser.add_argument("--task", default="hopper-medium-v4")
    parser.add_argument("--episodes", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1000, help="at most, per episode")
    options = parser.parse_args()

    agent = gato.load(options.model).agent(options.task)
    assert agent.task.environment is not None  # it is None where the logs named no environment
    envs = [gymnasium.make(agent.task.environment.id) for _ in range(options.episodes)]
    for seed in range(options.episodes):
        print(f"alone, seed {seed}: return {play_one(agent, envs[0], options.steps, seed):.1f}")
    for seed, total in enumerate(play_batch(agent, envs, options.steps, 0)):
        print(f"batch, seed {seed}: return {total:.1f}")


if __name__ == "__main__":
    main()
