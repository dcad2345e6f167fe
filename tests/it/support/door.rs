//! The part of `serve` that decides, without what listens: for what has to look at a decision from within the process.
//!
//! The benchmark includes this file too, so it needs nothing of the other parts here.

use std::sync::Arc;
use std::time::Duration;

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
use keyward::domain::key::PrefixLength;
use keyward::domain::key_format::KeyForm;
use keyward::domain::rules::PolicyRules;
use keyward::server::door::{CheckOptions, Door};
use keyward::server::options::{
    ClientIpSource, CredentialConflict, CredentialSource, ErrorFormat, IdentityHeader, OnUnavailable,
};
use keyward::server::response::{Responder, ResponseOptions};
use keyward::store::{Store, StoreOptions, StoreUrl};
use keyward::telemetry::metrics::Metrics;

const HOUR: Duration = Duration::from_hours(1);

/// A door on this store, with what `serve` has by default.
pub(crate) async fn door(store: &str) -> Door {
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
