"""Jobs of Slurm. `scripts/` holds the batch scripts, which are also what `slurm/` shows to a reader."""
