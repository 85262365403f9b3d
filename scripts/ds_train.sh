#!/usr/bin/env bash
# Pretrain on one process, one node, many nodes, or in a SLURM allocation:
#   VARIABLE=VALUE ... bash scripts/ds_train.sh [--dry-run] [FLAGS OF pretrain_gpt2.py]
#
# Variables below that stay empty give no flag, so that the recipe or the trainer's default decides; FLAGS come last and
# win. Prints the command that it runs; --dry-run only prints it. Started again with the same SAVE it goes on.
# SIGTERM, SIGINT, SIGUSR1 and SIGHUP make the run save and stop; a second SIGINT gives it 30 seconds.
# Leaves with 0 (finished), 75 (stopped and saved: start it again) or 1 (failed). More in docs/cluster.md.
set -euo pipefail

# What to train. Counts may be written 300K or 157e9.
CONFIG="${CONFIG:-}"                     # recipe (YAML)
MODEL_SIZE="${MODEL_SIZE:-}"             # 117, 345, 774 or 1558 (millions of parameters), or a name of --model-size
SEQ_LEN="${SEQ_LEN:-}"                   # full sequence length
BSZ="${BSZ:-}"                           # global batch size, in sequences
MICRO_BATCH="${MICRO_BATCH:-}"           # sequences of full length in one forward pass
LR="${LR:-}"                             # peak learning rate
LR_WARMUP_ITER="${LR_WARMUP_ITER:-}"     # steps of learning rate warmup
LR_DECAY_TOKEN="${LR_DECAY_TOKEN:-}"     # tokens at which the learning rate's decay ends
LR_DECAY_ITER="${LR_DECAY_ITER:-}"       # or the step at which it does
NUM_TOKEN="${NUM_TOKEN:-}"               # tokens to train on
NUM_ITER="${NUM_ITER:-}"                 # or steps to take
CURRICULUM_STEP="${CURRICULUM_STEP:-}"   # T, the steps of linear sequence length warmup; 0: none, whatever CONFIG has
CURRICULUM_MIN="${CURRICULUM_MIN:-}"     # sequence length at its start
SEED="${SEED:-}"                         # weights, dropout and order of samples

# Data, tokenizer, and the run's home.
DATA="${DATA:-}"                         # prefix of a corpus, or weights and prefixes: "0.3 wiki 0.7 web"
VOCAB_FILE="${VOCAB_FILE:-}"             # vocab.json of the GPT-2 BPE
MERGE_FILE="${MERGE_FILE:-}"             # merges.txt of the GPT-2 BPE
TOKENIZER_FILE="${TOKENIZER_FILE:-}"     # or a tokenizer.json
SAVE="${SAVE:-}"                         # checkpoints and metrics, on a file system that all nodes share
SAVE_INTERVAL="${SAVE_INTERVAL:-}"       # steps between checkpoints

# Where to train.
MP_SIZE="${MP_SIZE:-}"                   # ranks that share each layer (tensor parallel)
ZERO_STAGE="${ZERO_STAGE:-}"             # 0, 2 or 3: what data parallel ranks share out
GPUS_PER_NODE="${GPUS_PER_NODE:-}"       # processes a node (default: its GPUs, or 1 where there are none)
NNODES="${NNODES:-}"                     # nodes (default: those of the SLURM allocation, or 1)
MASTER_ADDR="${MASTER_ADDR:-}"           # a node that all reach (default: the first of the SLURM allocation)
MASTER_PORT="${MASTER_PORT:-}"           # a free port there (default: 29500, in SLURM one that follows from the job)
MAX_RESTARTS="${MAX_RESTARTS:-0}"        # times that all processes are started again after one has failed
LOG_DIR="${LOG_DIR:-}"                   # SLURM: write each node's output to LOG_DIR/NODE.log, at its end
TRAINER="${TRAINER:-}"                   # the program (default: pretrain_gpt2.py of this repository)

fail() {
    echo "error: $1" >&2
    exit 1
}

trap 'exit 75' TERM USR1 HUP # as long as nothing has been started
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
TRAINER="${TRAINER:-$root/pretrain_gpt2.py}"
[[ -f $TRAINER ]] || fail "TRAINER=$TRAINER: no such file (for sbatch there is scripts/pretrain_gpt2.slurm)"

count() { # name value least most
    [[ $2 =~ ^[0-9]{1,9}$ && 10#$2 -ge $3 && 10#$2 -le $4 ]] || fail "$1=$2: expected a number from $3 to $4"
}
[[ -z $GPUS_PER_NODE ]] || count GPUS_PER_NODE "$GPUS_PER_NODE" 1 1024
[[ -z $NNODES ]] || count NNODES "$NNODES" 1 100000
[[ -z $MASTER_PORT ]] || count MASTER_PORT "$MASTER_PORT" 1 65535
count MAX_RESTARTS "$MAX_RESTARTS" 0 100000
[[ -z $CONFIG || -f $CONFIG ]] || fail "CONFIG=$CONFIG: no such file"

dry_run="" arguments=()
for argument in "$@"; do
    case "$argument" in
        --dry-run) dry_run=1 ;;
        *) arguments+=("$argument") ;;
    esac
