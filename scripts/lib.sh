# Shared by the scripts here; sourced, never run. Sets $root, moves there, and makes the system programs of
# an unprivileged user's PATH complete.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
export PATH=$PATH:/usr/sbin:/sbin

say() { printf '%s: %s\n' "${0##*/}" "$*"; }
warn() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }
die() {
  warn "$*"
  exit 1
}
have() { command -v "$1" >/dev/null 2>&1; }

# The commands of the working tree, whatever is installed on the machine.
fullstripe() { node "$root/dist/program/fullstripe.js" "$@"; }
