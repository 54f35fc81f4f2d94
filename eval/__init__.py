"""Playing the real simulators: agent, environments, baselines, scores, the table and its report."""
