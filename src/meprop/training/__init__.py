"""Train a task: the loop, its checkpoints, and the record that a run leaves behind."""
