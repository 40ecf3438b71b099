"""How the command ends: what exceptions become on stderr, and with which status."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from latentlm.errors import OUT_OF_MEMORY, DivergedError, InputError, out_of_memory
from latentlm.files import reason_of
from latentlm.processes import is_first_here
from latentlm_command import end_interrupted

_MISTAKE, _BROKEN_PIPE = 2, 1  # 1 as typer does for its own writes


@contextmanager
def told_in_one_sentence(debug: bool) -> Iterator[None]:
    """Ends the process where its body fails by something the user can mend; defects keep their traceback."""
    try:
        yield
    except typer.exceptions.TyperException as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # typer keeps the class to itself; its message is the help
            print(error.format_message(), file=sys.stderr)
            sys.exit(_MISTAKE)
        _end(error.format_message(), debug)
    except BrokenPipeError:
        # latentlm … | head: who reads has had enough; Python's own flush at the end would complain once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(_BROKEN_PIPE)
    except InputError as error:
        # of several processes all make the same mistake: one of each machine tells; a number is one process' own
        _end(str(error), debug, quiet=not (is_first_here() or isinstance(error, DivergedError)))
    except OSError as error:
        _end(f"{error.filename or 'a file'} cannot be used: {reason_of(error)}.", debug)
    except (typer.Abort, KeyboardInterrupt):
        end_interrupted()
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        _end(OUT_OF_MEMORY, debug)


def _end(message: str, debug: bool, quiet: bool = False) -> None:
    if debug:
        raise
    if not quiet:
        print(f"latentlm: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(_MISTAKE)
