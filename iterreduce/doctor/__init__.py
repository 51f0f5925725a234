"""`python -m iterreduce doctor`: whether launcher, MPI, memory and files fit together on the nodes of a job.

command      the command line of `doctor`: gathers, judges, tells
facts        what one process sees of its node, without MPI
meeting      a child process that meets the other ranks in MPI: the one place where something may hang
checks       one small function for each question: facts to findings
"""
