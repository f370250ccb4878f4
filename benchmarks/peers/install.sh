#!/usr/bin/env bash
# Makes an environment of its own for each peer system, under .peers/ (or $TORCHWAYS_PEERS): they share no versions
# with ours, and nothing of theirs is ever installed into it.
set -euo pipefail
root="${TORCHWAYS_PEERS:-.peers}"
python="${PYTHON:-python3.11}"

install() {
  local name="$1"
  shift
  test -x "$root/$name/bin/python" || "$python" -m venv "$root/$name"
  "$root/$name/bin/pip" install --quiet --disable-pip-version-check "$@"
}

install jax "jax==0.10.2"
install ray "ray[default]==2.60.0"
install monarch "torchmonarch==0.7.0" "torch==2.13.0"
