# shellcheck shell=bash
# Shared by the scripts beside it; sourced, never run.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# Read by the scripts that source this file.
# shellcheck disable=SC2034
parts=${CARGO_TARGET_DIR:-$root/target}/test-parts

# All talk goes to stderr: stdout belongs to the command a script was asked to run.
say() { printf '%s: %s\n' "$(basename "$0")" "$*" >&2; }
die() {
    say "$*"
    exit 1
}

# Finds a toolchain that rustup installed but this shell does not have in its PATH yet.
if ! command -v cargo >/dev/null && [ -f "${CARGO_HOME:-$HOME/.cargo}/env" ]; then
    # shellcheck disable=SC1091
    . "${CARGO_HOME:-$HOME/.cargo}/env"
fi

# apt_install PACKAGE...: as root, or through sudo, or says what somebody who may should run.
apt_install() {
    local as=()
    command -v apt-get >/dev/null ||
        die "this needs what Debian calls: $*. Install the same with your package manager, then run this again"
    if [ "$(id -u)" != 0 ]; then
        command -v sudo >/dev/null || die "as root, please run: apt-get install -y --no-install-recommends $*"
        as=(sudo)
    fi
    local install=(env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@")
    say "installing with apt-get: $*"
    # A fresh image has no package lists, an old one has stale ones: only then fetch them.
    "${as[@]}" "${install[@]}" >/dev/null || { "${as[@]}" apt-get update -qq >/dev/null && "${as[@]}" "${install[@]}" >/dev/null; } ||
        die "apt-get could not install: $*. Its own message is above; mend that, then run this again"
}
