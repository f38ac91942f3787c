# The daemon as process 1 of a container, serving the pool in /pool over NBD (TCP port 10809, and /pool/nbd.sock).
#
#   docker build -t fullstripe .
#   docker run --rm -v fullstripe:/pool -p 127.0.0.1:10809:10809 fullstripe
#
# scripts/docker-attach starts it privileged and makes a volume a disk of the host. Another base with node, npm and
# apt can be given with --build-arg BASE=IMAGE.
ARG BASE=node:22-bookworm-slim

# ---- build: the compiler stays here -----------------------------------------------------------------------
FROM ${BASE} AS build
RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends python3 make g++ nbd-client \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/fullstripe
COPY package.json package-lock.json .npmrc ./
RUN npm ci --ignore-scripts
COPY . .
RUN scripts/setup && test -f native/build/Release/node_nbd.node \
 && npm prune --omit=dev --ignore-scripts \
 && rm -rf src native/src native/build/Release/obj.target native/build/Release/.deps tsconfig*.json

# ---- run ----------------------------------------------------------------------------------------------------
FROM ${BASE}
RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends nbd-client kmod \
 && rm -rf /var/lib/apt/lists/* \
 && ln -s /opt/fullstripe/dist/program/fullstripe.js /usr/local/bin/fullstripe
COPY --from=build /opt/fullstripe /opt/fullstripe
ENV NODE_ENV=production FULLSTRIPE_POOL=/pool
VOLUME /pool
EXPOSE 10809
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=10s --start-period=20s CMD ["fullstripe", "status", "--json"]
ENTRYPOINT ["/opt/fullstripe/scripts/docker-entry"]
CMD ["serve"]
