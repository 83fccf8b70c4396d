# Everything but a vLLM server, on a CPU; with another index for torch on a GPU:
#   docker build --tag obm-warmstart .
#   docker build --tag obm-warmstart:cuda --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 .
#   docker run --rm --volume "$PWD/runs:/work/runs" obm-warmstart obm demo --output runs/demo
# Written without a Docker daemon at hand: tests/docs/test_dockerfile.py checks what can be checked
# without one, the image itself has not been built.
FROM python:3.11.13-slim-bookworm

ARG TORCH=2.13.0
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

# on a GPU Triton compiles what calls its kernels
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

# torch first: a change of the code does not install it again
RUN pip install --no-cache-dir --index-url "$TORCH_INDEX" "torch==$TORCH"

WORKDIR /opt/obm-warmstart
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY merge merge
COPY environments environments
COPY rewards rewards
COPY configs configs
COPY train train
COPY compare compare
COPY launch launch
RUN pip install --no-cache-dir --constraint constraints.txt ".[serve,live,dense]"

RUN useradd --create-home --uid 1000 obm && mkdir /work && chown obm /work
USER obm
WORKDIR /work
ENV PYTHONSAFEPATH=1 TOKENIZERS_PARALLELISM=false
CMD ["obm", "doctor"]
