# dpo_jax on hosts with NVIDIA GPUs. The wheels of JAX bring CUDA; the host needs a driver (580 or newer for CUDA 13) and
# the NVIDIA Container Toolkit.
#
#   docker build -f launch/gpu.Dockerfile -t dpo_jax:gpu .
#   docker run --rm --gpus=all --shm-size=8g -v "$PWD:/work" dpo_jax:gpu train --config=sdxl:lora --workdir=runs/mine \
#       --config.data.path=data/mine
#
# CUDA=cuda12 is for older drivers (525 or newer): docker build --build-arg CUDA=cuda12 ...
FROM python:3.12-slim
ARG CUDA=cuda13
WORKDIR /opt/dpo_jax
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY configs configs
COPY dpo_jax dpo_jax
RUN pip install --no-cache-dir -c constraints.txt ".[${CUDA},vote]"
ENV HF_HOME=/work/.cache/huggingface
WORKDIR /work
ENTRYPOINT ["dpo_jax"]
CMD ["--help"]
