"""Local data: batches of columns, and the kernels that hash, group, fold, pack and join them.

NumPy and Numba only: nothing here knows of ranks, files or loops.
"""
