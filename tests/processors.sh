#!/usr/bin/env bash
# Run unit tests and notebooks as other processors would; name what fails, and the committed verdicts that flip.
#
#   tests/processors.sh                 every kind below, one after the other (about 15 minutes each on two cores)
#   tests/processors.sh old one-core    these kinds
#   tests/processors.sh old -- -k lstm  arguments of pytest, for the unit tests alone
#
# A library picks its kernels by what the processor can do. The variables below make it pick those of a smaller one, so
# that a machine with AVX-512 stands for the others; where a machine lacks it anyway, they change nothing.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
jobs=${JOBS:-$(getconf _NPROCESSORS_ONLN)}

declare -A kinds=(
  [aten-default]="ATEN_CPU_CAPABILITY=default" # torch's own kernels without vector instructions
  [aten-avx2]="ATEN_CPU_CAPABILITY=avx2"
  [onednn-avx2]="ONEDNN_MAX_CPU_ISA=AVX2" # oneDNN's convolutions, products and LSTMs; no bfloat16 LSTM there
  # All at once, with numpy's products: a desktop processor of 2013 to 2021.
  [old]="ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 OPENBLAS_CORETYPE=Haswell"
  [one-core]="" # taskset, below
  [four-threads]="OMP_NUM_THREADS=4" # as set by a user; results must not depend on it
)
order=(aten-default aten-avx2 onednn-avx2 old one-core four-threads)

chosen=()
while (($#)) && [[ $1 != -- ]]; do
  [[ -v kinds[$1] ]] || { echo "no kind of processor is called '$1'; there are: ${order[*]}" >&2; exit 2; }
  chosen+=("$1")
  shift
done
((${#chosen[@]})) || chosen=("${order[@]}")

status=0
log=$(mktemp)
kept=$(mktemp -d)
trap 'rm -rf "$log" "$kept"' EXIT

check() { # check KIND WHAT PYTEST-ARGUMENTS...
  local kind=$1 what=$2 pinned=() parallel=(-n "$jobs")
  shift 2
  [[ $kind == one-core ]] && pinned=(taskset -c "$(taskset -cp $$ | grep -oE '[0-9]+' | tail -1)") parallel=(-n 1)
  # shellcheck disable=SC2086  # several settings are several words
  if env ${kinds[$kind]} "${pinned[@]}" "$python" -m pytest -q "${parallel[@]}" "$@" >"$log" 2>&1; then
    echo "$kind, $what: $(tail -1 "$log")"
  else
    status=1
    echo "$kind, $what: FAILED"
    grep -E '^(FAILED|ERROR)|^=+ .*(failed|error)|^E  ' "$log" || tail -20 "$log"
  fi
}

for kind in "${chosen[@]}"; do
  if (($#)); then
    check "$kind" "unit tests" "${@:2}"
  else
    check "$kind" "unit tests"
    export KOALA_KEEP_VERDICTS=$kept/$kind
    check "$kind" notebooks --nbval-lax --nbval-current-env --nbval-cell-timeout=1200 --dist loadscope notebooks
    KOALA_REPORT=$KOALA_KEEP_VERDICTS "$python" -c 'from koala_lab import report; print(*report.differences(), sep="\n")' |
      sed "s/^/$kind, verdict: /"
  fi
done
exit $status
