#!/usr/bin/env bash
# A mirrored disk outlives its machine: ext4 on the primary, mirrored before its first write; the primary's daemon is killed under load;
# the secondary is promoted and mounted; then the primary comes back, gets what changed, and takes over again. As root, where the kernel
# has the nbd driver.
#   test/kernel/mirror.sh [DATAPATH] [sync|async...]
set -euo pipefail
. "$(dirname "$0")/lib.sh"

datapath=${1:-native}
shift || true
modes=("$@")
((${#modes[@]})) || modes=(sync async)
volume_size=$((256 * 1024 * 1024))
file_size=$((24 * 1024 * 1024))
daemon2=''
writer=''

# ---- the second machine ---------------------------------------------------------------------------------
on_second() {
  local pool=$pool2
  "$@"
}
start_second() {
  node dist/program/fullstripe.js serve "$pool2" --datapath "$datapath" --link 127.0.0.1:0 >"$work/second.log" 2>&1 &
  daemon2=$!
}
second_started() { grep -q '"daemon.started"' "$work/second.log"; }
second_link() { grep -o 'for peers on [^"]*' "$work/second.log" | sed 's/for peers on //'; }
stop_second() {
  [[ $daemon2 ]] || return 0
  kill -TERM "$daemon2" || true
  wait "$daemon2" || true
  daemon2=''
}

# ---- what is written ------------------------------------------------------------------------------------
# Small files, each fsynced before the next: from then on it has to be there.
write_synced() { # NAME COUNT
  local i
  for ((i = 0; i < $2; i++)); do
    head -c 20000 /dev/urandom >"$mounted/$1-$i" && sync "$mounted/$1-$i" &&
      (cd "$mounted" && sha256sum "$1-$i") >>"$work/$1.sums" || return 1
  done
}
synced_are_there() { (cd "$mounted" && sha256sum --quiet -c "$work/$1.sums"); }
mirror_state() { api /v1/mirrors | jq -r '.mirrors[0].state' >"$work/state" && grep -qE "$1" "$work/state"; }
make_pools() { # side by side
  node dist/program/fullstripe.js pool create "$pool" &
  node dist/program/fullstripe.js pool create "$pool2"
  wait $!
}
let_device_go() {
  umount -l "$mounted" 2>/dev/null || true
  nbd-client -d "$device" >/dev/null 2>&1 || true
  wait_until 60 detached
}

scenario() { # MODE
  local mode=$1 goal before how=()
  goal=$([[ $mode == sync ]] && echo insync || echo cycling)
  tap_section "$datapath, $mode: the primary dies, the secondary goes on, and back"
  pool=$work/one-$mode
  pool2=$work/two-$mode
  : >"$work/first.sums"
  : >"$work/second.sums"
  [[ $mode == sync ]] || how=(--interval 5s)
  tap_check 'a pool here, and one there' make_pools
  start_daemon "$datapath"
  start_second
  tap_check 'two daemons' eval 'daemon_answers && wait_until 180 second_started'
  tap_check 'volume' make_volume disk "$volume_size"
  tap_check 'mirrored before the first write' fullstripe mirror add disk "$(second_link)" --mode "$mode" "${how[@]}" --wait
  tap_check 'attached' connect_volume disk "$volume_size"
  tap_check 'mkfs' make_fs ext4
  tap_check 'mounted' mount_fs
  tap_check 'files, each fsynced' write_synced first 10
  if [[ $mode == async ]]; then tap_check 'a cycle later' wait_until 60 caught_up; fi
  before=$(device_writes)
  fio_verify load "$file_size" >"$work/fio.log" 2>&1 </dev/null &
  writer=$!
  tap_check 'fio writes' wait_until 120 load_is_on "$before"
  tap_check 'more files, each fsynced' write_synced last 5
  kill_daemon
  tap_check 'the device is let go' let_device_go
  kill "$writer" 2>/dev/null || true
  wait "$writer" 2>/dev/null || true

  tap_check 'the secondary refused writes until now' on_second secondary_is_read_only
  tap_check 'promoted' on_second fullstripe mirror promote disk
  tap_check 'attached there' on_second connect_volume disk "$volume_size"
  tap_check 'mounted there' mount_fs
  tap_check 'every file of before is there' synced_are_there first
  if [[ $mode == sync ]]; then tap_check 'every fsynced file is there' synced_are_there last; fi
  tap_check 'unmounted' unmount_fs
  tap_check 'fsck is clean' check_fs ext4
  tap_check 'mounted again' mount_fs
  tap_check 'written there' write_synced second 10

  start_daemon "$datapath"
  tap_check 'the old primary is back' daemon_answers
  tap_check 'and sees that both are primary' wait_until 60 mirror_state splitbrain
  tap_check 'it gives up what only it has' fullstripe mirror resolve disk --discard local
  tap_check 'and gets what changed' on_second fullstripe mirror wait disk --timeout 120s
  tap_check 'unmounted there' unmount_fs
  tap_check 'detached there' on_second disconnect_volume
  tap_check 'demoted there' on_second fullstripe mirror demote disk
  tap_check 'promoted here' fullstripe mirror promote disk
  tap_check 'attached here' connect_volume disk "$volume_size"
  tap_check 'fsck is clean here' check_fs ext4
  tap_check 'mounted here' mount_fs
  tap_check 'files of the first' synced_are_there first
  tap_check 'files of the second' synced_are_there second
  tap_check 'mirrored the other way again' wait_until 60 mirror_state "$goal"
  tap_check 'unmounted here' unmount_fs
  tap_check 'detached here' disconnect_volume
  tap_going || let_go
  stop_daemon
  tap_check 'the daemon stops well' daemon_stopped_well
  stop_second
}
load_is_on() { (($(device_writes) - $1 >= 500)); }
caught_up() { api /v1/mirrors | jq -e '.mirrors[0].lag.bytes == 0' >/dev/null; }
secondary_is_read_only() { api /v1/volumes | jq -e '.volumes[0].readOnly' >/dev/null; }
end_second() { if [[ $daemon2 ]]; then kill -9 "$daemon2"; fi 2>/dev/null; }

need_everything
make_scratch
trap 'end_second; clean_up' EXIT
for mode in "${modes[@]}"; do scenario "$mode"; done
tap_end
