#!/usr/bin/env bash
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=common.sh
. "$HERE/common.sh"

HELP="Starts one command on every worker of every slice, detached; see it with logs.sh.

    tpu_setup/launch.sh -- python -m lm.train --config=configs/chinchilla.py:425m --workdir=/mnt/lm/425m

  --stop             interrupt the run instead: lm.train and lm.sweep end with exit code 75
$COMMON"

parse_flags "$HELP" "$@"
check_common
if [[ $STOP ]]; then
    ((!${#COMMAND[@]})) || fail "--stop takes no command"
    worker stop
else
    ((${#COMMAND[@]})) || fail "the command is missing: launch.sh -- python -m lm.train ..."
    worker start -- "${COMMAND[@]}"
fi
