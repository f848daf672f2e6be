# shellcheck shell=bash
# What the batch scripts share; they source it.  Everything that differs between clusters is here or in the
# environment (docs/cluster.md lists the variables), so that the scripts themselves need not be edited.

# ---- where things are

MMSSL_HOME=${MMSSL_HOME:-$SLURM_SUBMIT_DIR}   # the checkout; sbatch runs a copy of the script, so $0 does not tell
MMSSL_SITE=${MMSSL_SITE:-$MMSSL_HOME/slurm/site.sh}
# shellcheck disable=SC1090  # a site's own file: `module load ...`, proxies, NCCL's interface
[ ! -f "$MMSSL_SITE" ] || . "$MMSSL_SITE"
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
MASTER_ADDR=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" 2>/dev/null | head -n 1)}
if [ -n "$MASTER_ADDR" ]; then export MASTER_ADDR; else unset MASTER_ADDR; fi  # unset, Lightning reads the node list
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_GPU:-${SLURM_CPUS_PER_TASK:-1}}}
export PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1

# ---- the shape of the job: one task for each device

if [ "${SLURM_GPUS_ON_NODE:-0}" -gt 0 ]; then
  TASKS_PER_NODE=$SLURM_GPUS_ON_NODE
else
  TASKS_PER_NODE=${SLURM_NTASKS_PER_NODE:-1}  # a job without GPUs: --gpus-per-node=0 --ntasks-per-node=4 --cpus-per-task=8
  unset SLURM_GPUS_PER_NODE SLURM_CPUS_PER_GPU  # srun would read them, and refuse GPUs that are none
fi

# The image, if there is one: a .sif for Apptainer, anything else for the Pyxis plugin of srun.
IN_IMAGE=() SRUN_IMAGE=()
case ${MMSSL_IMAGE:-} in
  '') type mmssl >/dev/null 2>&1 ||
    die "no mmssl here: run 'make environment' in $MMSSL_HOME, activate an environment before sbatch, or set MMSSL_IMAGE" ;;
  *.sif)
    IN_IMAGE=(apptainer exec)
    [ "${SLURM_GPUS_ON_NODE:-0}" -eq 0 ] || IN_IMAGE+=(--nv)
    IN_IMAGE+=(--bind "$PWD,${MMSSL_MOUNTS:-$MMSSL_HOME}" --pwd "$PWD" "$MMSSL_IMAGE") ;;
  *) SRUN_IMAGE=("--container-image=$MMSSL_IMAGE" "--container-mounts=${MMSSL_MOUNTS:-$PWD,$MMSSL_HOME}"
    "--container-workdir=$PWD") ;;
esac

# ---- shards on the nodes' own disks

STAGE_DIR=${MMSSL_STAGE_DIR:-${SLURM_TMPDIR:-${TMPDIR:-/tmp}}/mmssl-$(id -un)}

# Copies the files that MMSSL_STAGE names (patterns, separated by spaces) to every node's STAGE_DIR.
stage() {
  [ -n "${MMSSL_STAGE:-}" ] || return 0
  # One task a node.  What an earlier job left there is not copied again.
  srun --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --gpus-per-node=0 bash "$MMSSL_HOME/slurm/stage.sh" "$STAGE_DIR" ||
    die "staging failed; see the lines above, or leave MMSSL_STAGE out"
}

# Replaces {stage} by the node-local folder and {task} by the number of the array task in the arguments -> ARGS.
fill_in() {
  ARGS=()
  local arg
  for arg in "$@"; do
    arg=${arg//\{stage\}/$STAGE_DIR}
    ARGS+=("${arg//\{task\}/${SLURM_ARRAY_TASK_ID:-0}}")
  done
}

# ---- running, and what follows from the exit code

head_of_log() {
  say "job ${SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+ (task $SLURM_ARRAY_TASK_ID of array $SLURM_ARRAY_JOB_ID)}," \
    "start $((${SLURM_RESTART_COUNT:-0} + 1)) on $SLURM_JOB_NODELIST: $SLURM_NNODES x $TASKS_PER_NODE tasks, $(date)"
}

# What each task runs.  srun returns the highest code of all, and once a task has failed it ends the others with SIGTERM,
# which leave with 75 as if they were preempted.  So that the failure is the highest, low codes are lifted by 200.  The
# signals of the job come to this shell as well: it waits for what its command makes of them.
# shellcheck disable=SC2016  # expanded in the task
TASK='trap : TERM USR2; "$@"; code=$?; [ $code -eq 0 ] || [ $code -ge 55 ] || code=$((code + 200)); exit $code'

# run COMMAND...: one task for each device; sets CODE.
run() {
  # A signal that reaches this shell must not end it before it has decided about requeueing; SLURM sends one here
  # when the job is cancelled or out of time, but not for --signal and not when a partition preempts with a grace time.
  STOPPED=""
  trap 'STOPPED=TERM' TERM
  trap : USR2
  srun --kill-on-bad-exit=1 --ntasks="$((SLURM_NNODES * TASKS_PER_NODE))" --ntasks-per-node="$TASKS_PER_NODE" \
    --gpu-bind=none "${SRUN_IMAGE[@]}" bash -c "$TASK" task "${IN_IMAGE[@]}" "$@"
  CODE=$?
  [ "$CODE" -lt 200 ] || CODE=$((CODE - 200))
}

# The end of every script.  75 says: preempted, a checkpoint is saved.  Nothing else is requeued: a failure would fail again.
requeue_or_exit() {
  [ "$CODE" -eq 75 ] || exit "$CODE"
  if [ -n "$STOPPED" ] && ! out_of_time; then
    say "job $SLURM_JOB_ID was cancelled; its checkpoint is saved and it is not requeued"
    exit 75
  fi
  if ! type scontrol >/dev/null 2>&1; then
    say "there is no scontrol on $(hostname) to requeue with; submit the same line again, and it goes on"
  elif scontrol requeue "$SLURM_JOB_ID"; then
    say "job $SLURM_JOB_ID is requeued and goes on from its checkpoint"
    sleep 60  # SLURM ends this shell
  else
    say "job $SLURM_JOB_ID could not be requeued; the next job of a chain, or the same line submitted again, goes on"
  fi
  exit 75
}

# Whether the time limit ended the job, and not a person: both send SIGTERM.
out_of_time() {
  case $(squeue -h -j "$SLURM_JOB_ID" -o %L 2>/dev/null) in
    0:00 | -* | INVALID) return 0 ;;
    *) return 1 ;;
  esac
}
