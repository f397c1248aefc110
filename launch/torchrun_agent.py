"""Run torchrun, and write to GCVIT_REPORT_DIR which of its processes was the first to fail.

A process that is killed from outside, for using too much memory for example, writes no report. torchrun then ends the
other processes of the node, and only torchrun knows which one came first.
"""

import json
import os
import socket
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

if __name__ == "__main__":
    try:
        main()
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        content = {"rank": rank, "host": socket.gethostname(), "exit": failure.exitcode, "time": failure.timestamp}
        path = Path(os.environ["GCVIT_REPORT_DIR"], f"agent_{os.environ['SLURM_NODEID']}.json")
        part = path.with_suffix(".tmp")
        part.write_text(json.dumps(content) + "\n")
        part.rename(path)
        raise
