# Two stages: the toolchain stays behind. The result holds one binary and the C library, no shell, and is not root.
FROM rust:1.95-slim-bookworm AS build
WORKDIR /src
COPY . .
RUN cargo build --locked --release --bin keyward

FROM gcr.io/distroless/cc-debian12:nonroot
COPY --from=build /src/target/release/keyward /usr/local/bin/keyward
# ext_authz and admin. Both listen on loopback unless told otherwise (KEYWARD_GRPC_LISTEN, KEYWARD_ADMIN_LISTEN):
# containers of one pod share it.
EXPOSE 9191 9193
ENTRYPOINT ["/usr/local/bin/keyward"]
CMD ["serve"]
