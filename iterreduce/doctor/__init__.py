"""`python -m iterreduce doctor`: whether launcher, MPI, memory and files fit together on the nodes of a job.

command      the command line of `doctor`
"""
