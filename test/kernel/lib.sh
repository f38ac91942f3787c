# What the kernel tests share: a scratch place, a daemon, a device, and that all of it goes away in the end. Sourced.
#
#   $work   scratch directory, on $FULLSTRIPE_TEST_DISK (which is overwritten) where that is set
#   $pool   the pool in it; $device the /dev/nbdX that this test uses; $mounted where its file system is mounted

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cd "$here/../.."
export PATH=$PATH:/usr/sbin:/sbin
. test/tap.sh

daemon=''
fullstripe() { node dist/program/fullstripe.js "$@" --pool "$pool"; }
bail() {
  printf 'Bail out! %s\n' "$*"
  exit 1
}

# ---- needs --------------------------------------------------------------------------------------------
need_everything() {
  local program
  for program in node curl nbd-client fio mkfs.ext4 fsck.ext4 mkfs.xfs xfs_repair fstrim mount jq; do
    command -v "$program" >/dev/null || bail "$program is missing: run scripts/setup --test"
  done
  ((EUID == 0)) || bail 'root is needed to attach and mount'
  [[ -f dist/program/fullstripe.js ]] || bail 'dist/ is missing: run scripts/setup'
  [[ -e /sys/block/nbd0 ]] || modprobe nbd || bail 'this kernel has no nbd driver'
}

# ---- scratch ------------------------------------------------------------------------------------------
make_scratch() {
  work=$(realpath "$(mktemp -d "${TMPDIR:-/var/tmp}/fullstripe-kernel.XXXXXX")")
  trap clean_up EXIT
  trap 'exit 130' INT TERM HUP
  if [[ ${FULLSTRIPE_TEST_DISK:-} ]]; then
    mkfs.ext4 -q -F "$FULLSTRIPE_TEST_DISK"
    mkdir "$work/disk"
    mount "$FULLSTRIPE_TEST_DISK" "$work/disk"
    pool=$work/disk/pool
  else
    pool=$work/pool
  fi
  mounted=$work/mounted
  mkdir "$mounted"
  device=$(free_device) || bail 'every nbd device is in use'
}
free_device() {
  local block
  for block in /sys/block/nbd*; do
    [[ -e $block/pid ]] || {
      printf '/dev/%s\n' "${block##*/}"
      return
    }
  done
  return 1
}
clean_up() {
  local status=$?
  set +e
  if ((tap_failed)); then sed 's/^/# daemon: /' "$work/daemon.log" | tail -n 40; fi
  trap - EXIT
  if mountpoint -q "$mounted"; then umount -l "$mounted"; fi
  if attached; then nbd-client -d "$device" >/dev/null 2>&1; fi
  if [[ $daemon ]]; then kill -9 "$daemon"; wait "$daemon"; fi 2>/dev/null
  if mountpoint -q "$work/disk"; then umount -l "$work/disk"; fi
  rm -rf "$work"
  exit "$status"
}

# ---- daemon -------------------------------------------------------------------------------------------
# In the background of the main shell, not of a check's, so that its exit status can be waited for.
start_daemon() { # DATAPATH
  node dist/program/fullstripe.js serve "$pool" --datapath "$1" >"$work/daemon.log" 2>&1 &
  daemon=$!
}
# On an emulated processor a call of the CLI takes seconds: what a test is not about goes by the API.
api() { # PATH [CURL-ARGUMENT...]
  local path=$1
  shift
  curl -sS --fail-with-body --unix-socket "$pool/control.sock" "http://localhost$path" "$@"
}
make_volume() { # NAME SIZE
  api /v1/volumes -H 'content-type: application/json' -d "{ \"name\": \"$1\", \"size\": $2 }"
}
status_answers() { api /v1/status >"$work/status.json"; }
# Without a process for each look: beside a daemon that starts, those would take a good part of the machine.
control_listens() { [[ $(</proc/net/unix) == *" $pool/control.sock"* ]]; }
listens_or_is_gone() { control_listens || ! kill -0 "$daemon" 2>/dev/null; }
daemon_answers() {
  wait_until 240 listens_or_is_gone && control_listens && wait_until 60 status_answers && return
  tail -n 20 "$work/daemon.log"
  return 1
}
datapath_is() { [[ $(jq -r .datapath.kind "$work/status.json") == "$1" ]]; }
# Sets $daemon_status: what the daemon exits with when asked to stop.
stop_daemon() {
  daemon_status=0
  kill -TERM "$daemon"
  wait "$daemon" || daemon_status=$?
  daemon=''
}
daemon_stopped_well() {
  ((daemon_status == 0)) && return
  tail -n 20 "$work/daemon.log"
  return 1
}
kill_daemon() {
  kill -9 "$daemon"
  wait "$daemon" 2>/dev/null || true
  daemon=''
}

