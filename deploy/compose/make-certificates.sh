#!/usr/bin/env bash
# Makes what compose.tls.yaml mounts: an authority, and from it a certificate for each part. Run
# again, it renews the certificates from the same authority in place, and what runs takes them up.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: deploy/compose/make-certificates.sh [--days N] DIR [NAME...]

  --days N  how long the certificates are good, days (default: 365; the authority: ten times that)
  DIR       where they go: DIR/PART/{tls.crt,tls.key,ca.crt}, and DIR/ca.key, which stays here
  NAME      further names or IP addresses of the coordinator, as clients elsewhere call it; without
            any, those of its certificate in DIR stay

PART is coordinator, worker, operator, frontend or metrics. Run it as root: a part's key belongs to
the user that its container runs as, and nobody else may read it.
TEXT
}

# Users of the images of epserve and of Prometheus.
readonly epserve_user=10001 prometheus_user=65534

days=365
while (($#)); do
  case "$1" in
    --days) days="${2:?--days needs a number}"; shift ;;
    --help | -h) usage; exit 0 ;;
    -*) echo "make-certificates: unknown argument $1" >&2; usage >&2; exit 2 ;;
    *) break ;;
  esac
  shift
done
if (($# == 0)) || [[ ! "$days" =~ ^[1-9][0-9]*$ ]]; then
  usage >&2
  exit 2
fi
directory="$1"
shift
if ((EUID != 0)); then
  echo "make-certificates: uid $EUID cannot give keys to the containers' users; run it as root" >&2
  exit 1
fi

umask 077
mkdir -p "$directory"
chmod 755 "$directory"
scratch="$(mktemp -d "$directory/.new.XXXXXX")"
trap 'rm -rf "$scratch"' EXIT

key_flags=(-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes)
if [[ ! -e "$directory/ca.key" ]]; then
  openssl req -x509 "${key_flags[@]}" -keyout "$scratch/ca.key" -out "$scratch/ca.crt" \
    -days $((10 * days)) -subj "/CN=epserve authority" 2>/dev/null
  mv "$scratch/ca.crt" "$directory/ca.crt"
  mv "$scratch/ca.key" "$directory/ca.key"
  chmod 644 "$directory/ca.crt"
fi

# issue PART USER NAMES: NAMES as subjectAltName has them.
issue() {
  local part="$1" user="$2" names="$3" made="$scratch/$1"
  mkdir "$made"
  printf 'subjectAltName=%s\nbasicConstraints=CA:FALSE\n' "$names" >"$made/extensions"
  openssl req "${key_flags[@]}" -keyout "$made/tls.key" -out "$made/request" \
    -subj "/CN=epserve $part" 2>/dev/null
  openssl x509 -req -in "$made/request" -CA "$directory/ca.crt" -CAkey "$directory/ca.key" \
    -set_serial "0x$(openssl rand -hex 16)" -days "$days" -extfile "$made/extensions" \
    -out "$made/tls.crt" 2>/dev/null
  cp "$directory/ca.crt" "$made/ca.crt"
  chown "$user" "$made"/tls.* "$made/ca.crt"
  chmod 400 "$made/tls.key"
  chmod 444 "$made/tls.crt" "$made/ca.crt"
  mkdir -p "$directory/$part"
  chmod 755 "$directory/$part"
  # A reader who finds the one without the other keeps what it has, and looks again.
  mv -f "$made/tls.key" "$made/tls.crt" "$made/ca.crt" "$directory/$part/"
}

# names_of CERTIFICATE: its DNS names and addresses, as subjectAltName has them.
names_of() {
  openssl x509 -in "$1" -noout -ext subjectAltName | tr ',' '\n' |
    sed -nE 's/^ *(DNS:.*)$/\1/p; s/^ *IP Address:(.*)$/IP:\1/p' | paste -sd ,
}

coordinator_names="DNS:coordinator,DNS:localhost,IP:127.0.0.1"
if (($# == 0)) && [[ -e "$directory/coordinator/tls.crt" ]]; then
  coordinator_names="$(names_of "$directory/coordinator/tls.crt")"
  if [[ -z "$coordinator_names" ]]; then
    echo "make-certificates: $directory/coordinator/tls.crt has no names to keep; give them" >&2
    exit 1
  fi
fi
for name in "$@"; do
  if [[ "$name" =~ ^[0-9.]+$ || "$name" == *:* ]]; then
    coordinator_names+=",IP:$name"
  else
    coordinator_names+=",DNS:$name"
  fi
done
issue coordinator "$epserve_user" "$coordinator_names"
for role in worker operator frontend; do
  issue "$role" "$epserve_user" "URI:spiffe://compose/epserve/$role"
done
issue metrics "$prometheus_user" "URI:spiffe://compose/epserve/metrics"
echo "certificates in $directory: coordinator worker operator frontend metrics, good for $days days"
echo "the coordinator's is for $coordinator_names"
