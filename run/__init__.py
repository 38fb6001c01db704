"""What surrounds the loop: ranks, checkpoints, evaluation, the run folder, the console."""
