#!/usr/bin/env bash
# What only a GPU can show, the most valuable first. Nothing is fetched: docs/gpu.md says what has to be installed.
#
#   bash tools/on_gpu.sh                    the first set of the stages below
#   bash tools/on_gpu.sh second             the second one
#   bash tools/on_gpu.sh build kernels      some stages, in the table's order
#   bash tools/on_gpu.sh --dry-run          without a GPU: do files, filters and limits fit?
#
# A stage that fails, or is stopped at its limit, does not keep the next from running. Logs and results are in $OUT
# (build/on_gpu/first and so on, where it is not set), the table of verdicts comes last, and the exit status says whether
# all have passed. LIMIT=30 is a limit for each stage. tools/record_gpu.py writes what came back into the documents.
# shellcheck disable=SC2329 # stages are called by their names
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

# The seconds that a stage may take, where its output goes, the sets that it is in, what it shows. The dry run holds the
# sets to 550 seconds, and what lies in $OUT to eight files.
STAGES='
facts      30  build.log    first,second  what the machine is
build     110  build.log    first,second  the extension and the checks of its kernels, compiled for its architecture
kernels    40  kernels.log  first         each kernel and pass on raw pointers, beside the CPU kernels and float64
tests     170  tests.log    first         streams, graphs, launches, assertions, each traversal
large      35  tests.log    first         tensors of more than 2^31 elements
bench     120  bench.log    first         the headline cases beside native torch, Triton and a copy
sanitize   45  kernels.log  first         small cases under the four tools of compute-sanitizer
ncu       120  bench.log    second        hardware counters of eight headline cases
devices   100  tests.log    second        the tests over devices, with the CUDA kernels
peers     110  bench.log    second        beside torch.compile, and other projects whose wheels are in .whl
triton     80  tests.log    second        the tests of the Triton kernels
'
python=${PYTHON:-python3}

run_facts() { "${dry[@]}" "$python" tools/gpu_facts.py; }

