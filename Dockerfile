# docker build -t v4train .
# docker run --rm --gpus all --shm-size=8g -v "$PWD/runs:/workspace/runs" v4train model=flash_small
#
# torchrun's own options come through its environment: -e PET_NPROC_PER_NODE=8 -e PET_NNODES=2 ...
# A sweep: docker run --entrypoint python3 ... v4train launch/pretrain.py -m seed=1,2
# The mounted folder must be writable for uid 10001, or add --user "$(id -u)".
FROM pytorch/pytorch:2.13.0-cuda13.0-cudnn9-runtime

# The image's Python is marked as managed by the system (PEP 668), although nothing but us uses it.
ENV PIP_BREAK_SYSTEM_PACKAGES=1 \
    PIP_NO_CACHE_DIR=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/workspace \
    USER=v4train

WORKDIR /workspace
COPY pyproject.toml README.md LICENSE ./
COPY conf conf
COPY hydra_plugins hydra_plugins
COPY v4train v4train
# The constraint keeps the image's CUDA build of torch: pip may not replace it with another.
RUN python3 -c "import torch; print('torch==' + torch.__version__)" > /tmp/constraints.txt \
    && python3 -m pip install --constraint /tmp/constraints.txt . \
    && rm -rf /tmp/constraints.txt build ./*.egg-info v4train hydra_plugins conf

COPY launch launch
COPY tools tools
RUN useradd --uid 10001 --no-create-home --home-dir /workspace v4train \
    && mkdir -p runs \
    && chmod 1777 /workspace runs
USER 10001

HEALTHCHECK NONE
ENTRYPOINT ["torchrun", "launch/pretrain.py"]
