"""Human re-identification: find the same person in a gallery of crops from other cameras."""

import errno
import sys

__version__ = "1.0.0"


class ReidError(Exception):
    """Something the user can mend. The message is one line: what is wrong, where, and what to do about it."""


def run(parser, main):
    """Parse the command line, call `main(args)` and exit with its return value (None is 0).

    What users get wrong ends as one line on stderr and exit status 1, Ctrl-C as 130: never as a traceback.
    """
    args = parser.parse_args()
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
        if error.errno not in (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EPERM, errno.EDQUOT):
            raise
        denied = error.errno in (errno.EACCES, errno.EPERM)
        advice = "check its permissions" if denied else "free some space or choose another folder"
        status = fail(parser.prog, f"{error.filename or 'write'}: {error.strerror}; {advice}")
    sys.exit(status)


def fail(prog, message, status=1):
    print(f"{prog}: error: {message}", file=sys.stderr, flush=True)
    return status
