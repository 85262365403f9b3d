"""torchrun, whose end after a failure is one line: the failed process has said why itself."""

import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

try:
    main()
except ChildFailedError as error:
    rank, failure = error.get_first_failure()
    print(f"torchrun: rank {rank} was the first to fail, with exit code {failure.exitcode}", file=sys.stderr)
    sys.exit(1)
