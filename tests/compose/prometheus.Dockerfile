# Prometheus as the public image runs it: flags alone, as nobody, data in /prometheus.
ARG BASE_IMAGE
FROM ${BASE_IMAGE}
COPY prometheus /bin/
RUN mkdir /prometheus && chown nobody:nogroup /prometheus
USER nobody
ENTRYPOINT ["prometheus"]
