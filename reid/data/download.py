"""Resumable download of one file over HTTP."""

import os
import re
import time

import requests
from tqdm import tqdm

from reid import ReidError
from reid.data.prepare import make_folder
from reid.files import locked

TRIES = 6  # failures in a row, without one byte gained, before a download is given up
MAX_SIZE = 50 << 30  # bytes; a server that never ends would fill the disk
MAX_WAIT = 300  # seconds, whatever a server's Retry-After says


class _TryAgain(Exception):
    """A failure that passes; `wait` is the server's own word on how many seconds to leave it alone, or None."""

    def __init__(self, reason, wait=None):
        super().__init__(reason)
        self.wait = wait


def download(url, path):
    """Fetch `url` to `path`. What a broken connection or a killed run has left in `<path>.part` is continued.

    Raises ReidError for an address that does not answer with a file, and after TRIES failures that brought nothing.
    """
    if path.exists():
        return
    shown = without_password(url)
    make_folder(path.parent)
    part = path.with_name(f"{path.name}.part")
    print(f"downloading {shown} to {path}", flush=True)
    with open(part, "ab") as file, locked(part, "another data_prep.py is fetching it; wait for it"):
        failures, best = 0, file.tell()
        while True:
            try:
                _fetch(url, file)
                break
            except (requests.RequestException, _TryAgain) as error:
                if isinstance(error, ValueError):  # what requests raises for an address that is none
                    raise ReidError(f"--url {shown}: {error}") from error
                failures = 0 if file.tell() > best else failures + 1
                best = max(best, file.tell())
                if failures == TRIES:
                    raise ReidError(f"{shown}: download failed {TRIES} times ({error}); run again to continue, or get the "
                                    "archive another way and give it to --archive") from error
                wait = getattr(error, "wait", None)
                wait = 2**failures if wait is None else min(wait, MAX_WAIT)
                print(f"{error}; going on in {wait} s", flush=True)
                time.sleep(wait)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def _fetch(url, file):
    """One request; appends to `file` and returns when it is complete."""
    have = file.tell()
    shown = without_password(url)
    headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={have}-"} if have else {})}
    with requests.get(url, headers=headers, stream=True, timeout=(10, 60)) as answer:
        said, code = answer.headers, answer.status_code
        if code == 416 and said.get("Content-Range") == f"bytes */{have}":
            return
        if code in (408, 425, 429) or code >= 500:
            wait = said.get("Retry-After", "")
            raise _TryAgain(f"the server answered {code} {answer.reason}", int(wait) if wait.isdecimal() else None)
        if code not in (200, 206, 416):
            raise ReidError(f"{shown}: the server answered {code} {answer.reason}; give another --url, or --archive")
        if code != 416 and "html" in said.get("Content-Type", ""):
            raise ReidError(f"{shown}: the server answered with a web page, not an archive; open it in a browser, download "
                            "the archive there and give it to --archive")
        span = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", said.get("Content-Range", ""))
        if code == 416 or (code == 206 and not (span and int(span[1]) == have)):
            _empty(file)
            raise _TryAgain("the server has another file than the part that is here; starting over")
        if code == 200:  # it cannot continue: all over again
            _empty(file)
        size = span[2] if code == 206 else said.get("Content-Length", "")
        size = int(size) if size.isdecimal() else None
        with tqdm(total=size, initial=file.tell(), unit="B", unit_scale=True, disable=None) as bar:
            for chunk in answer.iter_content(1 << 14):
                bar.update(file.write(chunk))
                if file.tell() > MAX_SIZE:
                    _empty(file)
                    raise ReidError(f"{shown}: more than {MAX_SIZE >> 30} GB, that is no dataset of people; give another --url")
        if size is not None and file.tell() != size:
            raise _TryAgain(f"the connection closed after {file.tell():,} of {size:,} bytes")


def without_password(url):
    """The address as it may be shown and written down."""
    return re.sub("//[^/]*@", "//", url)


def _empty(file):
    file.seek(0)
    file.truncate()
