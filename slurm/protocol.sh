# What every job does around its work: an attempt's folder, checks of the nodes, ranks that are told to stop in time, and
# the decision whether the job comes back. Sourced by the job scripts.
#
# Only the files that a run writes are trusted for that decision. Exit codes are not: of a step that is stopped, srun
# returns 75 or 143 by chance; and of one whose slurmstepd died, 0.

JOB=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}  # requeueing an array's own id restarts all of it
JOB=${JOB:-$SLURM_JOB_ID}
ATTEMPT_NAME=$JOB.${SLURM_RESTART_COUNT:-0}
TERMED=0    # SLURM or its user ends this job: whether it comes back is theirs to say
STOP=0      # the ranks are to stop and save
FORWARDED=0
AFTER_STOP="it goes on from there when it comes back, or is submitted again"
BEFORE=()   # a command in front of that of each task
trap 'STOP=1' USR1  # from the start: modules may take long to load
trap 'STOP=1 TERMED=1' TERM

# step [options of srun] -- command: run a command as tasks of this job, in the container if there is one.
step() {
  local options=()
  while [ "$1" != -- ]; do options+=("$1"); shift; done
  shift
  # shellcheck disable=SC2086  # options and commands of several words
  exec srun --distribution=block --kill-on-bad-exit=1 --wait=60 $BGE_ICL_CONTAINER ${BGE_ICL_CONTAINER:+--container-workdir="$PWD"} \
    "${options[@]}" ${BEFORE[@]+"${BEFORE[@]}"} $BGE_ICL_WRAP "$@"
}

# begin RECIPE [key=value ...] | begin --run RUN: make the attempt's folder. RUN comes from the recipe unless it is given.
begin() {
  MAX_STUCK=${BGE_ICL_MAX_STUCK:-3}  # starts that gain no step, after which a job stops coming back
  PATIENCE=${BGE_ICL_PATIENCE:-300}
  if [ "$1" = --run ]; then BGE_ICL_RUN=$2; fi
  RUN=${BGE_ICL_RUN:-$(step --nodes=1 --ntasks=1 -- python pipeline/job_status.py --where --config "$@")} || leave_early $?
  ATTEMPT=$RUN/attempts/$ATTEMPT_NAME
  mkdir -p "$ATTEMPT" || exit 2
  export BGE_ICL_ATTEMPT=$ATTEMPT
  rm -f "$ATTEMPT"/{ready,end,verdict,bad_nodes,preflight.txt,unreached.*}  # of another job that had this id: ids begin anew
  newest_step >"$ATTEMPT/before"
  scontrol show hostnames "$SLURM_JOB_NODELIST" >"$ATTEMPT/nodes"
  # Newer releases of SLURM say when the job ends; the trainer stops in time by it, with or without a signal.
  if [ -z "${SLURM_JOB_END_TIME:-}" ]; then
    local end
    end=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/.* EndTime=\([^ ]*\).*/\1/p' | head -n 1)
    if [ -n "$end" ] && end=$(date -d "$end" +%s 2>/dev/null); then export SLURM_JOB_END_TIME=$end; fi
  fi
  # What explains a run, and no secret: others may read the run folder.
  env | grep -E '^(SLURM|BGE_ICL|NCCL|GLOO|CUDA|DS|OMP|TORCH|TRITON|PYTHON|SRUN)[A-Z_]*=|^(PATH|LD_LIBRARY_PATH|HF_HOME)=' |
    sort >"$ATTEMPT/env.txt"
  echo "attempt $ATTEMPT_NAME on $SLURM_JOB_NODELIST: $ATTEMPT"
}

# leave_early CODE: the run folder could not be told. A wrong recipe is an end; anything else, some starts later, too.
leave_early() {
  if [ "$1" != 2 ] && [ $TERMED = 0 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt "$MAX_STUCK" ]; then requeue; fi
  exit "$1"
}

# The number of steps in the newest checkpoint.
newest_step() {
  local newest
  newest=$(find "$RUN/checkpoints" -maxdepth 1 -name 'step-[0-9]*' 2>/dev/null | sed 's/.*step-0*//' | sort -n | tail -n 1)
  echo "${newest:-0}"
}

