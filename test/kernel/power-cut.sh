#!/usr/bin/env bash
# The power fails under a file system on a volume, in the kernel's block layer: dm-log-writes notes what reaches the disk
# that the pool lies on, and from the note that disk is built as it may be found after a failure at several moments. Each
# time: the file system below recovers, the pool checks clean, the daemon opens it (under a kernel with another boot id),
# the file system on the volume recovers and is clean, and every file is there whose fsync had ended.
#   power-cut.sh native|portable
# FULLSTRIPE_TEST_CUTS: how many moments (default 3).
set -euo pipefail
# What it mounts over the kernel's boot id is for its own eyes.
if [[ ${FULLSTRIPE_TEST_UNSHARED:-} != yes ]]; then
  FULLSTRIPE_TEST_UNSHARED=yes exec unshare --mount --propagation private "$0" "$@"
fi
. "$(dirname "$0")/lib.sh"

datapath=${1:?which datapath: native or portable}
cuts=${FULLSTRIPE_TEST_CUTS:-3}
disk_size=640M
log_size=2G
volume_size=$((192 * 1024 * 1024))
files=8
logged=fullstripe-logged # the device that notes
boot_id=/proc/sys/kernel/random/boot_id
noise=''

# ---- devices ------------------------------------------------------------------------------------------
make_devices() {
  truncate -s "$disk_size" "$work/disk.img"
  truncate -s "$log_size" "$work/log.img"
  disk_loop=$(losetup --find --show "$work/disk.img")
  log_loop=$(losetup --find --show "$work/log.img")
  # A machine without udev gets no node by itself.
  dmsetup create "$logged" --noudevsync --table "0 $(blockdev --getsz "$disk_loop") log-writes $disk_loop $log_loop"
  [[ -e /dev/mapper/$logged ]] || dmsetup mknodes --noudevsync "$logged"
  mkfs.ext4 -q -F "/dev/mapper/$logged"
  mount "/dev/mapper/$logged" "$below"
}
remove_devices() {
  if mountpoint -q "$below"; then umount "$below"; fi
  if dmsetup info "$logged" >/dev/null 2>&1; then dmsetup remove --noudevsync --retry "$logged"; fi
  local loop
  for loop in $(losetup --list --noheadings --output NAME,BACK-FILE | awk -v work="$work/" 'index($2, work) == 1 { print $1 }'); do
    losetup -d "$loop"
  done
}
# The daemon believes to run under the kernel of that number.
boot() {
  if mountpoint -q "$boot_id"; then umount "$boot_id"; fi
  printf '00000000-0000-4000-8000-%012d\n' "$1" >"$work/boot-$1"
  mount --bind "$work/boot-$1" "$boot_id"
}
clean_up_all() {
  local status=$?
  set +e
  if [[ $noise ]]; then kill "$noise"; wait "$noise"; fi 2>/dev/null
  if mountpoint -q "$mounted"; then umount -l "$mounted"; fi
  if attached; then nbd-client -d "$device" >/dev/null 2>&1; fi
  if [[ $daemon ]]; then kill -9 "$daemon"; wait "$daemon"; fi 2>/dev/null
  daemon=''
  if mountpoint -q "$boot_id"; then umount "$boot_id"; fi
  remove_devices
  (exit "$status")
  clean_up
}

# ---- load ---------------------------------------------------------------------------------------------
# Writes that nobody waits for, and space that comes and goes.
make_noise() {
  local n
  for ((n = 0; ; n++)); do
    dd if=/dev/urandom of="$mounted/noise" bs=4k count=$((RANDOM % 64 + 1)) seek=$((RANDOM % 1024)) conv=notrunc 2>/dev/null
    if ((n % 8 == 7)); then fstrim "$mounted"; fi
  done
}
write_files() {
  local n
  for ((n = 1; n <= files; n++)); do
    dd if=/dev/urandom of="$mounted/file-$n" bs=64k count=$((n % 4 + 1)) 2>/dev/null
    sync "$mounted/file-$n" # fsync
    (cd "$mounted" && sha256sum "file-$n") >"$work/sum-$n"
    dmsetup message "$logged" 0 mark "file-$n"
    if ((n % 3 == 0)); then
      rm "$mounted/noise"
      fstrim "$mounted"
    fi
  done
}
stop_noise() {
  kill "$noise"
  wait "$noise" 2>/dev/null || true
  noise=''
}
# What the disk is told from here on does not count.
end_of_note() { dmsetup message "$logged" 0 mark end; }
put_everything_away() {
  umount "$below"
  dmsetup remove --noudevsync --retry "$logged"
}

