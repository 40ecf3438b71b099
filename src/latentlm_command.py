"""The command's first moment, outside of the package, whose import takes seconds: Ctrl-C meanwhile ends it as later."""

import sys


def main() -> None:
    try:
        from latentlm.cli import main as run
    except KeyboardInterrupt:
        print("latentlm: interrupted; what was saved is whole.", file=sys.stderr)
        sys.exit(130)
    run()
