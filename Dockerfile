# Two images from one file:
#   docker build --target inference -t reid .            small, CPU, answers queries (add --build-arg TORCH_INDEX=... for CUDA)
#   docker build --target train -t reid-train .          CUDA, trains, with TensorBoard and MLflow
ARG BASE_IMAGE=python:3.12-slim

FROM ${BASE_IMAGE} AS base
ENV PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 \
    MLFLOW_DISABLE_TELEMETRY=true DO_NOT_TRACK=true
WORKDIR /app
RUN useradd --create-home --uid 1000 reid && mkdir -p data index models runs && chown reid data index models runs

# --- what embeds and searches: no MLflow, no TensorBoard, no torchvision -------------------------------------------
FROM base AS inference-packages
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY requirements-inference.txt ./
RUN python -m venv /venv && /venv/bin/pip install --extra-index-url "${TORCH_INDEX}" -r requirements-inference.txt

FROM base AS inference
COPY --from=inference-packages /venv /venv
ENV PATH=/venv/bin:$PATH
COPY reid ./reid
COPY models/masked-hog-908 ./models/masked-hog-908
COPY data_prep.py inference.py ./
USER reid
RUN python data_prep.py --synthetic && python inference.py --data_root data/synthetic --save_index --topk 1
EXPOSE 8000
# Meant for --serve; a container that answers a query has ended before the first check.
HEALTHCHECK --interval=30s --timeout=5s --start-period=40s CMD ["python", "-c", \
    "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/healthz', timeout=4)"]
ENTRYPOINT ["python", "inference.py", "--load_index", "--data_root", "data/synthetic"]

# --- what trains: needs a CUDA driver on the host, --gpus all, and data as a volume on /app/data --------------------
FROM base AS train
COPY requirements.txt ./
RUN pip install -r requirements.txt
COPY . .
RUN chown -R reid models runs index data
USER reid
ARG DOWNLOAD=
RUN if [ -n "${DOWNLOAD}" ]; then python data_prep.py --url "${DOWNLOAD}"; fi
ENV HOST=0.0.0.0
EXPOSE 6006 8080
CMD ["./dashboards.sh"]
