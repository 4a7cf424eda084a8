# syntax=docker/dockerfile:1
# SPDX-License-Identifier: Apache-2.0
# docker build -f deploy/images/cpu.Dockerfile -t vllm-lowbit:0.1.0-cpu .
# Never built yet: no container engine where this was written. Its step, install.sh, was
# run without one.
FROM python:3.11.14-slim-bookworm

# g++ stays: torch.compile calls it when a model loads. Debian's stable release pins it.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ libnuma1 \
    && rm -rf /var/lib/apt/lists/*

# Where wheels of torch marked +cpu come from, if not from the default index.
ARG PIP_EXTRA_INDEX_URL=
WORKDIR /src
COPY . .
RUN deploy/images/install.sh cpu /opt/vllm && rm -rf /src/*

ENV PATH=/opt/vllm/bin:$PATH \
    VLLM_PLUGINS=lowbit \
    VLLM_NO_USAGE_STATS=1 \
    HOME=/tmp
WORKDIR /tmp
USER 10001:10001
EXPOSE 8000
ENTRYPOINT ["vllm"]
CMD ["serve", "--help"]
