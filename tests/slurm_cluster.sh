#!/usr/bin/env bash
# A real SLURM cluster of virtual nodes on this machine: slurmctld and a slurmd a node, without systemd, cgroups and GPUs.
#
#   slurm_cluster.sh install               Debian's packages where some are missing; where that may not be done, what to do
#   slurm_cluster.sh up DIR N [OWNER]      N nodes with 16 CPUs each; they end when the process OWNER does, however it does
#   slurm_cluster.sh in DIR COMMAND ...    as on the login node, in this folder and with this environment
#   slurm_cluster.sh at DIR K COMMAND ...  on node K
#   slurm_cluster.sh kill-node|start-node DIR K       power off, power on
#   slurm_cluster.sh cut|join DIR K                   its network cable out and in again
#   slurm_cluster.sh kill-slurmd|start-slurmd DIR K   the daemon alone: jobs of the node go on
#   slurm_cluster.sh down DIR
#
# Each node is one set of namespaces (network, host name, mounts, IPC, processes) inside an outer set that holds the
# controller and the bridge between them. So a node has an address, a host name, a /dev/shm and processes of its own; its
# power loss is the end of its process 1; and the end of the outer process 1 takes everything along: processes, mounts,
# links. Files, /tmp among them, are those of this machine: they are the cluster's shared file system.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin
SELF=$(readlink -f "$0")
PACKAGES="slurmctld slurmd slurm-client munge iproute2 util-linux"
NET=10.77.0
NAMESPACES="unshare --net --uts --mount --ipc --pid --fork --kill-child --mount-proc --"

die() { echo "error: $*" >&2; exit 1; }

missing() {
  local name
  for name in slurmctld slurmd sbatch munged ip unshare nsenter; do
    command -v "$name" >/dev/null || echo -n "$name "
  done
}

install_packages() {
  local absent
  absent=$(missing)
  if [ -z "$absent" ]; then return; fi
  if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    die "no ${absent}here; as root: apt-get install $PACKAGES (Debian, Ubuntu), then the same again as root"
  fi
  echo "installing $PACKAGES (there is no $absent)"
  apt-get update -q
  # shellcheck disable=SC2086
  DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends $PACKAGES
}

# Inside the outer namespaces. nsenter -m would leave us in /, so the way back is given along.
inside() {
  nsenter -t "$(cat "$D/pid")" -n -u -i -m -p -- \
    bash -c 'cd "$0" && exec "$@"' "$PWD" env SLURM_CONF="$D/etc/slurm.conf" "$@"
}

on_node() {
  local k=$1
  shift
  inside nsenter -t "$(cat "$D/run/node$k.pid1")" -n -u -i -m -p -- bash -c 'cd "$0" && exec "$@"' "$PWD" "$@"
}

# The first child of a process: process 1 of the namespaces that unshare made.
child() {
  local found
  for _ in $(seq 250); do
    found=$(tr -d ' ' <"/proc/$1/task/$1/children" 2>/dev/null || true)  # a file of /proc has size 0, [ -s ] is no test
    if [ -n "$found" ]; then echo "$found"; return; fi
    sleep 0.02
  done
  return 1
}

