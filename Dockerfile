# The agent's image. python-iptables comes as source only, hence the build stage.
FROM debian:12-slim AS build
RUN apt-get update \
 && apt-get install -y --no-install-recommends python3 python3-venv python3-dev gcc libc6-dev \
 && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/netpol
COPY requirements/run.lock /src/requirements/run.lock
RUN /opt/netpol/bin/pip install --no-cache-dir --require-hashes -r /src/requirements/run.lock
COPY pyproject.toml README.md /src/
COPY netpol /src/netpol
COPY proxy /src/proxy
COPY routes /src/routes
RUN /opt/netpol/bin/pip install --no-cache-dir --no-deps /src \
 && /opt/netpol/bin/pip uninstall -q -y setuptools pip

FROM debian:12-slim
RUN apt-get update \
 && apt-get install -y --no-install-recommends python3 iptables ipset iproute2 kmod bird2 \
 && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/netpol /opt/netpol
ENV PATH=/opt/netpol/bin:/usr/sbin:/usr/bin:/sbin:/bin PYTHONUNBUFFERED=1
CMD ["netpol-agent"]
