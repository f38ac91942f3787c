#!/usr/bin/env bash
# The daemon is killed (SIGKILL) while fio writes to a mounted file system, and started again: the device waits, then
# goes on; fio sees no error and reads back what it wrote; the file system is clean, and so is the pool.
#   daemon-killed.sh DATAPATH [CONNECTIONS...]
set -euo pipefail
. "$(dirname "$0")/lib.sh"

datapath=${1:?which datapath: native or portable}
connections=("${@:2}")
((${#connections[@]})) || connections=(1 4)
size=$((512 * 1024 * 1024))
file_size=$((64 * 1024 * 1024))
writes_before_kill=2000 # of the 16384 that fio makes
writer=''

written_since() { (($(device_writes) - $1 >= $2)); }
writer_runs() { kill -0 "$writer" && (($(device_writes) - $1 < file_size / 4096)); }
writer_ended_well() {
  cat "$work/fio.log"
  ((writer_status == 0))
}
file_is_whole() { fio_again first "$file_size"; }

scenario() { # CONNECTIONS
  local count=$1 volume=killed-$1 label="$datapath, $1 connection(s), daemon killed" before
  tap_check "$label: volume created" fullstripe volume create "$volume" --size "$size" || return
  tap_check "$label: attached" attach_volume "$volume" "$count" "$size" || return
  tap_check "$label: mkfs" make_fs ext4 || return
  tap_check "$label: mounted" mount_fs || return
  before=$(device_writes)
  fio_verify first "$file_size" >"$work/fio.log" 2>&1 </dev/null &
  writer=$!
  tap_check "$label: fio writes" wait_until 60 written_since "$before" "$writes_before_kill" || return
  kill_daemon
  tap_check "$label: fio was in the middle of it" writer_runs "$before" || return
  start_daemon "$datapath"
  tap_check "$label: the new daemon answers" daemon_answers || return
  writer_status=0
  wait "$writer" || writer_status=$?
  tap_check "$label: fio went on and verified every block" writer_ended_well || return
  tap_check "$label: still attached" attached || return
  tap_check "$label: unmounted" unmount_fs || return
  tap_check "$label: fsck is clean" check_fs ext4 || return
  tap_check "$label: mounted again" mount_fs || return
  tap_check "$label: fio finds every block again" file_is_whole || return
  tap_check "$label: unmounted again" unmount_fs || return
  tap_check "$label: detached" detach_volume "$volume"
}

run() {
  local count
  tap_check "$datapath: pool created" node dist/cli/main.js pool create "$pool" || return
  start_daemon "$datapath"
  tap_check "$datapath: the daemon answers" daemon_answers || return
  for count in "${connections[@]}"; do
    scenario "$count" || return
  done
  stop_daemon
  tap_check "$datapath: SIGTERM ended the daemon with 0" daemon_stopped_well || return
  tap_check "$datapath: check finds the pool clean" node dist/cli/main.js check "$pool"
}

need_everything
make_scratch
run || true
tap_end
