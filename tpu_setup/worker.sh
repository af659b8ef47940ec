#!/usr/bin/env bash
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=common.sh
. "$HERE/common.sh"

HELP="What the other scripts run on each worker, in ~/lm.

    worker.sh setup [--bucket=BUCKET] [--data=gs://...]
    worker.sh start -- COMMAND...
    worker.sh status | stop | tail [--last=40] [--follow]

  --bucket=BUCKET    mounted at /mnt/lm
  --data=gs://...    copied into memory, /mnt/data
  --last=40          lines, of the log's end
  --follow           go on as the log grows
  --dry_run          print what setup would run
  --help             this text"

CODE=$(dirname "$HERE")
VENV=$HOME/lm-venv
RUN=$HOME/lm-run # pid, exit code and log of the run
MOUNT=/mnt/lm

setup() {
    # The image has Python 3.10; uv brings 3.12 in seconds. The constraints give every worker the
    # same jax, without which they would not understand each other.
    local uv=$HOME/.local/bin/uv
    [[ -x $uv ]] || run sh -c 'curl -LsSf https://astral.sh/uv/install.sh | sh'
    [[ -x $VENV/bin/python ]] || run "$uv" venv --quiet --python=3.12 "$VENV"
    run "$uv" pip install --quiet --python="$VENV/bin/python" \
        --constraint="$CODE/constraints.txt" -e "$CODE""[tpu]"
    [[ ! $BUCKET ]] || mountpoint -q "$MOUNT" || mount_bucket
    [[ ! $DATA ]] || copy_data
}

mount_bucket() {
    local packages=https://packages.cloud.google.com/apt key=/usr/share/keyrings/cloud.google.asc
    if ! command -v gcsfuse >/dev/null; then
        run sudo curl -fsS -o "$key" "$packages/doc/apt-key.gpg"
        run sudo sh -c "echo 'deb [signed-by=$key] $packages gcsfuse-$(lsb_release -cs) main' \
>/etc/apt/sources.list.d/gcsfuse.list"
        run sudo apt-get update -qq
        run sudo apt-get install -qq -o DPkg::Lock::Timeout=600 gcsfuse
    fi
    run sudo install -d -o "$(id -u)" "$MOUNT"
    # Many hosts write here, so nobody may trust a cache (on TPU machines gcsfuse's would never
    # expire); and a flushed log is in the bucket at once, not when it is closed.
    run gcsfuse --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 \
        --enable-streaming-writes=false --implicit-dirs --rename-dir-limit=200000 "$BUCKET" "$MOUNT"
}

copy_data() {
    # Not /dev/shm, which systemd empties when its owner logs out.
    if ! mountpoint -q /mnt/data; then
        run sudo install -d /mnt/data
        run sudo mount -t tmpfs -o "size=75%,uid=$(id -u)" tmpfs /mnt/data
    fi
    run gcloud storage rsync --recursive "$DATA" /mnt/data
}

start() {
    ((${#COMMAND[@]})) || fail "the command is missing: worker.sh start -- COMMAND..."
    if [[ $(status) == running ]]; then
        echo "error: a run is under way on $(hostname); launch.sh --stop ends it" >&2
        exit 1
    fi
    mkdir -p "$RUN"
    rm -f "$RUN/exit"
    cd "$CODE"
    set -m # a process group of its own, which hears SIGINT
    run_to_the_end </dev/null >>"$RUN/log.txt" 2>&1 &
    echo "$! $(boot)" >"$RUN/pid"
}

run_to_the_end() {
    local code=0 uploader=''
    trap '' HUP # as nohup does
    trap : INT  # the command ends by it; this shell lives on to note the exit code
    echo "$(date -u +%FT%TZ) $(hostname): $(words "${COMMAND[@]}")"
    if mountpoint -q "$MOUNT"; then
        while sleep 60; do upload; done &
        uploader=$!
    fi
    PATH=$VENV/bin:$PATH "${COMMAND[@]}" || code=$?
    echo "$(date -u +%FT%TZ) exit code $code"
    [[ ! $uploader ]] || kill "$uploader" 2>/dev/null || true
    [[ ! $uploader ]] || upload
    echo "$code" >"$RUN/exit"
}

upload() { # the machine may vanish at any time
    mkdir -p "$MOUNT/logs" && cp "$RUN/log.txt" "$MOUNT/logs/$(hostname).txt"
}

boot() {
    cat /proc/sys/kernel/random/boot_id
}

status() {
    local pid booted
    [[ -e $RUN/pid ]] || { echo idle && return; }
    read -r pid booted <"$RUN/pid"
    if [[ -s $RUN/exit ]]; then
        echo "exit $(<"$RUN/exit")"
    elif [[ $booted == "$(boot)" ]] && kill -0 "$pid" 2>/dev/null; then
        echo running
    else
        echo 'exit 137' # it died with its machine, and nobody noted a code
    fi
}

stop() {
    [[ $(status) != running ]] || kill -INT -- "-$(cut -d ' ' -f 1 "$RUN/pid")"
}

verb=${1:---help}
shift || true
case $verb in
    setup | start | status | stop | tail) parse_flags "$HELP" "$@" ;;
    *) parse_flags "$HELP" "$verb" ;;
esac
case $verb in
    status) echo "lm-run: $(status)" ;;
    tail)
        whole --last "${LAST:=40}"
        exec tail -n "$LAST" ${FOLLOW:+-F} "$RUN/log.txt"
        ;;
    *) "$verb" ;;
esac
