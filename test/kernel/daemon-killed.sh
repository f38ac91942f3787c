# The daemon is killed (SIGKILL) while fio writes to a mounted file system, and started again: the device waits, then
# goes on; fio sees no error and reads back what it wrote; the file system is clean. Sourced by datapath.sh.

killed_volume_size=$((512 * 1024 * 1024))
killed_file_size=$((32 * 1024 * 1024))
writes_before_kill=1000 # of the 8192 that fio makes
writer=''

written_since() { (($(device_writes) - $1 >= $2)); }
writer_runs() { kill -0 "$writer" && (($(device_writes) - $1 < killed_file_size / 4096)); }
writer_ended() { ! kill -0 "$writer"; }
writer_ended_well() {
  cat "$work/fio.log"
  ((writer_status == 0))
}
file_is_whole() { fio_again first "$killed_file_size"; }

daemon_killed_scenario() { # CONNECTIONS
  local volume=killed-$1 before
  tap_section "$datapath, daemon killed, $1 connection(s)"
  tap_check 'volume created' make_volume "$volume" "$killed_volume_size"
  tap_check 'attached' attach_volume "$volume" "$1" "$killed_volume_size"
  tap_check 'mkfs' make_fs ext4
  tap_check 'mounted' mount_fs
  tap_going || { let_go && return 0; }
  before=$(device_writes)
  fio_verify first "$killed_file_size" >"$work/fio.log" 2>&1 </dev/null &
  writer=$!
  tap_check 'fio writes' wait_until 60 written_since "$before" "$writes_before_kill"
  kill_daemon
  tap_check 'fio was in the middle of it' writer_runs "$before"
  start_daemon "$datapath"
  tap_check 'the new daemon answers' daemon_answers
  tap_check 'fio ended' wait_until 300 writer_ended
  tap_going || let_go # which ends what fio waits for
  writer_status=0
  wait "$writer" || writer_status=$?
  tap_check 'fio went on and verified every block' writer_ended_well
  tap_check 'still attached' attached
  tap_check 'unmounted' unmount_fs
  tap_check 'fsck is clean' check_fs ext4
  tap_check 'mounted again' mount_fs
  tap_check 'fio finds every block again' file_is_whole
  tap_check 'unmounted again' unmount_fs
  tap_check 'detached' disconnect_volume
  tap_going || let_go
}