# ---- after the failure ----------------------------------------------------------------------------------
# Moments between the first file and the end, the last one among them.
choose_moments() {
  node "$here/replay-log.mjs" list "$log_loop" >"$work/log.txt"
  local total first n
  total=$(awk '$3 == "end" { print $2 }' "$work/log.txt")
  first=$(awk '$1 == "mark" { print $2; exit }' "$work/log.txt")
  ((total > first && first > 0))
  for ((n = 1; n < cuts; n++)); do
    echo $((first + 1 + (RANDOM * 32768 + RANDOM) % (total - first)))
  done | sort -n >"$work/moments"
  echo "$total" >>"$work/moments"
}
build_disk() { # FROM TO
  node "$here/replay-log.mjs" apply "$log_loop" "$work/replay.img" "$1" "$2"
  cp --sparse=always "$work/replay.img" "$work/cut.img"
  mount -o loop "$work/cut.img" "$below"
}
pool_is_clean() { node dist/program/fullstripe.js check "$pool"; }
mount_after_failure() {
  mount_fs
  umount "$mounted"
  check_fs ext4
  mount_fs
}
flushed_files_are_there() { # MOMENT
  local n at found=0
  for ((n = 1; n <= files; n++)); do
    at=$(awk -v name="file-$n" '$1 == "mark" && $3 == name { print $2 }' "$work/log.txt")
    ((at < $1)) || continue
    (cd "$mounted" && sha256sum --quiet -c "$work/sum-$n")
    found=$((found + 1))
  done
  echo "$found files"
  ((found > 0))
}
cut_scenario() { # FROM TO
  tap_section "$datapath, power cut after entry $2"
  tap_check 'the disk is built, and its file system recovers' build_disk "$1" "$2"
  tap_check 'the pool checks clean' pool_is_clean
  tap_going || return 0
  start_daemon "$datapath"
  tap_check 'the daemon opens it' daemon_answers
  tap_check 'attached' connect_volume disk "$volume_size"
  tap_check 'the file system on the volume recovers and is clean' mount_after_failure
  tap_check 'every file is there whose fsync had ended' flushed_files_are_there "$2"
  tap_check 'unmounted' unmount_fs
  tap_check 'detached' disconnect_volume
  tap_going || let_go
  stop_daemon
  tap_check 'SIGTERM ended the daemon with 0' daemon_stopped_well
  umount "$below"
}

run() {
  local from=0 to
  tap_section "$datapath, power cut"
  if ! modprobe dm-log-writes 2>/dev/null || ! command -v dmsetup >/dev/null; then
    tap_skip 'in the block layer' 'dm-log-writes or dmsetup is missing'
    return
  fi
  modprobe loop 2>/dev/null || true # where it is no module, it is there
  make_devices
  boot 1
  tap_check 'pool created' node dist/program/fullstripe.js pool create "$pool" --capacity 256M
  tap_going || return 0
  start_daemon "$datapath"
  tap_check 'the daemon answers' daemon_answers
  tap_check 'volume created' make_volume disk "$volume_size"
  tap_check 'attached' connect_volume disk "$volume_size"
  tap_check 'mkfs' make_fs ext4
  tap_check 'mounted' mount_fs
  tap_going || return 0
  make_noise &
  noise=$!
  tap_check 'files written and synced' write_files
  end_of_note
  stop_noise
  tap_check 'unmounted' unmount_fs
  tap_check 'detached' disconnect_volume
  stop_daemon
  tap_check 'the disk is put away' put_everything_away
  tap_check 'moments chosen' choose_moments
  tap_going || return 0
  sed 's/^/# moment: entry /' "$work/moments"
  truncate -s "$disk_size" "$work/replay.img"
  boot 2
  while read -r to <&3; do
    cut_scenario "$from" "$to"
    tap_going || return 0
    from=$to
  done 3<"$work/moments"
}

need_everything
make_scratch
below=$work/below
mkdir "$below"
pool=$below/pool
trap clean_up_all EXIT
run
tap_end
