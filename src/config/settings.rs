//! Every setting: its flag, field, type, default, reader and help, in one table.
//!
//! The doc comment of an entry is its help text in the command line, in `docs/settings.md` and in
//! `config/keyward.yaml`; a new setting is one entry here (and `KEYWARD_REGENERATE=1 cargo test --lib config`).
//! The default is a text like any other, so that it is read and checked like any other.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use super::values::{self, DAY, MILLISECOND, MINUTE, Reading, SECOND, SecretUrl, Shown};
use crate::domain::key::PrefixLength;
use crate::domain::model_path::ModelPaths;
use crate::domain::rules::{ScopePaths, Shadow};
use crate::server::client_san::ClientSan;
use crate::server::listen::{Listen, SocketMode};
use crate::server::options::{
    ClientIpSource, CredentialConflict, CredentialSource, ErrorFormat, HttpProfile, IdentityHeader,
    OnUnavailable,
};
use crate::telemetry::decision_log::{Sample, Target};
use crate::telemetry::logging::LogFormat;
use crate::telemetry::traces::{OtlpEndpoint, OtlpProtocol, SampleShare};

/// One row of the table.
#[derive(Debug)]
pub struct Setting {
    /// The flag without its dashes; the other names follow from it.
    pub flag: &'static str,
    /// The text that holds where none is given.
    pub default: &'static str,
    /// What to write, for help texts: `ADDRESS`, `on|off`.
    pub form: &'static str,
    /// Whether a bad text may hold a password and is not to be repeated.
    pub secrecy: Secrecy,
    help: &'static [&'static str],
}

/// Whether the text of a setting may be printed as it was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Secrecy {
    /// It may.
    Plain,
    /// It may hold a password.
    Secret,
}

impl Setting {
    /// Meaning, range and consequence, one paragraph without line breaks.
    pub fn help(&self) -> String {
        self.help.iter().map(|line| line.trim()).collect::<Vec<_>>().join(" ")
    }

    /// `KEYWARD_GRPC_LISTEN`
    pub fn variable(&self) -> String {
        format!("KEYWARD_{}", self.flag.replace('-', "_").to_ascii_uppercase())
    }

    /// Where it is in the file: `grpc` and `listen`; a name of one word is at the top.
    pub fn file_key(&self) -> (&'static str, Option<String>) {
        match self.flag.split_once('-') {
            Some((group, rest)) => (group, Some(rest.replace('-', "_"))),
            None => (self.flag, None),
        }
    }

    /// `grpc.listen`
    pub fn file_path(&self) -> String {
        match self.file_key() {
            (group, Some(key)) => format!("{group}.{key}"),
            (key, None) => key.to_owned(),
        }
    }
}

