"""`python -m iterreduce run`: a launcher is started, watched, and started again from the last checkpoint.

    command      the command line of `run`; the limits within which it tries again
    launchers    which launcher, and its words
    attempt      one start of the ranks, from launch to end
    beats        whether ranks get on
    processes    processes and shared memory of this machine
    places       the files through which ranks and supervisor speak
    vitals       the ranks' side
    witnesses    beside ranks of other hosts

Only standard modules are imported: the supervisor needs neither MPI nor NumPy, and starts fast.
"""
