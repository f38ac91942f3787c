# Results of the shell tests in TAP, one line a check; sourced. .ci/run adds these lines up.
#
#   tap_check NAME COMMAND [ARGUMENT...]   ok or not ok by the command's exit status, its output shown when not ok
#   tap_skip NAME REASON
#   tap_end                                the plan and a summary; its status is that of the whole file

tap_passed=0 tap_failed=0 tap_skipped=0
tap_log=$(mktemp)

tap_check() {
  local name=$1 begin=$SECONDS status=0
  shift
  # Not `if "$@"`: there, bash would ignore a failing line in the middle of a function. Its own shell, so that
  # a check can leave; whatever must outlive a check (a daemon's process id) is kept in files.
  set +e
  (
    set -e
    "$@"
  ) >"$tap_log" 2>&1 </dev/null
  status=$?
  set -e
  if ((status == 0)); then
    tap_passed=$((tap_passed + 1))
    printf 'ok %d - %s (%d s)\n' $((tap_passed + tap_failed + tap_skipped)) "$name" $((SECONDS - begin))
  else
    tap_failed=$((tap_failed + 1))
    printf 'not ok %d - %s (status %d)\n' $((tap_passed + tap_failed + tap_skipped)) "$name" "$status"
    tail -n 60 "$tap_log" | sed 's/^/# /'
    return 1
  fi
}

tap_skip() {
  tap_skipped=$((tap_skipped + 1))
  printf 'ok %d - %s # SKIP %s\n' $((tap_passed + tap_failed + tap_skipped)) "$1" "$2"
}

tap_end() {
  rm -f "$tap_log"
  printf '1..%d\n' $((tap_passed + tap_failed + tap_skipped))
  printf '# %d passed, %d failed, %d skipped\n' "$tap_passed" "$tap_failed" "$tap_skipped"
  ((tap_failed == 0))
}
