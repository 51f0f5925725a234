"""What lasts: checkpoints on disk, when they are written, and how a job goes on from them.

It knows batches, files and groups of ranks, but no loop: `iterreduce.checkpoint` says what is saved.
"""
