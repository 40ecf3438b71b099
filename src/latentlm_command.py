"""The command's first moment, outside of the package, whose import takes seconds: Ctrl-C meanwhile ends it as later."""

import sys
from typing import NoReturn

INTERRUPTED = 130  # as a shell numbers SIGINT, and typer


def main() -> None:
    try:
        from latentlm.cli import main as run
    except KeyboardInterrupt:
        end_interrupted()
    run()


def end_interrupted() -> NoReturn:
    print("latentlm: interrupted; what was saved is whole.", file=sys.stderr)
    sys.exit(INTERRUPTED)
