//! Lists of endpoints against odd paths, as real Envoy hands them on under each of its settings: whatever an upstream
//! makes of a path that was allowed, it is one of the list.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;

use tokio::task::JoinSet;

use crate::endpoint_corpus::{readings, targets};
use crate::support::envoy::{Builder, Envoy};
use crate::support::http::{Request, Response};
use crate::support::keyward::Keyward;
use crate::support::upstream::{Echo, Upstream};
use crate::support::{Stack, http2, port};

/// Two routes that say which one was taken; the rest is as shipped.
const ROUTES: &str = r"routes: # @routes
                        - match: {path_separated_prefix: /v1/chat}
                          route: {cluster: upstream}
                          request_headers_to_add: [{header: {key: x-route, value: chat}}]
                        - match: {path_separated_prefix: /admin}
                          route: {cluster: upstream}
                          request_headers_to_add: [{header: {key: x-route, value: admin}}]";

/// A list, what is within it in plain words, and paths that it must never refuse.
struct List {
    rule: &'static str,
    /// What the targets hold that are worth a request; all are for the first list.
    about: &'static str,
    admits: fn(&[u8]) -> bool,
    plain: &'static [&'static str],
}

const LISTS: [List; 3] = [
    List {
        rule: "/v1/chat/**",
        about: "",
        admits: |path| path == b"/v1/chat" || path.starts_with(b"/v1/chat/"),
        plain: &["/v1/chat", "/v1/chat/completions", "/v1/chat/a.b/c~d?x=/../y", "/v1/chat/caf%C3%A9/a%20b"],
    },
    List {
        rule: "GET /v1/models/*",
        about: "models",
        admits: |path| {
            path.strip_prefix(b"/v1/models/").is_some_and(|rest| !rest.is_empty() && !rest.contains(&b'/'))
        },
        plain: &["/v1/models/gpt-4o", "/v1/models/a%3Ab", "/v1/models/...?"],
    },
    List {
        rule: "/**/completions",
        about: "completions",
        admits: |path| path.ends_with(b"/completions"),
        plain: &["/completions", "/v1/chat/completions", "/admin/completions"],
    },
];

/// What became of one request.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Outcome {
    Reached {
        route: String,
        path: Vec<u8>,
    },
    Denied(String),
    /// Not Keyward's doing: Envoy's own answer, or none.
    Envoy(u16),
}

/// Every combination of what Envoy can do to a path, and one in which it does nothing and shows Keyward text instead of
/// bytes; each as a listener of one Envoy.
fn every_configuration(mut envoy: Builder) -> (Builder, Vec<(String, SocketAddr)>) {
    let mut all = vec![(false, false, "KEEP_UNCHANGED", false)];
    for normalize in [true, false] {
        for merge in [true, false] {
            let actions =
                ["KEEP_UNCHANGED", "REJECT_REQUEST", "UNESCAPE_AND_REDIRECT", "UNESCAPE_AND_FORWARD"];
            all.extend(actions.map(|action| (normalize, merge, action, true)));
        }
    }
    let mut listeners = Vec::new();
    for (normalize, merge, action, raw) in all {
        let addr = port::free_addr();
        let name = format!("normalize={normalize},merge={merge},{action},raw={raw}");
        envoy = envoy.also_listen(
            &name,
            &format!("socket_address: {{address: 127.0.0.1, port_value: {}}}", addr.port()),
            &[
                ("normalize_path: true", &format!("normalize_path: {normalize}")),
                ("merge_slashes: true", &format!("merge_slashes: {merge}")),
                ("slashes_action: REJECT_REQUEST", &format!("slashes_action: {action}")),
                ("encode_raw_headers: true", &format!("encode_raw_headers: {raw}")),
            ],
        );
        listeners.push((name, addr));
    }
    (envoy, listeners)
}

fn reached(echo: &Echo) -> Outcome {
    let path = echo.path.chars().map(|letter| u8::try_from(u32::from(letter)).unwrap()).collect();
    Outcome::Reached { route: echo.values("x-route").join(","), path }
}

fn outcome(response: &Response) -> Outcome {
    match (response.status, response.reason()) {
        (200, _) => reached(&response.echo()),
        (status, "") => Outcome::Envoy(status),
        (_, reason) => Outcome::Denied(reason.to_owned()),
    }
}

