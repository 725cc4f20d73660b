# Two images; docs/containers.md shows how to use them. Name the target, since the last stage is the large one.
#   docker build --target inference -t reid .       searches on a CPU, embeds with OpenVINO. For CUDA, add
#     --build-arg ENGINE=torch --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130
#   docker build --target train -t reid-train .     trains with CUDA, serves TensorBoard and MLflow
ARG BASE_IMAGE=python:3.12-slim

FROM ${BASE_IMAGE} AS base
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore \
    MLFLOW_DISABLE_TELEMETRY=true DO_NOT_TRACK=true
WORKDIR /app
RUN useradd --create-home --uid 1000 reid

# --- inference: without MLflow, TensorBoard and torchvision --------------------------------------------------------
FROM base AS inference
ARG TORCH=2.13.0
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG ENGINE=openvino
COPY requirements.lock ./
# PyPI's torch contains CUDA, so torch is installed from PyTorch's own index, and only from there: with --extra-index-url
# either index could provide any package. The lock file contains torch's dependencies, which are installed first. Torch's
# headers and C++ tests are a quarter of its size and nothing is compiled here; half of OpenVINO is for other devices
# and other frameworks' files.
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
# As root, so that the user of the container cannot change code, model or index. This also writes the bytecode, which a
# read-only container could not keep. The network that OpenVINO compiled is removed: it fits the build machine only.
RUN python data_prep.py --synthetic && \
    python inference.py --engine "${ENGINE}" --data_root data/synthetic --save_index --topk 1 && \
    rm -f models/*/*.openvino && \
    python -m compileall -q inference.py reid
ENV PYTHONDONTWRITEBYTECODE=1 ENGINE=${ENGINE}
USER 1000
EXPOSE 8000
# As process 1, Python ignores TERM but stops at INT.
STOPSIGNAL SIGINT
# For --serve; a container that answers one query ends before the first check.
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s CMD ["python", "-c", \
    "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/healthz', timeout=4)"]
# The index of drawn people is searched, unless the options name a gallery that has to be embedded.
ENTRYPOINT ["sh", "-c", "case \" $* \" in *' --gallery'[!_]*|*' --data_root'*|*' --save_index'*) ;; *) set -- --load_index \"$@\" ;; esac; exec python inference.py --engine \"$ENGINE\" \"$@\"", "reid"]

# --- training: dashboards by default, scripts by `docker exec` -----------------------------------------------------
FROM base AS train
# PyPI's torch contains CUDA. For another version of CUDA: TORCH_INDEX=https://download.pytorch.org/whl/cu126
ARG TORCH_INDEX=https://pypi.org/simple
# torch.compile builds small C files; without a compiler training goes on without it, at a lower speed. Any version will do.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
COPY requirements.txt ./
RUN grep ^torch requirements.txt > /tmp/torch.txt && \
    pip install --index-url "${TORCH_INDEX}" -r /tmp/torch.txt && \
    pip install -r requirements.txt
COPY --chown=1000:1000 . .
# Volumes inherit owner and mode from these folders; they are open to the users that --user names. MLflow's database is in
# runs/ and ImageNet's weights are in data/, so that the volumes keep them.
RUN mkdir -p data index models runs && chown reid: . data index runs && chmod 1777 data index models runs
ENV MLFLOW_TRACKING_URI=sqlite:////app/runs/mlflow.db TORCH_HOME=/app/data/torch
USER 1000
# An address (--build-arg DOWNLOAD=https://...) puts a dataset into the image; do not publish such an image.
ARG DOWNLOAD=
RUN if [ -n "${DOWNLOAD}" ]; then python data_prep.py --url "${DOWNLOAD}" && rm -f data/download-*; fi
ENV HOST=0.0.0.0 PYTHONDONTWRITEBYTECODE=1
EXPOSE 6006 8080
CMD ["./dashboards.sh"]
