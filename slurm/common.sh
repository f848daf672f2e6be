# shellcheck shell=bash
# What the batch scripts share; they source it.  Everything that differs between clusters is here or in the
# environment (docs/cluster.md lists the variables), so that the scripts themselves need not be edited.

# ---- where things are

MMSSL_HOME=${MMSSL_HOME:-$SLURM_SUBMIT_DIR}   # the checkout; sbatch runs a copy of the script, so $0 does not tell
MMSSL_SITE=${MMSSL_SITE:-$MMSSL_HOME/slurm/site.sh}
set +u  # what a site sources, `module` above all, is seldom made for it
# shellcheck disable=SC1090  # a site's own file: `module load ...`, proxies, NCCL's interface
[ ! -f "$MMSSL_SITE" ] || . "$MMSSL_SITE"
set -u
# Without a checkout's environment the mmssl on the PATH is taken: conda, a module, or the image's.
[ ! -x "${MMSSL_VENV:-$MMSSL_HOME/.venv}/bin/mmssl" ] || PATH=${MMSSL_VENV:-$MMSSL_HOME/.venv}/bin:$PATH

say() { echo "mmssl: $*"; }
die() { say "error: $*" >&2; exit 2; }

# ---- NCCL and the processes' environment: the one place.  What is set already stays.

export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}  # who waits for a dead rank ends
export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000}  # collectives that the report of a hang shows
# Usually right as they are; a cluster that needs one sets it in slurm/site.sh:
#   NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME   the network between the nodes, where there are several (ib0, bond0, ^docker0)
#   NCCL_IB_HCA, NCCL_NET_PLUGIN, FI_PROVIDER   InfiniBand's cards, EFA
# Not what the job inherited: that is the node of another job, or the login node.
MASTER_ADDR=${MMSSL_MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" 2>/dev/null | head -n 1)}
if [ -n "$MASTER_ADDR" ]; then export MASTER_ADDR; else unset MASTER_ADDR; fi  # unset, Lightning reads the node list
export PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1

# ---- the shape of the job: one task for each device

if [ "${SLURM_GPUS_ON_NODE:-0}" -gt 0 ]; then
  TASKS_PER_NODE=$SLURM_GPUS_ON_NODE
  export SLURM_GPUS_PER_NODE=$SLURM_GPUS_ON_NODE  # after --gres=gpu:N it is still that of the #SBATCH line
else
  # A job without GPUs: --gpus-per-node=0 --ntasks-per-node=4 --mincpus=32.  srun would read these, and refuse.
  TASKS_PER_NODE=${SLURM_NTASKS_PER_NODE:-1}
  unset SLURM_GPUS_PER_NODE SLURM_CPUS_PER_GPU
fi
CPUS=${SLURM_CPUS_PER_GPU:-${SLURM_CPUS_PER_TASK:-$((${SLURM_CPUS_ON_NODE:-1} / TASKS_PER_NODE))}}
[ "$CPUS" -ge 1 ] || CPUS=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$CPUS}
SRUN_CPUS=()
[ -n "${SLURM_CPUS_PER_GPU:-}" ] || SRUN_CPUS=("--cpus-per-task=$CPUS")  # srun does not take it from the job

# ---- shards on the nodes' own disks

STAGE_DIR=${MMSSL_STAGE_DIR:-}
if [ -z "$STAGE_DIR" ]; then
  STAGE_DIR=${SLURM_TMPDIR:-${TMPDIR:-/tmp}}/mmssl-$(id -un)
  # A folder for each choice of files: patterns must not match what a job with other data left there.
  [ -z "${MMSSL_STAGE:-}" ] || STAGE_DIR+=-$(echo "$PWD $MMSSL_STAGE" | cksum | { read -r sum _; echo "$sum"; })
fi

