# A volume as a disk of the running kernel: file system, verified random writes, trim that gives stripes and disk space
# back, remount, fsck; and the same content after the daemon was stopped and started again. Sourced by datapath.sh.

fs_volume_size=$((512 * 1024 * 1024))
fs_file_size=$((16 * 1024 * 1024))

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
  ((formatted_before > fs_file_size)) || return 1
  rm "$mounted/first"
  sync -f "$mounted"
  fstrim -v "$mounted"
  formatted_after=$(formatted_bytes "$1")
  echo "formatted: $formatted_before, after the trim $formatted_after; pool on disk: $blocks_before KiB"
  # Most of the file: it shares stripes with others at the ends of its extents, and ext4 goes on initialising itself.
  ((formatted_after <= formatted_before - fs_file_size * 3 / 4))
  # Punching holes follows in the background.
  wait_until 60 pool_shrank $((blocks_before - fs_file_size * 3 / 4 / 1024))
}
pool_shrank() { (($(pool_blocks) <= $1)); }

keep_files() {
  mkdir "$mounted/kept"
  cp -r src "$mounted/kept/"
  (cd "$mounted/kept" && find . -type f -print0 | sort -z | xargs -0 sha256sum) >"$work/kept.sums"
  [[ -s $work/kept.sums ]]
}
files_are_kept() { (cd "$mounted/kept" && sha256sum --quiet -c "$work/kept.sums"); }

file_system_scenario() { # FILE-SYSTEM CONNECTIONS
  local fs=$1 volume=$1-$2
  tap_section "$datapath, $fs, $2 connection(s)"
  tap_check 'volume created' fullstripe volume create "$volume" --size "$fs_volume_size"
  tap_check 'attached' attach_volume "$volume" "$2" "$fs_volume_size"
  tap_check 'mkfs' make_fs "$fs"
  tap_check 'mounted' mount_fs
  tap_check 'random writes, verified' fio_verify first "$fs_file_size"
  tap_check 'fstrim gives stripes and space back' trim_gives_back "$volume"
  tap_check 'files copied' keep_files
  tap_check 'unmounted' unmount_fs
  tap_check 'fsck is clean' check_fs "$fs"
  tap_check 'mounted again' mount_fs
  tap_check 'files are the same' files_are_kept
  tap_check 'unmounted again' unmount_fs
  tap_check 'detached' detach_volume
  tap_going || let_go
}

# The last volume of the run, through a daemon that was stopped in between.
after_restart() { # FILE-SYSTEM CONNECTIONS
  local fs=$1 volume=$1-$2
  tap_section "$datapath, after a restart"
  stop_daemon
  tap_check 'SIGTERM ended the daemon with 0' daemon_stopped_well
  tap_check 'check finds the pool clean' node dist/program/fullstripe.js check "$pool"
  start_daemon "$datapath"
  tap_check 'the daemon answers' daemon_answers
  tap_check 'attached' attach_volume "$volume" "$2" "$fs_volume_size"
  tap_check 'fsck is clean' check_fs "$fs"
  tap_check 'mounted' mount_fs
  tap_check 'files are the same' files_are_kept
  tap_check 'unmounted' unmount_fs
  tap_check 'detached' detach_volume
}
