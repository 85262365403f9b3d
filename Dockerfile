# For GPU nodes: PyTorch's image with this repository installed in place. Read by the tests, not built by them; how to
# build and run it is in docs/cluster.md.

# 12.6 serves GPUs up to Hopper; Blackwell needs 13.0, whose driver is 580 or newer.
ARG CUDA=12.6
FROM pytorch/pytorch:2.13.0-cuda${CUDA}-cudnn9-runtime

# Nothing is compiled here, but Triton, with which torch.compile works, compiles its launchers when a run starts.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev python-is-python3 python3-dev \
    && rm -rf /var/lib/apt/lists/*

# The image's torch belongs to the system's Python, which in a container nobody else uses.
ENV PIP_BREAK_SYSTEM_PACKAGES=1 \
    PIP_NO_CACHE_DIR=1 \
    PYTHONUNBUFFERED=1

WORKDIR /opt/megatron-slw
COPY pyproject.toml setup.py constraints.txt README.md LICENSE pretrain_gpt2.py ./
COPY megatron megatron
COPY tools tools
COPY recipes recipes
COPY scripts scripts
# In place, so that scripts/ds_train.sh and the command megatron-slw run the same files.
RUN python -m pip install --constraint constraints.txt --editable .

# With the number of who runs it, files that a run writes outside of the container are theirs.
ARG UID=10001
RUN useradd --non-unique --uid "${UID}" --create-home trainer
USER trainer

CMD ["megatron-slw", "--help"]
