import os
import signal
import sys

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch loads, as ssr.py says

from run.distributed import interrupt
from rzero.selfplay import main

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, interrupt)
    main(sys.argv[1:])
