#!/usr/bin/env bash
# Builds and runs every test: release, then AddressSanitizer with UndefinedBehaviorSanitizer, then
# ThreadSanitizer, then the quickstart, then the stack in containers (which only root can).
# On a bare Debian 12, as root or with sudo, it installs what it needs from Debian's packages, and
# Python packages into .venv.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: tests/run.sh [--quick] [--only STAGE] [--no-install] [--jobs N]

  --quick       release build and its tests only
  --only STAGE  one stage: release, asan, tsan, quickstart or compose (these two need the release
                build)
  --no-install  leave the system's packages as they are
  --jobs N      parallel compilations (default: number of CPUs)
TEXT
}

cd "$(dirname "${BASH_SOURCE[0]}")/.."
stages=(release asan tsan quickstart compose)
install=yes
jobs="$(nproc)"
while (($#)); do
  case "$1" in
    --quick) stages=(release) ;;
    --only)
      case "${2:-}" in
        release | asan | tsan | quickstart | compose) stages=("$2") ;;
        *)
          echo "tests/run.sh: --only takes release, asan, tsan, quickstart or compose" >&2
          exit 2
          ;;
      esac
      shift
      ;;
    --no-install) install=no ;;
    --jobs)
      [[ "${2:-}" =~ ^[1-9][0-9]*$ ]] || { echo "tests/run.sh: --jobs takes a number" >&2; exit 2; }
      jobs="$2"
      shift
      ;;
    --help | -h) usage; exit 0 ;;
    *) echo "tests/run.sh: unknown argument $1" >&2; usage >&2; exit 2 ;;
  esac
  shift
done

# Flags given through the environment are meant for another service; what is left says how the tests
# run.
for variable in "${!EPSERVE_@}"; do
  case "$variable" in
    EPSERVE_SOAK_SECONDS | EPSERVE_CUDA_IMAGE | EPSERVE_SIM_* | EPSERVE_FUZZ_*) ;;
    EPSERVE_TEST_SLOWNESS) ;;
    *) unset "$variable" ;;
  esac
done

# With ccache, objects of one checkout serve another: paths count relative to the checkout.
export CCACHE_BASEDIR="$PWD" CCACHE_NOHASHDIR=1
# Here the tests in Python have their packages; a test that skips for want of them has failed.
export EPSERVE_REQUIRE_PYTHON=1

summary=()
failed=0

log="$(mktemp "${TMPDIR:-/tmp}/epserve-tests-XXXXXX")"
trap 'rm -f "$log"' EXIT

# Runs a step, keeps how long it took and what ctest or pytest made of it, and goes on after a
# failure to what does not depend on it.
step() {
  local name="$1" began=$SECONDS result=ok counts
  shift
  printf '\n==> %s\n' "$name"
  "$@" 2>&1 | tee "$log" || { result=FAILED; failed=1; }
  counts="$(grep -E '^[0-9]+% tests passed|^[0-9]+ (passed|failed)' "$log" | tail -n 1 || true)"
  summary+=("$(printf '%-28s %-7s %5d s  %s' "$name" "$result" $((SECONDS - began)) "$counts")")
  [[ "$result" == ok ]]
}

finish() {
  printf '\n==> Summary (%d s in all)\n' "$SECONDS"
  printf '%s\n' "${summary[@]}"
  exit "$failed"
}

# Debian's own interpreter where there is one: another on PATH may lack the packages' wheels.
python=/usr/bin/python3

make_venv() {
  local stamp=.venv/requirements.txt
  [[ -x "$python" ]] || python="$(command -v python3)"
  if ! cmp -s tests/requirements.txt "$stamp"; then
    rm -rf .venv
    "$python" -m venv .venv &&
      .venv/bin/pip install --quiet --disable-pip-version-check -r tests/requirements.txt &&
      cp tests/requirements.txt "$stamp"
  fi
  if ! cmp -s tests/perf_analyzer.txt .venv/perf_analyzer/requirements.txt; then
    .venv/bin/python tests/support/fetch_perf_analyzer.py tests/perf_analyzer.txt \
      .venv/perf_analyzer &&
      cp tests/perf_analyzer.txt .venv/perf_analyzer/requirements.txt
  fi
}

# build PRESET [TARGET...]
build() {
  local preset="$1"
  shift
  cmake --preset "$preset" -DEPSERVE_TESTS=ON -DEPSERVE_PYTHON="$PWD/.venv/bin/python" &&
    cmake --build --preset "$preset" --parallel "$jobs" ${@:+--target "$@"}
}

# A sanitizer's shadow memory wants addresses that a strongly randomised layout may have taken.
fixed_addresses() {
  if setarch "$(uname -m)" -R true 2>/dev/null; then
    setarch "$(uname -m)" -R "$@"
  else
    "$@"
  fi
}

run_release() {
  step "release: build" build release || return
  step "release: unit and fuzz tests" \
    ctest --test-dir build/release --output-on-failure -j 2 -LE 'e2e|gpu|compose' || true
  step "release: end-to-end tests" \
    ctest --test-dir build/release --output-on-failure -L e2e || true
}

run_asan() {
  export ASAN_OPTIONS=detect_leaks=1:abort_on_error=0:strict_string_checks=1
  export UBSAN_OPTIONS=print_stacktrace=1
  export LSAN_OPTIONS="suppressions=$PWD/tests/support/lsan.supp:print_suppressions=0"
  step "asan: build" build asan || return
  step "asan: unit and fuzz tests" fixed_addresses \
    ctest --test-dir build/asan --output-on-failure -j 2 -LE 'e2e|gpu|compose' -E '^structure$' ||
    true
  step "asan: end-to-end smoke" fixed_addresses env EPSERVE_BIN_DIR="$PWD/build/asan/bin" \
    EPSERVE_TEST_SLOWNESS=5 .venv/bin/python -m pytest -q -p no:cacheprovider \
    tests/e2e/test_bad_requests.py tests/e2e/test_batching.py tests/e2e/test_metrics.py || true
}

# Of what has threads of its own: the control plane, the exchange between workers, and their
# experts, but not the state machine, which has none. Nor the client, whose requests are memory that
# gRPC's own threads let go of: its count of who holds them is in a library that ThreadSanitizer
# does not see, and reports of it come and go.
tsan_folders=(
  tests/server tests/runtime/alltoallv tests/runtime/symmetric tests/runtime/engine
  tests/runtime/experts
)

run_tsan() {
  export TSAN_OPTIONS="suppressions=$PWD/tests/support/tsan.supp:halt_on_error=1:history_size=7"
  step "tsan: build" build tsan "${tsan_folders[@]/%//all}" || return
  local folder
  for folder in "${tsan_folders[@]}"; do
    step "tsan: $folder" fixed_addresses \
      ctest --test-dir "build/tsan/$folder" --output-on-failure --no-tests=error \
      -j 2 -E '^state_machine' || true
  done
}

run_quickstart() {
  step "quickstart" deploy/quickstart.sh || true
}

run_compose() {
  step "compose" ctest --test-dir build/release --output-on-failure --no-tests=error -L compose ||
    true
}

if [[ "$install" == yes ]]; then
  step "install packages" deploy/install-deps.sh --tests || finish
fi
step "python packages" make_venv || finish
for stage in "${stages[@]}"; do
  "run_$stage" || true
done
finish
