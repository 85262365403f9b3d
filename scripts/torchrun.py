"""torchrun, whose end after a failure or a signal is one line: the processes have said why themselves."""

import signal
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

try:
    main()
except ChildFailedError as error:
    rank, failure = error.get_first_failure()
    print(f"torchrun: rank {rank} was the first to fail, with exit code {failure.exitcode}", file=sys.stderr)
    sys.exit(1)
except SignalException as error:
    name = signal.Signals(error.sigval).name
    print(f"torchrun: ended by {name}; SAVE/exit.json says whether the run was saved", file=sys.stderr)
    sys.exit(1)