# Copies the files that MMSSL_STAGE names (patterns, separated by spaces) to every node's STAGE_DIR; 75 if told to stop.
stage() {
  [ -n "${MMSSL_STAGE:-}" ] || return 0
  # One task a node, without GPUs.  What an earlier job left there is not copied again.
  env -u SLURM_GPUS_PER_NODE -u SLURM_CPUS_PER_GPU srun --export=ALL --gres=none --ntasks="$SLURM_NNODES" \
    --ntasks-per-node=1 bash -c "$TASK" task bash "$MMSSL_HOME/slurm/stage.sh" "$STAGE_DIR"
  CODE=$?
  [ "$CODE" -ne 75 ] || return 75
  [ "$CODE" -eq 0 ] || die "staging failed; see the lines above, or leave MMSSL_STAGE out"
}

# Replaces {stage} by the node-local folder and {task} by the number of the array task in the arguments -> ARGS.
fill_in() {
  ARGS=()
  local arg
  for arg in "$@"; do
    arg=${arg//\{stage\}/"$STAGE_DIR"}
    arg=${arg//\{task\}/"${SLURM_ARRAY_TASK_ID:-0}"}
    ARGS+=("$arg")
  done
}

# ---- containers

# The image, if there is one: a .sif for Apptainer, anything else for the Pyxis plugin of srun.
IN_IMAGE=() SRUN_IMAGE=() MOUNTS=$PWD:$PWD
[ "$MMSSL_HOME" = "$PWD" ] || MOUNTS+=,$MMSSL_HOME:$MMSSL_HOME
[ -z "${MMSSL_STAGE:-}" ] || MOUNTS+=,$STAGE_DIR:$STAGE_DIR
MOUNTS+=${MMSSL_MOUNTS:+,$MMSSL_MOUNTS}
case ${MMSSL_IMAGE:-} in
  '') type mmssl >/dev/null 2>&1 ||
    die "no mmssl here: run 'make environment' in $MMSSL_HOME, activate an environment before sbatch, or set MMSSL_IMAGE" ;;
  *.sif)
    IN_IMAGE=(apptainer exec)
    [ "${SLURM_GPUS_ON_NODE:-0}" -eq 0 ] || IN_IMAGE+=(--nv)
    IN_IMAGE+=(--bind "$MOUNTS" --pwd "$PWD" "$MMSSL_IMAGE") ;;
  *) SRUN_IMAGE=("--container-image=$MMSSL_IMAGE" "--container-mounts=$MOUNTS" "--container-workdir=$PWD") ;;
esac

# ---- running, and what follows from the exit code

head_of_log() {
  say "job ${SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+ (task $SLURM_ARRAY_TASK_ID of array $SLURM_ARRAY_JOB_ID)}," \
    "start $((${SLURM_RESTART_COUNT:-0} + 1)) on $SLURM_JOB_NODELIST: $SLURM_NNODES x $TASKS_PER_NODE tasks, $(date)"
}

# What each task runs.  srun returns the highest code of all, and once a task has failed it ends the others with SIGTERM,
# which leave with 75 as if they were preempted.  So that the failure is the highest, low codes are lifted by 200; and what
# a signal ended before it could answer to it (143, 140) counts as 75.  The signals of the job come to this shell as well:
# it waits for what its command makes of them.
# shellcheck disable=SC2016  # expanded in the task
TASK='trap : TERM USR2; "$@"; code=$?
case $code in 0) ;; 143 | 140) code=75 ;; [0-9] | [1-4]? | 5[0-4]) code=$((code + 200)) ;; esac
exit $code'

# A signal that reaches this shell must not end it before it has decided about requeueing; SLURM sends one here when the
# job is cancelled or out of time, but not for --signal and not when a partition preempts with a grace time.
STOPPED=""
trap 'STOPPED=TERM' TERM
trap : USR2