# What a value is for stands here, since slurm.conf mistakes a comment after a value for a part of it now and then.
#   cred_expire=5       a requeued job waits that long and a second more; at the default of 120 every requeue takes 2 minutes
#   config_overrides    nodes may have more CPUs and memory than this machine
#   preempt_send_user_signal   a preempted job gets the signal it asked for with --signal, and then GraceTime
#   TmpFS               a tmpfs a node: --mpi=pmix keeps sockets there, which would clash
#   FirstJobId          from the clock: no two clusters give the same number, so files named after a job are this one's
#   MinJobAge           ended jobs can still be asked for; there is no accounting here
#   SlurmdTimeout=6     a dead node is noticed after about 10 s
#   KillWait=3          seconds between TERM and KILL
#   Gres                SLURM takes only character devices for GPUs: plain files are refused, a bare Count is taken for 0
write_conf() {
  cat >"$D/etc/slurm.conf" <<CONF
ClusterName=testbed
SlurmctldHost=ctl($NET.254)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=/run/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation=$D/state
SlurmdSpoolDir=$D/spool/%n
SlurmctldPidFile=$D/run/slurmctld.pid
SlurmdPidFile=$D/run/slurmd.%n.pid
SlurmctldLogFile=$D/log/slurmctld.log
SlurmdLogFile=$D/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
MpiDefault=none
TmpFS=$D/nodetmp
FirstJobId=$(($(date +%s) % 60000000 + 1))
ReturnToService=2
SlurmdTimeout=6
KillWait=3
MinJobAge=3600
TCPTimeout=2
MessageTimeout=10
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=0,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
NodeName=node[1-$N] NodeAddr=$NET.[1-$N] CPUs=16 Boards=1 SocketsPerBoard=2 CoresPerSocket=8 ThreadsPerCore=1 RealMemory=64000 Gres=gpu:h200:8 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
PartitionName=low Nodes=ALL MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
CONF
  echo "AutoDetect=off" >"$D/etc/gres.conf"
  echo "NodeName=node[1-$N] Name=gpu Type=h200 File=$D/dev/gpu[0-7]" >>"$D/etc/gres.conf"
  : >"$D/etc/plugstack.conf"
  # torch asks for the name of each peer, which it sees as an IPv6 address, and waits 10 s where nobody knows it.
  { echo "127.0.0.1 localhost"
    echo "$NET.254 ctl"
    for k in $(seq "$N"); do printf '%s node%s\n::ffff:%s node%s\n' "$NET.$k" "$k" "$NET.$k" "$k"; done
  } >"$D/etc/hosts"
  sed 's/^hosts:.*/hosts: files/' /etc/nsswitch.conf >"$D/etc/nsswitch.conf"
}