# ---- waiting ------------------------------------------------------------------------------------------
exec {never}<> <(:) # where nothing ever comes: a pause without a process
wait_until() { # SECONDS COMMAND [ARGUMENT...]
  local deadline=$((SECONDS + $1))
  shift
  until "$@"; do
    ((SECONDS < deadline)) || return 1
    read -rt 0.2 -u "$never" || true
  done
}

# ---- device -------------------------------------------------------------------------------------------
attached() { [[ -e /sys/block/${device##*/}/pid ]]; }
detached() { ! attached; }
device_size() { echo $(($(<"/sys/block/${device##*/}/size") * 512)); }
# Writes the kernel has finished on the device since the module was loaded.
device_writes() { awk '{ print $5 }' "/sys/block/${device##*/}/stat"; }

# Without the CLI and its keeper, for tests in which the daemon does not come back to the device.
connect_volume() { # VOLUME SIZE
  nbd-client -unix "$pool/nbd.sock" "$device" -N "$1" -timeout 5
  wait_until 20 attached
  [[ $(device_size) == "$2" ]]
  wait_until 20 connections_are 1
}
disconnect_volume() {
  nbd-client -d "$device"
  wait_until 20 detached
  wait_until 20 connections_are 0
}

attach_volume() { # VOLUME CONNECTIONS SIZE
  # Short times: requests in flight at a kill are sent again soon, and a daemon that is gone for good ends the test.
  fullstripe attach "$1" "$device" --connections "$2" --timeout 5 --reconnect 240
  wait_until 20 attached
  [[ $(device_size) == "$3" ]]
  wait_until 20 connections_are "$2"
}
# As the kernel lists them: connected sockets of the daemon's address.
connections_are() { [[ $(awk -v path="$pool/nbd.sock" '$6 == "03" && $8 == path' /proc/net/unix | wc -l) == "$1" ]]; }
detach_volume() {
  fullstripe detach "$device"
  wait_until 20 detached
  wait_until 20 connections_are 0
}

# After a failed scenario: the device is free for the next one.
let_go() {
  if mountpoint -q "$mounted"; then umount -l "$mounted"; fi
  if attached; then nbd-client -d "$device" >/dev/null 2>&1; fi
  wait_until 20 detached || bail "$device cannot be freed"
}

# ---- file systems -------------------------------------------------------------------------------------
make_fs() { # ext4|xfs
  case $1 in
    ext4) mkfs.ext4 -q -F "$device" ;;
    xfs) mkfs.xfs -q -f "$device" ;;
  esac
}
mount_fs() { mount "$device" "$mounted"; }
unmount_fs() { umount "$mounted"; }
check_fs() { # ext4|xfs
  case $1 in
    ext4) fsck.ext4 -f -n "$device" ;;
    xfs) xfs_repair -n "$device" ;;
  esac
}

# Random 4 KiB writes past the page cache, then every block read back and its checksum compared.
fio_verify() { # NAME SIZE
  fio --name="$1" --directory="$mounted" --filename="$1" --size="$2" --rw=randwrite --bs=4k --ioengine=libaio \
    --iodepth=16 --direct=1 --verify=crc32c --do_verify=1 --verify_fatal=1 --end_fsync=1 --randrepeat=1
}
# The same file read back later: what was verified once must still be there.
fio_again() { # NAME SIZE
  fio --name="$1" --directory="$mounted" --filename="$1" --size="$2" --rw=randwrite --bs=4k --ioengine=libaio \
    --iodepth=16 --direct=1 --verify=crc32c --verify_only --verify_fatal=1 --randrepeat=1
}
