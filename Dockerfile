# syntax=docker/dockerfile:1
# Two stages: the toolchain stays behind. The result holds one binary and the C library, no shell, and is not root.
#
#   docker build --build-arg VERSION=0.1.0 --build-arg REVISION="$(git rev-parse HEAD)" \
#     --build-arg SOURCE_DATE_EPOCH="$(git log -1 --format=%ct)" -t keyward:0.1.0 .
#
# Made to be repeatable: versions come from Cargo.lock, paths of the build machine are mapped away, times come from
# SOURCE_DATE_EPOCH (with BuildKit's output option rewrite-timestamp=true). What is left are the two base images: pin them by
# digest (`docker buildx imagetools inspect`) in a build of yours. They are tags here, because a digest that nobody
# renews keeps yesterday's certificates and C library.
FROM rust:1.95-slim-bookworm AS build
# Paths would differ from one machine to the next, and tell about it.
ENV CARGO_INCREMENTAL=0 \
    RUSTFLAGS="--remap-path-prefix=/src=keyward --remap-path-prefix=/usr/local/cargo=cargo" \
    CARGO_PROFILE_RELEASE_STRIP=symbols
ARG SOURCE_DATE_EPOCH=0
WORKDIR /src
COPY . .
RUN cargo build --locked --release --bin keyward

# With the C library: the memory allocator, TLS and SQLite are C. Its certificates are what `sslmode=verify-full` goes by.
FROM gcr.io/distroless/cc-debian12:nonroot
ARG VERSION=0.0.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="Keyward" \
      org.opencontainers.image.description="Authorizes API keys for Envoy" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
COPY --from=build --chown=0:0 --chmod=0555 /src/target/release/keyward /usr/local/bin/keyward
# As a number, so that Kubernetes can see that it is not root. The same that the tag `nonroot` has.
USER 65532:65532
# ext_authz and admin. Both listen on loopback unless told otherwise (KEYWARD_GRPC_LISTEN, KEYWARD_ADMIN_LISTEN):
# containers of one pod share it.
EXPOSE 9191 9193
# For container engines; Kubernetes has probes of its own. There is no shell and no curl in here: the binary asks itself.
HEALTHCHECK --interval=10s --timeout=2s --start-period=30s CMD ["/usr/local/bin/keyward", "health"]
ENTRYPOINT ["/usr/local/bin/keyward"]
CMD ["serve"]
