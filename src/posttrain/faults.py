"""A hook for tests of failure: POSTTRAIN_FAULT=`call:count:what` makes the count-th `call` of the checkpoint writer fail.

call: write, fsync or rename; what: kill (SIGKILL to this process) or the name of an errno such as ENOSPC. Without the variable
nothing happens.
"""

import errno
import os
import signal
from collections import Counter

_seen: Counter[str] = Counter()


def point(call: str, path: str) -> None:
    """Called just before a write, fsync or rename of `path`."""
    wanted = os.environ.get("POSTTRAIN_FAULT", "")
    if not wanted:
        return
    name, count, what = wanted.split(":")
    _seen[call] += 1
    if name != call or _seen[call] != int(count):
        return
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    code = getattr(errno, what)
    raise OSError(code, os.strerror(code), path)
