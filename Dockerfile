# Two images from one file; name the target, since the last one is the large one.
#   docker build --target inference -t reid .       CPU, searches, embeds with OpenVINO. For CUDA, add
#     --build-arg ENGINE=torch --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130
#   docker build --target train -t reid-train .     CUDA, trains, with TensorBoard and MLflow
#
#   docker run reid                                                              the default query on people that are drawn
#   docker run -v "$PWD:/images:ro" reid --query_paths /images/crop.jpg --topk 10
#   docker run -p 127.0.0.1:8000:8000 reid --serve --host 0.0.0.0                the search page; it asks for no password
#   docker run -v "$PWD:/images:ro" --entrypoint python reid inference.py --gallery /images --query_paths /images/crop.jpg
# It writes nothing and needs no network, so all of these also run with
#   --network none --read-only --cap-drop ALL --security-opt no-new-privileges    (no network: not with -p)
# For --output, mount a folder and add --user "$(id -u)", whose files they then are.
ARG BASE_IMAGE=python:3.12-slim

FROM ${BASE_IMAGE} AS base
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore \
    MLFLOW_DISABLE_TELEMETRY=true DO_NOT_TRACK=true
WORKDIR /app
RUN useradd --create-home --uid 1000 reid

# --- what embeds and searches: no MLflow, no TensorBoard, no torchvision -------------------------------------------
FROM base AS inference
ARG TORCH=2.13.0
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG ENGINE=openvino
COPY requirements.lock ./
# PyPI's torch is the CUDA one, so torch comes from PyTorch's own index and from there alone: --index-url, since with
# --extra-index-url either index could answer for any name. What torch needs is in the lock and installed before it.
# Its headers and C++ tests are a quarter of its size, and nothing here compiles; half of OpenVINO is for other devices and
# for files of other frameworks.
RUN pip install --require-hashes -r requirements.lock && \
    pip install --index-url "${TORCH_INDEX}" "torch==${TORCH}" && \
    site="$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" && \
    rm -rf "${site}/torch/include" "${site}/torch/share" "${site}/torch/test" "${site}"/torch/bin/test_* \
      "${site}"/torch/bin/protoc* "${site}/openvino/include" && \
    find "${site}/openvino/libs" -regextype egrep \
      -regex '.*(cache\.json|_[gn]pu_plugin.*|_(onnx|tensorflow|pytorch|paddle|gguf|jax)_.*)' -delete && \
    if [ "${ENGINE}" = torch ]; then pip uninstall -y openvino openvino-telemetry; fi
COPY models/masked-hog-908 ./models/masked-hog-908
COPY reid ./reid
COPY data_prep.py inference.py ./
# As root: the user who answers queries cannot change code, model or gallery. It also leaves the bytecode that later
# starts then need not make, which a read-only container could not keep. What OpenVINO compiled is for this processor only.
RUN python data_prep.py --synthetic && \
    python inference.py --engine "${ENGINE}" --data_root data/synthetic --save_index --topk 1 && \
    rm -f models/*/*.openvino && \
    python -m compileall -q inference.py reid
ENV PYTHONDONTWRITEBYTECODE=1 ENGINE=${ENGINE}
USER 1000
EXPOSE 8000
# Python as process 1 would ignore TERM; INT it answers at once.
STOPSIGNAL SIGINT
# Meant for --serve; a container that answers a query has ended before the first check.
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s CMD ["python", "-c", \
    "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/healthz', timeout=4)"]
ENTRYPOINT ["sh", "-c", "exec python inference.py --engine ${ENGINE} --load_index --data_root data/synthetic \"$@\"", "reid"]

# --- what trains ---------------------------------------------------------------------------------------------------
# Dashboards by default, training beside them; needs NVIDIA's container toolkit on the host:
#   docker run -d --name reid --gpus all --shm-size 2g -p 127.0.0.1:6006:6006 -p 127.0.0.1:8080:8080 \
#     -v reid-data:/app/data -v reid-models:/app/models -v reid-runs:/app/runs reid-train
#   docker exec reid python data_prep.py && docker exec reid python train.py
# A folder of the host instead of a volume must be writable by the user: add --user "$(id -u)" there.
FROM base AS train
# PyPI's torch is the CUDA one. For another CUDA: TORCH_INDEX=https://download.pytorch.org/whl/cu126
ARG TORCH_INDEX=https://pypi.org/simple
COPY requirements.txt ./
RUN grep ^torch requirements.txt > /tmp/torch.txt && \
    pip install --index-url "${TORCH_INDEX}" -r /tmp/torch.txt && \
    pip install -r requirements.txt
COPY --chown=1000:1000 . .
# Volumes take owner and mode from here; with --user, somebody else writes to what is not mounted. MLflow's database lies with
# the runs, ImageNet's weights with the data, where volumes keep them.
RUN mkdir -p data index models runs && chown reid: . data index runs && chmod 1777 data index models runs
ENV MLFLOW_TRACKING_URI=sqlite:////app/runs/mlflow.db TORCH_HOME=/app/data/torch
USER 1000
# A whole address (--build-arg DOWNLOAD=https://...) puts the dataset into the image: keep such an image to yourself.
ARG DOWNLOAD=
RUN if [ -n "${DOWNLOAD}" ]; then python data_prep.py --url "${DOWNLOAD}" && rm -f data/download-*; fi
ENV HOST=0.0.0.0 PYTHONDONTWRITEBYTECODE=1
EXPOSE 6006 8080
CMD ["./dashboards.sh"]
