"""`python -m iterreduce doctor`."""
