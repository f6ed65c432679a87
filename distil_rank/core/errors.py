"""Bad input ends in one sentence, not in a traceback."""

import errno
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

# what a disk or a folder refuses: the user's to cure, not a defect of the program
_REFUSED = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
# extra of pyproject.toml -> the packages it brings; `generators` has the first one's too
_EXTRAS = {
    "transformers": ("transformers", "tokenizers"),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "generators": ("accelerate", "pyopal", "pyhmmer"),
}


class InputError(ValueError):
    """What the user gave cannot be used: says what was required, what came and what to do."""


@contextmanager
def one_line_errors(program: str) -> Iterator[None]:
    """InputError becomes one line on standard error and exit status 2, Ctrl-C status 130.

    So does a package that is not here because its extra was not installed.
    """
    try:
        yield
    except KeyboardInterrupt:
        sys.stderr.write(f"\n{program}: interrupted; earlier results are untouched\n")
        raise SystemExit(130) from None
    except (InputError, ModuleNotFoundError, OSError) as error:
        if (text := _told(error, program)) is None:
            raise
        sys.stderr.write(f"{program}: error: {' '.join(text.split())}\n")
        raise SystemExit(2) from None


def _told(error: Exception, program: str) -> str | None:
    """What the user is told of an error; None of a defect of the program."""
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").partition(".")[0]
        extra = next((extra for extra, packages in _EXTRAS.items() if package in packages), None)
        remedy = f"pip install 'distil-rank[{'generators' if 'generator' in program else extra}]'"
        return f"the package {package} required, got none; {remedy}" if extra else None
    if isinstance(error, OSError):
        where = f" ({error.filename})" if error.filename else ""
        text = f"a writable disk required, got: {error.strerror}{where}; choose another"
        return text if error.errno in _REFUSED else None
    return str(error)


@contextmanager
def hub_errors(what: str, remedy: str) -> Iterator[None]:
    """What the Hugging Face hub, or the way to it, refuses becomes an InputError."""
    from huggingface_hub.errors import HfHubHTTPError

    # the bases: what the HTTP client itself raises, whichever it is
    errors: tuple[type[Exception], ...] = (
        OSError,
        ValueError,
        ImportError,
        *HfHubHTTPError.__bases__,
    )
    try:
        yield
    except InputError:
        raise
    except errors as error:
        reason = (str(error).strip() or type(error).__name__).partition("\n")[0]
        raise InputError(f"{what} required, got: {reason}; {remedy}") from None


def few(names: Sequence[str]) -> str:
    """The first five names, and how many more there are: a message stays short."""
    more = f", and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def at_least(minimum: float, **flags: float | None) -> None:
    """InputError that names the first flag below `minimum`; flags that are None are not checked."""
    _require(f"at least {minimum}", lambda value: value >= minimum, flags)


def at_most(maximum: float, **flags: float | None) -> None:
    """InputError that names the first flag above `maximum`."""
    _require(f"at most {maximum}", lambda value: value <= maximum, flags)


def above(limit: float, **flags: float | None) -> None:
    """InputError that names the first flag that is not above `limit`."""
    _require(f"above {limit}", lambda value: value > limit, flags)


def _require(words: str, holds: Callable[[float], bool], flags: dict[str, float | None]) -> None:
    for name, value in flags.items():
        if value is not None and not holds(value):  # NaN holds nothing
            raise InputError(f"--{name.replace('_', '-')} must be {words}, got {value}")
