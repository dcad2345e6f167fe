//! The faults, by the numbers of the list in docs/attacks.md.

use crate::truth::history::State;

/// A fault that is run here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    RedisKilled,
    RedisRestarted,
    RedisFrozen,
    RedisSlow,
    RedisCutsReplies,
    RedisGarbage,
    RedisLongLength,
    RedisSlowAccept,
    RedisNoClients,
    RedisFull,
    RedisEvicts,
    RedisFlushed,
    RedisWrongTypes,
    RedisCannotSave,
    RedisReadOnly,
    RedisPassword,
    RedisForged,
    PostgresKilled,
    PostgresRestarted,
    PostgresFrozen,
    ListenerFrozen,
    ListenerKilled,
    PostgresSilent,
    PostgresSlow,
    TableLocked,
    SlotsExhausted,
    PostgresReadOnly,
    MassUpdate,
    SidecarKilled,
    SidecarStopped,
    BadReload,
    DescriptorsExhausted,
    BusyCores,
    EnvoyReplaced,
    ChecksCancelled,
    BothGone,
    OneCutOff,
}

/// What is said about a fault before it is run.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Case {
    pub(crate) number: &'static str,
    pub(crate) what: &'static str,
    /// How much a replica may know while it lasts.
    pub(crate) state: State,
    /// Whether 503, or no answer, may be heard for keys that are known and valid.
    pub(crate) may_be_unavailable: bool,
    /// Whether the database takes changes meanwhile.
    pub(crate) takes_changes: bool,
}

impl Fault {
    pub(crate) const ALL: [Self; 37] = [
        Self::RedisKilled,
        Self::RedisRestarted,
        Self::RedisFrozen,
        Self::RedisSlow,
        Self::RedisCutsReplies,
        Self::RedisGarbage,
        Self::RedisLongLength,
        Self::RedisSlowAccept,
        Self::RedisNoClients,
        Self::RedisFull,
        Self::RedisEvicts,
        Self::RedisFlushed,
        Self::RedisWrongTypes,
        Self::RedisCannotSave,
        Self::RedisReadOnly,
        Self::RedisPassword,
        Self::RedisForged,
        Self::PostgresKilled,
        Self::PostgresRestarted,
        Self::PostgresFrozen,
        Self::ListenerFrozen,
        Self::ListenerKilled,
        Self::PostgresSilent,
        Self::PostgresSlow,
        Self::TableLocked,
        Self::SlotsExhausted,
        Self::PostgresReadOnly,
        Self::MassUpdate,
        Self::SidecarKilled,
        Self::SidecarStopped,
        Self::BadReload,
        Self::DescriptorsExhausted,
        Self::BusyCores,
        Self::EnvoyReplaced,
        Self::ChecksCancelled,
        Self::BothGone,
        Self::OneCutOff,
    ];

    /// Those of `make test`: one of each kind of harm.
    pub(crate) const SHORT: [Self; 5] = [
        Self::RedisFrozen,
        Self::RedisGarbage,
        Self::ListenerKilled,
        Self::PostgresKilled,
        Self::SidecarKilled,
    ];

