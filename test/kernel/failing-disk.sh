#!/usr/bin/env bash
# A disk that fails under a pool, for real: the pool's member is a device-mapper device whose table is exchanged for one that
# fails reads, or writes (which a kernel notices when it writes its cache back: at a sync). As root, where the kernel has the nbd
# driver and dm-flakey; skipped where it has not.
#   test/kernel/failing-disk.sh [native|portable]
set -euo pipefail
. "$(dirname "$0")/lib.sh"
datapath=${1:-native}
need_everything
mapped=fullstripe-test-$$ loop=''

disk_bytes=$((160 * 1024 * 1024))
volume_size=$((96 * 1024 * 1024))

bad_disk_possible() {
  command -v dmsetup >/dev/null && command -v losetup >/dev/null && modprobe -a loop dm_flakey 2>/dev/null
}
make_bad_disk() {
  truncate -s "$disk_bytes" "$work/disk.img"
  loop=$(losetup --find --show "$work/disk.img")
  dmsetup create "$mapped" --noudevsync --table "0 $((disk_bytes / 512)) linear $loop 0"
  dmsetup mknodes "$mapped"
}
drop_bad_disk() {
  dmsetup remove --force --noudevsync "$mapped" 2>/dev/null
  [[ ! $loop ]] || losetup -d "$loop"
}
table_is() { # LINE after "0 SECTORS"
  dmsetup suspend --noflush --nolockfs "$mapped"
  dmsetup load "$mapped" --table "0 $((disk_bytes / 512)) $1"
  dmsetup resume --noudevsync "$mapped"
}
disk_works() { table_is "linear $loop 0"; }
writes_fail() { table_is "flakey $loop 0 0 3600 1 error_writes"; }
everything_fails() { table_is error; }

device_reads() { dd if="$device" of=/dev/null bs=4k count=4 skip="$1" iflag=direct; }
device_writes_at() { dd if=/dev/zero of="$device" bs=4k count=1 seek="$1" oflag=direct; }
fails() { if "$@"; then return 1; fi; }
uncached() { # what the daemon has read is read from the disk again
  sync -f "$work" || true
  blockdev --flushbufs "/dev/mapper/$mapped"
  echo 3 >/proc/sys/vm/drop_caches
}
pool_is() { api /v1/status | tee "$work/status.json" | jq -e --arg state "$1" ".pool.state == \$state"; }
volume_told() { # KIND
  api /v1/events | jq -e --arg kind "$1" "any(.events[]; .kind == \$kind)"
}
says_what_to_do() {
  fullstripe status >"$work/status.txt" && cat "$work/status.txt" && grep -q 'FAILED .*restart the daemon' "$work/status.txt"
}
file_is() { [[ $(md5sum <"$mounted/$1") == "$(<"$work/$1.md5")" ]]; }
write_file() { # NAME
  head -c 8M /dev/urandom >"$work/$1"
  md5sum <"$work/$1" >"$work/$1.md5"
  cp "$work/$1" "$mounted/$1"
}
file_cannot_be_synced() { fails dd if="$work/kept" of="$mounted/lost" bs=1M conv=fsync; }
detach_by_force() {
  fullstripe detach "$device" --force
  wait_until 20 detached
}
daemon_stopped_badly() { ((daemon_status != 0)); }

failing_disk_scenario() {
  tap_section "$datapath, a disk that fails"
  tap_check 'pool created on it' fullstripe pool create "$pool" --member "/dev/mapper/$mapped" --chunk 64K
  start_daemon "$datapath"
  tap_check 'the daemon answers' daemon_answers
  tap_check 'volume created' fullstripe volume create data --size "$volume_size" --intents
  tap_check 'attached' attach_volume data 1 "$volume_size"
  tap_check 'mkfs' make_fs ext4
  tap_check 'mounted' mount_fs
  tap_check 'a file written' write_file kept
  tap_check 'and synced' sync -f "$mounted"
  tap_check 'unmounted' unmount_fs
  tap_check 'nothing of it is cached' uncached

  tap_check 'every access to the disk fails' everything_fails
  tap_check 'a read of the device fails' fails device_reads 0
  tap_check 'and is told' wait_until 20 volume_told volume.errors
  tap_check 'the daemon serves on' pool_is online
  tap_check 'the disk works again' disk_works
  tap_check 'a read succeeds' device_reads 0
  tap_check 'mounted again' mount_fs
  tap_check 'the file is whole' file_is kept

  tap_check 'writes to the disk fail' writes_fail
  tap_check 'a file cannot be synced' file_cannot_be_synced
  tap_check 'the pool is read-only' pool_is read-only
  tap_check 'status says what to do' says_what_to_do
  tap_check 'the event is there' volume_told pool.failed
  tap_check 'a write fails at once' fails device_writes_at 20000
  tap_check 'unmounted after the failure' umount -l "$mounted"
  tap_check 'the disk works again, once more' disk_works
  tap_check 'which does not heal the pool' pool_is read-only
  tap_check 'a write fails still' fails device_writes_at 20000
  tap_check 'a read succeeds still' device_reads 20000
  tap_check 'it is not detached, because it cannot be flushed' fails fullstripe detach "$device"
  tap_check 'unless that is given up' detach_by_force
  stop_daemon
  tap_check 'the daemon says that it did not end in order' daemon_stopped_badly

  tap_check 'the pool checks clean' node dist/program/fullstripe.js check "$pool"
  start_daemon "$datapath"
  tap_check 'a new daemon answers' daemon_answers
  tap_check 'the pool is healed' pool_is online
  tap_check 'what was hot is suspect' bash -c "jq -e '.volumes[0].intents.suspect > 0' '$work/status.json'"
  tap_check 'attached again' connect_volume data "$volume_size"
  tap_check 'the file system recovers' bash -c "fsck.ext4 -f -y '$device'; [[ \$? -le 1 ]]"
  tap_check 'and is clean' check_fs ext4
  tap_check 'mounted once more' mount_fs
  tap_check 'the flushed file is whole' file_is kept
  tap_check 'another can be written' write_file another
  tap_check 'and synced, too' sync -f "$mounted"
  tap_check 'unmounted in the end' unmount_fs
  tap_check 'detached in the end' disconnect_volume
  stop_daemon
  tap_check 'the daemon ends in order' daemon_stopped_well
}

make_scratch
if ! bad_disk_possible; then
  tap_skip "$datapath, a disk that fails" 'no dmsetup, or no dm-flakey in this kernel'
else
  trap 'status=$?; set +e; if mountpoint -q "$mounted"; then umount -l "$mounted"; fi; if attached; then nbd-client -d "$device" >/dev/null 2>&1; fi; if [[ $daemon ]]; then kill -9 "$daemon"; wait "$daemon" 2>/dev/null; daemon=""; fi; drop_bad_disk; (exit $status); clean_up' EXIT
  make_bad_disk
  failing_disk_scenario
fi
tap_end
