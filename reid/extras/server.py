"""The HTTP server of the search page: who may ask, how much, and how it starts and stops. What it answers is in page.py."""

import asyncio
import base64
import hmac
import ipaddress
import logging
import re
import signal
import socket
from contextlib import asynccontextmanager, suppress
from urllib.parse import urlsplit

from reid import ReidError

try:
    import resource
except ImportError:  # Windows
    resource = None
try:
    import uvicorn
    from fastapi import HTTPException
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse
    from python_multipart.exceptions import FormParserError
    from starlette.exceptions import HTTPException as AnyHTTPException
    from starlette.formparsers import MultiPartException, MultiPartParser
    from starlette.requests import ClientDisconnect
    from uvicorn.protocols.http.h11_impl import H11Protocol
except ImportError as missing:
    raise ReidError(f"--serve needs {missing.name}: pip install -e '.[page]'") from missing

IMAGES = 64  # images, or boxes, of a request
UPLOAD_LIMIT, BODY_LIMIT, BODIES_LIMIT = 10 << 20, 64 << 20, 512 << 20  # bytes of an image, a request, all requests at once
HEADER_SECONDS, BODY_SECONDS = 15, 120  # for the header of a request; for its body, or reading an answer
TOKEN_LENGTH = 16  # characters


def connection_limit():
    """Return how many connections may be open: 512, or fewer where the limit of open files (`ulimit -n`) is low.

    64 files remain for everything else, and half the number of connections for those that are accepted to be closed.
    """
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0] if resource else -1
    return 512 if files < 0 else max(8, min(512, (files - 64) * 2 // 3))  # -1: no limit; macOS has a large number for it


CONNECTIONS = connection_limit()  # open ones; more are closed at once
ANSWERED = CONNECTIONS // 2  # open ones up to which requests are answered; beyond them they get 503
ADDRESSES = {"Not Found": "no such address; /docs lists all", "Method Not Allowed": "no such method here; /docs lists all"}


def harden(app, policy, names, token=None):
    """Answer errors as {"error": one line}, refuse requests of other sites and without the token, restrict what browsers do.

    policy: Content-Security-Policy of the answers that have none. names: host names to answer to. token: or None, for all.
    """
    def failed(status, message, headers=None):
        return JSONResponse({"error": message}, status, headers)

    app.add_exception_handler(ReidError, lambda request, error: failed(400, str(error)))
    app.add_exception_handler(AnyHTTPException, lambda request, error: failed(
        error.status_code, ADDRESSES.get(error.detail, error.detail), error.headers))
    app.add_exception_handler(RequestValidationError, lambda request, error: failed(
        400, "; ".join(f"{e['loc'][1]}: {e['msg'].removeprefix('Value error, ')}" for e in error.errors())))
    app.add_exception_handler(Exception, lambda request, error: failed(500, "the server failed; its log has the reason"))

    @app.middleware("http")
    async def guard(request, call_next):
        if refusal := _refusal(request, names):
            response = failed(403, refusal)
        elif token and request.url.path != "/healthz" and not _has_token(request, token):
            response = failed(401, "give the token: as Authorization: Bearer TOKEN, or as the password in a browser",
                              {"WWW-Authenticate": 'Basic realm="reid"'})
        else:
            try:
                response = await call_next(request)
            except asyncio.CancelledError:
                response = failed(503, "the server stops; a change that was asked for may have been stored")
        response.headers.setdefault("Content-Security-Policy", policy)
        response.headers.update({"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
                                 "Cross-Origin-Resource-Policy": "same-origin"})
        return response


def _refusal(request, names):
    """Return why a request must not be answered, or None. DNS rebinding needs a name, so all IP addresses are allowed."""
    host, origin, site = map(request.headers.get, ("host", "origin", "sec-fetch-site"))
    try:
        host = urlsplit(f"//{host or ''}").hostname or ""
        allowed = host in names or ipaddress.ip_address(host)
    except ValueError:
        allowed = False
    if not allowed:
        return "this server has another name; --allowed_hosts adds one"
    if origin and not site:  # as older browsers send a form
        own = re.fullmatch(r"https?://([^/]+?)(:\d+)?", origin)
        site = "same-origin" if own and own[1].strip("[]").lower() in (host, *names) else "cross-site"
    link = request.headers.get("sec-fetch-mode") == "navigate" and request.method == "GET" and request.url.path == "/"
    if (site or "none") not in ("same-origin", "none") and not link:
        return "requests of other web pages are refused"


def _has_token(request, token):
    """Whether the Authorization header holds the token, by itself (Bearer) or as the password of any user (Basic)."""
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "basic":
        with suppress(ValueError):
            given = base64.b64decode(given).decode().partition(":")[2]
    return scheme.lower() in ("basic", "bearer") and hmac.compare_digest(given.encode(), token.encode())


class Uploads:
    """Read the images of multipart forms, whose sizes are counted because Content-Length may be wrong, within a time limit."""

    def __init__(self):
        self.held = 0  # bytes of all requests

    @asynccontextmanager
    async def files(self, request):
        """Yield [(file name, bytes)] of the fields `files`; the field `name` is kept in `request.state`.

        Raises HTTPException for what is too large, too slow or no form.
        """
        if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
            raise HTTPException(415, "send a multipart form with the images in the field files: curl -F files=@crop.jpg")
        size = 0

        async def counted():
            nonlocal size
            async for chunk in request.stream():
                size += len(chunk)
                self.held += len(chunk)
                if size > BODY_LIMIT:
                    raise HTTPException(413, f"the request is larger than {BODY_LIMIT >> 20} MB")
                if self.held > BODIES_LIMIT:
                    raise HTTPException(429, "too many uploads at once, try again", {"Retry-After": "1"})
                yield chunk

        try:
            parser = MultiPartParser(request.headers, counted(), max_files=IMAGES, max_fields=IMAGES)
            parser.spool_max_size = BODY_LIMIT  # in memory: the server writes no files
            async with asyncio.timeout(BODY_SECONDS):
                form = await parser.parse()
            request.state.name = form.get("name")
            files = [file for file in form.getlist("files") if not isinstance(file, str)]
            if not files:
                raise HTTPException(400, "files: no image; send at least one in the field files")
            for file in files:
                if file.size > UPLOAD_LIMIT:
                    raise HTTPException(413, f"{file.filename}: the image file is larger than {UPLOAD_LIMIT >> 20} MB")
            yield [(file.filename or "image", await file.read()) for file in files]
        except (TimeoutError, ClientDisconnect) as error:
            raise HTTPException(408, "the upload took too long or broke off", {"Connection": "close"}) from error
        except (MultiPartException, FormParserError) as error:
            raise HTTPException(400, f"files: {getattr(error, 'message', error)}") from error
        finally:
            self.held -= size


class Protocol(H11Protocol):
    """uvicorn's HTTP/1.1 with a limit of connections, and time limits for each header and for sending an answer."""

    expiry = stalled = None  # timers

    def connection_made(self, transport):
        super().connection_made(transport)
        if len(self.connections) > CONNECTIONS:
            transport.abort()
        self.await_header()

    def on_response_complete(self):
        self.await_header()  # first, because the next request may have arrived already
        super().on_response_complete()

    def await_header(self):
        """Close the connection unless the header of another request arrives in time, whatever of its body was not read."""
        if self.expiry:
            self.expiry.cancel()
        self.expiry = self.loop.call_later(HEADER_SECONDS, self.expire, self.cycle)

    def expire(self, last):
        if self.cycle is last:
            self.transport.close()
            if self.transport.get_write_buffer_size():  # the client reads the answer slowly, or not at all
                self.loop.call_later(BODY_SECONDS, self.transport.abort)

    def pause_writing(self):
        super().pause_writing()
        self.stalled = self.loop.call_later(BODY_SECONDS, self.transport.abort)

    def resume_writing(self):
        super().resume_writing()
        self.stalled.cancel()


def listen(host, port, token=None):
    """Return a bound socket for `serve`. Raises ReidError if the address is not this machine's or the port is taken.

    An address that other machines reach needs a token.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family)
    except (OSError, OverflowError, UnicodeError) as error:
        reason = str(getattr(error, "strerror", None) or error).split(" (")[0]
        raise ReidError(f"--host {host} --port {port}: {reason}; stop what uses it, or choose another --port") from error
    local, wrong = ipaddress.ip_address(listener.getsockname()[0]).is_loopback, None
    if not token:
        wrong = None if local else f"--host {host}: set REID_TOKEN to"
    elif len(token) < TOKEN_LENGTH:
        wrong = "REID_TOKEN: is too short; give"
    elif not (token.isascii() and token.isprintable() and token == token.strip()):
        wrong = "REID_TOKEN: has characters that a header cannot carry; give"
    if wrong:
        listener.close()
        raise ReidError(f"{wrong} a secret of {TOKEN_LENGTH} or more ASCII characters that clients must give, such as: "
                        'export REID_TOKEN="$(openssl rand -hex 16)"')
    return listener


def make_server(app):
    """Return a uvicorn.Server with these limits, which stops when the index file changes and it must not read it again."""
    async def stop_if_outdated():
        server.should_exit |= app.state.outdated()

    server = uvicorn.Server(uvicorn.Config(
        app, http=Protocol, ws="none", lifespan="off", log_level="error", log_config=None, access_log=False, server_header=False,
        backlog=CONNECTIONS // 8 + 1,  # asyncio accepts so many connections at once, and again before `Protocol` can close them
        limit_concurrency=ANSWERED, timeout_graceful_shutdown=5, callback_notify=stop_if_outdated, timeout_notify=1))
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # a bad form is answered, not logged
    logging.getLogger("uvicorn.error").addFilter(  # no tracebacks of the requests that are cancelled when the server stops
        lambda record: not record.exc_info or not isinstance(record.exc_info[1], asyncio.CancelledError))
    return server


def serve(app, listener):
    """Serve `app` on the socket of `listen` until Ctrl-C or TERM; requests in progress get five seconds to finish.

    Raises ReidError if the index file changes meanwhile, unless the server is writable.
    """
    address, port = listener.getsockname()[:2]
    address = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(address, f"[{address}]" if ":" in address else address)
    with suppress(ValueError):  # outside of the main thread
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # TERM, too, then ends below
    print(f"search page: http://{address}:{port} (Ctrl-C stops it)", flush=True)
    with suppress(KeyboardInterrupt):  # uvicorn has shut down and passes the signal on
        make_server(app).run(sockets=[listener])
    if app.state.outdated():
        raise ReidError("the index file has changed while it was searched; start the search page again")
    print("search page: stopped", flush=True)
