"""Talk to a Milvus engine: one collection with its settings, calls that outlast a restart, and one line for an error."""

import json
import logging
import os
import re
import time
from contextlib import suppress
from pathlib import Path

import torch

from reid import BusyError, ReidError
from reid.cli import first_line, without_secrets

TOKEN = "MILVUS_TOKEN"  # environment variable with `user:password` or an API key
TIMEOUT = 60  # seconds that a call may take, and for which it is repeated while the server is away
DEPTH = 16_384  # rows that Milvus returns at most for one query
VECTORS = 2048  # embeddings in one reply: 8 MiB if they have 1,024 numbers; gRPC ends at 64 MiB
BATCH = 1024  # rows of one write, which is acknowledged as a whole
NUMBERS = ("pid", "camid", "seq", "frame", "size", "mtime", "content")  # int64 fields besides the primary key
FIELDS = ("path", "pid", "camid", "seq", "frame")  # fetched with every hit
INDEXES = {  # name -> (parameters of the build, parameters of a search that looks at n rows or more)
    "FLAT": ({}, lambda n: {}),
    "HNSW": ({"M": 16, "efConstruction": 200}, lambda n: {"ef": max(2 * n, 128)}),
    "IVF_SQ8": ({"nlist": 1024}, lambda n: {"nprobe": 64}),
}


def is_file(uri):
    """Whether the engine runs inside this process, on a folder named *.db."""
    return str(uri).endswith(".db")


def connect(uri):
    """Return a MilvusClient; raise ReidError without pymilvus, for a wrong address, or if no engine answers."""
    if is_file(uri):
        Path(uri).parent.mkdir(parents=True, exist_ok=True)
        if Path(uri).is_file() or (Path(uri).is_dir() and any(Path(uri).iterdir()) and not Path(uri, "LOCK").exists()):
            raise ReidError(f"{uri}: exists, and is no gallery of Milvus; choose another --gallery_uri")
    elif not re.fullmatch("https?://[^@?/]+(/[^@?]*)?", uri):
        raise ReidError(f"--gallery_uri {without_secrets(uri)}: give index/<run>.pt, a name.db, or http://host:19530; "
                        f"user:password belongs in {TOKEN}")
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        from pymilvus import MilvusClient
    except ImportError as error:
        raise ReidError(f"{uri}: needs {error.name}; pip install -e '.[milvus]'") from error
    for name in ("pymilvus", "milvus_lite", "grpc"):  # they also log, over pages, each error that they raise
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    try:  # a connection of its own: a shared one, and gRPC's pool, would keep that to a server which has died
        return MilvusClient(str(uri), token=os.environ.get(TOKEN, ""), timeout=TIMEOUT, dedicated=True,
                            grpc_options={"grpc.use_local_subchannel_pool": 1})
    except Exception as error:  # MilvusException, and anything from the embedded engine
        advice = ("does another process use it? Only one can: start `milvus-lite server` for more"
                  if is_file(uri) else f"check the address, whether the server runs, and {TOKEN} if it wants one")
        raise BusyError(f"{uri}: no Milvus engine ({_reason(error)}); {advice}") from None