/// Over HTTP/1.1, once more where Envoy redirects to.
async fn ask(addr: SocketAddr, target: &[u8], secret: &str) -> Outcome {
    let send = async |target: &[u8]| Request::raw("GET", target).bearer(secret).try_send(addr).await;
    // A line that is no request is answered or not; what counts is that it goes no further.
    let Ok(mut response) = send(target).await else {
        return Outcome::Envoy(0);
    };
    if response.status == 307 {
        let location = response.value("location").unwrap().to_owned();
        let path = location.strip_prefix("http://api.example.com").unwrap_or(&location);
        response = send(path.as_bytes()).await.unwrap();
    }
    outcome(&response)
}

/// The same over HTTP/2, where the body of the answer tells enough.
async fn ask_http2(addr: SocketAddr, target: &[u8], secret: &str) -> Outcome {
    let body = http2::get(addr, target, secret).await.unwrap().unwrap_or_default();
    let Ok(json) = serde_json::from_slice(&body) else {
        return Outcome::Envoy(0);
    };
    Echo::try_from_json(&json).map_or_else(|| Outcome::Denied(json.to_string()), |echo| reached(&echo))
}

/// Why this should not have reached the upstream; `None` where it may.
fn escape(list: &List, outcome: &Outcome) -> Option<String> {
    let Outcome::Reached { route, path } = outcome else {
        return None;
    };
    if list.rule.starts_with("/v1/chat") && route != "chat" {
        return Some(format!("was routed to {route:?} as {}", path.escape_ascii()));
    }
    let outside = readings(path).into_iter().find(|reading| !(list.admits)(reading))?;
    Some(format!("arrived as {}, which is {} to some", path.escape_ascii(), outside.escape_ascii()))
}

async fn rig(keyward: &Keyward) -> (Envoy, Upstream, Vec<(String, SocketAddr)>) {
    let upstream = Upstream::start().await;
    let envoy = Envoy::new(keyward.grpc_addr(), upstream.addr()).replace("routes: # @routes", ROUTES);
    let (envoy, listeners) = every_configuration(envoy);
    (envoy.start().await, upstream, listeners)
}

#[tokio::test(flavor = "multi_thread")]
async fn no_reading_of_an_allowed_path_leaves_the_key_s_list() {
    let keyward = Keyward::new().start().await;
    keyward.create_user("ada", &[]);
    let create = |name: &str, list: &[&str]| {
        keyward.create_key("ada", name, &[&["--hash", "sha256"], list].concat()).secret
    };
    let keys: Arc<Vec<String>> =
        Arc::new(LISTS.iter().map(|list| create(list.rule, &["--allowed-endpoints", list.rule])).collect());
    let (_envoy, _upstream, listeners) = rig(&keyward).await;
    let targets = Arc::new(targets());
    assert!(targets.len() >= 300, "{}", targets.len());

    let mut runs = JoinSet::new();
    for (name, addr) in listeners {
        let (keys, targets) = (Arc::clone(&keys), Arc::clone(&targets));
        runs.spawn(async move {
            let mut seen: Vec<(String, Outcome)> = Vec::new();
            let mut escapes = Vec::new();
            for (list, secret) in LISTS.iter().zip(keys.iter()) {
                for plain in list.plain {
                    let answers = [
                        ask(addr, plain.as_bytes(), secret).await,
                        ask_http2(addr, plain.as_bytes(), secret).await,
                    ];
                    for answer in answers {
                        assert!(matches!(answer, Outcome::Reached { .. }), "{name}: {plain}: {answer:?}");
                    }
                }
                let about = |target: &&Vec<u8>| target.escape_ascii().to_string().contains(list.about);
                for target in targets.iter().filter(about) {
                    let mut answers = vec![ask(addr, target, secret).await];
                    // The two differ in what they take for a path at all.
                    if !target.starts_with(b"/") || !target.iter().all(u8::is_ascii_graphic) {
                        answers.push(ask_http2(addr, target, secret).await);
                    }
                    for outcome in answers {
                        if let Some(why) = escape(list, &outcome) {
                            escapes.push(format!("{name}: {}: {} {why}", list.rule, target.escape_ascii()));
                        }
                        seen.push((name.clone(), outcome));
                    }
                }
            }
            (seen, escapes)
        });
    }
    let (seen, escapes): (Vec<_>, Vec<_>) = runs.join_all().await.into_iter().unzip();
    let escapes: BTreeSet<String> = escapes.into_iter().flatten().collect();
    assert!(escapes.is_empty(), "{} got through:\n{}", escapes.len(), Vec::from_iter(escapes).join("\n"));

    // No setting may have hidden the paths from the rule, or all of them behind it.
    for of_one in seen {
        let name = &of_one[0].0;
        let count = |fits: fn(&Outcome) -> bool| of_one.iter().filter(|(_, outcome)| fits(outcome)).count();
        let allowed = count(|outcome| matches!(outcome, Outcome::Reached { .. }));
        let denied = |reason: &str| {
            let is_it = |outcome: &Outcome| matches!(outcome, Outcome::Denied(own) if own.contains(reason));
            of_one.iter().filter(|(_, outcome)| is_it(outcome)).count()
        };
        let (ambiguous, outside) = (denied("ambiguous_request"), denied("endpoint_not_allowed"));
        let others = count(|outcome| matches!(outcome, Outcome::Envoy(_)));
        println!("{name}: {allowed} allowed, {ambiguous} ambiguous, {outside} outside, {others} others");
        assert_eq!(allowed + ambiguous + outside + others, of_one.len(), "{name}: another reason");
        assert!(
            allowed >= 15 && ambiguous >= 200 && outside >= 15,
            "{name}: {allowed} {ambiguous} {outside}"
        );
    }
}

