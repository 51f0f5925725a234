"""Jobs of Slurm. `scripts/` holds the batch scripts, which are also what `slurm/` shows to a reader.

batch        one script of its own, made of them
submit       the command line that checks an app's arguments, writes the script and hands it in
"""
