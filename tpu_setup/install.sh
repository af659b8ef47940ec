#!/usr/bin/env bash
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=common.sh
. "$HERE/common.sh"

HELP="Makes every worker ready: the code in ~/lm, Python with the 'tpu' extra, the bucket, the data.

    tpu_setup/install.sh --bucket=my-bucket --data=gs://my-bucket/data

  --bucket=BUCKET    mounted at /mnt/lm on every worker: workdirs and logs belong there
  --data=gs://...    a prepared data_dir, copied into each worker's memory at /mnt/data
  --repository=URL   clone this instead of sending the commit checked out here
  --revision=main    the branch or tag to clone
$COMMON"

parse_flags "$HELP" "$@"
check_common
[[ ! $DATA || $DATA == gs://* ]] || fail "--data=$DATA: must begin with gs://"
[[ $BUCKET != */* ]] || fail "--bucket=$BUCKET: the name alone, without gs:// or folders"
[[ ! $REVISION || $REPOSITORY ]] || fail "--revision goes with --repository"

setup=(setup)
[[ ! $BUCKET ]] || setup+=(--bucket="$BUCKET")
[[ ! $DATA ]] || setup+=(--data="$DATA")
CODE=$(dirname "$HERE")
# What an older version left is removed; data/ and runs/, which a run may have made, stay.
clean='rm -rf lm/lm lm/configs lm/tpu_setup && mkdir -p lm'

if [[ $REPOSITORY ]]; then
    clone=$(words git clone --quiet --depth=1 --branch="${REVISION:-main}" "$REPOSITORY" lm-clone)
    fetch="rm -rf lm-clone && $clone && $clean && cp -r lm-clone/. lm && rm -rf lm-clone"
else
    archive=${TMPDIR:-/tmp}/$NAME.tar.gz
    if [[ $(git -C "$CODE" status --porcelain --untracked-files=no) ]]; then
        say "uncommitted changes are not sent"
    fi
    run git -C "$CODE" archive --format=tar.gz --output="$archive" HEAD
    on_slices scp "$archive" %SLICE%:lm.tar.gz --worker=all
    fetch="$clean && tar -xzf lm.tar.gz -C lm"
fi
on_slices ssh %SLICE% --worker=all \
    --command="$fetch && bash lm/tpu_setup/worker.sh $(words "${setup[@]}")"
