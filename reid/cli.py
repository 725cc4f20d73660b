"""What the scripts share: errors as one line, ranges of arguments, help."""

import argparse
import errno
import os
import sys

from reid import ReidError

ADVICE = {  # what to do about an error of the system, which is then no traceback
    **dict.fromkeys([errno.ENOSPC, errno.EROFS, errno.EDQUOT], "free some space or choose another folder"),
    **dict.fromkeys([errno.EACCES, errno.EPERM], "check its permissions"),
    **dict.fromkeys([errno.ENOENT, errno.EEXIST, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP], "try another"),
    **dict.fromkeys([errno.EIO, errno.ESTALE], "check the disk or the network"), errno.EMFILE: "raise the limit of ulimit -n",
}


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the lines of a script's description, and tells every default that says something."""

    def _get_help_string(self, action):
        silent = action.default is None or action.default is False or action.default == ""
        return action.help if silent else super()._get_help_string(action)


def check_ranges(args, limits):
    """Raise ReidError for an argument outside of its (lowest, highest); NaN always is. limits: {name: (lowest, highest)}."""
    for name, (low, high) in limits.items():
        values = getattr(args, name, None)
        for value in values if isinstance(values, list) else [] if values is None else [values]:
            if not low <= value <= high:
                raise ReidError(f"--{name} {value}: must lie between {low:,} and {high:,}")


def run(parser, main):
    """Parse the command line, call `main(args)` and exit with its return value (None is 0).

    What users get wrong ends as one line on stderr and exit status 1, Ctrl-C as 130: never as a traceback.
    """
    args = parser.parse_args()
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # in a service that has closed them
            setattr(sys, name, open(os.devnull, "w"))
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file name may hold what the terminal's encoding has not
    try:
        status = main(args) or 0
        sys.stdout.flush()
    except ReidError as error:
        status = fail(parser.prog, " ".join(str(error).split()))
    except KeyboardInterrupt:
        status = fail(parser.prog, "interrupted", 130)
    except BrokenPipeError:  # the reader (`| head`) has gone; nothing is left to tell it
        sys.stdout = None
        status = 141
    except OSError as error:
        if error.errno not in ADVICE:
            raise
        status = fail(parser.prog, f"{error.filename or 'write'}: {error.strerror}; {ADVICE[error.errno]}")
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "allocate memory" not in str(error) and "out of memory" not in str(error):
            raise
        status = fail(parser.prog, "not enough memory; a smaller --batch_size or smaller images need less")
    sys.exit(status)


def fail(prog, message, status=1):
    print(f"{prog}: error: {message}", file=sys.stderr, flush=True)
    return status
