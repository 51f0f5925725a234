"""The logical plan behind a `Dataset`: nodes, what is known of them, rewrites, and lowering to a `Loop`."""
