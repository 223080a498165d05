# docker build -t alexnet .
# docker run --rm --gpus all --ipc host -v /data:/data:ro -v "$PWD:/workspace" alexnet train alexnet_ilsvrc2012 --data.index=/workspace/index
#
# torch's wheel brings its own CUDA libraries (of CUDA 13 with the version in constraints.txt: driver 580 or newer); DALI's CUDA 12 build
# uses those of the base. Not built or run yet.
FROM nvidia/cuda:12.9.1-runtime-ubuntu24.04

# gcc and Python's headers: Triton builds its launcher with them.
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-dev python3-venv gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 alexnet \
    && python3 -m venv /opt/alexnet \
    && install -d -o alexnet -g alexnet /workspace

COPY setup.cfg pyproject.toml constraints.txt README.md LICENSE /source/
COPY pipeline /source/pipeline
COPY model /source/model
COPY train /source/train
COPY tools /source/tools
RUN /opt/alexnet/bin/pip install --no-cache-dir -c /source/constraints.txt '/source[demo,plots,export]' \
    && rm -r /source

ENV PATH=/opt/alexnet/bin:$PATH PYTHONUNBUFFERED=1
USER alexnet
WORKDIR /workspace
ENTRYPOINT ["alexnet"]
CMD ["--help"]
