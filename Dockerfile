# Image of the service with the pretrained models, with two targets:
#   lean     ONNX Runtime only, without TensorFlow       docker build --target lean .
#   (last)   both runtimes, and the dependencies of `carry replay`
# A final image contains the locked environment without build tools, runs as an unprivileged
# user, and writes only to /data (the embedded store; unused with CARRY_REDIS_URL) and /tmp.
# Nothing here depends on the architecture: docker buildx build --platform linux/amd64,linux/arm64 .

ARG PYTHON_IMAGE=python:3.13-slim
FROM ${PYTHON_IMAGE} AS environment
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
RUN python3 -m venv /opt/venv

FROM environment AS locked-lean
COPY requirements-lean.lock ./
# The lock is complete without the dependencies that `scripts/lock` leaves out.
RUN /opt/venv/bin/pip install --no-compile --no-deps --require-hashes -r requirements-lean.lock

FROM environment AS locked
COPY requirements.lock ./
RUN /opt/venv/bin/pip install --require-hashes -r requirements.lock

# Outside of the environment, so that a code change produces one small layer.
FROM locked-lean AS built
WORKDIR /src
COPY pyproject.toml hatch_build.py README.md LICENSE ./
COPY carry carry
COPY client client
COPY models models
COPY service service
RUN /opt/venv/bin/pip install --no-build-isolation --no-compile --no-deps --target /opt/carry ./client . \
    && /opt/venv/bin/python -m compileall -q -x '/models/(importing|training)/' /opt/carry

# Removes from packages what no service uses: ONNX Runtime's library for C, and its tools that write models; NumPy's
# interface to Fortran; all lexers but Python's, for tracebacks; tests; sources in C and stubs; debug symbols.
FROM locked-lean AS stripped-lean
RUN apt-get update && apt-get install --yes --no-install-recommends binutils
RUN /opt/venv/bin/pip uninstall --yes hatchling editables trove-classifiers ziglang pathspec pluggy tomlkit pip \
    && cd /opt/venv/lib/python3*/site-packages \
    && rm -r onnxruntime/capi/libonnxruntime.so.* onnxruntime/quantization onnxruntime/tools onnxruntime/transformers \
    && rm -r numpy/f2py numpy/_core/_simd.*.so \
    && find pygments/lexers -name '[a-z]*.py' ! -name python.py ! -name special.py -delete \
    && find . -type d -name tests -prune -exec rm -r {} + \
    && find . -type f \( -name '*.[ach]' -o -name '*.cpp' -o -name '*.p[xy][dxi]' \) -delete \
    && find . -name '*.so' -exec strip --strip-unneeded {} + \
    && /opt/venv/bin/python -m compileall -q .

FROM locked AS stripped
RUN /opt/venv/bin/pip uninstall --yes hatchling editables trove-classifiers ziglang pathspec pluggy tomlkit pip

# List the packages of an image with their versions and licenses (CycloneDX).
FROM ${PYTHON_IMAGE} AS sbom
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
RUN python3 -m venv /opt/sbom
COPY requirements-sbom.lock ./
RUN /opt/sbom/bin/pip install --require-hashes -r requirements-sbom.lock
COPY pyproject.toml ./
COPY --from=built /opt/carry /opt/carry
ENV PYTHONPATH=/opt/carry
ARG LIST_PACKAGES="/opt/sbom/bin/cyclonedx-py environment /opt/venv --pyproject pyproject.toml --output-reproducible -o /sbom.cdx.json"

FROM sbom AS sbom-lean
COPY --from=stripped-lean /opt/venv /opt/venv
RUN $LIST_PACKAGES

FROM sbom AS sbom-full
COPY --from=stripped /opt/venv /opt/venv
RUN $LIST_PACKAGES

# The base image without package managers, Perl, administration of disks, and conversion of character sets; its
# Python without IDLE and Tk, and with the bytecode of what every start imports.
FROM ${PYTHON_IMAGE} AS slim
RUN useradd --system --uid 10001 --user-group --home-dir /nonexistent --shell /usr/sbin/nologin carry \
    && install --directory --owner carry --group carry --mode 700 /data
RUN dpkg --purge --force-depends --force-remove-essential apt libapt-pkg7.0 perl-base sqv util-linux \
    && rm -rf /usr/lib/*-linux-gnu/gconv /usr/local/include \
    && cd /usr/local/lib && rm -rf python3*/ensurepip python3*/idlelib python3*/site-packages/pip* python3*/tkinter \
    && python3 -c "import asyncio, ctypes, decimal, difflib, email.message, fractions, html, http.cookies, inspect, \
    ipaddress, logging.handlers, multiprocessing.spawn, statistics, timeit, urllib.request, uuid, wsgiref, zoneinfo"

FROM scratch AS service
COPY --from=slim / /

# docker build --build-arg VERSION=0.1.0 --build-arg REVISION=$(git rev-parse HEAD) .
ARG VERSION= REVISION=
LABEL org.opencontainers.image.title="carry" \
      org.opencontainers.image.version=$VERSION \
      org.opencontainers.image.revision=$REVISION \
      org.opencontainers.image.description="Serves stateful stacked LSTMs over event streams" \
      org.opencontainers.image.licenses="Apache-2.0"

ENV PATH=/opt/carry/bin:/opt/venv/bin:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin \
    LANG=C.UTF-8 \
    PYTHONPATH=/opt/carry \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    CARRY_DATA_DIR=/data
USER carry
WORKDIR /data
VOLUME /data
EXPOSE 8000

HEALTHCHECK --interval=5s --timeout=5s --start-period=120s --retries=6 \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health/ready', timeout=4)"]

ENTRYPOINT ["carry"]
CMD ["serve", "--host", "0.0.0.0"]

FROM service AS lean
COPY --from=stripped-lean /opt/venv /opt/venv
COPY --from=built /opt/carry /opt/carry
COPY --from=sbom-lean /sbom.cdx.json /opt/carry/

FROM service
ENV KERAS_HOME=/tmp/keras
COPY --from=stripped /opt/venv /opt/venv
COPY --from=built /opt/carry /opt/carry
COPY --from=sbom-full /sbom.cdx.json /opt/carry/
