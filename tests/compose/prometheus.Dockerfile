# Prometheus as the public image runs it: flags alone, as nobody, data in /prometheus.
ARG BASE_IMAGE
FROM ${BASE_IMAGE}
COPY prometheus /bin/
RUN mkdir /prometheus && chown 65534:65534 /prometheus
USER 65534:65534
ENTRYPOINT ["prometheus"]