# check_nodes STAGE RECIPE [key=value ...]: with the tasks that training will have, one a GPU; else with one a node.
check_nodes() {
  local stage=$1 tasks=(--ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1)
  shift
  if [ "$stage" = train ]; then tasks=("${TASKS[@]}"); fi
  # One task's fault must not end the others before the first one has judged; one that never ends is given up.
  (
    BEFORE=(timeout -k 30 $((4 * PATIENCE + 120)))
    step "${tasks[@]}" --kill-on-bad-exit=0 --wait=$((2 * PATIENCE + 60)) -- python pipeline/check_nodes.py \
      --for "$stage" --patience "$PATIENCE" --config "$@"
  )
  if grep -q '^  all is well' "$ATTEMPT/preflight.txt" 2>/dev/null; then return; fi
  blame_first_node
  if [ "$(cat "$RUN"/attempts/"$JOB".*/bad_nodes 2>/dev/null | wc -l)" -ge $((4 * MAX_STUCK)) ]; then
    finish 2 "gave up: the checks of $JOB found too many bad nodes: see bad_nodes of its attempts"
  fi
  if [ -s "$ATTEMPT/bad_nodes" ] && [ "${BGE_ICL_EXCLUDE:-0}" = 1 ] && [ "$TERMED" = 0 ]; then
    come_back_without "$(cut -d' ' -f1 "$ATTEMPT/bad_nodes" | sort -u | paste -sd,)"
  fi
  local error
  error=$(sed -n 's/^  error: //p' "$ATTEMPT/preflight.txt" 2>/dev/null | head -n 1)
  if [ -n "$error" ]; then finish 2 "failed: the check of the nodes: $error"; fi
  come_back_at_most "$MAX_STUCK" "the check of the nodes came to no verdict"
}

# blame_first_node: the first task judges. Where all other nodes live and did not reach it, its own node is the bad one.
blame_first_node() {
  local first others
  if [ "$SLURM_JOB_NUM_NODES" = 1 ]; then return; fi
  first=$(head -n 1 "$ATTEMPT/nodes")
  others=$(find "$ATTEMPT" -maxdepth 1 -name 'unreached.*' ! -name "unreached.$first" | wc -l)
  if [ "$others" -lt $((SLURM_JOB_NUM_NODES - 1)) ]; then return; fi
  if [ "$SLURM_JOB_NUM_NODES" = 2 ] && [ -e "$ATTEMPT/preflight.txt" ]; then
    rm -f "$ATTEMPT/bad_nodes"  # both live, and which of them is cut off is not known
    return
  fi
  echo "error: $first, where the first task was to be, answered no other node" >&2
  echo "$first answers nobody" >"$ATTEMPT/bad_nodes"
}

# run_ranks command: one task a rank, each with a log of its own; the first one's lines come here too.
run_ranks() {
  if [ $TERMED = 1 ]; then finish 143 "stopped: by SLURM or its user, before the ranks were started"; fi
  touch "$ATTEMPT/rank-0.log"
  tail -n +1 -F "$ATTEMPT/rank-0.log" 2>/dev/null &
  local follower=$!
  # srun must not die of the signal before it can pass it on, nor a rank before it heeds it.
  BEFORE=(bash -c 'trap "" USR1 TERM; exec "$@"' rank)
  (trap '' USR1; step --output="$ATTEMPT/rank-%t.log" --open-mode=append "${TASKS[@]}" -- "$@") &
  local srun=$!
  while kill -0 $srun 2>/dev/null; do
    if [ $STOP = 1 ] && [ $FORWARDED = 0 ] && [ -e "$ATTEMPT/ready" ]; then
      FORWARDED=1
      echo "asking the ranks to stop and save"
      kill -USR1 $srun
    fi
    sleep 1 &
    wait $!
  done
  wait $srun
  STEP_CODE=$?
  sleep 0.2  # the follower's last lines
  kill $follower 2>/dev/null
  wait $follower 2>/dev/null
}

# decide: end the job, or let it come back, by what the run has said and gained.
decide() {
  local code=- steps=- reason="srun ended with $STEP_CODE, and the first rank said nothing"
  if [ -s "$ATTEMPT/end" ]; then read -r code steps reason <"$ATTEMPT/end"; fi
  show_errors "$code"
  if [ $STOP = 1 ] && [ $TERMED = 0 ]; then reason="told to stop before its time limit: $reason"; fi
  case $code in
    0) finish 0 "done: $steps steps" ;;
    2 | 77) finish "$code" "failed: $reason" ;;
  esac
  come_back_unless_stuck "$reason"
}

# come_back_unless_stuck REASON: requeue, unless this job's last starts gained no step, or its end is not its own.
come_back_unless_stuck() {
  local saved stuck
  if [ $TERMED = 1 ]; then finish 143 "stopped: by SLURM or its user ($1); $AFTER_STOP"; fi
  saved=$(newest_step)
  stuck=$(cat "$RUN"/attempts/"$JOB".*/before | grep -cx "$saved")
  if [ "$stuck" -ge "$MAX_STUCK" ]; then
    finish 1 "gave up: $stuck starts gained no step beyond $saved ($1); mend the cause and submit again"
  fi
  come_back "$1; $saved steps are saved"
}

