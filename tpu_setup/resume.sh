#!/usr/bin/env bash
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=common.sh
. "$HERE/common.sh"

HELP="Sees one command through: creates, installs, launches, watches; and does so anew whenever the
slices are taken away, until the command is done. Its --workdir in the bucket is where it goes on.

    tpu_setup/resume.sh --type=v5p-512 --spot --bucket=my-bucket --delete_at_end \\
        -- python -m lm.train --config=configs/chinchilla.py:425m --workdir=/mnt/lm/425m

Let it run in tmux on a machine that stays awake. It may be stopped and started at any time: a run
that is under way is watched, not begun again. Exit codes of the command: 0 ends this script, 75 is
launched again at once, 2 is bad input and ends it, and any other is a failure.

Takes the flags of create.sh and install.sh, and

  --retries=3        launches after failures that were no pre-emption, before it gives up
  --patience=300     seconds from a failure until it counts as none of a pre-emption: hosts notice
                     that others are gone before the queued resource does
  --delete_at_end    give the slices back when the command is done, or has failed for good
$COMMON"

parse_flags "$HELP
$("$HERE/create.sh" --help)
$("$HERE/install.sh" --help)" "$@"
check_common
POLL=${POLL:-60} RETRIES=${RETRIES:-3} PATIENCE=${PATIENCE:-300}
whole --poll "$POLL"
whole --retries "$RETRIES"
whole --patience "$PATIENCE"
((${#COMMAND[@]})) || fail "the command is missing: resume.sh ... -- python -m lm.train ..."
GIVEN=(--name="$NAME" "$@")

call() { # call SCRIPT [MORE...]: with those of the given flags that it takes
    local known argument arguments=()
    known=$(flags_in "$("$HERE/$1" --help)")
    for argument in "${GIVEN[@]}"; do
        [[ $argument != -- ]] || break
        if grep -qxF -e "${argument%%=*}" -e "${argument%%=*}=" <<<"$known"; then
            arguments+=("$argument")
        fi
    done
    "$HERE/$1" "${arguments[@]}" "${@:2}"
}

build() {
    local code=0
    call create.sh || code=$?
    ((code != 75)) || return 0 # no capacity: what is left of the request is seen to next time
    ((code == 0)) || exit "$code"
    begin
}

begin() {
    if ! { call install.sh && call launch.sh -- "${COMMAND[@]}"; }; then failed "no start" || true; fi
}

rebuild() {
    call delete.sh --force
    build
}

finish() { # finish CODE WORD...
    say "${@:2}"
    [[ ! $DELETE_AT_END ]] || call delete.sh --force
    exit "$1"
}

failures=0
failed() { # it counts where the slices outlive it, and only then does this succeed
    say "$*; a pre-emption?"
    sleep "$PATIENCE"
    [[ $(state) == ACTIVE ]] || return
    failures=$((failures + 1))
    ((failures <= RETRIES)) || finish 1 "failed $failures times; tpu_setup/logs.sh shows why"
    say "no: failure $failures, and $RETRIES are allowed"
}

report() { # one line a worker: running, idle, or exit CODE
    on_slices ssh %SLICE% --worker=all \
        --command="if [ -e lm/tpu_setup ]; then bash lm/tpu_setup/worker.sh status; else echo lm-run: idle; fi"
}

silent_since=''
look() {
    local reports summary node
    if ! reports=$(report); then
        for node in $(nodes); do
            case $(tpus tpu-vm describe "$node" --format='value(state)' || true) in
                PREEMPTED | TERMINATED | STOPPED)
                    rebuild
                    return 0
                    ;;
            esac
        done
        silent_since=${silent_since:-$SECONDS}
        say "some workers of $NAME do not answer"
        ((SECONDS - silent_since < PATIENCE)) ||
            finish 1 "they have not for $PATIENCE s; can 'gcloud compute tpus tpu-vm ssh' reach them?"
        return 0
    fi
    silent_since=''
    reports=$(sed -n 's/^lm-run: //p' <<<"$reports" | sort)
    summary=$(uniq -c <<<"$reports" | awk '{$1 = $1 " x"; print}' | paste -sd ',' -)
    say "$NAME: $summary"
    case $'\n'$(uniq <<<"$reports")$'\n' in
        $'\nexit 0\n') finish 0 "done" ;;
        *$'\nexit 2\n'*) finish 2 "bad input; tpu_setup/logs.sh shows which" ;;
        *$'\nrunning\n'*) ;; # also beside ended ones: those that remain end within a minute
        *$'\nexit 75\n'* | $'\nidle\n') begin ;;
        *) if failed "$summary"; then begin; fi ;;
    esac
}

if [[ $DRY_RUN ]]; then
    tpus queued-resources describe "$NAME" --format='value(state.state)'
    rebuild
    report
    exit 0
fi
last=''
while true; do
    now=$(state)
    [[ $now == "$last" ]] || say "$NAME: $now"
    last=$now
    case $now in
        ABSENT) build ;;
        SUSPENDED | FAILED) rebuild ;;
        ACTIVE) look ;;
    esac
    sleep "$POLL"
done
