#!/usr/bin/env bash
# A volume as a disk of the running kernel, over one connection and over four, with ext4 and with XFS:
# file system, verified random writes, trim that gives stripes and disk space back, remount, fsck, a daemon that is
# stopped and started again with the same content.
#   file-systems.sh DATAPATH
set -euo pipefail
. "$(dirname "$0")/lib.sh"

datapath=${1:?which datapath: native or portable}
size=$((512 * 1024 * 1024))
file_size=$((32 * 1024 * 1024))

formatted_bytes() { # VOLUME: as the map says
  fullstripe volume map "$1" --json | jq '[.extents[] | select(.formatted) | .length] | add // 0'
}
# Bytes of the file system under the pool that the pool takes up.
pool_blocks() { du -sk "$pool" | cut -f1; }

trim_gives_back() { # VOLUME
  local formatted_before formatted_after blocks_before
  sync -f "$mounted"
  formatted_before=$(formatted_bytes "$1")
  blocks_before=$(pool_blocks)
  ((formatted_before > file_size)) || return 1
  rm "$mounted/first"
  sync -f "$mounted"
  fstrim -v "$mounted"
  formatted_after=$(formatted_bytes "$1")
  echo "formatted: $formatted_before, after the trim $formatted_after; pool on disk: $blocks_before KiB"
  # All of the file but the stripes that it shares with others at its ends.
  ((formatted_after <= formatted_before - file_size * 9 / 10))
  # Punching holes follows in the background.
  wait_until 20 pool_shrank $((blocks_before - file_size * 9 / 10 / 1024))
}
pool_shrank() { (($(pool_blocks) <= $1)); }

keep_files() {
  mkdir "$mounted/kept"
  cp -r src "$mounted/kept/"
  (cd "$mounted/kept" && find . -type f -print0 | sort -z | xargs -0 sha256sum) >"$work/kept.sums"
  [[ -s $work/kept.sums ]]
}
files_are_kept() { (cd "$mounted/kept" && sha256sum --quiet -c "$work/kept.sums"); }

scenario() { # FILE-SYSTEM CONNECTIONS
  local fs=$1 connections=$2 volume=$1-$2
  local label="$datapath, $fs, $connections connection(s)"
  tap_check "$label: volume created" fullstripe volume create "$volume" --size "$size" || return
  tap_check "$label: attached" attach_volume "$volume" "$connections" "$size" || return
  tap_check "$label: mkfs" make_fs "$fs" || return
  tap_check "$label: mounted" mount_fs || return
  tap_check "$label: random writes, verified" fio_verify first "$file_size" || return
  tap_check "$label: fstrim gives stripes and space back" trim_gives_back "$volume" || return
  tap_check "$label: files copied" keep_files || return
  tap_check "$label: unmounted" unmount_fs || return
  tap_check "$label: fsck is clean" check_fs "$fs" || return
  tap_check "$label: mounted again" mount_fs || return
  tap_check "$label: files are the same" files_are_kept || return
  tap_check "$label: unmounted again" unmount_fs || return
  tap_check "$label: detached" detach_volume "$volume"
}

# The last volume of the run, through a daemon that was stopped in between.
after_restart() { # FILE-SYSTEM CONNECTIONS
  local fs=$1 connections=$2 volume=$1-$2 label="$datapath, after a restart"
  stop_daemon
  tap_check "$label: SIGTERM ended the daemon with 0" daemon_stopped_well || return
  tap_check "$label: check finds the pool clean" node dist/cli/main.js check "$pool" || return
  start_daemon "$datapath"
  tap_check "$label: the daemon answers" daemon_answers || return
  tap_check "$label: attached" attach_volume "$volume" "$connections" "$size" || return
  tap_check "$label: fsck is clean" check_fs "$fs" || return
  tap_check "$label: mounted" mount_fs || return
  tap_check "$label: files are the same" files_are_kept || return
  tap_check "$label: unmounted" unmount_fs || return
  tap_check "$label: detached" detach_volume "$volume"
}

run() {
  tap_check "$datapath: pool created" node dist/cli/main.js pool create "$pool" || return
  start_daemon "$datapath"
  tap_check "$datapath: the daemon answers" daemon_answers || return
  tap_check "$datapath: that datapath runs" datapath_is "$datapath" || return
  scenario ext4 1 || return
  scenario xfs 1 || return
  scenario xfs 4 || return
  scenario ext4 4 || return
  after_restart ext4 4
}

need_everything
make_scratch
run || true
tap_end
