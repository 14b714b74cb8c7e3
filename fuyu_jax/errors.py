"""Errors that are a user's to mend: one line that says what, where, and what to do."""

import difflib
import sys
from collections.abc import Callable, Iterable
from typing import NoReturn


class UserError(ValueError):
    """Bad input. Its message is one line; programs print it and exit with status 2."""


class TrainingStoppedError(RuntimeError):
    """Training cannot go on (non-finite loss, too many bad examples). Exit status 3."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns `; did you mean "x"?` for the closest known name, or the names if none is close."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f'; did you mean "{close[0]}"?'
    return f"; known: {', '.join(known)}"


def run_main(main: Callable[[], None]) -> NoReturn:
    """Runs a program: a user's error becomes one line on standard error and a non-zero exit."""
    try:
        main()
    except (UserError, TrainingStoppedError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2 if isinstance(error, UserError) else 3)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(130)
    sys.exit(0)
