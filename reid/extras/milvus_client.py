"""The way to a Milvus engine: connecting, one collection with its settings, and one line for whatever goes wrong."""

import json
import logging
import os
import re
import shlex
import time
from pathlib import Path
from urllib.parse import urlsplit

from reid import ReidError

TOKEN = "MILVUS_TOKEN"  # environment variable with `user:password` or an API key
TIMEOUT = 60  # seconds that one call may take, and for which a call that failed since the server has gone is repeated
BACK_OFF = (0.1, 5)  # seconds to wait before the first repetition, doubled each time up to the second figure
OUTAGES = (2, 101)  # codes of Milvus: no connection, collection not loaded
NUMBERS = ("pid", "camid", "seq", "frame", "position", "content")  # int64 fields besides the primary key
INDEXES = {  # name -> (parameters of the build, parameters of a search that looks at n rows or more)
    "FLAT": ({}, lambda n: {}),
    "HNSW": ({"M": 16, "efConstruction": 200}, lambda n: {"ef": max(2 * n, 128)}),
    "IVF_FLAT": ({"nlist": 1024}, lambda n: {"nprobe": 64}),
    "IVF_SQ8": ({"nlist": 1024}, lambda n: {"nprobe": 64}),
}
QUANTIZED = ("IVF_SQ8",)  # their own scores are rough
SAFE = "every row acknowledged so far is kept, and the same command run again goes on with what is missing"


def is_file(uri):
    """Whether the engine runs inside this process, on a folder named *.db."""
    return str(uri).endswith(".db")


def is_engine(uri):
    """Whether `uri` names a Milvus engine and not an index file."""
    return is_file(uri) or "://" in str(uri)


def collection_name(run, part=""):
    """The collection of a run; Milvus allows letters, digits and _ in it."""
    return "reid_" + re.sub(r"\W", "_", run, flags=re.ASCII) + (f"_{part}" if part else "")


def rebuild_command(uri, run, part=""):
    script = "eval.py" if part else "inference.py"  # evaluation alone keeps queries
    return f"python {script} --save_index --gallery_uri {shlex.quote(str(uri))} --exp_name {shlex.quote(run)}"


