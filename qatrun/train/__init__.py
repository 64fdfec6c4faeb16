"""Training: one loop for trunk and arms, its step, its checkpoints, and what is watched while it runs."""
