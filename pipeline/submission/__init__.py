"""Configs to Slurm jobs: text by pure functions, one thin shell that asks Slurm."""
