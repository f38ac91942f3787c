#!/usr/bin/env bash
# All kernel tests of one datapath, on one pool and with one daemon at a time.
#   datapath.sh native|portable
set -euo pipefail
. "$(dirname "$0")/lib.sh"
. "$here/file-systems.sh"
. "$here/daemon-killed.sh"

datapath=${1:?which datapath: native or portable}
# Every pair of file system and number of connections once: the kernel's side is the same for both.
case $datapath in
  native) file_systems=(ext4:1 xfs:4) kills=(1 4) ;;
  *) file_systems=(xfs:1 ext4:4) kills=(4) ;;
esac

run() {
  local one connections
  tap_section "$datapath"
  tap_check 'pool created' node dist/program/fullstripe.js pool create "$pool"
  tap_going || return 0
  start_daemon "$datapath"
  tap_check 'the daemon answers' daemon_answers
  tap_check 'that datapath runs' datapath_is "$datapath"
  tap_going || return 0
  for one in "${file_systems[@]}"; do
    file_system_scenario "${one%:*}" "${one#*:}"
  done
  for connections in "${kills[@]}"; do
    daemon_killed_scenario "$connections"
  done
  # The volume of the last file system: nothing that happened since has touched it.
  after_restart "${one%:*}" "${one#*:}"
}

need_everything
make_scratch
run
tap_end
