# Two images from one file: `service` speaks HTTP and holds no torch, `worker` runs jobs and holds
# no HTTP. Each has the dependencies of its extra, at the versions of constraints.txt, and only the
# packages that it may import; the worker's has torchvision and timm too, for their networks, unless
# it is built with --build-arg NETWORKS="". Neither has pip, a compiler, or a user who could write to the code.
#
#   docker build --target service -t weightwash-service .
#   docker build --target worker -t weightwash-worker .

FROM python:3.11-slim-bookworm AS base
ENV PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1


FROM base AS dependencies
ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /build
# Only these two files decide what is installed, so a change of code reuses the layers below.
COPY pyproject.toml constraints.txt ./
ARG NETWORKS="torchvision timm"
# Installing the project itself would bring both sides' code into both images.
RUN set -e; for extras in service "worker $NETWORKS"; do \
        python -c 'import sys, tomllib; \
project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
print(*project["dependencies"], sep="\n"); \
[print(*project["optional-dependencies"][extra], sep="\n") for extra in sys.argv[1].split()]' \
            "$extras" > "${extras%% *}.txt"; \
    done


FROM dependencies AS service-dependencies
RUN python -m venv --without-pip /opt/venv \
    && pip --python /opt/venv/bin/python install --only-binary :all: \
        -c constraints.txt -r service.txt


FROM dependencies AS worker-dependencies
RUN python -m venv --without-pip /opt/venv \
    && pip --python /opt/venv/bin/python install --only-binary :all: \
        -c constraints.txt -r worker.txt


FROM base AS code
# .dockerignore lets only the packages through.
COPY . /code
# A checkout may be readable for its owner alone. Every job starts a fresh interpreter, which must
# not compile everything again; the files never change, so their bytecode is never checked.
RUN chmod -R u=rwX,go=rX /code \
    && python -m compileall -q --invalidation-mode unchecked-hash /code


FROM base AS runtime
# /data is the volume that both sides share: files move inside it by atomic rename. /scratch holds
# the folders of running jobs. A new volume takes its owner from here.
RUN pip uninstall --yes pip setuptools wheel \
    && groupadd --gid 10001 weightwash \
    && useradd --uid 10001 --gid weightwash --no-create-home --home-dir /nonexistent \
        --shell /usr/sbin/nologin weightwash \
    && install -d -o weightwash -g weightwash -m 0700 \
        /data /data/blobs /data/uploads /scratch
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONPATH=/app \
    WEIGHTWASH_DATA_DIR=/data \
    WEIGHTWASH_SCRATCH_DIR=/scratch
WORKDIR /app
COPY --from=code /code/common common
COPY --from=code /code/migrations migrations


FROM runtime AS service
COPY --from=service-dependencies /opt/venv /opt/venv
COPY --from=code /code/alembic.ini ./
COPY --from=code /code/service service
USER 10001:10001
# Jobs run in the worker's containers. An address beyond loopback is refused without tokens.
ENV WEIGHTWASH_HOST=0.0.0.0 \
    WEIGHTWASH_PORT=8000 \
    WEIGHTWASH_AUTH=tokens \
    WEIGHTWASH_EMBEDDED_WORKERS=0
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=20s --retries=3 \
    CMD ["python", "-c", "from urllib.request import urlopen; \
urlopen('http://127.0.0.1:8000/healthz', timeout=4)"]
CMD ["python", "-m", "service", "serve"]


FROM runtime AS worker
# Debian's own installer stands on libseccomp, and jobs are confined with it: a base image without it
# must fail here, not when the first job is refused.
RUN python -c 'import ctypes; ctypes.CDLL("libseccomp.so.2")'
COPY --from=worker-dependencies /opt/venv /opt/venv
COPY --from=code /code/worker worker
USER 10001:10001
# A worker answers to no one: its heartbeats in the database are its health, shown by /readyz.
CMD ["python", "-m", "worker", "celery"]
