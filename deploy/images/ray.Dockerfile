# syntax=docker/dockerfile:1
# SPDX-License-Identifier: Apache-2.0
# docker build -f deploy/images/ray.Dockerfile -t vllm-lowbit-ray:0.1.0-cpu .
# Ray on top of either of the other two images (BASE). Never built yet: no container
# engine where this was written.
ARG BASE=vllm-lowbit:0.1.0-cpu
FROM ${BASE}

USER 0
# KubeRay's probes call wget.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends wget \
    && rm -rf /var/lib/apt/lists/*

ARG PIP_EXTRA_INDEX_URL=
WORKDIR /src
COPY . .
RUN deploy/images/install.sh ray && rm -rf /src/*

ENV VLLM_PLUGINS=lowbit \
    RAY_USAGE_STATS_ENABLED=0
WORKDIR /tmp
USER 10001:10001
ENTRYPOINT []
CMD ["ray", "--help"]
