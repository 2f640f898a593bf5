# dpo_jax on the hosts of Cloud TPUs; libtpu comes with the wheels of JAX.
#
#   docker build -f launch/tpu.Dockerfile -t dpo_jax:tpu .
#   docker run --rm --privileged --net=host -v "$PWD:/work" dpo_jax:tpu train --config=sdxl --workdir=runs/mine \
#       --config.data.path=data/mine
#
# Every host of a slice runs the same command; launch/gke_jobset.yaml does so on Kubernetes.
FROM python:3.12-slim
WORKDIR /opt/dpo_jax
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY configs configs
COPY dpo_jax dpo_jax
RUN pip install --no-cache-dir -c constraints.txt ".[tpu,gcs]"
ENV HF_HOME=/work/.cache/huggingface
WORKDIR /work
ENTRYPOINT ["dpo_jax"]
CMD ["--help"]