/// Some frameworks take another path or method from a header than the request's own.
#[tokio::test(flavor = "multi_thread")]
async fn no_header_that_takes_the_place_of_the_path_gets_past_a_list() {
    let change = |envoy: Builder| {
        envoy.replace(
            "headers_with_underscores_action: REJECT_REQUEST",
            "headers_with_underscores_action: ALLOW",
        )
    };
    let stack = Stack::start_with(Keyward::new(), change).await;
    stack.keyward.create_user("ada", &[]);
    for (list, is_kept) in [
        (&["--allowed-endpoints", "GET /v1/chat/*"][..], false),
        (&["--allowed-models", "gpt-4o"], false),
        (&[], true),
    ] {
        let key = stack.keyward.create_key("ada", "ci", &[&["--hash", "sha256"], list].concat()).secret;
        for name in [
            "X-Original-URL",
            "x-rewrite-url",
            "X-HTTP-Method-Override",
            "x-http-method",
            "X_Method_Override",
        ] {
            let request =
                Request::get("/v1/chat/x").bearer(&key).header(name, "/admin").header(name, "DELETE");
            let echo = request.send(stack.envoy.addr()).await.echo();
            assert_eq!(!echo.values(&name.to_lowercase()).is_empty(), is_kept, "{list:?} {name}");
        }
    }
}

/// The opposite of a list: what the table does not fit asks for nothing, so it has to fit every spelling.
#[tokio::test(flavor = "multi_thread")]
async fn a_scope_is_asked_for_under_every_spelling_of_its_path() {
    let keyward =
        Keyward::new().arg("--scope-paths", "GET /v1/chat/**=chat,/V1/Models/*=models").start().await;
    keyward.create_user("ada", &[]);
    let key = keyward.create_key("ada", "ci", &["--hash", "sha256"]).secret;
    let (_envoy, _upstream, listeners) = rig(&keyward).await;
    let (mut escapes, mut reached) = (Vec::new(), 0);
    for (name, addr) in listeners {
        if !name.contains("KEEP") {
            continue;
        }
        for target in targets().iter().filter(|target| !target.contains(&b'.')) {
            let Outcome::Reached { path, .. } = ask(addr, target, &key).await else {
                continue;
            };
            reached += 1;
            let asks = |reading: &Vec<u8>| {
                let reading = reading.to_ascii_lowercase();
                let reading = reading.strip_suffix(b"/").unwrap_or(&reading);
                (LISTS[0].admits)(reading) || (LISTS[1].admits)(reading)
            };
            if let Some(reading) = readings(&path).iter().find(|reading| asks(reading)) {
                escapes.push(format!("{name}: {}: {}", target.escape_ascii(), reading.escape_ascii()));
            }
        }
    }
    assert!(escapes.is_empty(), "{} got through:\n{}", escapes.len(), escapes.join("\n"));
    assert!(reached >= 10, "{reached}");
}