up() {
  local N=$1 owner=${2:-} outer refused ready=
  if [ -n "$(missing)" ]; then die "no $(missing)here: bash tests/slurm_cluster.sh install"; fi
  if [ "$(id -u)" != 0 ]; then die "the nodes are namespaces, which only root may make here; run this as root"; fi
  if ! refused=$($NAMESPACES true 2>&1); then die "this machine refuses the namespaces that nodes are made of: $refused"; fi
  mkdir -p "$D"/{etc,run,log,state,spool,dev,nodetmp}
  for g in $(seq 0 7); do mknod "$D/dev/gpu$g" c 1 3; done
  write_conf
  # shellcheck disable=SC2086
  setsid $NAMESPACES bash "$SELF" _controller "$D" "$N" </dev/null >"$D/log/controller.out" 2>&1 &
  outer=$!
  child "$outer" >"$D/pid"
  if [ -n "$owner" ]; then
    setsid bash -c 'while kill -0 "$1" && [ -e "$3/pid" ]; do sleep 1; done; exec bash "$2" down "$3"' \
      _ "$owner" "$SELF" "$D" </dev/null >/dev/null 2>&1 &
  fi
  SECONDS=0
  while [ $SECONDS -lt 30 ]; do
    if [ "$(inside sinfo -h -p main -t idle -o %D 2>/dev/null)" = "$N" ]; then ready=1; break; fi
    if ! kill -0 "$outer" 2>/dev/null; then break; fi
    sleep 0.1
  done
  if [ -z "$ready" ]; then
    # A wrong value in slurm.conf shows as nodes that never become idle, and in these logs.
    tail -n 20 "$D"/log/* >&2
    down
    die "the cluster did not come up; its logs stand above"
  fi
}

controller() {
  hostname ctl
  mount --bind "$D/etc/hosts" /etc/hosts
  mount --bind "$D/etc/nsswitch.conf" /etc/nsswitch.conf
  # munged wants folders above its socket that everybody may enter, and one for its seed that nobody else may.
  mount -t tmpfs -o mode=755 tmpfs /run
  mkdir -m 700 /run/munge
  (umask 077; head -c 128 /dev/urandom >/run/munge/key)
  ip link set lo up
  ip link add br0 type bridge
  ip addr add "$NET.254/24" dev br0
  ip link set br0 up
  export SLURM_CONF=$D/etc/slurm.conf
  munged -F --socket=/run/munge.socket --key-file=/run/munge/key --seed-file=/run/munge/seed \
    --pid-file=/run/munge/pid --log-file=/run/munge/log >"$D/log/munged.out" 2>&1 &
  for _ in $(seq 100); do
    if munge -S /run/munge.socket -n >/dev/null 2>&1; then break; fi
    sleep 0.02
  done
  slurmctld -D -i -f "$SLURM_CONF" >"$D/log/slurmctld.out" 2>&1 &
  for k in $(seq "$1"); do start_node "$k"; done
  reap
}

start_node() {
  local k=$1 outer
  mkdir -p "$D/spool/node$k"
  ip link del "v$k" 2>/dev/null || true
  # shellcheck disable=SC2086
  setsid $NAMESPACES bash "$SELF" _node "$D" "$k" </dev/null >>"$D/log/node$k.out" 2>&1 &
  outer=$!
  child "$outer" >"$D/run/node$k.pid1"
  ip link add "v$k" type veth peer name eth0 netns "$outer"
  ip link set "v$k" master br0 up
}

node() {
  local k=$1
  hostname "node$k"
  mount -t tmpfs tmpfs "$D/nodetmp"
  mount -t tmpfs tmpfs /dev/shm
  ip link set lo up
  for _ in $(seq 250); do
    if ip link show eth0 >/dev/null 2>&1; then break; fi
    sleep 0.02
  done
  ip addr add "$NET.$k/24" dev eth0
  ip link set eth0 up
  start_slurmd "$k"
  reap
}

# Its number is the one inside the node.
start_slurmd() {
  export SLURM_CONF=$D/etc/slurm.conf
  setsid slurmd -D -f "$SLURM_CONF" </dev/null >>"$D/log/slurmd.node$1.out" 2>&1 &
  echo $! >"$D/run/node$1.slurmd"
}

# Process 1 of a set of namespaces: stays, and takes in the children that others leave.
reap() {
  while :; do
    sleep 3600 &
    wait $! || true
  done
}

down() {
  kill -9 "$(cat "$D/pid" 2>/dev/null)" 2>/dev/null || true
  for _ in $(seq 50); do
    if rm -rf "$D" 2>/dev/null; then return; fi
    sleep 0.1
  done
  die "$D cannot be removed"
}

if [ $# = 0 ] || { [ "$1" != install ] && [ $# = 1 ]; }; then sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$SELF"; exit 2; fi
command=$1
shift
if [ "$command" = install ]; then install_packages; exit; fi
D=$(readlink -m "$1")
shift
case $command in
  up) up "$@" ;;
  in) inside "$@" ;;
  at) on_node "$@" ;;
  kill-node) inside kill -9 "$(cat "$D/run/node$1.pid1")" ;;
  start-node) inside bash "$SELF" _start-node "$D" "$1" ;;
  kill-slurmd) on_node "$1" kill -9 "$(cat "$D/run/node$1.slurmd")" ;;
  start-slurmd) on_node "$1" bash "$SELF" _start-slurmd "$D" "$1" ;;
  cut) inside ip link set "v$1" down ;;
  join) inside ip link set "v$1" up ;;
  down) down ;;
  _controller) controller "$@" ;;
  _start-node) start_node "$@" ;;
  _node) node "$@" ;;
  _start-slurmd) start_slurmd "$@" ;;
  *) die "unknown command $command" ;;
esac
