//! Whose address a list of networks is held against: every form of `--client-ip` through a real Envoy, with callers who
//! say that they are somebody else.

use std::net::{IpAddr, SocketAddr, TcpListener};

use tokio::io::AsyncWriteExt as _;
use tokio::net::{TcpStream, UnixStream};

use crate::support::Stack;
use crate::support::http::{Request, Response};
use crate::support::keyward::Keyward;
use crate::support::port;

/// Addresses that a client may be taken for. The first two are on loopback: callers can really come from there.
const CLIENTS: [&str; 9] =
    ["127.0.0.2", PROXY, "192.0.2.1", "192.0.2.2", "203.0.113.7", "10.0.0.7", "2001:db8::7", FORGED, "::1"];

/// A proxy of ours in front of Envoy.
const PROXY: &str = "127.0.0.9";

/// What callers say who want to be somebody else.
const FORGED: &str = "198.51.100.66";

const CALLER: &str = "127.0.0.2";

const SHIPPED: &str = "use_remote_address: true\n";

/// Envoy believes one proxy in front of it.
const ONE_HOP: (&str, &str) =
    (SHIPPED, "use_remote_address: true\n                xff_num_trusted_hops: 1\n");

/// Envoy takes `x-forwarded-for` as it comes.
const NOT_THE_EDGE: (&str, &str) = (SHIPPED, "use_remote_address: false\n");

const NO_APPEND: (&str, &str) =
    (SHIPPED, "use_remote_address: true\n                skip_xff_append: true\n");

/// A listener's name, and what it has in place of the shipped text.
type Listener<'a> = (&'a str, &'a [(&'a str, &'a str)]);

/// Everything that carries an address in one product or another.
const CARRIERS: [&str; 10] = [
    "x-forwarded-for",
    "forwarded",
    "x-real-ip",
    "x-client-ip",
    "true-client-ip",
    "cf-connecting-ip",
    "x-envoy-external-address",
    "x-original-forwarded-for",
    "client",
    "x-cluster-client-ip",
];

struct Rig {
    _stack: Stack,
    listeners: Vec<(String, SocketAddr)>,
    /// One for each of [`CLIENTS`], which admits nobody else.
    keys: Vec<String>,
}

impl Rig {
    async fn start(client_ip: &str, listeners: &[Listener<'_>]) -> Self {
        let addrs: Vec<_> =
            listeners.iter().map(|(name, _)| ((*name).to_owned(), port::free_addr())).collect();
        let stack = Stack::start_with(Keyward::new().arg("--client-ip", client_ip), |envoy| {
            listeners.iter().zip(&addrs).fold(envoy, |envoy, ((name, changes), (_, addr))| {
                let address = format!("socket_address: {{address: 127.0.0.1, port_value: {}}}", addr.port());
                envoy.also_listen(name, &address, changes)
            })
        })
        .await;
        stack.keyward.create_user("ada", &[]);
        let keys = CLIENTS.iter().map(|client| restricted(&stack, client)).collect();
        Self { _stack: stack, listeners: addrs, keys }
    }

    /// Where the client is taken to be, by which keys are admitted; `None` where none is.
    async fn client(&self, listener: &str, from: &str, headers: &[(&str, &str)]) -> Option<&'static str> {
        let (_, addr) = self.listeners.iter().find(|(name, _)| name == listener).unwrap();
        let mut admitted = Vec::new();
        for (client, key) in CLIENTS.into_iter().zip(&self.keys) {
            let request = headers
                .iter()
                .fold(Request::get("/").bearer(key), |request, (name, value)| request.header(name, value));
            if is_admitted(&request.send_from(from.parse().unwrap(), *addr).await) {
                admitted.push(client);
            }
        }
        assert!(admitted.len() < 2, "{listener} {headers:?}: {admitted:?}");
        admitted.pop()
    }
}

fn restricted(stack: &Stack, networks: &str) -> String {
    let options = ["--hash", "sha256", "--allowed-ips", networks];
    stack.keyward.create_key("ada", networks, &options).secret
}

