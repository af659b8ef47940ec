#!/usr/bin/env bash
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=common.sh
. "$HERE/common.sh"

HELP="Shows the end of one worker's log.

    tpu_setup/logs.sh --worker=3 --follow

  --worker=0         which worker of the slice
  --slice=0          which slice, of several
  --last=40          how many lines
  --follow           go on as the log grows, until Ctrl-C
$COMMON"

parse_flags "$HELP" "$@"
check_common
LAST=${LAST:-40} SLICE=${SLICE:-0} WORKER=${WORKER:-0}
whole --last "$LAST"
[[ $WORKER =~ ^[0-9]+$ ]] || fail "--worker=$WORKER: must be a whole number, counted from 0"
if [[ ! $SLICE =~ ^[0-9]+$ ]] || ((SLICE >= SLICES)); then
    fail "--slice=$SLICE: must be a whole number below --slices=$SLICES"
fi

node=$(nodes | sed -n "$((SLICE + 1))p")
tpus tpu-vm ssh "$node" --worker="$WORKER" \
    --command="bash lm/tpu_setup/worker.sh tail --last=$LAST${FOLLOW:+ --follow}"
