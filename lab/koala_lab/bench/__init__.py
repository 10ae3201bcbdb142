"""Time and memory of a step, a training step and a run."""
