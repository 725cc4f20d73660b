#!/usr/bin/env bash
# Serve TensorBoard (runs/) on port 6006 and MLflow (mlflow.db) on port 8080, from the active Python environment. Both run
# until Ctrl-C, TERM, the end of the terminal or the death of one of them; then both stop, with all their children.
#
#   HOST                 address to listen on (127.0.0.1); neither asks for a password, so think before 0.0.0.0
#   TENSORBOARD_PORT, MLFLOW_PORT
#   MLFLOW_TRACKING_URI  another store than mlflow.db, such as sqlite:////data/mlflow.db or postgresql://...
#   MLFLOW_SERVER_ALLOWED_HOSTS, MLFLOW_SERVER_CORS_ALLOWED_ORIGINS
#                        host names under which browsers may open both pages, and origins for MLflow (default: localhost,
#                        IP addresses and, where HOST is set, the names of this machine). Other names are refused, since
#                        by DNS rebinding any web page could read the training images in runs/.
#
# Exit status: 1 could not start, or one has died; 130 Ctrl-C; 143 TERM; 129 terminal closed. Needs bash >= 4.4.
set -u
HOST=${HOST:-127.0.0.1} TENSORBOARD_PORT=${TENSORBOARD_PORT:-6006} MLFLOW_PORT=${MLFLOW_PORT:-8080}
STORE=${MLFLOW_TRACKING_URI:-sqlite:///mlflow.db}

die() { echo "dashboards.sh: error: $*" >&2; exit 1; }

((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) || die "bash $BASH_VERSION is too old, 4.4 is needed"
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" || exit 1
for tool in tensorboard mlflow; do
  command -v "$tool" >/dev/null ||
    die "$tool is not installed; activate your environment, or run: pip install -r requirements.txt"
done
[[ $STORE != http?(s)://* ]] ||
  die "MLFLOW_TRACKING_URI is the address of a server: open that, or unset it to serve mlflow.db"

# Ports are checked before anything starts: on a taken port mlflow exits with status 0 after ten seconds.
python3 - "$HOST" "TENSORBOARD_PORT=$TENSORBOARD_PORT" "MLFLOW_PORT=$MLFLOW_PORT" <<'PYTHON' || exit 1
import socket, sys
host, held = sys.argv[1], []
for setting in sys.argv[2:]:
    name, port = setting.split("=", 1)
    try:
        held.append(socket.create_server((host, int(port))))
    except (OSError, OverflowError, ValueError) as error:
        reason = str(getattr(error, "strerror", None) or error).split(" (")[0]
        sys.exit(f"dashboards.sh: error: {host} port {port}: {reason}; stop what uses it, or set {name} or HOST")
PYTHON

address=$HOST
case $HOST in
  127.* | localhost) ;;
  *)  # MLflow answers other machines' browsers only under the names in this list
    [[ $HOST != 0.0.0.0 ]] || address=localhost
    for name in "$HOST" localhost 127.0.0.1 "$HOSTNAME" $(hostname -I 2>/dev/null); do
      hosts=${hosts:+$hosts,}$name:$MLFLOW_PORT
      origins=${origins:+$origins,}http://$name:$MLFLOW_PORT
    done
    export MLFLOW_SERVER_ALLOWED_HOSTS=${MLFLOW_SERVER_ALLOWED_HOSTS:-$hosts}
    export MLFLOW_SERVER_CORS_ALLOWED_ORIGINS=${MLFLOW_SERVER_CORS_ALLOWED_ORIGINS:-$origins} ;;
esac
export MLFLOW_DISABLE_TELEMETRY=true DO_NOT_TRACK=true
export MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false  # with --workers 1: 2 processes instead of 10

# The command `tensorboard`, which accepts any Host header, with a check of it.
read -r -d '' TENSORBOARD <<'PYTHON'
import ipaddress, os, sys
from fnmatch import fnmatch
from urllib.parse import urlsplit
from tensorboard import default, main_lib, program

hosts = os.environ.get("MLFLOW_SERVER_ALLOWED_HOSTS", "localhost").split(",")
names = {"localhost", *(host.rsplit(":", 1)[0] for host in hosts)}

def allowed(host):
    try:
        name = urlsplit(f"//{host}").hostname
        return any(fnmatch(name, pattern) for pattern in names) or bool(ipaddress.ip_address(name))
    except (TypeError, ValueError):  # no name, or one that is no address
        return False

def server(app, flags):
    def checked(environ, start_response):
        if allowed(environ.get("HTTP_HOST", "")):
            return app(environ, start_response)
        start_response("403 Forbidden", [("Content-Type", "text/plain")])
        return [b"This host name is not allowed; add it to MLFLOW_SERVER_ALLOWED_HOSTS.\n"]
    return program.WerkzeugServer(checked, flags)

main_lib.global_init()
tensorboard = program.TensorBoard(default.get_plugins(), server_class=server)
tensorboard.configure(["tensorboard", *sys.argv[1:]])
sys.exit(tensorboard.main())
PYTHON

groups=() logs=

start() {  # NAME COMMAND...; job control gives each its own process group, as setsid would (macOS has no setsid)
  set -m
  "${@:2}" </dev/null >"$logs/$1" 2>&1 &
  set +m
  groups+=("$!")
}

stop() {  # the whole groups: without their leaders, workers would live on
  trap '' HUP INT QUIT TERM
  groups+=($(jobs -p))  # one whose start was cut short by a signal
  kill -TERM -- "${groups[@]/#/-}"
  for _ in {1..50}; do
    kill -0 -- "${groups[@]/#/-}" || break
    sleep 0.1
  done
  kill -KILL -- "${groups[@]/#/-}"
  rm -rf -- "$logs"
} 2>/dev/null

mlflow_server() {
  if [[ $STORE == sqlite:///mlflow.db && ! -e mlflow.db ]]; then  # a training may be creating the same tables just now
    python3 -c 'from reid.training.tracking import open_store; open_store()' || exit 1
  fi
  # in the environment, since `ps` would show the password of a command line
  MLFLOW_BACKEND_STORE_URI=$STORE exec mlflow server --host "$HOST" --port "$MLFLOW_PORT" --workers 1
}

page() (  # PORT PATH: the answer to a GET, header and all
  exec 3<>"/dev/tcp/$address/$1" && printf 'GET %s HTTP/1.0\r\nHost: localhost:%s\r\n\r\n' "$2" "$1" >&3 || return
  read -r -t 5 -d '' answer <&3
  printf '%s' "$answer"
) 2>/dev/null

both_live() { kill -0 "${groups[0]}" && kill -0 "${groups[1]}"; } 2>/dev/null

trap stop EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 131' QUIT
trap 'exit 143' TERM

logs=$(mktemp -d) || exit 1
echo "Starting TensorBoard and MLflow, which takes about ten seconds (Ctrl-C stops both) ..."
start tensorboard python3 -c "$TENSORBOARD" --logdir runs --host "$HOST" --port "$TENSORBOARD_PORT"
start mlflow mlflow_server
until [[ $(page "$TENSORBOARD_PORT" /) == HTTP/* && $(page "$MLFLOW_PORT" /health) == HTTP/* ]] || ! both_live; do
  sleep 0.2
done
if both_live; then
  # link to the runs: MLflow's front page is about language models, and would open the experiment as one of those
  experiment=$(page "$MLFLOW_PORT" "/api/2.0/mlflow/experiments/get-by-name?experiment_name=human-reid")
  [[ $experiment =~ \"experiment_id\":\ *\"([0-9]+) ]] &&
    runs="/#/experiments/${BASH_REMATCH[1]}/runs?workflowType=machine_learning"
  echo "TensorBoard  http://$address:$TENSORBOARD_PORT"
  echo "MLflow       http://$address:$MLFLOW_PORT${runs-}"
  wait -n "${groups[@]}"
fi
dead=tensorboard
! kill -0 "${groups[0]}" 2>/dev/null || dead=mlflow
last=$(tail -n 3 -- "$logs/$dead")
[[ ! $STORE =~ ://[^/]*:(.+)@ ]] || last=${last//"${BASH_REMATCH[1]}"/***}  # without the password of the store
[[ ! $STORE =~ \?(.+) ]] || last=${last//"${BASH_REMATCH[1]}"/***}
printf '%s\n' "$last" >&2
die "$dead has stopped by itself (its last lines are above)"