class Collection:
    """One collection of an engine. Its settings are a dict of plain values, kept as the collection's property `reid`."""

    def __init__(self, uri, name):
        self.uri, self.name, self.client = uri, name, connect(uri)

    def call(self, method, **arguments):
        """Call a method of MilvusClient. While the server is away the call is repeated over new connections, which is safe for
        all that are used here; pymilvus itself gives up when a connection is refused."""
        end, wait = None, 0.1
        while True:
            try:
                return getattr(self.client, method)(collection_name=self.name, timeout=TIMEOUT, **arguments)
            except Exception as error:
                end = end or time.monotonic() + TIMEOUT
                if not _is_outage(error) or time.monotonic() > end:
                    raise self.failure(method, error) from None
            time.sleep(wait)
            wait = min(2 * wait, 5)
            with suppress(Exception):  # if this fails, the next call fails too and gives the reason
                self.client = connect(self.uri)
                self.client.load_collection(self.name, timeout=TIMEOUT)  # a server that was restarted may not have done so

    def failure(self, method, error):
        """Return the ReidError for what pymilvus raised."""
        return ReidError(f"{self.uri}: {method} failed ({_reason(error)}); every acknowledged row is kept, and the same command "
                         "goes on with the rest")

    def create(self, dim, index_type, **settings):
        """Create the collection, empty and ready to be searched."""
        from pymilvus import DataType

        schema = self.client.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field("key", DataType.INT64, is_primary=True)
        schema.add_field("path", DataType.VARCHAR, max_length=4096)
        for name in NUMBERS:
            schema.add_field(name, DataType.INT64)
        schema.add_field("vector", DataType.FLOAT_VECTOR, dim=dim)
        settings = {"reid": json.dumps({**settings, "dim": dim, "index_type": index_type})}
        self.call("create_collection", schema=schema, index_params=self._index(index_type), properties=settings,
                  consistency_level="Strong")  # a search finds every row that was acknowledged before it

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
        """Return all settings; a collection of another program has none."""
        return json.loads(self.call("describe_collection")["properties"].get("reid", "{}"))

    def set(self, **settings):
        """Change some settings."""
        self.call("alter_collection_properties", properties={"reid": json.dumps(self.settings() | settings)})

    def fetch(self, keys, fields):
        """Return {key: {field: value}} of the rows that exist among `keys`, a list."""
        size = VECTORS if "vector" in fields else DEPTH
        return {row["key"]: row for first in range(0, len(keys), size)
                for row in self.call("get", ids=keys[first : first + size], output_fields=list(fields))}

    def read(self, fields, condition=""):
        """Yield every row that meets `condition`, as lists of {field: value} in no particular order."""
        iterator = self.call("query_iterator", batch_size=VECTORS, filter=condition, output_fields=["key", *fields])
        try:
            while block := iterator.next():
                yield block
        except Exception as error:
            raise self.failure("query_iterator", error) from None
        iterator.close()


class Column:
    """One field of the rows of a gallery. A row number gives one value, a tensor of them a tensor of the values."""

    def __init__(self, gallery, field):
        self.gallery, self.field = gallery, field

    def __getitem__(self, rows):
        rows = torch.as_tensor(rows)
        keys = rows.flatten().tolist()
        found = {} if self.field == "vector" else self.gallery._hits
        if missing := [key for key in keys if key not in found]:
            found |= self.gallery.collection.fetch(missing, [self.field] if self.field == "vector" else FIELDS)
        if gone := [key for key in keys if key not in found]:
            raise ReidError(f"{self.gallery.uri}: no row {gone[0]}; it was removed")
        values = [found[key][self.field] for key in keys]
        values = values if rows.ndim else values[0]
        return values if self.field == "path" else torch.tensor(values)


def batches(stream):
    """Join what Extractor.stream yields to batches of BATCH rows or a little more."""
    pieces = []
    for piece in stream:
        pieces.append(piece)
        if sum(len(positions) for positions, _ in pieces) >= BATCH:
            yield map(torch.cat, zip(*pieces))
            pieces = []
    if pieces:
        yield map(torch.cat, zip(*pieces))


def _is_outage(error):
    from grpc import StatusCode

    code = getattr(error, "code", None)  # 2 and 101 are Milvus' own: no connection, collection not loaded
    code = code() if callable(code) else code
    closed = isinstance(error, ValueError) and "closed" in str(error)  # the connection, after an attempt to renew it
    return closed or code in (2, 101, StatusCode.UNAVAILABLE, StatusCode.DEADLINE_EXCEEDED)


def _reason(error):
    """Return the first line of an error of gRPC, pymilvus or Python, without the token."""
    text = error.details() if hasattr(error, "details") else getattr(error, "message", "")
    text, token = str(text or error) or type(error).__name__, os.environ.get(TOKEN, "")
    for secret in filter(None, (token, token.partition(":")[2])):
        text = text.replace(secret, "***")
    return without_secrets(first_line(text))
