"""Connect to a Milvus engine: one collection, its settings, and one line for whatever goes wrong."""

import hashlib
import json
import logging
import os
import re
import shlex
import time
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

from reid import ReidError

TOKEN = "MILVUS_TOKEN"  # environment variable with `user:password` or an API key
TIMEOUT = 60  # seconds one call may take, and for which it is repeated while the server is away
NUMBERS = ("pid", "camid", "seq", "frame", "position", "content")  # int64 fields besides the primary key
INDEXES = {  # name -> (parameters of the build, parameters of a search that looks at n rows or more)
    "FLAT": ({}, lambda n: {}),
    "HNSW": ({"M": 16, "efConstruction": 200}, lambda n: {"ef": max(2 * n, 128)}),
    "IVF_SQ8": ({"nlist": 1024}, lambda n: {"nprobe": 64}),
}
SAFE = "every acknowledged row is kept, run the same command again to go on"


def is_file(uri):
    """Whether the engine runs inside this process, on a folder named *.db."""
    return str(uri).endswith(".db")


def number(data):
    """Hash bytes to 63 bits: Milvus' integers are signed."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") >> 1


def collection_name(run, part=""):
    """Name of the collection of a run. Milvus allows letters, digits and _ alone, so a hash tells `a-b` from `a_b`."""
    return f"reid_{re.sub(r'[^A-Za-z0-9]', '_', run)[:100]}_{number(json.dumps([run, part]).encode()):016x}"


def rebuild_command(uri, run, part=""):
    """The command line that makes a gallery."""
    script = "eval.py" if part else "inference.py"  # only evaluation keeps queries
    return f"python {script} --save_index --gallery_uri {shlex.quote(str(uri))} --exp_name {shlex.quote(run)}"


def connect(uri):
    """Return a MilvusClient. Raise ReidError without pymilvus, for a wrong address or if the engine does not answer."""
    if not is_file(uri):
        parts = urlsplit(uri)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ReidError(f"--gallery_uri {mask(uri)}: give index/<run>.pt, a name.db, or http://host:19530")
        if "@" in uri or parts.query:
            raise ReidError(f"--gallery_uri {mask(uri)}: no password in an address; put user:password in {TOKEN}")
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        from pymilvus import MilvusClient

        if is_file(uri):
            import milvus_lite  # noqa: F401
    except ImportError as error:
        raise ReidError(f"{uri}: needs {error.name}; pip install -e '.[milvus]'") from error
    for name in ("pymilvus", "milvus_lite", "grpc"):  # they log pages about an error that is raised, too
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    if is_file(uri):
        if Path(uri).exists() and not Path(uri).is_dir():
            raise ReidError(f"{uri}: is a file, but milvus-lite keeps a folder; choose another name")
        Path(uri).parent.mkdir(parents=True, exist_ok=True)
    try:  # with a connection and a pool of its own: a shared one would keep the connection to a server that has died
        return MilvusClient(str(uri), token=os.environ.get(TOKEN, ""), timeout=TIMEOUT, dedicated=True,
                            grpc_options={"grpc.use_local_subchannel_pool": 1})
    except Exception as error:  # MilvusException, and anything from the embedded engine
        advice = ("does another process use it? Only one can open a file; start `milvus-lite server` for more"
                  if is_file(uri) else f"check the address, that the server runs, and {TOKEN} if it asks for one")
        raise ReidError(f"{uri}: no Milvus engine ({reason(error)}); {advice}") from None


class Collection:
    """One collection of an engine. Its settings are plain values, kept as collection properties named `reid.<name>`."""

    def __init__(self, uri, name):
        self.uri, self.name, self.client = uri, name, connect(uri)

    def call(self, method, **arguments):
        """Call a method of MilvusClient on this collection, again and again while the server is away (every call used here
        may be repeated). pymilvus alone gives up at once when the connection is refused."""
        wait, end = 0.1, None
        while True:
            try:
                return getattr(self.client, method)(collection_name=self.name, timeout=TIMEOUT, **arguments)
            except Exception as error:
                end = end or time.monotonic() + TIMEOUT
                if not _is_outage(error) or time.monotonic() + wait > end:
                    raise self.failure(method, error) from None
            time.sleep(wait)
            wait = min(2 * wait, 5)
            with suppress(Exception):  # still away, or no such collection: the next call fails as well, with the reason
                self.client = connect(self.uri)
                self.client.load_collection(self.name, timeout=TIMEOUT)  # a server releases it when it starts again

    def failure(self, method, error):
        """The ReidError for what pymilvus raised."""
        safe = SAFE if method in ("upsert", "flush", "delete") else "the rows are as they were"
        return ReidError(f"{self.uri}: {method} failed ({reason(error)}); {safe}")

    def create(self, dim, index_type, **settings):
        """Create the collection, empty and ready for searches."""
        from pymilvus import DataType

        schema = self.client.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field("key", DataType.INT64, is_primary=True)
        schema.add_field("path", DataType.VARCHAR, max_length=4096)
        for name in NUMBERS:
            schema.add_field(name, DataType.INT64)
        schema.add_field("vector", DataType.FLOAT_VECTOR, dim=dim)
        self.call("create_collection", schema=schema, index_params=self._index(index_type), consistency_level="Strong",
                  properties=_encode({"index_type": index_type, **settings}))  # Strong: acknowledged rows are found

    def change_index(self, index_type):
        """Build another index over the rows of the collection."""
        self.call("release_collection")
        self.call("drop_index", index_name="vector")
        self.call("create_index", index_params=self._index(index_type))
        self.call("load_collection")
        self.set(index_type=index_type)

    def _index(self, index_type):
        params = self.client.prepare_index_params()
        # Inner product, not cosine: the rows have norm 1, and the scores are those of the .pt index to the last rounding.
        params.add_index("vector", index_name="vector", index_type=index_type, metric_type="IP", params=INDEXES[index_type][0])
        return params

    def settings(self):
        """Return the settings and, as `dim`, the dimension of the embeddings; raise ReidError for a foreign collection."""
        described = self.call("describe_collection")
        try:
            settings = {key.removeprefix("reid."): json.loads(value) for key, value in described["properties"].items()
                        if key.startswith("reid.")}
            dim = next(int(field["params"]["dim"]) for field in described["fields"] if field["name"] == "vector")
            return settings | {"dim": dim, "format": settings["format"]}
        except (KeyError, ValueError, StopIteration) as error:
            raise ReidError(f"{self.uri}: collection {self.name} is no gallery; choose another --exp_name") from error

    def set(self, **settings):
        """Change settings."""
        self.call("alter_collection_properties", properties=_encode(settings))


def _encode(settings):
    return {f"reid.{name}": json.dumps(value) for name, value in settings.items()}


def _is_outage(error):
    from grpc import StatusCode

    code = getattr(error, "code", None)  # 2 and 101 are Milvus' codes: no connection, collection not loaded
    code = code() if callable(code) else code
    return (code in (2, 101, StatusCode.UNAVAILABLE, StatusCode.DEADLINE_EXCEEDED)
            or isinstance(error, ValueError) and "closed" in str(error))


def reason(error):
    """First line of an error of gRPC, pymilvus or Python, without the token."""
    text = error.details() if hasattr(error, "details") else getattr(error, "message", "")
    text = (str(text or error) or type(error).__name__).splitlines()[0]
    token = os.environ.get(TOKEN, "")
    for secret in filter(None, (token, token.partition(":")[2])):
        text = text.replace(secret, "***")
    return mask(text)[:200]


def mask(text):
    """An address without user, password and query."""
    return re.sub(r"\?.*", "?***", re.sub(r"//.*@", "//***@", text))
