//! What memory decides, it decides without the heap.

use std::time::Duration;

use hyper::HeaderMap;
use keyward::clock;
use keyward::domain::decision::Decision;
use keyward::server::check_view::CheckView;
use keyward::server::door::Begun;
use keyward::server::options::ClientIpSource;
use keyward::server::request::Inbound;
use prost::Message as _;
use tracing::Span;

use crate::support::door::door;
use crate::support::grpc::{Check, Encoding};
use crate::support::keyward::Keyward;

/// Key, address, endpoint, scope and model are all looked at; the answer, which is bytes on the heap, comes after.
#[tokio::test]
async fn a_decision_from_memory_allocates_nothing() {
    let keyward = Keyward::new().start().await;
    keyward.create_user("ada", &[]);
    let options = [
        "--allowed-models",
        "gpt-4o*,claude-*",
        "--allowed-ips",
        "10.0.0.0/8",
        "--scopes",
        "chat",
        "--allowed-endpoints",
        "POST /v1/**",
    ];
    let body = br#"{"messages":[{"role":"user","content":"Why?"}],"model":"gpt-4o-mini"}"#.to_vec();
    let door = door(&format!("sqlite:{}", keyward.sqlite_file().display())).await;
    for hash in ["bcrypt", "sha256"] {
        let key = keyward.create_key("ada", hash, &[&options[..], &["--hash", hash]].concat());
        let mut check = Check::new("POST", "/v1/chat/completions")
            .bearer(&key.secret)
            .header("content-length", body.len().to_string())
            .source("10.1.2.3")
            .context_extension("required_scopes", "chat")
            .build(Encoding::Joined);
        let http = check.attributes.as_mut().unwrap().request.as_mut().unwrap().http.as_mut().unwrap();
        http.raw_body.clone_from(&body);
        let message = check.encode_to_vec();
        let view = CheckView::read(&message).unwrap();
        let inbound = Inbound::read(&view, &HeaderMap::new(), &ClientIpSource::Peer).unwrap();
        // Once with everything that has to be asked.
        let Begun::Open(presented) = door.begin(Some(&inbound), clock::now()) else {
            panic!("memory knows it already")
        };
        let checked = door.ask(&presented, &inbound, Duration::from_secs(30), &Span::none()).await;
        assert!(matches!(checked.decision, Decision::Allow(_)), "{checked:?}");

        let mut begun = None;
        let allocated =
            allocation_counter::measure(|| begun = Some(door.begin(Some(&inbound), clock::now())));
        let Some(Begun::Decided(checked)) = begun else { panic!("memory does not know it") };
        assert!(matches!(checked.decision, Decision::Allow(_)), "{checked:?}");
        assert_eq!(allocated.count_total, 0, "{hash}: {allocated:?}");
    }
}
