#!/usr/bin/env bash
# Trains on a Cloud TPU slice: creates it, copies and installs this repository, and runs the training on all its hosts.
#
#   NAME=dpo ZONE=us-east5-a TYPE=v5p-128 bash launch/tpu_pod.sh create
#   NAME=dpo ZONE=us-east5-a bash launch/tpu_pod.sh install
#   NAME=dpo ZONE=us-east5-a bash launch/tpu_pod.sh run --config=configs/sdxl.py --workdir=/mnt/shared/runs/sdxl \
#       --config.data.path=/mnt/shared/data/pickapic --config.mesh.data=-1 --config.mesh.fsdp=4
#   NAME=dpo ZONE=us-east5-a bash launch/tpu_pod.sh collect /mnt/shared/runs/sdxl runs/
#   NAME=dpo ZONE=us-east5-a bash launch/tpu_pod.sh delete
#
#   NAME     name of the slice
#   ZONE     zone of the slice
#   TYPE     kind and number of TensorCores of the slice, for example v5p-128 or v6e-64; for create
#   RUNTIME  image of the hosts; default: the one for TYPE
#   PROJECT  project that pays; default: gcloud's
#   SPOT     1 creates a cheaper slice that may be taken away; the same `run` then continues in a new one
#   DRY_RUN  1 prints the gcloud commands instead of running them
#
# `run` trains in the foreground and shows the output of the hosts. The work directory and the data must be where all
# hosts see them, for example on a Filestore share. The script needs gcloud, logged in.
set -euo pipefail
usage() { sed -n '2,/^# hosts see them/p' "$0" | sed 's/^# \{0,1\}//' >&2; exit 2; }
[ $# -gt 0 ] || usage
: "${NAME:?set it to the name of the slice}" "${ZONE:?set it to the zone of the slice}"
place=(--zone="$ZONE" ${PROJECT:+--project="$PROJECT"})
folder=dpo_jax

do_it() {
  if [ "${DRY_RUN:-0}" = 1 ]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}
tpu() { do_it gcloud compute tpus tpu-vm "$@"; }
on_all() { tpu ssh "$NAME" "${place[@]}" --worker=all --command="$1"; }

step=$1
shift
case $step in
  create)
    : "${TYPE:?set it to the kind and size of the slice, for example v5p-128}"
    case ${RUNTIME:-$TYPE} in
      v6e-*) runtime=v2-alpha-tpuv6e ;;
      v5p-*) runtime=v2-alpha-tpuv5 ;;
      v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
      v4-*) runtime=tpu-ubuntu2204-base ;;
      *) runtime=${RUNTIME:?set it to the image of the hosts, since no default is known for $TYPE} ;;
    esac
    [ "${SPOT:-0}" = 1 ] && spot=(--spot) || spot=()
    tpu create "$NAME" "${place[@]}" --accelerator-type="$TYPE" --version="$runtime" "${spot[@]}"
    ;;
  install)
    archive=$(mktemp -d)/dpo_jax.tar.gz
    do_it git archive --format=tar.gz --output="$archive" HEAD
    tpu scp "$archive" "$NAME:dpo_jax.tar.gz" "${place[@]}" --worker=all
    on_all "mkdir -p $folder && tar xzf dpo_jax.tar.gz -C $folder && cd $folder && python3 -m venv .venv && \
.venv/bin/pip install --quiet -c constraints.txt -e '.[tpu]'"
    ;;
  run)
    [ $# -gt 0 ] || usage
    on_all "cd $folder && .venv/bin/python -m dpo_jax.train $(printf '%q ' "$@")"
    ;;
  collect)
    [ $# = 2 ] || usage
    tpu scp --recurse "$NAME:$1" "$2" "${place[@]}" --worker=0
    ;;
  delete) tpu delete "$NAME" "${place[@]}" --quiet ;;
  *) usage ;;
esac