def connect(uri):
    """A MilvusClient; raises ReidError without pymilvus, for a wrong address and for an engine that does not answer."""
    if not is_file(uri):
        parts = urlsplit(uri)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ReidError(f"--gallery_uri {without_secrets(uri)}: give index/<run>.pt, a name.db, or http://host:19530")
        if parts.username or parts.password:
            raise ReidError(f"--gallery_uri {without_secrets(uri)}: no password in an address; put user:password in {TOKEN}")
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        from pymilvus import MilvusClient

        if is_file(uri):
            import milvus_lite  # noqa: F401
    except ImportError as error:
        raise ReidError(f"{uri}: needs {error.name}; pip install -e '.[milvus]'") from error
    # they print pages of what we tell in one line; gRPC's C core, which starts with the first connection, too
    for name in ("pymilvus", "milvus_lite", "grpc"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    if is_file(uri):
        if Path(uri).exists() and not Path(uri).is_dir():
            raise ReidError(f"{uri}: is a file, milvus-lite keeps a folder; choose another name")
        Path(uri).parent.mkdir(parents=True, exist_ok=True)
    try:
        return MilvusClient(str(uri), token=os.environ.get(TOKEN, ""), timeout=TIMEOUT, dedicated=True,
                            grpc_options={"grpc.use_local_subchannel_pool": 1})  # else gRPC goes on waiting for the one that died
    except Exception as error:  # MilvusException and, from the embedded engine, anything
        advice = ("is another process using it? One at a time opens a file; start `milvus-lite server` for more"
                  if is_file(uri) else f"is the address right, does the server run, and is {TOKEN} set where it wants one?")
        raise ReidError(f"{uri}: no Milvus engine ({reason(error)}); {advice}") from None


class Collection:
    """One collection of an engine. Its settings are plain values, kept as collection properties `reid.<name>`."""

    def __init__(self, uri, name):
        self.uri, self.name, self._client = uri, name, connect(uri)

    def call(self, method, **arguments):
        """One call of the MilvusClient on this collection, repeated while the server is away (all our calls may be)."""
        wait, end = BACK_OFF[0], None
        while True:
            try:
                return getattr(self._client, method)(collection_name=self.name, timeout=TIMEOUT, **arguments)
            except Exception as error:
                end = end or time.monotonic() + TIMEOUT
                if not _is_outage(error) or time.monotonic() + wait > end:
                    raise self.failure(method, error) from None
            time.sleep(wait)
            wait = min(2 * wait, BACK_OFF[1])
            try:
                self._client = connect(self.uri)  # pymilvus gives up a connection whose server has gone
                self._client.load_collection(self.name, timeout=TIMEOUT)  # a server that was started again may have released it
            except Exception:
                pass  # not back yet, or no such collection: the next call fails too, and tells why

    def failure(self, action, error):
        """What pymilvus raised (MilvusException, grpc.RpcError, TypeErrors of replies cut off), and what is safe."""
        safe = SAFE if action in ("upsert", "flush", "delete") else "the rows are as they were"
        return ReidError(f"{self.uri}: {action} failed ({reason(error)}); {safe}")

    def make(self, dim, index_type, **settings):
        """Create the collection, empty and ready for searches."""
        from pymilvus import DataType

        schema = self._client.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field("key", DataType.INT64, is_primary=True)
        schema.add_field("path", DataType.VARCHAR, max_length=4096)
        for name in NUMBERS:
            schema.add_field(name, DataType.INT64)
        schema.add_field("vector", DataType.FLOAT_VECTOR, dim=dim)
        self.call("create_collection", schema=schema, index_params=self._index(index_type), consistency_level="Strong",
                  properties=_encode({"index_type": index_type, **settings}))  # Strong: what was acknowledged is found

    def _index(self, index_type):
        params = self._client.prepare_index_params()
        # Inner product, not cosine: the rows have norm 1, and the scores are the .pt index's to the last rounding.
        params.add_index("vector", index_name="vector", index_type=index_type, metric_type="IP", params=INDEXES[index_type][0])
        return params

    def change_index(self, index_type):
        """Build another index over the rows that are there."""
        self.call("release_collection")
        self.call("drop_index", index_name="vector")
        self.call("create_index", index_params=self._index(index_type))
        self.call("load_collection")
        self.set(index_type=index_type)

    def settings(self):
        """(settings, dimension of the vectors); a collection that is not one of ours raises ReidError."""
        described = self.call("describe_collection")
        try:
            found = {key.removeprefix("reid."): json.loads(value) for key, value in described["properties"].items()
                     if key.startswith("reid.")}
            dim = next(int(field["params"]["dim"]) for field in described["fields"] if field["name"] == "vector")
            found["format"]
        except (KeyError, ValueError, StopIteration) as error:
            raise ReidError(f"{self.uri}: the collection {self.name} is not one of ours; choose another --exp_name") from error
        return found, dim

    def set(self, **settings):
        self.call("alter_collection_properties", properties=_encode(settings))

    def close(self):
        self._client.close()


def _is_outage(error):
    from grpc import StatusCode

    code = getattr(error, "code", None)
    code = code() if callable(code) else code
    return (code in (*OUTAGES, StatusCode.UNAVAILABLE, StatusCode.DEADLINE_EXCEEDED)
            or (isinstance(error, ValueError) and "closed" in str(error)))


def _encode(settings):
    return {f"reid.{name}": json.dumps(value) for name, value in settings.items()}


def reason(error):
    """The first line of an error, without secrets."""
    told = error.details() if hasattr(error, "details") else getattr(error, "message", "")  # of gRPC, of pymilvus
    return without_secrets((str(told or error) or type(error).__name__).splitlines()[0])[:200]


def without_secrets(text):
    token = os.environ.get(TOKEN)
    for secret in (token, *(token or "").split(":", 1)[1:]):
        text = text.replace(secret, "***") if secret else text
    return re.sub(r"//[^/@\s]*@", "//***@", text)
