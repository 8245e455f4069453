"""The process of a `Worker`; run as a script, never imported. Its argument is a file whose `begin()` gives what answers.

One line of JSON in, with `seconds` of processor time, one line out. Over that time, or its memory, the process is killed by the
kernel, also inside a long call of C code.
"""

import json
import os
import resource
import runpy
import signal
import sys

MEMORY = 2 << 30


def main() -> None:
    replies = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)  # whatever a library prints must not be taken for a reply
    answer = runpy.run_path(sys.argv[1])["begin"]()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    print("ready", file=replies, flush=True)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # nobody reads it from here on
    for line in sys.stdin:
        question = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, question["seconds"])
        found = answer(question)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(found), file=replies, flush=True)


if __name__ == "__main__":
    main()
