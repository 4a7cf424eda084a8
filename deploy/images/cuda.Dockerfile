# syntax=docker/dockerfile:1
# SPDX-License-Identifier: Apache-2.0
# docker build -f deploy/images/cuda.Dockerfile -t vllm-lowbit:0.1.0-cuda .
# Never built yet: no container engine where this was written.
FROM vllm/vllm-openai:v0.32.0

USER 0
# It compiles the CPU kernels, which the installation builds everywhere.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /src
COPY . .
RUN deploy/images/install.sh cuda && rm -rf /src/*

ENV VLLM_PLUGINS=lowbit \
    VLLM_NO_USAGE_STATS=1 \
    HOME=/tmp
WORKDIR /tmp
USER 10001:10001
EXPOSE 8000
ENTRYPOINT ["vllm"]
CMD ["serve", "--help"]