fn is_admitted(response: &Response) -> bool {
    let is_ok = response.status == 200;
    assert!(is_ok || (response.status, response.reason()) == (403, "ip_not_allowed"), "{response:?}");
    is_ok
}

fn forged() -> Vec<(&'static str, &'static str)> {
    CARRIERS.iter().map(|name| (*name, FORGED)).collect()
}

fn has_ipv6() -> bool {
    TcpListener::bind("[::1]:0").is_ok()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_peer_is_who_connected_whatever_anybody_says() {
    let listeners: [Listener; 4] = [
        ("shipped", &[]),
        ("one hop", &[ONE_HOP]),
        ("not the edge", &[NOT_THE_EDGE]),
        ("no append", &[NO_APPEND]),
    ];
    let rig = Rig::start("peer", &listeners).await;
    for (listener, _) in listeners {
        assert_eq!(rig.client(listener, CALLER, &forged()).await, Some(CALLER), "{listener}");
        assert_eq!(rig.client(listener, PROXY, &forged()).await, Some(PROXY), "{listener}");
        assert_eq!(rig.client(listener, "127.0.0.3", &forged()).await, None, "{listener}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_network_ends_where_it_says_in_either_spelling() {
    let (v6, mapped) = (port::free_addr().port(), port::free_addr().port());
    let with_v6 = has_ipv6();
    let stack = Stack::start_with(Keyward::new(), |envoy| {
        if !with_v6 {
            return envoy;
        }
        let address = |address: &str, port: u16| {
            format!("socket_address: {{address: \"{address}\", port_value: {port}, ipv4_compat: true}}")
        };
        envoy.also_listen("v6", &address("::1", v6).replace(", ipv4_compat: true", ""), &[]).also_listen(
            "mapped",
            &address("::ffff:127.0.0.1", mapped),
            &[],
        )
    })
    .await;
    stack.keyward.create_user("ada", &[]);
    for (networks, within, without) in [
        ("127.0.0.2", &["127.0.0.2"][..], &["127.0.0.1", "127.0.0.3", "::1"][..]),
        ("127.0.0.2/32", &["127.0.0.2"], &["127.0.0.1", "127.0.0.3"]),
        ("127.0.0.4/30", &["127.0.0.4", "127.0.0.7"], &["127.0.0.3", "127.0.0.8"]),
        // Its host bits say nothing.
        ("127.0.0.6/30", &["127.0.0.4", "127.0.0.7"], &["127.0.0.3", "127.0.0.8"]),
        ("127.0.0.0/9", &["127.0.0.1", "127.127.255.254"], &["127.128.0.1"]),
        ("0.0.0.0/0", &["127.0.0.2", "127.200.0.1"], &["::1"]),
        ("::ffff:127.0.0.2", &["127.0.0.2"], &["127.0.0.3", "::1"]),
        ("::ffff:7f00:2/128", &["127.0.0.2"], &["127.0.0.3"]),
        ("::ffff:127.0.0.4/126", &["127.0.0.4", "127.0.0.7"], &["127.0.0.3", "127.0.0.8", "::1"]),
        ("::ffff:0:0/96", &["127.0.0.2"], &["::1"]),
        ("::1", &["::1"], &["127.0.0.1"]),
        ("::/127", &["::1"], &["127.0.0.1"]),
        ("::2/127", &[], &["::1", "127.0.0.1"]),
        // IPv4 is not a part of IPv6.
        ("::/0", &["::1"], &["127.0.0.1"]),
        ("192.0.2.0/24,127.0.0.3,::1", &["127.0.0.3", "::1"], &["127.0.0.2"]),
    ] {
        let key = restricted(&stack, networks);
        let sources =
            within.iter().map(|from| (*from, true)).chain(without.iter().map(|from| (*from, false)));
        for (from, expected) in sources {
            let from: IpAddr = from.parse().unwrap();
            let addrs = match from {
                IpAddr::V4(_) if with_v6 => {
                    vec![stack.envoy.addr(), SocketAddr::from(([127, 0, 0, 1], mapped))]
                }
                IpAddr::V4(_) => vec![stack.envoy.addr()],
                IpAddr::V6(_) if with_v6 => vec![SocketAddr::from((from, v6))],
                IpAddr::V6(_) => vec![],
            };
            for addr in addrs {
                let response = Request::get("/").bearer(&key).send_from(from, addr).await;
                assert_eq!(is_admitted(&response), expected, "{networks}: {from} on {addr}");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_without_an_address_is_in_no_network() {
    let folder = tempfile::Builder::new().prefix("keyward-envoy-").tempdir().unwrap();
    let socket = folder.path().join("api.sock");
    let stack = Stack::start_with(Keyward::new(), |envoy| {
        envoy.also_listen("unix", &format!("pipe: {{path: {}}}", socket.display()), &[])
    })
    .await;
    stack.keyward.create_user("ada", &[]);
    let everybody = restricted(&stack, "0.0.0.0/0,::/0");
    let unrestricted = stack.keyward.create_key("ada", "open", &["--hash", "sha256"]).secret;
    for (key, expected) in [(everybody, false), (unrestricted, true)] {
        let request = Request::get("/").bearer(&key).header("x-forwarded-for", CALLER);
        let response = request.send_over(UnixStream::connect(&socket).await.unwrap()).await;
        assert_eq!(is_admitted(&response), expected);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_peer_is_who_the_proxy_protocol_names() {
    let addr = port::free_addr();
    let stack = Stack::start_with(Keyward::new(), |envoy| {
        let address = format!(
            r#"socket_address: {{address: 127.0.0.1, port_value: {}}}
      listener_filters:
        - name: envoy.filters.listener.proxy_protocol
          typed_config:
            "@type": type.googleapis.com/envoy.extensions.filters.listener.proxy_protocol.v3.ProxyProtocol"#,
            addr.port()
        );
        envoy.also_listen("behind a proxy", &address, &[])
    })
    .await;
    stack.keyward.create_user("ada", &[]);
    for (named, networks, expected) in [
        ("TCP4 203.0.113.7 127.0.0.1", "203.0.113.7", true),
        ("TCP4 203.0.113.8 127.0.0.1", "203.0.113.7", false),
        ("TCP4 203.0.113.8 127.0.0.1", "127.0.0.0/8", false),
        ("TCP6 2001:db8::7 ::1", "2001:db8::/32", true),
        ("TCP6 2001:db9::7 ::1", "2001:db8::/32", false),
        ("TCP6 ::ffff:203.0.113.7 ::1", "203.0.113.0/29", true),
        ("TCP6 ::ffff:203.0.113.8 ::1", "203.0.113.0/29", false),
    ] {
        let key = restricted(&stack, networks);
        let mut stream = TcpStream::connect(addr).await.unwrap();
        stream.write_all(format!("PROXY {named} 4444 80\r\n").as_bytes()).await.unwrap();
        let response = Request::get("/").bearer(&key).send_over(stream).await;
        assert_eq!(is_admitted(&response), expected, "{named} {networks}");
    }
}

/// Envoy as the edge writes who connected at the right end, so that one address from there is safe with any caller.
#[tokio::test(flavor = "multi_thread")]
async fn the_first_from_the_right_of_x_forwarded_for_is_what_envoy_wrote() {
    let listeners: [Listener; 4] = [
        ("shipped", &[]),
        ("as text", &[("encode_raw_headers: true", "encode_raw_headers: false")]),
        ("not the edge", &[NOT_THE_EDGE]),
        ("no append", &[NO_APPEND]),
    ];
    let rig = Rig::start("xff:1", &listeners).await;
    for listener in ["shipped", "as text"] {
        for said in [
            &[][..],
            &[FORGED],
            &[FORGED, FORGED],
            &["192.0.2.1, 192.0.2.2,198.51.100.66"],
            &["", ","],
            &["198.51.100.66,"],
            &[", ,, "],
            &["not an address"],
            &["198.51.100.66:4444"],
        ] {
            let headers: Vec<_> = said.iter().map(|value| ("x-forwarded-for", *value)).collect();
            assert_eq!(rig.client(listener, CALLER, &headers).await, Some(CALLER), "{listener} {said:?}");
        }
        assert_eq!(rig.client(listener, CALLER, &forged()).await, Some(CALLER), "{listener}");
    }
    // What docs/policy.md says that xff:N needs: without it the caller is believed.
    for listener in ["not the edge", "no append"] {
        assert_eq!(rig.client(listener, CALLER, &forged()).await, Some(FORGED), "{listener}");
        assert_eq!(rig.client(listener, CALLER, &[]).await, None, "{listener}");
    }
}

/// A proxy of ours in front, which writes its caller at the right end of what that said.
#[tokio::test(flavor = "multi_thread")]
async fn the_second_from_the_right_is_who_connected_to_the_proxy_in_front() {
    let listeners: [Listener; 3] = [
        ("shipped", &[]),
        ("one hop", &[ONE_HOP]),
        ("as text", &[ONE_HOP, ("encode_raw_headers: true", "encode_raw_headers: false")]),
    ];
    let rig = Rig::start("xff:2", &listeners).await;
    for (listener, _) in listeners {
        for (said, expected) in [
            (&["192.0.2.1"][..], Some("192.0.2.1")),
            (&["198.51.100.66, 192.0.2.1"], Some("192.0.2.1")),
            (&[FORGED, "192.0.2.1"], Some("192.0.2.1")),
            (&["198.51.100.66,198.51.100.66", "192.0.2.2 ,  192.0.2.1"], Some("192.0.2.1")),
            // Envoy drops an empty line.
            (&["192.0.2.1", ""], Some("192.0.2.1")),
            (&["198.51.100.66, ::ffff:192.0.2.1"], Some("192.0.2.1")),
            (&["198.51.100.66, 2001:db8::7"], Some("2001:db8::7")),
            (&["198.51.100.66, 2001:DB8:0::0:7"], Some("2001:db8::7")),
            // Nobody's address is guessed.
            (&["198.51.100.66, 192.0.2.1:4444"], None),
            (&["198.51.100.66, [2001:db8::7]"], None),
            (&["198.51.100.66, 192.0.2.01"], None),
            (&["198.51.100.66, unknown"], None),
            (&["198.51.100.66,"], None),
            (&[], None),
        ] {
            let headers: Vec<_> = said.iter().map(|value| ("x-forwarded-for", *value)).collect();
            assert_eq!(rig.client(listener, PROXY, &headers).await, expected, "{listener} {said:?}");
        }
    }
}

const BEFORE_EXT_AUTHZ: &str = "                  - name: envoy.filters.http.ext_authz\n";

/// What docs/policy.md gives for `header:x-client-ip`.
const WRITES_CLIENT_IP: &str = r#"                  - name: envoy.filters.http.header_mutation
                    typed_config:
                      "@type": type.googleapis.com/envoy.extensions.filters.http.header_mutation.v3.HeaderMutation
                      mutations:
                        request_mutations:
                          - append:
                              header: {key: x-client-ip, value: "%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%"}
                              append_action: OVERWRITE_IF_EXISTS_OR_ADD
                  - name: envoy.filters.http.ext_authz
"#;

#[tokio::test(flavor = "multi_thread")]
async fn a_header_that_envoy_writes_is_what_it_wrote() {
    let written = (BEFORE_EXT_AUTHZ, WRITES_CLIENT_IP);
    let as_text = ("encode_raw_headers: true", "encode_raw_headers: false");
    let listeners: [Listener; 4] = [
        ("shipped", &[]),
        ("written", &[written]),
        ("written as text", &[written, as_text]),
        ("one hop", &[written, ONE_HOP]),
    ];
    let rig = Rig::start("header:X-Client-IP", &listeners).await;
    let twice = [("x-client-ip", FORGED), ("X-Client-Ip", FORGED)];
    for listener in ["written", "written as text"] {
        for headers in [&[][..], &forged(), &twice] {
            assert_eq!(rig.client(listener, CALLER, headers).await, Some(CALLER), "{listener} {headers:?}");
        }
    }
    let behind = [("x-client-ip", FORGED), ("x-forwarded-for", "198.51.100.66, 192.0.2.1")];
    assert_eq!(rig.client("one hop", PROXY, &behind).await, Some("192.0.2.1"));
    // Nothing writes it there: two of them are nobody's, one is the caller's word.
    assert_eq!(rig.client("shipped", CALLER, &twice).await, None);
    assert_eq!(rig.client("shipped", CALLER, &[("x-client-ip", "192.0.2.1, 192.0.2.2")]).await, None);
    assert_eq!(rig.client("shipped", CALLER, &[]).await, None);
    assert_eq!(rig.client("shipped", CALLER, &forged()).await, Some(FORGED));
}

#[tokio::test(flavor = "multi_thread")]
async fn envoy_s_own_header_of_the_external_address_is_no_caller_s_word() {
    let listeners: [Listener; 3] =
        [("shipped", &[]), ("one hop", &[ONE_HOP]), ("not the edge", &[NOT_THE_EDGE])];
    let rig = Rig::start("header:x-envoy-external-address", &listeners).await;
    assert_eq!(rig.client("shipped", CALLER, &forged()).await, Some(CALLER));
    for (said, expected) in
        [("198.51.100.66, 203.0.113.7", "203.0.113.7"), ("198.51.100.66, 10.0.0.7", "10.0.0.7")]
    {
        let behind = [("x-envoy-external-address", FORGED), ("x-forwarded-for", said)];
        assert_eq!(rig.client("one hop", PROXY, &behind).await, Some(expected));
    }
    assert_eq!(rig.client("not the edge", CALLER, &forged()).await, Some(FORGED));
}

#[tokio::test(flavor = "multi_thread")]
async fn metadata_is_what_envoy_s_configuration_says() {
    let cluster = "                          cluster_name: keyward\n";
    let initial = |value: &str| {
        let line = format!("{{key: client, value: \"{value}\"}}");
        format!("{cluster}                        initial_metadata: [{line}]\n")
    };
    let (without_port, with_port) =
        (initial("%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%"), initial("%DOWNSTREAM_REMOTE_ADDRESS%"));
    let direct = initial("%DOWNSTREAM_DIRECT_REMOTE_ADDRESS_WITHOUT_PORT%");
    let set = (cluster, without_port.as_str());
    let listeners: [Listener; 6] = [
        ("shipped", &[]),
        ("set", &[set]),
        ("one hop", &[set, ONE_HOP]),
        ("not the edge", &[set, NOT_THE_EDGE]),
        ("direct", &[(cluster, &direct), NOT_THE_EDGE]),
        ("with port", &[(cluster, &with_port)]),
    ];
    let rig = Rig::start("metadata:client", &listeners).await;
    assert_eq!(rig.client("set", CALLER, &[]).await, Some(CALLER));
    assert_eq!(rig.client("set", CALLER, &forged()).await, Some(CALLER));
    assert_eq!(rig.client("direct", CALLER, &forged()).await, Some(CALLER));
    let behind = [("x-forwarded-for", "198.51.100.66, 192.0.2.1"), ("client", FORGED)];
    assert_eq!(rig.client("one hop", PROXY, &behind).await, Some("192.0.2.1"));
    let behind_v6 = [("x-forwarded-for", "198.51.100.66, 2001:db8::7")];
    assert_eq!(rig.client("one hop", PROXY, &behind_v6).await, Some("2001:db8::7"));
    // Without use_remote_address Envoy itself believes the caller.
    assert_eq!(rig.client("not the edge", CALLER, &forged()).await, Some(FORGED));
    assert_eq!(rig.client("with port", CALLER, &[]).await, None);
    // Nothing sets it there, and a header is no metadata.
    assert_eq!(rig.client("shipped", CALLER, &forged()).await, None);
}