# The registers are judged last, and are no reason to leave the kernels untested.
run_build() {
  local tag
  tag=$("$python" -c 'import sys; print(sys.implementation.cache_tag)') # of this Python's objects
  "${dry[@]}" "$python" setup.py build_ext --inplace || return
  "${dry[@]}" nvcc -std=c++20 -O2 --expt-relaxed-constexpr "-gencode=arch=compute_${arch/./},code=sm_${arch/./}" -Icsrc \
    -Xcompiler -fopenmp -o build/check_kernels tests/kernels/check_kernels.cu tests/kernels/cpu_reference.cpp \
    build/temp*"$tag"/csrc/kernels/c*/*.o || return
  "${dry[@]}" "$python" tools/kernel_resources.py "$log" || echo 'built; kernel_resources refuses the machine code'
}

run_kernels() { each checked float32 float64 bfloat16 float16; }
checked() { "${dry[@]}" build/check_kernels "$1"; }

run_tests() { tested -n 12 tests/test_cuda.py tests/test_cuda_traversals.py; }
run_large() { tested tests/test_cuda_large.py; } # one at a time: each takes 20 GiB

run_bench() { measured bench --no-compile --minutes 1.6; }

run_sanitize() { need compute-sanitizer && each sanitized memcheck racecheck synccheck initcheck; }
sanitized() { # some launches are to fail: that the runtime says so is no error
  "${dry[@]}" compute-sanitizer --tool "$1" --report-api-errors no --error-exitcode 9 --print-limit 20 \
    build/check_kernels --small bfloat16
}

run_ncu() {
  need ncu || return
  "${dry[@]}" ncu --profile-from-start off --clock-control none --section SpeedOfLight --section Occupancy \
    --section WarpStateStats --section LaunchStats --csv --page raw --print-units base --log-file "$OUT/ncu.csv" \
    "$python" tools/ncu_cases.py || { tail -n 3 "$OUT/ncu.csv" && false; }
}

over_devices='parity edge_cases gradients grad_in_forward accuracy autocast errors operators modules promises shards'
run_devices() {
  local files=() name
  for name in $over_devices; do files+=("tests/test_$name.py"); done
  tested -n 12 "${files[@]}" -k 'cuda and not triton'
}

run_peers() {
  if ls .whl/*.whl >/dev/null 2>&1; then
    "${dry[@]}" "$python" -m pip install -q --no-index --no-deps --no-compile --target "$scratch/site" .whl/*.whl &&
      export PYTHONPATH=$PYTHONPATH:$scratch/site
  else
    echo 'no wheels in .whl: torch.compile alone'
  fi
  measured peers --minutes 1.4
}

run_triton() { tested -n 12 tests/test_triton.py tests/test_lesson.py -k 'triton and not compile_for_a_gpu'; }

# --- What the stages are made of ---

# Where every test is skipped, pytest is content. A kernel that never ends hears no signal: the thread ends its process.
tested() {
  "${dry[@]}" "$python" -m pytest --timeout 60 --timeout-method thread --tb short -rfE "$@" || return
  tac "$log" | sed "/^===== [a-z]/q" | grep -m 1 -E '[0-9] (passed|tests collected)' || { echo 'no test has run' && false; }
}

# The cases that tools/gpu_headlines.py has for this stage. What is measured when it is stopped is kept.
measured() {
  local stage=$1 cases
  shift
  cases=$("$python" tools/gpu_headlines.py "$stage") || return
  "${dry[@]}" "$python" -m benchmarks --device cuda --filter "$cases" --output "$scratch/$stage" "$@"
}

# A function for each of the words, side by side; what it prints begins with the word.
each() {
  local function=$1 word pids=() failed=()
  shift
  for word; do
    ("$function" "$word" 2>&1 | sed -u "s/^/$word: /") &
    pids+=($!)
  done
  for word; do
    wait "${pids[0]}" || failed+=("$word")
    pids=("${pids[@]:1}")
  done
  echo "$function: ${#failed[@]} of $# failed${failed[*]:+: ${failed[*]}}"
  [ ${#failed[@]} -eq 0 ]
}

need() { [ ${#dry[@]} -gt 0 ] || command -v "$1" || { echo "$1 is not on the PATH, and this stage needs it" && false; }; }

# --- The stages, one after the other ---

# A stage is a process of its own, whose children end with it: `timeout` has made them one group.
stage() {
  local name=$1 limit=$2 begin=$SECONDS status verdict=passed
  export log=$OUT/$3
  echo "===== $name" >>"$log"
  timeout -k 5 "$limit" bash tools/on_gpu.sh --stage "$name" >>"$log" 2>&1 </dev/null &
  running=$!
  wait "$running"
  status=$?
  kill -KILL -- "-$running" 2>/dev/null
  [ $status -eq 0 ] || verdict=failed
  [[ $status =~ ^(124|137)$ ]] && verdict=stopped
  cp -f "$scratch/$name/results.json" "$OUT/$name.json" 2>/dev/null
  printf '%-9s %-8s %3d %4d s of %4d s  %s\n' "$name" $verdict $status $((SECONDS - begin)) "$limit" \
    "$(tail -n 1 "$log" | cut -c 1-160)" | tee -a "$OUT/summary.txt"
  [ $verdict = passed ]
}

is_wanted() { # by its name or that of a set
  local word
  for word in "${wanted[@]}"; do [[ ,$1,$2, == *,$word,* ]] && return; done
  return 1
}

dry=()
if [ "${1:-}" = --stage ]; then
  [ -z "$dry_run" ] || dry=("$python" tools/on_gpu_dry_run.py)
  "run_$2"
  exit
fi
wanted=("${@:-first}")
export dry_run=
if [ "${wanted[0]}" = --dry-run ]; then
  dry_run=yes LIMIT=${LIMIT:-200}
  if [ $# -gt 1 ]; then wanted=("${@:2}"); else wanted=(first second); fi
  OUT=${OUT:-build/on_gpu/dry-run}
  "$python" tools/on_gpu_dry_run.py || exit
fi
known=" $(awk '{ print $1, $4 }' <<<"$STAGES" | tr ',\n' '  ') "
for word in "${wanted[@]}"; do
  [[ $known == *" $word "* ]] || { echo "on_gpu: no stage or set is called $word" >&2 && exit 2; }
done

OUT=${OUT:-build/on_gpu/${wanted[0]}}
mkdir -p "$OUT" && OUT=$(realpath "$OUT") && rm -f "$OUT"/{summary.txt,bench.json,peers.json,ncu.csv,*.log}
scratch=$(mktemp -d)
running=
trap 'kill -KILL -- "-$running" 2>/dev/null; rm -rf "$scratch"' EXIT
arch=$(timeout 40 "$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())' 2>/dev/null) || arch=9.0
PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin
export OUT scratch arch PYTHONUNBUFFERED=1 PYTHONPATH=$PWD:${PYTHONPATH:-} FUSEDLOSS_CUDA=1
MAX_JOBS=${MAX_JOBS:-$(nproc)}
export MAX_JOBS TORCH_CUDA_ARCH_LIST=$arch TRITON_CACHE_DIR=$scratch/triton

bad=0
while read -r name limit file sets _; do
  is_wanted "$name" "$sets" || continue
  stage "$name" "${LIMIT:-$limit}" "$file" || bad=1
done < <(grep . <<<"$STAGES")
printf '\n%s:\n' "$OUT" && cat "$OUT/summary.txt"
exit $bad
