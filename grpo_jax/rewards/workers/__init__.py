"""A pool of processes in which rewards run."""
