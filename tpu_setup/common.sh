# shellcheck shell=bash
# What these scripts share: flags, dry runs, and how a queued resource is spoken to.
# Sourced with HERE, this folder, and USAGE, the script's help, set. Runs in macOS's bash 3.2 too.

# shellcheck disable=SC2034  # the scripts use it
COMMON="
Common flags:

  --name=NAME        the queued resource, and its slice (or the variable TPU_NAME)
  --zone=ZONE        as us-west4-a (or the variable ZONE)
  --project=PROJECT  the cloud project's id (or the variable PROJECT_ID)
  --slices=N         slices, 1 if not given; more than one are called NAME-0, NAME-1, ...
  --dry_run          print the exact commands and run none
  --help             this text

Exit codes: 0 done, 1 a failure, 2 bad input, 75 no capacity: run it again."

fail() { # bad input
    printf 'error: %s\n' "$*" >&2
    exit 2
}

say() {
    printf '%s  %s\n' "$(date -u +%H:%M:%S)" "$*" >&2
}

variables() { # --dry_run -> DRY_RUN, line by line
    tr -d '=-' <<<"$1" | tr '[:lower:]' '[:upper:]'
}

# The flags that a help text describes: "--zone=" takes a value, "--spot" takes none.
flags_in() {
    grep -oE '^  --[a-z_]+=?' <<<"$1" | tr -d ' '
}

# parse_flags HELP ARGUMENT...: sets ZONE for --zone=..., SPOT for --spot, and so on; what HELP does
# not describe is refused. The words after -- become COMMAND.
# shellcheck disable=SC2034
parse_flags() {
    local help=$1 known argument flag zone=${ZONE:-}
    shift
    known=$(flags_in "$help")
    while read -r flag; do printf -v "$flag" ''; done < <(variables "$known")
    NAME=${TPU_NAME:-} ZONE=$zone PROJECT=${PROJECT_ID:-} SLICES=1 COMMAND=()
    while (($#)); do
        argument=$1
        shift
        flag=${argument%%=*}
        case $argument in
            --) COMMAND=("$@") && break ;;
            --help | -h) printf '%s\n' "$help" && exit 0 ;;
            --*) ;;
            *) fail "unexpected argument '$argument': flags look like --name=value, see --help" ;;
        esac
        if grep -qxF -e "$flag=" <<<"$known"; then
            [[ $argument == *=?* ]] || fail "$flag needs a value: $flag=VALUE"
            printf -v "$(variables "$flag")" '%s' "${argument#*=}"
        elif grep -qxF -e "$flag" <<<"$known"; then
            [[ $argument != *=* ]] || fail "$flag takes no value"
            printf -v "$(variables "$flag")" 1
        else
            fail "unknown flag $flag (known: $(tr -d = <<<"$known" | paste -sd ' ' -))"
        fi
    done
}

check_common() {
    [[ $NAME ]] || fail "--name is missing: as --name=lm"
    [[ $ZONE ]] || fail "--zone is missing: as --zone=us-west4-a"
    [[ $PROJECT ]] || fail "--project is missing: as --project=my-project"
    [[ $NAME =~ ^[a-z]([-a-z0-9]{0,60}[a-z0-9])?$ ]] ||
        fail "--name=$NAME: lower-case letters, digits and -, beginning with a letter"
    whole --slices "$SLICES"
}

whole() { # whole FLAG VALUE
    [[ $2 =~ ^[1-9][0-9]*$ ]] || fail "$1=$2: must be a whole number, at least 1"
}

words() { # the arguments as a shell would read them
    local word line=''
    for word; do
        [[ $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]] || word="'${word//\'/\'\\\'\'}'"
        line+="$word "
    done
    printf '%s' "${line% }"
}

run() {
    if [[ $DRY_RUN ]]; then
        printf '%s\n' "$(words "$@")"
    else
        "$@"
    fi
}

tpus() { # tpus VERB ARGUMENT...
    run gcloud compute tpus "$@" --zone="$ZONE" --project="$PROJECT"
}

# The state of the queued resource, ABSENT where there is none, UNKNOWN where gcloud cannot tell.
state() {
    local answer
    if answer=$(DRY_RUN='' tpus queued-resources describe "$NAME" --format='value(state.state)' 2>&1)
    then
        tail -n 1 <<<"$answer"
    elif [[ $answer == *NOT_FOUND* || $answer == *"not found"* ]]; then
        echo ABSENT
    else
        say "${answer##*$'\n'}"
        echo UNKNOWN
    fi
}

nodes() { # the names of the slices
    local i
    if ((SLICES == 1)); then
        echo "$NAME"
    else
        for ((i = 0; i < SLICES; i++)); do echo "$NAME-$i"; done
    fi
}

# on_slices VERB ARGUMENT...: `gcloud compute tpus tpu-vm VERB` for every slice at once; %SLICE% in
# the arguments stands for its name. Fails where one worker does.
on_slices() {
    local node pid pids=() failed=0
    for node in $(nodes); do
        tpus tpu-vm "${@//%SLICE%/$node}" &
        pids+=($!)
        [[ ! $DRY_RUN ]] || wait $!
    done
    for pid in "${pids[@]}"; do wait "$pid" || failed=1; done
    return "$failed"
}

# worker VERB ARGUMENT...: runs worker.sh on every worker of every slice.
worker() {
    on_slices ssh %SLICE% --worker=all --command="bash lm/tpu_setup/worker.sh $(words "$@")"
}
