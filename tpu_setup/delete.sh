#!/usr/bin/env bash
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=common.sh
. "$HERE/common.sh"

HELP="Gives the slices back. Nothing on them remains; what lies in the bucket does.

    tpu_setup/delete.sh --force

A queued resource outlives its slices: after a pre-emption it stands SUSPENDED, keeps its name and
counts against the quota until it is deleted.

  --force            together with its slices; without, only a request that has none is deleted
  --no_wait          return at once
$COMMON"

parse_flags "$HELP" "$@"
check_common
request=(--quiet)
[[ ! $FORCE ]] || request+=(--force)
[[ ! $NO_WAIT ]] || request+=(--async)
tpus queued-resources delete "$NAME" "${request[@]}"
