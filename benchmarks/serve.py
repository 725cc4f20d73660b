"""The search page under load: many clients at once against one client, in turn, on a server that is started for it.

    python benchmarks/serve.py --json out.json --load_index --engine openvino

What is not listed below goes to `inference.py --serve`. Every request is a POST /search of a query's crop; the clients run
on the same cores as the server.
"""

import argparse
import http.client
import json
import signal
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from reid.data.datasets import read_split

ROOT = Path(__file__).resolve().parents[1]


def client(port, bodies, times, errors):
    """One connection that asks for all `bodies`, one after the other; appends seconds, and what went wrong."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    for body in bodies:
        started = time.perf_counter()
        try:
            connection.request("POST", "/search?topk=10", body)
            answer = connection.getresponse()
            found = json.load(answer).get("results", [])
            if answer.status != 200 or len(found) != 10:
                errors.append(f"status {answer.status}, {len(found)} results")
        except (OSError, ValueError, http.client.HTTPException) as error:
            errors.append(repr(error))
        times.append(time.perf_counter() - started)
    connection.close()


def load(port, clients, bodies):
    """All `bodies` over so many clients: {clients, requests, errors, per_s, p50_s, p99_s}."""
    times, errors, started = [], [], time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        for i in range(clients):
            pool.submit(client, port, bodies[i::clients], times, errors)
    seconds = time.perf_counter() - started
    p = statistics.quantiles(times, n=100, method="inclusive")
    return {"clients": clients, "requests": len(bodies), "errors": errors, "per_s": len(bodies) / seconds,
            "p50_s": p[49], "p99_s": p[98]}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=512, help="of each round with many clients")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--data_root", default="data/market-1501-grouped", help="its query/ is asked for")
    parser.add_argument("--json", metavar="PATH")
    args, rest = parser.parse_known_args()
    bodies = [file.read_bytes() for file in read_split(args.data_root, "query").files()[: args.requests]]
    bodies = (bodies * args.requests)[: args.requests]

    command = [sys.executable, str(ROOT / "inference.py"), "--serve", "--port", "0", "--data_root", args.data_root, *rest]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            line = model = ""
            while not line.startswith("search page: http"):
                model, line = line.strip(), server.stdout.readline()
                if not line:
                    sys.exit("the server did not start")
            port = int(line.split()[2].rsplit(":", 1)[1])
            print(model)
            load(port, args.clients, bodies[: 2 * args.clients])  # the first batches compile and fill caches
            rounds = [[load(port, 1, bodies[: max(20, args.requests // 16)]), load(port, args.clients, bodies)]
                      for _ in range(args.rounds)]
        finally:
            server.send_signal(signal.SIGINT)
    alone, many = sorted(rounds, key=lambda pair: pair[1]["per_s"] / pair[0]["per_s"])[len(rounds) // 2]
    for side in (alone, many):
        print(f"{side['clients']:>3} clients: {side['per_s']:6.1f} searches a second, p50 {1000 * side['p50_s']:5.0f} ms, "
              f"p99 {1000 * side['p99_s']:5.0f} ms")
    errors = sum(len(side["errors"]) for pair in rounds for side in pair)
    print(f"{many['per_s'] / alone['per_s']:.2f} times the searches of one client; errors: {errors} of "
          f"{sum(side['requests'] for pair in rounds for side in pair)}")
    if args.json:
        row = {"name": f"search page, {args.clients} clients, searches a second", "ours": many["per_s"], "peer": alone["per_s"],
               "peer_name": "one client", "ratio": many["per_s"] / alone["per_s"]}
        Path(args.json).write_text(json.dumps({"model": model, "rows": [row], "rounds": rounds}, indent=1))
    sys.exit(bool(errors))


if __name__ == "__main__":
    main()