/// Where the readers get their texts from, and where they leave their complaints.
pub(super) trait Texts {
    /// Reads the text that holds for this setting; `None` after a complaint.
    fn read<T>(&mut self, setting: &'static Setting, reader: fn(&str) -> Reading<T>) -> Option<T>;
}

macro_rules! settings {
    ($($(#[doc = $help:literal])+ $flag:literal($form:literal, $secrecy:ident) =>
        $field:ident: $type:ty = $default:literal, $reader:expr;)+) => {
        /// The settings of one process, read and checked.
        #[allow(clippy::doc_markdown, reason = "the same text is help on a terminal, where marks are noise")]
        #[derive(Debug, Clone)]
        pub struct Settings {
            $($(#[doc = $help])+ pub $field: $type,)+
        }

        mod row {
            use super::{Secrecy, Setting};
            $(#[allow(non_upper_case_globals, reason = "named like the field")]
            pub(super) static $field: Setting = Setting {
                flag: $flag,
                default: $default,
                form: $form,
                secrecy: Secrecy::$secrecy,
                help: &[$($help),+],
            };)+
        }

        /// Every setting, in the order of the documentation.
        pub static TABLE: &[&Setting] = &[$(&row::$field),+];

        impl Settings {
            /// Reads every setting, so that all complaints are made at once.
            pub(super) fn read(texts: &mut impl Texts) -> Option<Self> {
                $(let $field = texts.read::<$type>(&row::$field, $reader);)+
                Some(Self { $($field: $field?),+ })
            }

            /// Every setting with its value as text, secrets hidden.
            pub fn shown(&self) -> Vec<(&'static Setting, String)> {
                vec![$((&row::$field, self.$field.shown())),+]
            }
        }

        #[cfg(test)]
        pub(super) const FIELDS: &[&str] = &[$(stringify!($field)),+];
    };
}

settings! {
    /// Where Envoy's ext_authz checks are taken (gRPC), a comma list, or the flag several times: an IP address and port,
    /// unix:/path for a socket that its owner and group may use, or unix:@name for an abstract one, which everybody in
    /// the network namespace may. Without --grpc-tls-cert nothing is encrypted, so keep to the loopback address or a socket.
    "grpc-listen"("LIST", Plain) => grpc_listen: Vec<Listen> = "127.0.0.1:9191", values::listens;

    /// A PEM file with the certificate for gRPC and the intermediate ones behind it, or off for no TLS. It holds for
    /// every address of --grpc-listen. A change of it, of the key and of the authorities is seen within three seconds
    /// and holds for new connections.
    "grpc-tls-cert"("PATH|off", Plain) => grpc_tls_cert: Option<PathBuf> = "off", |text| values::optional(text, values::file);

    /// A PEM file with the private key of --grpc-tls-cert, without a passphrase, or off.
    "grpc-tls-key"("PATH|off", Plain) => grpc_tls_key: Option<PathBuf> = "off", |text| values::optional(text, values::file);

    /// A PEM file with the authorities of clients, or off. With it, only a client with a certificate of theirs is
    /// answered (mTLS); without it, everybody who can connect is.
    "grpc-tls-client-ca"("PATH|off", Plain) => grpc_tls_client_ca: Option<PathBuf> = "off", |text| values::optional(text, values::file);

    /// Which clients of --grpc-tls-client-ca are answered, a comma list of names, or none for all of them: a DNS name, a
    /// URI such as spiffe://example.com/envoy or an IP address that the certificate has as a subject alternative name, to
    /// the letter. An authority that signs for others too needs this list.
    "grpc-tls-client-sans"("LIST|none", Plain) => grpc_tls_client_sans: Vec<ClientSan> = "none", values::list;

    /// Whether another process may listen on the same TCP addresses of --grpc-listen (SO_REUSEPORT): on or off. For a
    /// successor that starts before this one ends. On, a second process that was started by mistake is not noticed.
    "reuse-port"("on|off", Plain) => reuse_port: bool = "off", values::switch;

    /// How old a gRPC connection becomes, give or take a tenth, or off: 1s to 30d. Then the client is told to open
    /// another (GOAWAY), and what has begun is answered. For load balancers, and for a look at new certificates.
    "max-connection-age"("DURATION|off", Plain) => max_connection_age: Option<Duration> = "off",
        |text| values::optional(text, |text| values::duration(text, SECOND..=30 * DAY));

    /// Where proxies ask over HTTP (Envoy's http_service, nginx, Traefik, Caddy): an IP address and port, unix:/path, or
    /// off. Whoever reaches it can say which request it asks about, so that nothing but the proxy may.
    "http-listen"("ADDRESS|off", Plain) => http_listen: Option<Listen> = "off",
        |text| values::optional(text, values::word);

    /// Which proxy asks there. It decides which part of a question names the original request and is believed: envoy
    /// (method and path of the question, behind /check), nginx (x-original-method and -uri), traefik and caddy
    /// (x-forwarded-method and -uri). The wrong one lets callers say which request theirs is.
    "http-profile"("envoy|nginx|traefik|caddy", Plain) => http_profile: HttpProfile = "envoy", values::word;

    /// The same as --grpc-tls-cert, for --http-listen.
    "http-tls-cert"("PATH|off", Plain) => http_tls_cert: Option<PathBuf> = "off", |text| values::optional(text, values::file);

    /// The same as --grpc-tls-key, for --http-listen.
    "http-tls-key"("PATH|off", Plain) => http_tls_key: Option<PathBuf> = "off", |text| values::optional(text, values::file);

    /// The same as --grpc-tls-client-ca, for --http-listen: the authorities of the proxy's certificate.
    "http-tls-client-ca"("PATH|off", Plain) => http_tls_client_ca: Option<PathBuf> = "off", |text| values::optional(text, values::file);

    /// The same as --grpc-tls-client-sans, for --http-listen.
    "http-tls-client-sans"("LIST|none", Plain) => http_tls_client_sans: Vec<ClientSan> = "none", values::list;

    /// The mode of unix sockets that have a file, in octal: who may connect is who may write there. 0660 is its owner and
    /// group; with 0666 everybody who reaches the folder may try keys.
    "socket-mode"("MODE", Plain) => socket_mode: SocketMode = "0660", values::word;

    /// Where /livez, /readyz, /metrics, /stats and the cache, deny and check commands are served (HTTP): an IP address and
    /// port. Whoever reaches it can flush the caches, deny keys and try keys.
    "admin-listen"("ADDRESS", Plain) => admin_listen: SocketAddr = "127.0.0.1:9193", values::socket_address;

    /// Threads that answer checks: 1 to 1024, or auto for the number of cores.
    "worker-threads"("N|auto", Plain) => worker_threads: usize = "auto", |text| values::threads(text, 0);

    /// How long checks are still answered after SIGTERM, while Envoy is told to go elsewhere: 0s to 1h. Too short,
    /// and a rolling restart fails requests; keep it under the pod's grace period.
    "drain-delay"("DURATION", Plain) => drain_delay: Duration = "5s",
        |text| values::duration(text, Duration::ZERO..=60 * MINUTE);

    /// The database that holds keys and users: sqlite:PATH, or postgres://USER@HOST/DATABASE. Put a password into
    /// KEYWARD_STORE or the file; a flag is seen by every process of the machine.
    "store"("URL", Secret) => store: SecretUrl = "sqlite:keyward.db", |text| {
        values::url(text, &["sqlite:", "postgres://", "postgresql://"], "sqlite:PATH or postgres://…")
    };

    /// The Redis that replicas share: redis://… or rediss://…, or off. It needs --cache-secret-file. Put a password
    /// into KEYWARD_REDIS or the file.
    "redis"("URL|off", Secret) => redis: Option<SecretUrl> = "off", |text| values::optional(text, |text| {
        values::url(text, &["redis://", "rediss://"], "redis://…, rediss://… or off")
    });

    /// A file with 32 or more bytes that seal what goes to Redis, or off; the same on all replicas. Of several
    /// lines the first one seals and all of them open, so that the secret can be changed.
    "cache-secret-file"("PATH|off", Plain) => cache_secret_file: Option<PathBuf> = "off",
        |text| values::optional(text, values::file);

    /// How many characters of a key are its public prefix: 1 to 64. It must be what the rows in the store were
    /// made with, or no key is found; a short one makes many keys share a prefix, and each costs a bcrypt.
    "key-prefix-length"("N", Plain) => key_prefix_length: PrefixLength = "8", values::prefix_length;

    /// The emergency deny list, or off: a file with key-id 42 or prefix kw_abcde on each line and comments behind #.
    /// These keys are refused whatever the store says, whether or not it answers. A change is seen within two
    /// seconds; keyward deny adds to the file where it may be written.
    "deny-file"("PATH|off", Plain) => deny_file: Option<PathBuf> = "off",
        |text| values::optional(text, values::file);

    /// What happens when two sources hold different keys: reject answers 401, first takes the one that comes first
    /// in --credential-sources.
    "credential-conflict"("reject|first", Plain) => credential_conflict: CredentialConflict = "reject", values::word;

    /// Where a key is looked for, a comma list of bearer, x-api-key, api-key, x-goog-api-key, header:NAME and
    /// query:NAME. Each of them is removed from what goes upstream.
    "credential-sources"("LIST", Plain) => credential_sources: Vec<CredentialSource> =
        "bearer,x-api-key,api-key,x-goog-api-key", values::credential_sources;

    /// Longest time that a record is used without being read from the store again: 1ms to 30d. Longer spares the
    /// store; changes arrive through the change feed before that.
    "cache-record-ttl"("DURATION", Plain) => cache_record_ttl: Duration = "300s", ttl;

    /// The same where there is no change feed: 1ms to 30d. It is then the time that a revocation takes.
    "record-ttl-without-feed"("DURATION", Plain) => record_ttl_without_feed: Duration = "5s", ttl;

    /// How long a record is used after the change feed last proved that no change was missed: 100ms to 1h. A quarter of
    /// it lies between heartbeats. It bounds a revocation while the feed is silently dead; shorter costs the database
    /// more heartbeats.
    "lease"("DURATION", Plain) => lease: Duration = "2s",
        |text| values::duration(text, 100 * MILLISECOND..=60 * MINUTE);

    /// How much longer than the lease known keys are still allowed while the store can't be asked: 0s to 30d. It is what
    /// a revocation takes at most on a replica that is cut off; 0s answers 503 as soon as the lease has run out.
    "outage-grace"("DURATION", Plain) => outage_grace: Duration = "30s",
        |text| values::duration(text, Duration::ZERO..=30 * DAY);

    /// Whether a key of Keyward's own is switched off and on every 10 seconds, to measure how long a change takes to take
    /// effect (keyward_revocation_seconds): on or off. It needs the right to write to the tables of keys and users.
    "canary"("on|off", Plain) => canary: bool = "off", values::switch;

    /// Longest time that a proof of a key is used without bcrypt: 1ms to 30d. A proof never becomes wrong; this
    /// bounds how long one stays in memory and Redis.
    "cache-verdict-ttl"("DURATION", Plain) => cache_verdict_ttl: Duration = "3600s", ttl;

    /// How long an unknown prefix is remembered: 1ms to 30d. A new key may be refused for that long; shorter lets
    /// junk keys cost more queries.
    "cache-negative-ttl"("DURATION", Plain) => cache_negative_ttl: Duration = "2s", ttl;

    /// Most entries of each memory cache: 1 to 100000000, about 1 KiB each. Memory stays bounded whatever is sent.
    "cache-max-entries"("N", Plain) => cache_max_entries: usize = "100000",
        |text| values::number(text, 1..=100_000_000);

    /// Threads that compute bcrypt: 1 to 1024, or auto for one less than the cores. Each keeps a core busy while
    /// new keys are proven.
    "verify-threads"("N|auto", Plain) => verify_threads: usize = "auto", |text| values::threads(text, 1);

    /// Wrong keys that one client address may send on one prefix before the next ones are answered 429: 0 to 1000000; they
    /// come back evenly over a minute, and 0 is no limit. Known keys are never refused for it. Clients whose address can't
    /// be told (--client-ip) count as one.
    "attempts-per-minute"("N", Plain) => attempts_per_minute: u32 = "20", |text| values::small(text, 0..=1_000_000);

    /// Look-ups in the store that may find no key, in a second: 1 to 1000000. One client address gets a quarter of them;
    /// beyond that it is answered 503. Look-ups that find a key do not count.
    "lookups-per-second"("N", Plain) => lookups_per_second: u32 = "1000", |text| values::small(text, 1..=1_000_000);

    /// At most one last_used_at write per key in this time, over all replicas: 1s to 30d.
    "last-used-interval"("DURATION", Plain) => last_used_interval: Duration = "300s",
        |text| values::duration(text, SECOND..=30 * DAY);

    /// Own deadline of a check: 1ms to 1m. Keep it under Envoy's timeout (200ms by default), so that the caller
    /// gets a 503 from here and not Envoy's own failure. A bcrypt that began goes on and its verdict is kept.
    "check-timeout"("DURATION", Plain) => check_timeout: Duration = "180ms",
        |text| values::duration(text, MILLISECOND..=MINUTE);

    /// What the names of the headers for the upstream begin with: lower case, not x-envoy-. Headers of the caller
    /// under these names are removed.
    "response-header-prefix"("TEXT", Plain) => response_header_prefix: String = "x-keyward-", values::header_prefix;

    /// Which headers the upstream gets, a comma list of names without the prefix, or none: key-id, key-name,
    /// key-prefix, user-id, username, user-email, role, superuser, scopes, allowed-models, allowed-endpoints,
    /// allowed-chatbots, rate-limit-minute, rate-limit-hour, rate-limit-day, budget-limit-cents,
    /// budget-remaining-cents and model. Personal data (key-name, username, user-email) is sent only when it is listed.
    "response-headers"("LIST", Plain) => response_headers: Vec<IdentityHeader> =
        "key-id,key-prefix,user-id,role,superuser,scopes,allowed-models,allowed-endpoints,allowed-chatbots,rate-limit-minute,rate-limit-hour,rate-limit-day,budget-limit-cents,budget-remaining-cents,model",
        values::list;

    /// Whose address the address lists of keys are held against: peer (who connected to Envoy), xff:N (the N-th from
    /// the right of x-forwarded-for, one for each proxy of yours), header:NAME, or metadata:NAME (gRPC metadata that
    /// Envoy's initial_metadata sets). Name nothing that a caller can set.
    "client-ip"("SOURCE", Plain) => client_ip: ClientIpSource = "peer", values::word;

    /// Whether the key stays in the request that goes upstream: on or off. On hands every caller's secret to the
    /// upstream.
    "forward-credentials"("on|off", Plain) => forward_credentials: bool = "off", values::switch;

    /// What Envoy hears when a check can't be decided: deny answers 503, error leaves it to Envoy's
    /// failure_mode_allow, which may let the request pass.
    "on-unavailable"("deny|error", Plain) => on_unavailable: OnUnavailable = "deny", values::word;

    /// What generated keys begin with: up to 28 visible characters without comma and exclamation mark. Secret
    /// scanners find leaked keys by it.
    "new-key-prefix"("TEXT", Plain) => new_key_prefix: String = "kw_", values::new_key_prefix;

    /// Whose error body a denial has: auto follows the caller's dialect; openai, anthropic, google or problem
    /// (RFC 9457) is sent to everyone.
    "error-format"("auto|openai|anthropic|google|problem", Plain) => error_format: ErrorFormat = "auto", values::word;

    /// Which rules of policy are computed and reported, and deny nothing: a comma list of endpoints, models, ips, scopes
    /// and budget, policy for all five, or none. For trying a rule out; the proof of the key is never shadowed.
    "shadow"("LIST|none", Plain) => shadow: Shadow = "none", values::parsed;

    /// Which paths take a model, a comma list, or none: * stands for a segment, ** at the end for the rest, {model} for
    /// a model that the path names, {model}:* for one with a verb behind it. On the others the body has to name it for
    /// keys with a list of models. A path that is missing here is one where such a list does not hold.
    "model-paths"("LIST|none", Plain) => model_paths: ModelPaths =
        "/v1/chat/completions,/v1/completions,/v1/responses,/v1/embeddings,/v1/images/*,/v1/audio/*,/v1/moderations,/v1/messages,/v1/messages/count_tokens,/openai/deployments/{model}/**,/v1/models/{model}:*,/v1beta/models/{model}:*,/model/{model}/*",
        values::parsed;

    /// Which scopes a path asks for besides those of its Envoy route, a comma list of PATTERN=SCOPE, or none: patterns
    /// as in allowed_endpoints, such as POST /v1/chat/**=chat. It holds for every key whose owner is no superuser.
    "scope-paths"("LIST|none", Plain) => scope_paths: ScopePaths = "none", values::parsed;

    /// Largest check that is read: 1KiB to 1GiB. Keep it above Envoy's max_request_bytes, or large requests get 503.
    "max-check-bytes"("SIZE", Plain) => max_check_bytes: usize = "8MiB",
        |text| values::size(text, 1 << 10..=1 << 30);

    /// Where spans of checks go: http://HOST:PORT of an OpenTelemetry collector, or off. Envoy's trace context is taken
    /// up from its gRPC metadata, or from the request's headers.
    "otlp-endpoint"("URL|off", Plain) => otlp_endpoint: OtlpEndpoint = "off", values::parsed;

    /// How they go there: grpc (port 4317 by custom) or http (4318).
    "otlp-protocol"("grpc|http", Plain) => otlp_protocol: OtlpProtocol = "grpc", values::parsed;

    /// Which share of the traces that begin here is exported, from 0 to 1. Where the trace began elsewhere, it was decided
    /// there.
    "otlp-sample"("SHARE", Plain) => otlp_sample: SampleShare = "1", values::parsed;

    /// How log lines look on standard error: text, or json with one object a line.
    "log-format"("text|json", Plain) => log_format: LogFormat = "text", values::log_format;

    /// What is logged: off, error, warn, info, debug or trace, or a list such as info,keyward::cache=debug.
    "log-level"("LEVEL", Plain) => log_level: String = "info", values::log_level;

    /// Where one JSON line a decision goes: off, stdout, or a file that is appended to (mode 0600 where it is made, opened
    /// anew on SIGHUP). Lines that nobody takes are dropped and counted; no check waits for them.
    "decision-log"("stdout|FILE|off", Plain) => decision_log: Option<Target> = "off",
        |text| values::optional(text, values::parsed);

    /// Which decisions the decision log has: all, denials, or a share of the allowed requests such as 1% or 0.1%.
    /// Denials, denials in shadow mode and what could not be decided are always there.
    "decision-log-sample"("all|denials|N%", Plain) => decision_log_sample: Sample = "all", values::parsed;
}

fn ttl(text: &str) -> Reading<Duration> {
    values::duration(text, MILLISECOND..=30 * DAY)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_are_the_fields_and_nest_without_collision() {
        for (setting, field) in TABLE.iter().zip(FIELDS) {
            assert_eq!(setting.flag.replace('-', "_"), *field);
            let (group, key) = setting.file_key();
            let single = TABLE.iter().any(|other| other.flag == group);
            assert_eq!(single, key.is_none(), "{group} is a group and a setting");
        }
        assert_eq!(TABLE.len(), FIELDS.len());
    }

    #[test]
    fn the_standard_model_paths_are_the_default() {
        let setting = TABLE.iter().find(|setting| setting.flag == "model-paths").unwrap();
        assert_eq!(setting.default, crate::domain::model_path::STANDARD_MODEL_PATHS);
    }

    #[test]
    fn names_in_every_layer() {
        let find = |flag| *TABLE.iter().find(|setting| setting.flag == flag).unwrap();
        let nested = find("record-ttl-without-feed");
        assert_eq!(nested.variable(), "KEYWARD_RECORD_TTL_WITHOUT_FEED");
        assert_eq!(nested.file_path(), "record.ttl_without_feed");
        assert_eq!(find("redis").file_path(), "redis");
    }
}
