#!/usr/bin/env bash
# Trains on a Cloud TPU slice: creates it, copies this repository there, installs, runs one command on all its hosts.
#
#   NAME=dpo ZONE=us-east5-a TYPE=v5p-128 bash launch/tpu_pod.sh create
#   NAME=dpo ZONE=us-east5-a bash launch/tpu_pod.sh install
#   NAME=dpo ZONE=us-east5-a bash launch/tpu_pod.sh run --config=configs/sdxl.py --workdir=/mnt/shared/runs/sdxl \
#       --config.data.path=/mnt/shared/data/pickapic --config.mesh.data=-1 --config.mesh.fsdp=4
#   NAME=dpo ZONE=us-east5-a bash launch/tpu_pod.sh collect /mnt/shared/runs/sdxl runs/
#   NAME=dpo ZONE=us-east5-a bash launch/tpu_pod.sh delete
#
#   NAME     of the slice
#   ZONE     where it is
#   TYPE     kind and number of TensorCores of the slice, such as v5p-128 or v6e-64; for create
#   RUNTIME  the hosts' image; the one for TYPE unless set
#   PROJECT  that pays; gcloud's default unless set
#   SPOT     1 takes a cheaper slice that may be taken away; the same `run` then goes on in a new one
#   DRY_RUN  1 prints the commands of gcloud
#
# `run` trains in the foreground; what the hosts print is shown. The work directory and the data must lie where all hosts
# see them, such as a Filestore share. Needs gcloud, logged in.
set -euo pipefail
usage() { sed -n '2,/^# see them/p' "$0" | sed 's/^# \{0,1\}//' >&2; exit 2; }
[ $# -gt 0 ] || usage
: "${NAME:?the name of the slice}" "${ZONE:?where it is}"
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
    : "${TYPE:?kind and size of the slice, such as v5p-128}"
    case ${RUNTIME:-$TYPE} in
      v6e-*) runtime=v2-alpha-tpuv6e ;;
      v5p-*) runtime=v2-alpha-tpuv5 ;;
      v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
      v4-*) runtime=tpu-ubuntu2204-base ;;
      *) runtime=${RUNTIME:?the image of the hosts: no default for $TYPE is known} ;;
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
