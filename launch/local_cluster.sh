#!/usr/bin/env bash
# Runs a command in several processes on this machine, each with several virtual CPU devices, to try a mesh before
# paying for one.
#
#   bash launch/local_cluster.sh python -m dpo_jax.train --config=configs/sdxl.py:tiny --workdir=/tmp/try \
#       --config.data.batch_size=8 --config.mesh.data=-1 --config.mesh.fsdp=2
#
#   PROCESSES  number of processes; default: 2
#   DEVICES    virtual devices per process; default: 4
#   PORT       port of this machine through which they connect; default: a free one
#   LOGS       folder for the output of all processes except the first; default: a temporary folder
#   DRY_RUN    1 prints the commands instead of running them
#
# The script ends when all processes have ended, with the exit code of the first failure. If one fails, or if this script
# is killed, the others are stopped. SIGTERM is passed on to all, as a scheduler does: they save and end with code 75.
set -euo pipefail
processes=${PROCESSES:-2}
devices=${DEVICES:-4}
[ $# -gt 0 ] || { sed -n '2,/^set /p' "$0" | sed '$d; s/^# \{0,1\}//' >&2; exit 2; }
port=${PORT:-$(python3 -c 'import socket; s = socket.socket(); s.bind(("localhost", 0)); print(s.getsockname()[1])')}
logs=${LOGS:-$(mktemp -d)}

export JAX_COORDINATOR_ADDRESS=localhost:$port JAX_NUM_PROCESSES=$processes
export JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=$devices JAX_CPU_COLLECTIVES_IMPLEMENTATION=gloo
if [ "${DRY_RUN:-0}" = 1 ]; then
  for ((i = 0; i < processes; i++)); do
    echo "JAX_COORDINATOR_ADDRESS=$JAX_COORDINATOR_ADDRESS JAX_NUM_PROCESSES=$processes JAX_PROCESS_ID=$i" \
      "JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=$devices JAX_CPU_COLLECTIVES_IMPLEMENTATION=gloo $*"
  done
  exit 0
fi

mkdir -p "$logs"
pids=()
trap 'kill "${pids[@]}" 2>/dev/null || true' TERM
trap 'exit 130' INT  # otherwise only `sleep` would end
trap 'kill -KILL "${pids[@]}" 2>/dev/null || true' EXIT  # after SIGTERM they would save and wait for each other
# No trap runs after SIGKILL, so another process reads their numbers from a pipe, which closes when this script ends.
watch=$(mktemp -d)
mkfifo "$watch/pipe"
(
  trap '' INT TERM HUP
  watched=()
  while read -r pid; do watched+=("$pid"); done
  kill -KILL "${watched[@]}" 2>/dev/null
) <"$watch/pipe" >/dev/null 2>&1 &
disown
exec 9>"$watch/pipe"
rm -r "$watch"
for ((i = 0; i < processes; i++)); do
  if [ "$i" = 0 ]; then
    JAX_PROCESS_ID=$i "$@" 9>&- &
  else
    JAX_PROCESS_ID=$i "$@" >"$logs/process_$i.log" 2>&1 9>&- &
  fi
  pids+=($!)
  echo $! >&9
done
# `wait -n` sometimes waits forever where two processes end at once, so this looks which ones have ended.
while [ ${#pids[@]} -gt 0 ]; do
  running=" $(jobs -rp | tr '\n' ' ')"
  for i in "${!pids[@]}"; do
    [[ $running != *" ${pids[i]} "* ]] || continue
    code=0
    wait "${pids[i]}" || code=$?
    unset "pids[i]"
    [ "$code" != 0 ] || continue
    for ((tenths = 0; tenths < 20; tenths++)); do
      [ -n "$(jobs -rp)" ] || break
      sleep 0.1
    done
    echo "error: a process ended with exit code $code. The output of all processes except the first is in $logs" >&2
    exit "$code"
  done
  [ ${#pids[@]} = 0 ] || sleep 0.1
done