# come_back_at_most NUMBER REASON [DETAIL]: requeue, unless so many starts before this one, in a row, had that reason.
come_back_at_most() {
  local restart=$((${SLURM_RESTART_COUNT:-0} - 1)) number=0
  if [ $TERMED = 1 ]; then finish 143 "stopped: by SLURM or its user ($2${3:-}); $AFTER_STOP"; fi
  while grep -q "^requeued: $2" "$RUN/attempts/$JOB.$restart/verdict" 2>/dev/null; do
    number=$((number + 1)) restart=$((restart - 1))
  done
  if [ $number -ge "$1" ]; then finish 1 "gave up: $2${3:-}, as $number starts before; mend the cause and submit again"; fi
  come_back "$2${3:-}"
}

# The first lines that name an error, of each rank's log.
show_errors() {
  if [ "$1" = 0 ] || [ "$1" = 75 ]; then return; fi
  grep -m 1 -H -E 'error: |Error: ' "$ATTEMPT"/rank-*.log | sed "s|^$ATTEMPT/||" | head -n 16
}

# finish CODE VERDICT: the job ends.
finish() {
  echo "$2" | tee "$ATTEMPT/verdict"
  exit "$1"
}

# come_back REASON: the same job again, at the end of the queue.
come_back() {
  echo "requeued: $1" | tee "$ATTEMPT/verdict"
  trap 'exit 143' TERM
  requeue
  sleep 300 &
  wait $!
  exit 1
}

# requeue: a controller that is busy or starts anew refuses for a while.
requeue() {
  for _ in $(seq 30); do
    if scontrol requeue "$JOB"; then return; fi
    sleep 10 &
    wait $!
  done
  return 1
}

# come_back_without NODES: requeue, and exclude the nodes as soon as SLURM lets a job that no longer runs be changed.
come_back_without() {
  local nodes shown left needed=${BGE_ICL_MIN_NODES:-$SLURM_JOB_NUM_NODES}
  shown=$(scontrol show job "$JOB")  # before the requeue: SLURM ends what runs here then
  if [[ $shown != *ExcNodeList=* ]]; then come_back_at_most "$MAX_STUCK" "SLURM did not say which nodes $JOB excludes"; fi
  nodes=$(sed -n 's/.*ExcNodeList=\([^ ]*\).*/\1/p' <<<"$shown" | grep -v '(null)')
  nodes=${nodes:+$nodes,}$1
  left=$(comm -23 <(sinfo -h -N -p "$SLURM_JOB_PARTITION" -o %N | sort -u) <(scontrol show hostnames "$nodes" | sort -u) | wc -l)
  if [ "$left" -lt "$needed" ]; then  # it would wait for ever
    finish 2 "failed: the check found $1 bad, and without $nodes partition $SLURM_JOB_PARTITION has $left nodes for $needed"
  fi
  echo "requeued: without $1, which the check found bad" | tee "$ATTEMPT/verdict"
  trap '' TERM  # for the commands below too
  requeue || finish 1 "failed: scontrol requeue was refused; exclude $1 and submit again"
  for _ in $(seq 60); do
    if scontrol update JobId="$JOB" ExcNodeList="$nodes" 2>/dev/null; then exit 1; fi
    sleep 0.5
  done
  scontrol hold "$JOB"
  finish 1 "failed: $1 could not be excluded; the job is held: scontrol update JobId=$JOB ExcNodeList=$nodes, then release"
}

# run_task command: work that keeps what is finished by itself; at the time limit it is ended, and the job comes back.
run_task() {
  local srun code=-
  if [ $TERMED = 1 ]; then finish 143 "stopped: by SLURM or its user, before the work was started"; fi
  # The first task's own code counts.
  # shellcheck disable=SC2016
  BEFORE=(bash -c '"$@"; code=$?; [ "$SLURM_PROCID" != 0 ] || echo "$code" >"$BGE_ICL_ATTEMPT/end"; exit $code' task)
  (trap '' USR1; step "${TASKS[@]}" -- "$@") &
  srun=$!
  while kill -0 $srun 2>/dev/null; do
    if [ $STOP = 1 ] && [ $FORWARDED = 0 ]; then
      FORWARDED=1
      kill -TERM $srun  # which kills the tasks
    fi
    sleep 1 &
    wait $!
  done
  wait $srun
  STEP_CODE=$?
  if [ -s "$ATTEMPT/end" ]; then read -r code <"$ATTEMPT/end"; fi
  if [ "$code" = 0 ]; then finish 0 "done"; fi
  if [ $TERMED = 1 ]; then finish 143 "stopped: by SLURM or its user; $AFTER_STOP"; fi
  if [ "$code" = 2 ]; then finish 2 "failed: see the error above"; fi
  # A task that is longer than its limit, or stands still, would come back for ever.
  if [ $STOP = 1 ]; then come_back_at_most $((8 * MAX_STUCK)) "at its time limit"; fi
  come_back_at_most "$MAX_STUCK" "ended with" " $code (srun: $STEP_CODE)"
}
