# docker build --tag lowrank .                              # for CPUs
# docker build --build-arg EXTRA=cuda --tag lowrank .       # for GPUs; or another extra of pyproject.toml, such as tpu
# docker run --gpus=all --volume="$PWD/runs:/runs" lowrank train --config=configs/quickstart.py --workdir=/runs/quickstart
FROM python:3.12-slim
ARG EXTRA=cpu
# Attention and decoding on a CPU are C++, compiled at the first start.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /lowrank_jax
COPY requirements.txt ./
RUN pip install --no-cache-dir -r requirements.txt
COPY pyproject.toml README.md LICENSE ./
COPY configs configs
COPY lowrank_jax lowrank_jax
RUN pip install --no-cache-dir -r requirements.txt ".[${EXTRA}]"
ENTRYPOINT ["python", "-m", "lowrank_jax"]
CMD ["--help"]