done
if [[ ${1:-} = -h || ${1:-} = --help ]]; then
    sed -n '2,/^TRAINER=/{/^set /d; s/^# \{0,1\}//; p;}' "${BASH_SOURCE[0]}"
    exit 0
fi

# A python that has torch is taken as it is (an active environment, a module, a container); else .venv is made.
if [[ -z $dry_run ]] &&
    ! python -c 'import importlib.util, sys; sys.exit(not importlib.util.find_spec("torch"))' 2> /dev/null; then
    # shellcheck source=scripts/environment.sh
    source "$root/scripts/environment.sh" base
fi

# In a task of srun? (A batch script has no step, and an interactive shell one with a number beyond a million.)
in_step="" local_addr="" node_rank="" nodes="${SLURM_JOB_NODELIST:-}"
NNODES="${NNODES:-${SLURM_JOB_NUM_NODES:-1}}"
if [[ -n ${SLURM_JOB_ID:-} && ${SLURM_STEP_ID:-none} =~ ^[0-9]{1,6}$ ]]; then
    in_step=1 local_addr="${SLURMD_NODENAME:-}" node_rank="${SLURM_NODEID:-}" nodes="${SLURM_STEP_NODELIST:-$nodes}"
    NNODES="${SLURM_STEP_NUM_NODES:-$NNODES}"
    [[ ${SLURM_LOCALID:-0} = 0 ]] || fail "srun started several tasks on a node: give it --ntasks-per-node=1"
fi
if [[ -z $MASTER_ADDR ]]; then
    while [[ $nodes =~ ^([^,[]*)\[([0-9]+)[^]]*\](.*)$ ]]; do # node[003-005,9],... to node003,...
        nodes="${BASH_REMATCH[1]}${BASH_REMATCH[2]}${BASH_REMATCH[3]}"
    done
    MASTER_ADDR="${nodes%%,*}"
fi
if [[ -z $GPUS_PER_NODE ]]; then
    GPUS_PER_NODE="$(python -c 'import torch; print(torch.cuda.device_count() or 1)' 2> /dev/null)" ||
        fail "python has no torch to count the GPUs with: set GPUS_PER_NODE"
fi

command=(python "$root/scripts/torchrun.py" --nproc-per-node "$GPUS_PER_NODE" --max-restarts "$MAX_RESTARTS")
if [[ $NNODES = 1 ]]; then
    command+=(--standalone --local-addr 127.0.0.1)
else
    [[ -n $MASTER_ADDR ]] || fail "NNODES=$NNODES needs MASTER_ADDR, the name or address of a node that all nodes reach"
    MASTER_PORT="${MASTER_PORT:-$((29500 + ${SLURM_JOB_ID:-0} % 1000))}" # jobs may share a node
    command+=(--nnodes "$NNODES" --rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT")
    command+=(--rdzv-id "${SLURM_JOB_ID:-ds_train}")
    [[ -z $node_rank ]] || command+=(--rdzv-conf "is_host=$([[ $node_rank = 0 ]] && echo true || echo false)")
    [[ -z $local_addr ]] || command+=(--local-addr "$local_addr") # a full host name need not resolve elsewhere
fi
command+=("$TRAINER")

flag() { # name value...: nothing where the value is empty
    [[ -z $2 ]] || command+=("$@")
}
case "$MODEL_SIZE" in
    117 | 345 | 774) MODEL_SIZE="${MODEL_SIZE}M" ;;
    1558) MODEL_SIZE=1.5B ;;
esac
flag --config "$CONFIG"
flag --model-size "$MODEL_SIZE"
flag --seq-length "$SEQ_LEN"
flag --global-batch-size "$BSZ"
flag --micro-batch-size "$MICRO_BATCH"
flag --lr "$LR"
flag --lr-warmup-iters "$LR_WARMUP_ITER"
flag --lr-decay-tokens "$LR_DECAY_TOKEN"
flag --lr-decay-iters "$LR_DECAY_ITER"
flag --train-tokens "$NUM_TOKEN"
flag --train-iters "$NUM_ITER"
if [[ $CURRICULUM_STEP = 0 ]]; then
    flag --seqlen-warmup none
    for setting in start warmup-iters warmup-tokens root-degree stages cycle stages-unit \
        adaptive-step adaptive-tolerance realisation; do
        flag --unset "seqlen-$setting" # whatever the recipe has
    done
elif [[ -n $CURRICULUM_STEP ]]; then
    flag --seqlen-warmup linear
    flag --seqlen-warmup-iters "$CURRICULUM_STEP"
