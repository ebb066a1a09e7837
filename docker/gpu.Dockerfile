# The force estimator with CUDA and TensorRT. From the repository root:
#   docker build -f docker/gpu.Dockerfile -t genforce:gpu .
#   docker run --gpus all --network host genforce:gpu genforce serve /bundle --sensor array_1
FROM nvidia/cuda:12.8.1-cudnn-runtime-ubuntu24.04

# The base image says which release these come from.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends \
        g++ git make python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /genforce
COPY . .
RUN make setup

# One onnxruntime at a time: the GPU build takes the place of the CPU one.
SHELL ["/bin/bash", "-c"]
RUN .venv/bin/pip uninstall -y onnxruntime \
    && .venv/bin/pip install --no-cache-dir -r requirements/gpu.txt tensorrt

COPY docker/entrypoint.sh /entrypoint.sh
ENTRYPOINT ["/entrypoint.sh"]
CMD ["genforce", "doctor"]
