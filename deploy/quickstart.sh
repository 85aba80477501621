#!/usr/bin/env bash
# From nothing to a measured service, on a Debian 12 with nothing but git and a shell: installs what
# is missing, builds, makes a checkpoint, starts a coordinator and four workers, proves the answers
# against an independent reference, drives load, and stops everything.
#
# Run as root or as a user who may use sudo. May be run again and again: a second run builds
# nothing.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: deploy/quickstart.sh [--no-install] [--jobs N] [--keep]

  --no-install  leave the system's packages as they are
  --jobs N      parallel compilations (default: number of CPUs)
  --keep        leave the service running; Ctrl-C stops it
TEXT
}

cd "$(dirname "${BASH_SOURCE[0]}")/.."
install=yes
keep=no
jobs="$(nproc)"
while (($#)); do
  case "$1" in
    --no-install) install=no ;;
    --keep) keep=yes ;;
    --jobs)
      [[ "${2:-}" =~ ^[1-9][0-9]*$ ]] || { echo "quickstart: --jobs takes a number" >&2; exit 2; }
      jobs="$2"
      shift
      ;;
    --help | -h) usage; exit 0 ;;
    *) echo "quickstart: unknown argument $1" >&2; usage >&2; exit 2 ;;
  esac
  shift
done

# Flags given through the environment are meant for another service.
unset "${!EPSERVE_@}"

# With ccache, objects of one checkout serve another: paths count relative to the checkout.
export CCACHE_BASEDIR="$PWD" CCACHE_NOHASHDIR=1

bin="$PWD/build/release/bin"
programs=(epserve epserve-coordinator epserve-worker)
# A name of its own, so that what is left behind can be told from any other cluster's.
cluster="quickstart-$$"
scratch="$(mktemp -d "${TMPDIR:-/tmp}/epserve-quickstart-XXXXXX")"
up_pid=
pids=()

say() { printf '\n\033[1m==> %s\033[0m\n' "$1"; }
[[ -t 1 && -z "${NO_COLOR:-}" ]] || say() { printf '\n==> %s\n' "$1"; }

# The segments and processes of this run that are still there, one a line.
left_behind() {
  local pid path
  for path in /dev/shm/epserve-"$cluster"-*; do
    [[ -e "$path" ]] && echo "segment $path"
  done
  for pid in "${pids[@]}"; do
    [[ -r "/proc/$pid/cmdline" ]] && tr '\0' ' ' <"/proc/$pid/cmdline" 2>/dev/null |
      grep -q -- "--cluster-id=$cluster" && echo "process $pid"
  done
  return 0
}

stop() {
  [[ -n "$up_pid" ]] || return 0
  local pid="$up_pid" code=0
  up_pid=
  kill -TERM "$pid" 2>/dev/null || true
  wait "$pid" || code=$?
  return "$code"
}

cleanup() {
  local code=$?
  trap - EXIT INT TERM HUP
  stop || true
  if ((code != 0)); then
    echo "quickstart: failed with code $code" >&2
    tail -n 20 "$scratch"/logs/*.log >&2 2>/dev/null || true
  fi
  rm -rf "$scratch"
  exit "$code"
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

if [[ "$install" == yes ]]; then
  say "Packages"
  deploy/install-deps.sh
  echo "all there"
fi

say "Build"
# The tests need more packages and time than this; tests/run.sh turns them on again.
tests=OFF
if grep -qs '^EPSERVE_TESTS:BOOL=ON' build/release/CMakeCache.txt; then tests=ON; fi
cmake --preset release "-DEPSERVE_TESTS=$tests" >"$scratch/cmake.log" ||
  { cat "$scratch/cmake.log" >&2; exit 1; }
cmake --build --preset release --parallel "$jobs" --target "${programs[@]}"

say "Checkpoint"
"$bin/epserve" make-checkpoint --output "$scratch/moe-demo" --architecture qwen3_moe --layers 2 \
  --hidden 512 --intermediate 384 --experts 32 --topk 4 --dtype bf16 --shards 2

say "Service: a coordinator and four workers"
"$bin/epserve" up --checkpoint "$scratch/moe-demo" --workers 4 --cluster-id "$cluster" \
  --listen 127.0.0.1:0 --metrics-listen 127.0.0.1:0 --ready-timeout 60 \
  --ready-file "$scratch/ready" --log-dir "$scratch/logs" &
up_pid=$!
until [[ -e "$scratch/ready" ]]; do
  kill -0 "$up_pid" 2>/dev/null || { wait "$up_pid" || exit 1; exit 1; }
  sleep 0.05
done
EPSERVE_SERVER="$(sed -n 's/^grpc=//p' "$scratch/ready")"
export EPSERVE_SERVER
mapfile -t pids < <(sed -n 's/^[a-z0-9_]*_pid=//p' "$scratch/ready")

say "Proof: every answer against an independent fp64 reference"
"$bin/epserve" verify --checkpoint "$scratch/moe-demo"

say "Load: one request at a time, then eight"
"$bin/epserve" bench --tokens 64 --concurrency 1 --requests 400
echo
"$bin/epserve" bench --tokens 64 --concurrency 8 --duration 4

say "Status"
"$bin/epserve" status

if [[ "$keep" == yes ]]; then
  say "Serving at $EPSERVE_SERVER until Ctrl-C"
  wait "$up_pid" || true
fi

say "Stop"
stop || { echo "quickstart: epserve up ended with code $?" >&2; exit 1; }
left="$(left_behind)"
if [[ -n "$left" ]]; then
  echo "quickstart: left behind: $left" >&2
  exit 1
fi
echo "no process and no shared-memory segment is left"

say "Done in $SECONDS s"
