//! What memory decides, it decides without the heap.

use std::sync::Arc;
use std::time::Duration;

use hyper::HeaderMap;
use keyward::authorizer::Authorizer;
use keyward::authorizer::attempts::Attempts;
use keyward::authorizer::background::Background;
use keyward::authorizer::bcrypt_pool::BcryptPool;
use keyward::authorizer::candidates::{Candidates, CandidatesParts};
use keyward::authorizer::deny::DenyControl;
use keyward::authorizer::freshness::{Freshness, FreshnessSettings};
use keyward::authorizer::lookups::Lookups;
use keyward::authorizer::proof::Prover;
use keyward::authorizer::uses;
use keyward::cache::records::RecordCache;
use keyward::cache::verdict_name::VerdictNamer;
use keyward::cache::verdicts::VerdictCache;
use keyward::clock;
use keyward::domain::decision::Decision;
use keyward::domain::key::PrefixLength;
use keyward::domain::key_format::KeyForm;
use keyward::domain::rules::PolicyRules;
use keyward::server::check_view::CheckView;
use keyward::server::door::{Begun, CheckOptions, Door};
use keyward::server::options::{
    ClientIpSource, CredentialConflict, CredentialSource, ErrorFormat, IdentityHeader, OnUnavailable,
};
use keyward::server::request::Inbound;
use keyward::server::response::{Responder, ResponseOptions};
use keyward::store::{Store, StoreOptions, StoreUrl};
use keyward::telemetry::metrics::Metrics;
use prost::Message as _;
use tracing::Span;

use crate::support::grpc::{Check, Encoding};
use crate::support::keyward::Keyward;

const HOUR: Duration = Duration::from_hours(1);

/// A door on this store, with what `serve` has by default.
async fn door(store: &str) -> Door {
    let metrics = Metrics::new();
    let store = Store::open(StoreOptions {
        url: StoreUrl::parse(store).unwrap(),
        connections: 1,
        query_timeout: Duration::from_secs(10),
        create_if_missing: false,
        actor: None,
    });
    let store = store.await.unwrap();
    let background = Background::new();
    let prover = Prover::new(
        VerdictCache::new(VerdictNamer::random().unwrap(), 1000),
        None,
        BcryptPool::start(1, metrics.clone()).unwrap(),
        background.clone(),
        metrics.clone(),
        HOUR,
    );
    let freshness = Freshness::new(FreshnessSettings {
        lease: HOUR,
        outage_grace: HOUR,
        without_feed: HOUR,
        record_ttl: HOUR,
    });
    let candidates = Candidates::new(CandidatesParts {
        memory: RecordCache::new(1000),
        redis: None,
        store: store.clone(),
        prover: Arc::clone(&prover),
        freshness: Arc::new(freshness),
        outage: Arc::default(),
        lookups: Lookups::new(1000),
        background,
        metrics: metrics.clone(),
        absent_lifetime: HOUR,
    });
    let (recorder, _) = uses::channel(store, None, HOUR, 1000, metrics.clone());
    let authorizer = Authorizer::new(
        candidates,
        prover,
        DenyControl::open(None, PrefixLength::DEFAULT, metrics.clone()).unwrap(),
        Attempts::new(20),
        PolicyRules::default(),
        recorder,
        KeyForm { prefix_length: PrefixLength::DEFAULT, beginning: "kw_".into() },
    );
    let sources: Vec<CredentialSource> =
        ["bearer", "x-api-key", "api-key", "x-goog-api-key"].map(|source| source.parse().unwrap()).into();
    let responder = Responder::new(ResponseOptions {
        header_prefix: "x-keyward-".into(),
        headers: IdentityHeader::ALL.to_vec(),
        credential_sources: sources.clone(),
        forward_credentials: false,
        error_format: ErrorFormat::Auto,
        on_unavailable: OnUnavailable::Deny,
    });
    let options = CheckOptions {
        credential_sources: sources,
        credential_conflict: CredentialConflict::Reject,
        client_ip: ClientIpSource::Peer,
        timeout: Duration::from_secs(10),
    };
    Door::new(Arc::new(authorizer), responder, options, None, metrics)
}

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
