"""The search page under load: searches per second of many clients at once against one client, on a server started for it.

Every request is a POST /search of a query image. The clients run on the cores of the server. The peer is the same page
with one client: the ratio is what the batching of concurrent requests gains.
"""

import http.client
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

import common

from reid import ReidError
from reid.data.datasets import read_split


def client(port, bodies, times):
    """Send all `bodies` (multipart forms) over one connection, one after the other, and append the seconds of each to `times`."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    for body in bodies:
        started = time.perf_counter()
        connection.request("POST", "/search?topk=10", body, {"Content-Type": "multipart/form-data; boundary=crop"})
        answer = connection.getresponse()
        found = json.load(answer)
        if answer.status != 200 or len(found["rankings"][0]["hits"]) != 10:
            raise ReidError(f"status {answer.status}, and not 10 results: {found}"[:200])
        times.append(time.perf_counter() - started)
    connection.close()


def load(port, clients, bodies):
    """Return (searches per second, median seconds, 99th percentile) of `bodies` sent by that many clients at once."""
    times, started = [], time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        for future in [pool.submit(client, port, bodies[i::clients], times) for i in range(clients)]:
            future.result()
    seconds, percentiles = time.perf_counter() - started, statistics.quantiles(times, n=100, method="inclusive")
    return len(bodies) / seconds, percentiles[49], percentiles[98]


def benchmark(args):
    with tempfile.TemporaryDirectory() as folder:
        if not args.data_root:
            args.data_root = f"{folder}/people"
            drawing = [sys.executable, common.ROOT / "data_prep.py", "--synthetic", "--num_ids", "20", "--output", args.data_root]
            subprocess.run(drawing, check=True, stdout=subprocess.DEVNULL)
        options = ["--data_root", args.data_root, "--exp_name", args.exp_name, "--engine", args.engine]
        options += ["--load_index"] if args.load_index else ["--gallery", f"{args.data_root}/gallery"]
        command = [sys.executable, common.ROOT / "inference.py", "--serve", "--port", "0", *options]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=common.ROOT) as server:
            try:
                yield from measure(args, server)
            finally:
                server.send_signal(signal.SIGINT)


def measure(args, server):
    requests = min(args.requests, 128) if args.quick else args.requests
    head = b'--crop\r\nContent-Disposition: form-data; name="files"; filename="crop.jpg"\r\n\r\n'
    bodies = [head + file.read_bytes() + b"\r\n--crop--\r\n" for file in read_split(args.data_root, "query").files()[:requests]]
    bodies = (bodies * requests)[:requests]
    line = ""
    while not line.startswith("search page: http"):
        line = server.stdout.readline()
        if not line:
            raise ReidError("the server did not start")
    port = int(line.split()[2].rsplit(":", 1)[1])
    load(port, args.clients, bodies)  # the first batches compile and fill caches
    alone, many = [], []
    for _ in range(args.rounds):
        alone.append(load(port, 1, bodies[: max(20, requests // 16)]))
        many.append(load(port, args.clients, bodies))
    for clients, sides in ((1, alone), (args.clients, many)):
        _, half, most = (statistics.median(column) for column in zip(*sides))
        print(f"{clients:>3} clients: half of the searches take up to {1000 * half:.0f} ms, 99 of 100 up to {1000 * most:.0f} ms")
    yield common.row(f"search page, {args.clients} clients, searches per second", [side[0] for side in many],
                     [side[0] for side in alone], "one client", higher_is_better=True)


if __name__ == "__main__":
    parser = common.get_args_parser(__doc__, "128 requests a round", rounds=3)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=512, help="of a round with many clients (default: %(default)s)")
    parser.add_argument("--data_root", metavar="DIR", help="a dataset, whose query images are sent (default: drawn people)")
    parser.add_argument("--load_index", action="store_true", help="search the index of --exp_name (default: the gallery images)")
    parser.add_argument("--exp_name", default="masked-hog-908")
    parser.add_argument("--engine", choices=["torch", "openvino"], default="torch")
    common.run(parser, benchmark)
