# Everything of requirements.lock and this project: docker build -t shardwright .
#   docker run --rm shardwright python -m trainer experiment=digits_mlp logging=[console]
#   docker run --rm --gpus all --shm-size 16g -v "$PWD/runs:/shardwright/runs" shardwright torchrun --nproc_per_node=8 -m trainer experiment=...
# The lock has the version of torch; the index decides on its build:
#   docker build --build-arg PIP_INDEX_URL=... --build-arg PIP_EXTRA_INDEX_URL=... .
FROM python:3.11-slim

ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL

# A compiler for what is built at first use (DeepSpeed's operators, torch.compile), and the headers of NVMe offloading.
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends g++ git libaio-dev ninja-build openssh-client \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/shardwright
COPY requirements.lock ./
RUN pip install --no-cache-dir -r requirements.lock
COPY pyproject.toml README.md LICENSE ./
COPY configs configs
COPY launch launch
COPY scripts scripts
COPY trainer trainer
RUN pip install --no-cache-dir --no-deps --no-build-isolation .

WORKDIR /shardwright
CMD ["python", "-m", "trainer", "--help"]
