# Results of the shell tests in TAP, one line a check; sourced. .ci/run adds these lines up.
#
#   tap_section LABEL                      what the following checks are about
#   tap_check NAME COMMAND [ARGUMENT...]   ok or not ok by the command's exit status; its output is shown when not ok
#   tap_going || return 0                  leaves a section of which a check has failed
#   tap_skip NAME REASON
#   tap_end                                the plan and a summary; its status is that of the whole file
#
# The checks of a section build on each other: after a failed one the rest of the section is passed over.
#
# A check runs in a shell of its own under `set -e`, so that any failing line of a function fails the check. bash
# ignores `set -e` below `if`, `&&` and `||`: call tap_check, and functions that call it, outside of these.

tap_passed=0 tap_failed=0 tap_skipped=0 tap_label='' tap_stopped=''
tap_log=$(mktemp)

tap_section() {
  tap_label=$1 tap_stopped=''
}
tap_going() { [[ ! $tap_stopped ]]; }
tap_number() { echo $((tap_passed + tap_failed + tap_skipped)); }

tap_check() {
  local name="$tap_label: $1" begin=$SECONDS status
  shift
  [[ ! $tap_stopped ]] || return 0
  set +e
  (
    set -e
    "$@"
  ) >"$tap_log" 2>&1 </dev/null
  status=$?
  set -e
  if ((status == 0)); then
    tap_passed=$((tap_passed + 1))
    printf 'ok %d - %s (%d s)\n' "$(tap_number)" "$name" $((SECONDS - begin))
  else
    tap_failed=$((tap_failed + 1)) tap_stopped=yes
    printf 'not ok %d - %s (status %d)\n' "$(tap_number)" "$name" "$status"
    tail -n 60 "$tap_log" | sed 's/^/# /'
  fi
}

tap_skip() {
  tap_skipped=$((tap_skipped + 1))
  printf 'ok %d - %s # SKIP %s\n' "$(tap_number)" "$tap_label: $1" "$2"
}

tap_end() {
  rm -f "$tap_log"
  printf '1..%d\n' "$(tap_number)"
  printf '# %d passed, %d failed, %d skipped\n' "$tap_passed" "$tap_failed" "$tap_skipped"
  ((tap_failed == 0))
}
