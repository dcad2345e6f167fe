"""Throughput of a real Envoy with different filters."""

import statistics
import subprocess

import checks
from hot import warm
from servers import ENVOY, Store, constant, constant_binary, free_port, h2load, keyward, running

LISTENER = """
    - name: {name}
      address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}
      filter_chains:
        - filters:
            - name: envoy.filters.network.http_connection_manager
              typed_config:
                "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
                stat_prefix: {name}
                route_config:
                  virtual_hosts:
                    - {{name: all, domains: ["*"], routes: [{{match: {{prefix: /}}, direct_response: {{status: 200}}}}]}}
                http_filters:
                  {filter}
                  - {{name: envoy.filters.http.router, typed_config: {{"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}}}
"""
CLUSTER = """
    - name: {name}
      type: STATIC
      typed_extension_protocol_options:
        envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
          "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
          explicit_http_config: {{http2_protocol_options: {{}}}}
      circuit_breakers: {{thresholds: [{{max_requests: 65536, max_pending_requests: 65536}}]}}
      load_assignment:
        cluster_name: {name}
        endpoints: [{{lb_endpoints: [{{endpoint: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}}}}}]}}]
"""


def ext_authz(cluster):
    return (
        "- {name: envoy.filters.http.ext_authz, typed_config: {"
        '"@type": type.googleapis.com/envoy.extensions.filters.http.ext_authz.v3.ExtAuthz, transport_api_version: V3, '
        f"grpc_service: {{envoy_grpc: {{cluster_name: {cluster}}}, timeout: 5s}}}}}}"
    )


def through_envoy(say, rounds=9, count=20_000):
    """Throughput behind one worker of Envoy, with different filters, in turn."""
    rows, binary = [], constant_binary()
    with Store() as store:
        key = store.key("hot")
        message = checks.check(key)
        with keyward(store, "--record-ttl-without-feed", "300s") as ours:
            with constant(binary, warm(ours, message)) as base:
                api_key_auth = (
                    "- {name: envoy.filters.http.api_key_auth, typed_config: {"
                    '"@type": type.googleapis.com/envoy.extensions.filters.http.api_key_auth.v3.ApiKeyAuth, '
                    f"credentials: [{{key: {key}, client: bench}}], key_sources: [{{header: authorization}}]}}}}"
                )
                filters = {"no filter": "", "Envoy's own api_key_auth": api_key_auth}
                filters |= {"constant server": ext_authz("constant"), "Keyward": ext_authz("keyward")}
                ports = {name: free_port() for name in filters}
                admin = free_port()
                config = f"admin: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {admin}}}}}}}\nstatic_resources:\n  listeners:"
                for index, (name, text) in enumerate(filters.items()):
                    config += LISTENER.format(name=f"listener{index}", port=ports[name], filter=text)
                config += "  clusters:" + CLUSTER.format(name="keyward", port=ours.grpc[1])
                config += CLUSTER.format(name="constant", port=base.grpc[1])
                (store.folder / "envoy.yaml").write_text(config)
                command = [str(ENVOY), "-c", str(store.folder / "envoy.yaml"), "--concurrency", "1", "-l", "error"]
                with running(command) as envoy:
                    rates = {name: [] for name in filters}
                    for turn in range(rounds + 1):
                        for name in filters:
                            while True:
                                try:
                                    arguments = ["--h1", "-n", str(count), "-c", "32", "-H", f"authorization: Bearer {key}"]
                                    rate = h2load(arguments, f"http://127.0.0.1:{ports[name]}/")
                                    break
                                except (SystemExit, subprocess.CalledProcessError):
                                    # Until it listens.
                                    if turn > 0 or envoy.poll() is not None:
                                        raise
                            if turn > 0:
                                rates[name].append(rate)
    base = rates["constant server"]
    for name, values in rates.items():
        ratios = [value / other for value, other in zip(values, base)]
        ratio = statistics.median(ratios)
        rows.append([name, f"**{ratio:.2f}**", f"{min(ratios):.2f} to {max(ratios):.2f}", f"{statistics.median(values):,.0f}"])
        say(f"through Envoy, {name}: {ratio:.2f} of the throughput with the constant server")
    return rows