    pub(crate) fn case(self) -> Case {
        let healthy = |number, what| Case {
            number,
            what,
            state: State::Healthy,
            may_be_unavailable: false,
            takes_changes: true,
        };
        let lame = |number, what| Case { may_be_unavailable: true, ..healthy(number, what) };
        let silent = |number, what| Case { state: State::FeedSilent, ..healthy(number, what) };
        let cut_off = |number, what| Case { state: State::CutOff, ..lame(number, what) };
        let gone = |number, what| Case { takes_changes: false, ..cut_off(number, what) };
        match self {
            Self::RedisKilled => healthy("X1", "Redis killed, stays down"),
            Self::RedisRestarted => healthy("X2", "Redis comes back empty at once"),
            Self::RedisFrozen => healthy("X3", "Redis hangs (SIGSTOP)"),
            Self::RedisSlow => healthy("X4", "Redis answers 500 ms late"),
            Self::RedisCutsReplies => healthy("X5", "connections to Redis end in the middle of a reply"),
            Self::RedisGarbage => healthy("X6", "Redis answers garbage"),
            Self::RedisLongLength => healthy("X6", "Redis announces a reply of a terabyte"),
            Self::RedisSlowAccept => healthy("X7", "Redis takes connections and says nothing"),
            Self::RedisNoClients => healthy("X8", "Redis takes no more clients"),
            Self::RedisFull => healthy("X9", "Redis is full and evicts nothing"),
            Self::RedisEvicts => healthy("X10", "Redis is full and evicts"),
            Self::RedisFlushed => healthy("X11", "Redis is flushed each half second"),
            Self::RedisWrongTypes => healthy("X12", "lists and 10 MB strings under our names in Redis"),
            Self::RedisCannotSave => healthy("X14", "Redis can't write its file and takes no writes"),
            Self::RedisReadOnly => healthy("X15", "Redis has become a replica and takes no writes"),
            Self::RedisPassword => healthy("X18", "Redis wants a password that it did not want"),
            Self::RedisForged => healthy("X20", "entries in Redis swapped, cut and changed"),
            Self::PostgresKilled => gone("X21", "Postgres killed, stays down"),
            Self::PostgresRestarted => gone("X22", "Postgres killed and started at once"),
            Self::PostgresFrozen => gone("X23", "Postgres hangs (SIGSTOP of all of it)"),
            Self::ListenerFrozen => silent("X24", "the sessions of the change feed hang"),
            Self::ListenerKilled => silent("X25", "the sessions of the change feed are ended twice a second"),
            Self::PostgresSilent => cut_off("X26", "packets to Postgres vanish"),
            Self::PostgresSlow => {
                Case { may_be_unavailable: true, ..silent("X27", "Postgres answers 500 ms late") }
            }
            Self::TableLocked => {
                Case { takes_changes: false, ..lame("X28", "the table of keys is locked (ACCESS EXCLUSIVE)") }
            }
            Self::SlotsExhausted => healthy("X29", "Postgres has no connection left"),
            Self::PostgresReadOnly => {
                silent("X30", "Postgres has become read-only, and the sessions begin anew")
            }
            Self::MassUpdate => healthy("X37", "all keys updated in one statement, again and again"),
            Self::SidecarKilled => lame("X42", "a sidecar is killed and another one started in its place"),
            Self::SidecarStopped => lame("X44", "a sidecar sleeps (SIGSTOP) through a revocation"),
            Self::BadReload => healthy("X46", "SIGHUP, several times"),
            Self::DescriptorsExhausted => lame("X47", "a sidecar has no file descriptor left"),
            Self::BusyCores => lame("X49", "every core is busy with something else"),
            Self::EnvoyReplaced => healthy("X51", "Envoy is replaced"),
            Self::ChecksCancelled => healthy("X52", "half of the checks are cancelled after 1 ms"),
            Self::BothGone => gone("X53", "Redis and Postgres are both down"),
            Self::OneCutOff => cut_off("X56", "one of three sidecars loses Postgres"),
        }
    }

    /// A counter of the sidecars that must rise: a fault that nobody meets proves nothing. `None` where it shows elsewhere
    /// in the row, or where what it does is done to a machine.
    pub(crate) fn trace(self) -> Option<(&'static str, &'static [(&'static str, &'static str)])> {
        let look_ups = "keyward_cache_requests_total";
        match self {
            Self::RedisKilled
            | Self::RedisRestarted
            | Self::RedisFrozen
            | Self::RedisSlow
            | Self::RedisCutsReplies
            | Self::RedisGarbage
            | Self::RedisLongLength
            | Self::RedisSlowAccept
            | Self::RedisNoClients
            | Self::RedisFull
            | Self::RedisWrongTypes
            | Self::RedisCannotSave
            | Self::RedisReadOnly
            | Self::RedisPassword
            | Self::BothGone => Some(("keyward_redis_failures_total", &[])),
            Self::RedisForged => Some((look_ups, &[("tier", "redis"), ("result", "rejected")])),
            Self::ListenerFrozen | Self::ListenerKilled | Self::PostgresReadOnly => {
                Some(("keyward_change_feed_lost_total", &[]))
            }
            Self::PostgresKilled
            | Self::PostgresRestarted
            | Self::PostgresFrozen
            | Self::PostgresSilent
            | Self::PostgresSlow
            | Self::TableLocked
            | Self::OneCutOff => Some((look_ups, &[("tier", "store"), ("result", "error")])),
            Self::MassUpdate => Some(("keyward_changes_total", &[])),
            Self::BadReload => Some(("keyward_reloads_total", &[])),
            _ => None,
        }
    }
}
