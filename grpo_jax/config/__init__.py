"""Every dataclass that becomes a command line. Nothing here runs."""
