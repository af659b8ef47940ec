#!/usr/bin/env bash
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=common.sh
. "$HERE/common.sh"

HELP="Asks for TPU slices through a queued resource, and waits until they are there.

    tpu_setup/create.sh --type=v5litepod-8 --spot

  --type=TYPE        v5litepod-N and v6e-N have N chips, v5p-N and v4-N have N/2: they count cores
  --runtime=VERSION  the workers' image, if not the one that goes with the type
  --spot             cheaper, and taken back at any time: see resume.sh
  --reserved         from the project's reservation
  --network=NAME     the VPC network, if not 'default'
  --subnetwork=NAME  its subnetwork, if the network has no automatic ones
  --service_account=EMAIL  whom the workers act as, if not Compute Engine's default account
  --valid_for=6h     give up if there is no capacity for so long
  --no_wait          return when the request stands in the queue
  --poll=30          seconds between two looks at its state
$COMMON"

shape_of() { # "256 chips, workers: 64"; fails for what is no type
    local chips=${1##*-}
    [[ $1 =~ ^(v5litepod|v6e)-(1|4|8|16|32|64|128|256)$ || $1 =~ ^(v4|v5p)-[1-9][0-9]*$ ]] || return
    if [[ $1 == v4-* || $1 == v5p-* ]]; then
        ((chips % 8 == 0)) || return
        chips=$((chips / 2))
    elif ((chips <= 8)); then
        echo "$chips chips, workers: 1" && return
    fi
    echo "$chips chips, workers: $((chips / 4))"
}

parse_flags "$HELP" "$@"
check_common
POLL=${POLL:-30}
whole --poll "$POLL"
[[ $TYPE ]] || fail "--type is missing: as --type=v5litepod-8"
shape=$(shape_of "$TYPE") ||
    fail "--type=$TYPE: must be v5litepod-N or v6e-N (N = 1, 4, 8, ... 256), v5p-N or v4-N (N = 8, 16, ...)"
[[ ! $SPOT || ! $RESERVED ]] || fail "--spot and --reserved: only one of them"
case $TYPE in
    v4-*) RUNTIME=${RUNTIME:-tpu-ubuntu2204-base} ;;
    v5litepod-*) RUNTIME=${RUNTIME:-v2-alpha-tpuv5-lite} ;;
    v5p-*) RUNTIME=${RUNTIME:-v2-alpha-tpuv5} ;;
    v6e-*) RUNTIME=${RUNTIME:-v2-alpha-tpuv6e} ;;
esac

request=(--accelerator-type="$TYPE" --runtime-version="$RUNTIME")
if ((SLICES > 1)); then
    request+=(--node-count="$SLICES" --node-prefix="$NAME")
else
    request+=(--node-id="$NAME")
fi
request+=(--scopes=https://www.googleapis.com/auth/cloud-platform)
[[ ! $SPOT ]] || request+=(--spot)
[[ ! $RESERVED ]] || request+=(--reserved)
[[ ! $NETWORK ]] || request+=(--network="$NETWORK")
[[ ! $SUBNETWORK ]] || request+=(--subnetwork="$SUBNETWORK")
[[ ! $SERVICE_ACCOUNT ]] || request+=(--service-account="$SERVICE_ACCOUNT")
[[ ! $VALID_FOR ]] || request+=(--valid-until-duration="$VALID_FOR")

say "$NAME: $SLICES x $TYPE ($shape)"
tpus queued-resources create "$NAME" "${request[@]}"
[[ ! $NO_WAIT ]] || exit 0
if [[ $DRY_RUN ]]; then
    tpus queued-resources describe "$NAME" --format='value(state.state)'
    exit 0
fi

last=''
while true; do
    now=$(state)
    [[ $now == "$last" ]] || say "$NAME: $now"
    last=$now
    case $now in
        ACTIVE) break ;;
        FAILED | SUSPENDING | SUSPENDED | DELETING | ABSENT)
            tpus queued-resources describe "$NAME" >&2 || true
            exit 75
            ;;
    esac
    sleep "$POLL"
done
say "it is paid for from now on, until tpu_setup/delete.sh --force"
