"""What the scripts share: errors as one line, ranges of arguments, help, and text that is safe to print."""

import argparse
import os
import re
import shlex
import signal
import sys
import warnings
from contextlib import suppress
from functools import partial

from tqdm import tqdm

from reid import ReidError

NO_MEMORY = "[Aa]llocate memory|out of memory|could not create a (primitive|memory)|start new thread|bad_alloc"
NEED_LESS = "not enough memory; a smaller --batch_size or smaller images need less"
# control characters, separators of lines, marks that reverse the direction of text, and bytes that are not UTF-8
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


ERASED = "erased from the index"  # the reason of an image that is left out on purpose


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keep the lines of a script's description, and show every default except None, False and ""."""

    def _get_help_string(self, action):
        hidden = action.default is None or action.default is False or action.default == ""
        return action.help if hidden else super()._get_help_string(action)


def check_ranges(args, limits):
    """Raise ReidError for an argument outside of its range, NaN included. limits: {name: (lowest, highest)}."""
    for name, (low, high) in limits.items():
        values = getattr(args, name, None)
        for value in values if isinstance(values, list) else [] if values is None else [values]:
            if not low <= value <= high:
                raise ReidError(f"--{name} {value}: must lie between {low:,} and {high:,}")


def printable(text):
    """Return `text` with control characters escaped (`\\x1b`, `\\n`), so that a file name cannot imitate other output."""
    return UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), str(text))


def command(script, **options):
    """Return a command line for a message. An option that is None or False is left out; True makes a flag of it."""
    words = [f"--{name}" if value is True else f"--{name} {shlex.quote(str(value))}" for name, value in options.items()
             if value not in (None, False)]
    return " ".join(["python", script, *words])


def left_out_status(bad):
    """Print the images that could not be read, [(file, reason, ...)]; return the exit status: 3, or 0 without such images."""
    bad = [row for row in bad if row[1] != ERASED]
    for file, reason, *_ in bad:
        print(f"left out: {printable(file)}: {printable(reason)}", file=sys.stderr)
    if bad:
        print(f"{len(bad):,} images could not be read and were left out (exit status 3)", file=sys.stderr)
    return 3 if bad else 0


def without_secrets(text):
    """Return `text` with *** for the user part, the query and the fragment of an address in it: they may hold passwords."""
    text = re.sub(r"[^\s/]*:(?!//\*)[^\s@]*@", "***@", re.sub("//.*@", "//***@", str(text)))  # also of an address without its //
    return re.sub(r"([#;])[^\s=]*=.*|\?\S.*", lambda found: f"{found[1] or '?'}***", text)


def first_line(error):
    """Return the first line of an exception's message, at most 120 characters; without a message, its type."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:120]


def root_cause(error):
    """Return the exception at the origin of a chain: it has the reason, and what was raised later often an address."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__
    return error


def run(parser, main):
    """Parse the command line, call `main(args)` and exit with its return value (None is 0).

    Expected errors end as one line on stderr and exit status 1, Ctrl-C as 130: never as a traceback.
    """
    args = parser.parse_args()
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed, as in some services
            setattr(sys, name, open(os.devnull, "w"))
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # for file names outside of the terminal's encoding
    # For the whole process, since warnings cannot be scoped to the threads that decode; the package itself changes no filter.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    tqdm.monitor_interval = 0  # no thread of its own
    sys.unraisablehook = partial(_unraisable, parser.prog)
    try:
        status = main(args) or 0
        sys.stdout.flush()
    except ReidError as error:
        status = fail(parser.prog, error)
    except KeyboardInterrupt as stop:
        status = fail(parser.prog, str(stop) or "interrupted", 130)
    except BrokenPipeError:  # the reader, such as `| head`, has gone
        sys.stdout = None
        status = 141
    except OSError as error:
        if error.errno is None:  # not from the operating system
            raise
        status = fail(parser.prog, f"{error.filename or 'write'}: {error.strerror}; check the path, its permissions, the free "
                      "space and the limits of ulimit")
    except (MemoryError, RuntimeError) as error:
        if not lacks_memory(error):
            raise
        status = fail(parser.prog, NEED_LESS)
    with suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C from here on ends the process, without a traceback of its clean-up
    sys.exit(status)


def lacks_memory(error):
    """Whether an exception is about memory; torch's, oneDNN's and those of threads are RuntimeErrors."""
    return isinstance(error, MemoryError) or bool(re.search(NO_MEMORY, str(error)))


def _unraisable(prog, caught):
    """End the process where a new thread has no memory: Python waits forever for one that dies before it has begun."""
    if issubclass(caught.exc_type, MemoryError) and "thread" in (caught.err_msg or ""):
        os.write(2, f"{prog}: error: {NEED_LESS}\n".encode())
        os._exit(1)
    sys.__unraisablehook__(caught)


def fail(prog, message, status=1):
    """Print an error as one line and return the exit status."""
    print(f"{prog}: error: {printable(' '.join(str(message).split()))}", file=sys.stderr, flush=True)
    return status
