//! A whole check: the bytes of a `CheckRequest` to those of a `CheckResponse`, as the gRPC door does it, on a fixed set
//! of keys in a real store. [`super::check_oracle`] judges the answer.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use envoy_types::pb::envoy::service::auth::v3::CheckResponse;
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
use keyward::domain::key::{KeyPrefix, PrefixLength};
use keyward::domain::key_format::KeyForm;
use keyward::domain::rules::PolicyRules;
use keyward::server::check_view::CheckView;
use keyward::server::door::{Begun, CheckOptions, Door};
use keyward::server::options::{
    ClientIpSource, CredentialConflict, CredentialSource, ErrorFormat, IdentityHeader, OnUnavailable,
};
use keyward::server::request::Inbound;
use keyward::server::response::{Responder, ResponseOptions};
use keyward::store::admin::{KeySettings, NewKey, NewUser, UserRef};
use keyward::store::{Store, StoreOptions, StoreUrl};
use keyward::telemetry::metrics::Metrics;
use prost::Message as _;
use sha2::{Digest as _, Sha256};
use tokio::runtime::Runtime;
use tracing::Span;
use zeroize::Zeroizing;

use super::check_oracle::{KEYS, Known, Rights, judge};

const HOUR: Duration = Duration::from_hours(1);

pub(crate) fn run(data: &[u8]) {
    if let Some(response) = decided(data) {
        judge(data, &response);
    }
}

/// The answer; `None` where the call itself fails, which is never an allow.
pub(crate) fn decided(message: &[u8]) -> Option<CheckResponse> {
    static WORLD: OnceLock<Mutex<World>> = OnceLock::new();
    let world = WORLD.get_or_init(|| Mutex::new(World::new()));
    // What was found in one test must not hide what another one finds.
    world.lock().unwrap_or_else(PoisonError::into_inner).check(message)
}

struct World {
    runtime: Runtime,
    door: Door,
    _folder: tempfile::TempDir,
}

impl World {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let deny_file = folder.path().join("deny");
        std::fs::write(&deny_file, "prefix kw_banne\n").expect("a deny file");
        let metrics = Metrics::new();
        let deny =
            DenyControl::open(Some(deny_file), PrefixLength::DEFAULT, metrics.clone()).expect("a deny list");
        let url = format!("sqlite:{}", folder.path().join("keys.db").display());
        let door = runtime.block_on(async {
            let store = filled_store(&url).await;
            let (recorder, _) = uses::channel(store.clone(), None, HOUR, 1000, metrics.clone());
            let (candidates, prover) = candidates(store, &metrics);
            let authorizer = Authorizer::new(
                candidates,
                prover,
                deny,
                Attempts::new(20),
                PolicyRules::default(),
                recorder,
                KeyForm { prefix_length: PrefixLength::DEFAULT, beginning: "kw_".into() },
            );
            door(Arc::new(authorizer), metrics)
        });
        Self { runtime, door, _folder: folder }
    }

    fn check(&self, data: &[u8]) -> Option<CheckResponse> {
        let began = clock::now();
        let view = CheckView::read(data).ok()?;
        let inbound = Inbound::read(&view, &HeaderMap::new(), &self.door.options().client_ip);
        let checked = match (self.door.begin(inbound.as_ref(), began), &inbound) {
            (Begun::Decided(checked), _) => checked,
            (Begun::Open(key), Some(inbound)) => {
                self.runtime.block_on(self.door.ask(&key, inbound, Duration::from_secs(10), &Span::none()))
            }
            (Begun::Open(_), None) => panic!("a key without a request"),
        };
        let answer = self.door.finish(&checked, inbound.as_ref(), began.instant, &Span::none());
        let framed = answer.expect("nothing is left to Envoy").into_grpc();
        let (head, message) = framed.split_at(5);
        let length = u32::from_be_bytes([head[1], head[2], head[3], head[4]]);
        assert_eq!((head[0], usize::try_from(length)), (0, Ok(message.len())), "the frame of gRPC");
        Some(CheckResponse::decode(message).expect("an answer is a message"))
    }
}

