"""The command line: one small file per command. Nothing heavy is imported before it is needed."""

import os
import sys
import traceback
from contextlib import suppress
from pathlib import Path

ERRORS = "posttrain-error.txt"


def main() -> None:
    """The entry point. Ends with 0; 2 for wrong input, 3 for a failed run, 4 for corrupt state, 128 + n for signals."""
    from posttrain.cli.app import app
    from posttrain.errors import PosttrainError
    from posttrain.pipeline.signals import Interrupted

    try:
        app()
    except PosttrainError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
    except Interrupted as stop:
        print(f"stopped by {stop.signal}; the state is saved: the same command goes on from here", file=sys.stderr)
        sys.exit(128 + {"SIGINT": 2, "SIGTERM": 15}[stop.signal])
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:
        with suppress(OSError):
            Path(ERRORS).write_text(traceback.format_exc(), encoding="utf-8")
        print(f"error: {type(error).__name__}: {error} (a fault of posttrain; the traceback is in {ERRORS})", file=sys.stderr)
        sys.exit(3)
