"""Run a script that keeps its compiled programs, even in a process that is not the first one.

    python -m tests.cached SCRIPT FLAGS...

JAX's compilation cache is written by the first process alone, and on CPU devices no other process can use what it
writes, since the key contains the process's own place among the devices. So processes of a test that are started again
and again would compile everything each time.
"""

import runpy
import sys
from types import SimpleNamespace

from jax._src import compiler


def main():
    compiler.distributed = SimpleNamespace(global_state=SimpleNamespace(process_id=0, client=None))
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