# The first rank that leaves behind a saved checkpoint writes this file.  The codes do not tell that: a rank that tidies up
# for too long is killed by srun, and a run that was stopped before its first step ends with 75 as well.
NOTES=$PWD/runs/.slurm
export MMSSL_SAVED=$NOTES/$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}.saved
FRUITLESS=$NOTES/$SLURM_JOB_ID.fruitless  # how many starts in a row made no step, and the newest checkpoint

# run COMMAND...: one task for each device; sets CODE.
run() {
  CODE=75
  [ -z "$STOPPED" ] || return 0
  mkdir -p "$NOTES" 2>/dev/null && rm -f "$MMSSL_SAVED"
  srun --export=ALL --kill-on-bad-exit=1 --ntasks="$((SLURM_NNODES * TASKS_PER_NODE))" \
    --ntasks-per-node="$TASKS_PER_NODE" ${SRUN_CPUS[@]+"${SRUN_CPUS[@]}"} --gpu-bind=none \
    ${SRUN_IMAGE[@]+"${SRUN_IMAGE[@]}"} bash -c "$TASK" task ${IN_IMAGE[@]+"${IN_IMAGE[@]}"} "$@"
  CODE=$?
  [ "$CODE" -lt 200 ] || [ "$CODE" -eq 255 ] || CODE=$((CODE - 200))
}

# requeue_or_exit resume|anew: the end of every script.  75 says: preempted; a checkpoint is saved, or nothing was begun.
# Nothing else is requeued: a failure would fail again.  "anew": what runs has no steps and no checkpoints.
requeue_or_exit() {
  local saved="" said="nothing was begun" then="starts again"
  if [ -s "$MMSSL_SAVED" ]; then
    read -r saved <"$MMSSL_SAVED"
    said="its checkpoint is saved" then="goes on from its checkpoint" CODE=75
    rm -f "$MMSSL_SAVED"
  fi
  [ "$CODE" -eq 75 ] || finish "$CODE"
  if [ -n "$STOPPED" ] && ! out_of_time; then
    say "SLURM ended job $SLURM_JOB_ID: it was cancelled, or SLURM itself requeues it; $said"
    exit 75
  fi
  [ "$1" = anew ] || count_fruitless "$saved"
  if ! type scontrol >/dev/null 2>&1; then
    say "there is no scontrol on $(hostname) to requeue with; submit the same line again, and it goes on"
  elif scontrol requeue "$SLURM_JOB_ID"; then
    say "job $SLURM_JOB_ID is requeued and $then"
    sleep 60  # SLURM ends this shell
  else
    say "job $SLURM_JOB_ID could not be requeued; the next job of a chain, or the same line submitted again, goes on"
  fi
  exit 75
}

# count_fruitless CHECKPOINT: ends the job if too many starts in a row made no step: they saved nothing, or, stopped in a
# validation, what was there already.
count_fruitless() {
  local count=0 before=""
  [ ! -f "$FRUITLESS" ] || read -r count before <"$FRUITLESS"
  if [ -n "$1" ] && [ "$1" != "$before" ]; then count=0 before=$1; else count=$((count + 1)); fi
  if [ "$count" -ge "${MMSSL_FRUITLESS_STARTS:-5}" ]; then
    say "error: job $SLURM_JOB_ID was stopped $count times in a row without a step; it is not requeued." \
      "Give it a longer --time, or a shorter lead in --signal" >&2
    finish 2
  fi
  { mkdir -p "$NOTES" && echo "$count $before" >"$FRUITLESS"; } 2>/dev/null || true
}

# Leaves no notes behind, and ends.
finish() {
  rm -f "$MMSSL_SAVED" "$FRUITLESS"
  rmdir "$NOTES" 2>/dev/null || true
  exit "$1"
}

# Whether the time limit ended the job, and not a person: both send SIGTERM.
out_of_time() {
  case $(squeue -h -j "$SLURM_JOB_ID" -o %L 2>/dev/null) in
    0:00 | -* | INVALID) return 0 ;;
    *) return 1 ;;
  esac
}
