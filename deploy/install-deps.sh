#!/usr/bin/env bash
# Installs what building and running epserve needs, from Debian 12's own packages, and only what is
# missing. Run as root, or as a user who may use sudo. Asks nothing.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: deploy/install-deps.sh [--tests] [--runtime]

  --tests    also what the tests need
  --runtime  only what the built programs need to run
TEXT
}

build_packages=(
  ccache cmake g++ git ninja-build pkg-config                # tools
  libgrpc++-dev libgrpc-dev protobuf-compiler-grpc           # gRPC
  libprotobuf-dev protobuf-compiler                          # Protobuf
  libabsl-dev libcli11-dev libspdlog-dev nlohmann-json3-dev  # Abseil, flags, logs, JSON
  prometheus-cpp-dev libboost-dev libssl-dev                 # metrics, and their port
  libdnnl-dev                                                # matrix products
  libmimalloc-dev                                            # malloc of the programs
)
runtime_packages=(
  libgrpc++1.51 libprotobuf32 libabsl20220623 libspdlog1.10  # as above, and what they need
  libprometheus-cpp-core1.0 libssl3 libdnnl2 libmimalloc2.0
)
test_packages=(
  libgtest-dev libgmock-dev libbenchmark-dev
  ca-certificates python3 python3-venv                       # tests in Python, in a .venv
  openssl                                                    # their certificates
  libb64-0d                                                  # of perf_analyzer
  prometheus                                                 # promtool checks the alert rules
  docker.io docker-compose debootstrap iproute2              # the tests in containers
)

packages=("${build_packages[@]}")
while (($#)); do
  case "$1" in
    --runtime) packages=("${runtime_packages[@]}") ;;
    --tests) packages+=("${test_packages[@]}") ;;
    --help | -h) usage; exit 0 ;;
    *) echo "install-deps: unknown argument $1" >&2; usage >&2; exit 2 ;;
  esac
  shift
done

if ! command -v dpkg-query >/dev/null || ! command -v apt-get >/dev/null; then
  echo "install-deps: this is not Debian; install what corresponds to: ${packages[*]}" >&2
  exit 1
fi

missing=()
for package in "${packages[@]}"; do
  state="$(dpkg-query --show --showformat='${db:Status-Status}' "$package" 2>/dev/null || true)"
  [[ "$state" == installed ]] || missing+=("$package")
done
if ((${#missing[@]} == 0)); then
  exit 0
fi

as_root=()
if ((EUID != 0)); then
  if ! command -v sudo >/dev/null; then
    echo "install-deps: missing ${missing[*]}; run as root, or install sudo" >&2
    exit 1
  fi
  as_root=(sudo)
fi

echo "Installing ${missing[*]}"
apt_get() {
  # Another apt-get may be at work, as on a machine that has just started.
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
    apt-get -qq -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0 "$@"
}
apt_get update
# promtool comes with a server, which nobody has asked to run on this machine.
unit=/etc/systemd/system/prometheus.service
if [[ " ${missing[*]} " == *" prometheus "* && ! -e "$unit" && -d "${unit%/*}" ]]; then
  "${as_root[@]}" ln -s /dev/null "$unit"
fi
apt_get install --yes --no-install-recommends "${missing[@]}" >/dev/null
