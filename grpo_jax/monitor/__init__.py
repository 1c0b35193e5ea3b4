"""What people see of a run: metrics on file, a live view, samples, curves, and what was gained."""
