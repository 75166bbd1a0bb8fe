# Image of the service with the pretrained models, with two targets:
#   lean     ONNX Runtime only, without TensorFlow       docker build --target lean .
#   (last)   both runtimes, and the dependencies of `carry replay`
# A final image contains the locked environment without build tools, runs as an unprivileged
# user, and writes only to /data (the embedded store; unused with CARRY_REDIS_URL) and /tmp.

ARG PYTHON_IMAGE=python:3.13-slim
FROM ${PYTHON_IMAGE} AS environment
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
RUN python3 -m venv /opt/venv

FROM environment AS locked-lean
COPY requirements-lean.lock ./
RUN /opt/venv/bin/pip install --require-hashes -r requirements-lean.lock

FROM environment AS locked
COPY requirements.lock ./
RUN /opt/venv/bin/pip install --require-hashes -r requirements.lock

# Outside of the environment, so that a code change produces one small layer.
FROM locked-lean AS built
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY carry carry
COPY client client
COPY models models
COPY service service
RUN /opt/venv/bin/pip install --no-build-isolation --no-deps --target /opt/carry ./client .

FROM locked-lean AS stripped-lean
RUN /opt/venv/bin/pip uninstall --yes hatchling editables trove-classifiers pathspec pluggy pip

FROM locked AS stripped
RUN /opt/venv/bin/pip uninstall --yes hatchling editables trove-classifiers pathspec pluggy pip

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

FROM ${PYTHON_IMAGE} AS service

# docker build --build-arg VERSION=0.1.0 --build-arg REVISION=$(git rev-parse HEAD) .
ARG VERSION= REVISION=
LABEL org.opencontainers.image.title="carry" \
      org.opencontainers.image.version=$VERSION \
      org.opencontainers.image.revision=$REVISION \
      org.opencontainers.image.description="Serves stateful stacked LSTMs over event streams" \
      org.opencontainers.image.licenses="Apache-2.0"

RUN useradd --system --uid 10001 --user-group --home-dir /nonexistent --shell /usr/sbin/nologin carry \
    && install --directory --owner carry --group carry --mode 700 /data

ENV PATH=/opt/carry/bin:/opt/venv/bin:$PATH \
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