fi
[[ $CURRICULUM_STEP = 0 ]] || flag --seqlen-start "$CURRICULUM_MIN"
flag --seed "$SEED"
if [[ $DATA =~ ^[0-9.][0-9.eE+-]*[[:space:]] ]]; then
    read -ra blend <<< "$DATA"
    flag --data-path "${blend[@]}"
else
    flag --data-path "$DATA"
fi
flag --vocab-file "$VOCAB_FILE"
flag --merge-file "$MERGE_FILE"
[[ -z $TOKENIZER_FILE ]] || flag --tokenizer-type HFTokenizer
flag --tokenizer-file "$TOKENIZER_FILE"
flag --save "$SAVE"
flag --load "$SAVE"
flag --save-interval "$SAVE_INTERVAL"
flag --tensor-model-parallel-size "$MP_SIZE"
flag --zero-stage "$ZERO_STAGE"
command+=(${arguments[@]+"${arguments[@]}"})

show() {
    printf '%q' "$1"
    printf ' %q' "${@:2}"
    echo
}

# In an allocation, but not yet on each of its nodes: one task a node comes here again.
through_srun=""
if [[ -n ${SLURM_JOB_ID:-} && -z $in_step ]]; then
    through_srun=1
    spread=(srun --nodes "$NNODES" --ntasks "$NNODES" --ntasks-per-node 1 --kill-on-bad-exit=0 --cpu-bind=none)
    [[ -z $LOG_DIR ]] || spread+=(--output "$LOG_DIR/%N.log" --open-mode append)
    spread+=(bash "$root/scripts/ds_train.sh" ${arguments[@]+"${arguments[@]}"})
    show "${spread[@]}"
    if [[ -z $dry_run ]]; then
        command -v srun > /dev/null || fail "srun: not found, in SLURM job $SLURM_JOB_ID: start this script with srun"
        [[ -z $LOG_DIR ]] || mkdir -p "$LOG_DIR"
        command=("${spread[@]}")
    fi
fi
[[ -n $through_srun && -z $dry_run ]] || show "${command[@]}"
[[ -z $dry_run ]] || exit 0
[[ -n $through_srun || -z $SAVE ]] || rm -f "$SAVE/exit.json" # an earlier run's, should this one not get far

# In a session of its own, so that Ctrl-C comes to this script alone. A worker that has no handler for SIGUSR1 yet, and
# torchrun itself, are not to die of it.
(
    trap - TERM INT USR1 HUP
    [[ -n $through_srun ]] || trap '' USR1
    export SIGNALLED_BY=ds_train.sh # so that exit.json does not take the SIGUSR1 below for what was sent to this script
    exec python -c 'import os, sys; os.setsid(); os.execvp(sys.argv[1], sys.argv[1:])' "${command[@]}"
) &
launcher=$!
asked="" interrupts=0
trap 'asked=SIGTERM' TERM
trap 'asked=SIGINT interrupts=$((interrupts + 1))' INT
trap 'asked=SIGUSR1' USR1
trap 'asked=SIGHUP' HUP

listeners() { # process ids
    if [[ -n $through_srun ]]; then
        echo "$launcher"
    else
        cat "/proc/$launcher/task/"*/children 2> /dev/null || pgrep -P "$launcher" || true
    fi
}
terminated=""
terminate() { # once: a second SIGTERM would tear torchrun out of ending its workers
    [[ -n $terminated ]] || kill -TERM "$launcher" 2> /dev/null || true
    terminated=1
}

# On SIGTERM torchrun gives its workers 30 seconds to save, too few for a large model, and ends as failed. So they are
# signalled themselves, again and again for those that are still starting, and torchrun ends when they have.
said="" reached=""
while kill -0 "$launcher" 2> /dev/null; do
    if [[ -z $asked ]]; then
        wait "$launcher" || true # a signal ends the wait as well
        continue
    fi
    [[ -n $said ]] || echo "$asked: asking the run to save and stop" >&2
    said=1
    read -ra processes <<< "$(listeners | tr '\n' ' ')"
    if [[ ${#processes[@]} -ne 0 ]]; then
        reached=1
        kill -USR1 "${processes[@]}" 2> /dev/null || true
    fi
    [[ -n $reached && $interrupts -lt 2 ]] || terminate
    sleep 2 > /dev/null 2>&1 &
    wait "$!" || true
done
wait "$launcher" && status=0 || status=$?
[[ -z $through_srun ]] || exit "$status"

# torchrun tells failed from the rest, exit.json finished from stopped. The listing makes a network file system look.
if [[ -n $SAVE ]]; then
    ls "$SAVE" > /dev/null 2>&1 || true
    if [[ -f $SAVE/exit.json && $(< "$SAVE/exit.json") =~ \"status\":\ *\"(finished|stopped)\" ]]; then
        [[ ${BASH_REMATCH[1]} = finished ]] && exit 0 || exit 75
    fi
fi
[[ -z $asked || -n $reached ]] || exit 75 # the workers had not been started yet
exit $((status != 0))
