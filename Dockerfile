# One image for every stage and for the driver that starts them: `python -m jobs.<stage>`, no network needed to start.
#
#   docker build --build-arg GIT_COMMIT=$(git rev-parse HEAD) -t moonlight-pipeline .
#
# torch comes with the CUDA that its wheel was built for (2.13: CUDA 13.0, Triton 3.7), whatever CUDA the base has; the nodes'
# driver must know it. PIP_ARGS="--extra-index-url ..." with PyTorch's index of another CUDA version takes that one (of one version
# pip takes the build with a tag). For a cluster without GPUs: BASE=rayproject/ray:2.60.0-py311 and PyTorch's CPU index.
#
# EXTRAS="eval language" adds optional dependencies of pyproject.toml: lm-eval, for evaluation.tasks, has 250 MB. The image keeps the
# Hugging Face Hub switched off, so the data of tasks come with evaluation.task_folder; HF_HUB_OFFLINE=0 in the evaluate stage where it may
# reach the Hub.
#
# Everything installs from wheels (but three packages of pure Python that lm-eval brings), so nothing here needs a compiler and none
# is added. `training.compile` needs one when it runs: Triton builds its driver module with gcc at the first kernel (ptxas is in its
# wheel). Ray's GPU bases keep g++ and Python's headers, its CPU bases do not; without one, training says so before the first step.
ARG BASE=rayproject/ray:2.60.0-py311-gpu
FROM ${BASE}
USER root

# Dependencies first and alone: this layer changes only with the lock file. The base already holds ray; pip leaves what fits.
# What wheels bring for their own tests goes (220 MB, with lm-eval 310); compiled bytecode stays, since nobody could write it later.
ARG PIP_ARGS=""
ARG EXTRAS=""
COPY pyproject.toml constraints.txt /tmp/build/
RUN python -c "import tomllib; p = tomllib.load(open('/tmp/build/pyproject.toml', 'rb'))['project']; \
print(*p['dependencies'], *(one for extra in '${EXTRAS}'.split() for one in p['optional-dependencies'][extra]), sep='\n')" \
      > /tmp/requirements.txt \
    && python -m pip install --no-cache-dir --only-binary :all: --no-binary rouge-score,sqlitedict,word2number ${PIP_ARGS} \
      --requirement /tmp/requirements.txt --constraint /tmp/build/constraints.txt \
    && cd "$(python -c "import sysconfig; print(sysconfig.get_path('purelib'))")" \
    && rm -rf torch/test torch/bin/test_* torch/bin/protoc* pandas/tests pyarrow/tests matplotlib/tests \
    && find sympy $(ls -d scipy sklearn nltk 2>/dev/null) -type d -name tests -prune -exec rm -r {} + \
    && rm -r /tmp/requirements.txt /tmp/build

# Code and dependencies belong to root and the process is uid 1000: it cannot change what it runs.
COPY pipeline /opt/moonlight/pipeline
COPY data_prep /opt/moonlight/data_prep
COPY jobs /opt/moonlight/jobs
RUN python -m compileall -q /opt/moonlight

# With a read-only root only /tmp is writable (an emptyDir in the cluster, --tmpfs /tmp:exec with docker): caches go there, and so does
# the token that a local Ray writes into its home. `exec`, because Triton and Inductor load what they compiled from their caches.
ENV HOME=/tmp/home \
    PYTHONPATH=/opt/moonlight \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    XDG_CACHE_HOME=/tmp/cache \
    MPLCONFIGDIR=/tmp/cache/matplotlib \
    TRITON_CACHE_DIR=/tmp/cache/triton \
    TORCHINDUCTOR_CACHE_DIR=/tmp/cache/inductor \
    HF_HUB_OFFLINE=1 \
    RAY_USAGE_STATS_ENABLED=0

ARG VERSION=0.1.0
ARG GIT_COMMIT=unknown
ENV MOONLIGHT_GIT_COMMIT=${GIT_COMMIT}
LABEL org.opencontainers.image.title="moonlight-pipeline" \
      org.opencontainers.image.description="From raw text to a published Moonlight model on Ray" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${GIT_COMMIT}"

USER 1000
WORKDIR /opt/moonlight
CMD ["python", "-m", "jobs.pipeline", "--help"]