async fn filled_store(url: &str) -> Store {
    let store = Store::open(StoreOptions {
        url: StoreUrl::parse(url).expect("a URL"),
        connections: 1,
        query_timeout: Duration::from_secs(10),
        create_if_missing: true,
        actor: None,
    });
    let store = store.await.expect("a store");
    store.migrate().await.expect("tables");
    for (username, is_superuser) in [("ada", false), ("root", true), ("gone", false)] {
        let (email, role) = (format!("{username}@example.com"), "user".to_owned());
        let user = NewUser { username: username.to_owned(), email, role, is_superuser };
        store.create_user(&user).await.expect("a user");
    }
    for key in &KEYS {
        store.create_key(&new_key(key)).await.expect("a key");
    }
    store.set_user_active(&UserRef::Username("gone".into()), false).await.expect("the user");
    store
}

fn new_key(key: &Known) -> NewKey {
    let digest: String = Sha256::digest(key.secret).iter().map(|byte| format!("{byte:02x}")).collect();
    let hash = match key.rights {
        Rights::Slow => bcrypt::hash(key.secret, 4).expect("a hash"),
        _ => format!("sha256:{digest}"),
    };
    let texts = |list: &[&str]| list.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>();
    let mut settings = KeySettings::default();
    match key.rights {
        Rights::Networks => settings.allowed_ips = texts(&["10.0.0.0/8", "2001:db8::/32"]),
        Rights::Models => settings.allowed_models = texts(&["gpt-4o*", "claude-3"]),
        Rights::Endpoint => settings.allowed_endpoints = texts(&["POST /v1/chat/*"]),
        Rights::Scopes => settings.scopes = texts(&["chat", "files"]),
        Rights::Expired => {
            settings.expires_at = Some(keyward::domain::time::Timestamp::from_microseconds(1));
        }
        Rights::Unreadable => settings.allowed_ips = texts(&["10.0.0.0/8", "nonsense"]),
        Rights::Spent => settings.budget_limit_cents = Some(0),
        Rights::All
        | Rights::Slow
        | Rights::Superuser
        | Rights::Inactive
        | Rights::OwnerGone
        | Rights::Denied => {}
    }
    let owner = match key.rights {
        Rights::Superuser => "root",
        Rights::OwnerGone => "gone",
        _ => "ada",
    };
    NewKey {
        user: UserRef::Username(owner.to_owned()),
        name: key.name.to_owned(),
        prefix: KeyPrefix::new(&key.secret[..8]).expect("a prefix"),
        hash: Zeroizing::new(hash),
        is_active: !matches!(key.rights, Rights::Inactive),
        settings,
    }
}

fn candidates(store: Store, metrics: &Metrics) -> (Arc<Candidates>, Arc<Prover>) {
    let background = Background::new();
    let prover = Prover::new(
        VerdictCache::new(VerdictNamer::random().expect("randomness"), 1000),
        None,
        BcryptPool::start(1, metrics.clone()).expect("a thread"),
        background.clone(),
        metrics.clone(),
        HOUR,
    );
    let freshness =
        FreshnessSettings { lease: HOUR, outage_grace: HOUR, without_feed: HOUR, record_ttl: HOUR };
    let candidates = Candidates::new(CandidatesParts {
        memory: RecordCache::new(1000),
        redis: None,
        store,
        prover: Arc::clone(&prover),
        freshness: Arc::new(Freshness::new(freshness)),
        outage: Arc::default(),
        lookups: Lookups::new(1000),
        background,
        metrics: metrics.clone(),
        absent_lifetime: HOUR,
    });
    (candidates, prover)
}

fn door(authorizer: Arc<Authorizer>, metrics: Metrics) -> Door {
    let credential_sources: Vec<CredentialSource> =
        ["bearer", "x-api-key", "api-key", "x-goog-api-key", "query:key"]
            .map(|source| source.parse().expect("a source"))
            .into();
    let responder = Responder::new(ResponseOptions {
        header_prefix: "x-keyward-".into(),
        headers: IdentityHeader::ALL.to_vec(),
        credential_sources: credential_sources.clone(),
        forward_credentials: false,
        error_format: ErrorFormat::Auto,
        on_unavailable: OnUnavailable::Deny,
    });
    let options = CheckOptions {
        credential_sources,
        credential_conflict: CredentialConflict::Reject,
        client_ip: ClientIpSource::Peer,
        timeout: Duration::from_secs(10),
    };
    Door::new(authorizer, responder, options, None, metrics)
}
