"""Bad input ends in one sentence, not in a traceback."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """What the user gave cannot be used: says what was required, what came and what to do."""


@contextmanager
def one_line_errors(program: str) -> Iterator[None]:
    """Turn InputError into one line on standard error and exit status 2, Ctrl-C into exit status 130."""
    try:
        yield
    except InputError as error:
        sys.stderr.write(f"{program}: error: {' '.join(str(error).split())}\n")
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        sys.stderr.write(f"\n{program}: interrupted; earlier results are untouched\n")
        raise SystemExit(130) from None
