//! What a check looked at on its way to a decision, for the operator who asks why.
//!
//! There is one path ([`super::Authorizer`]); a [`Witness`] goes along. A check that only answers takes [`Nobody`] along,
//! which costs nothing; one that is to be explained takes a [`Recorder`].

use std::sync::Arc;

use super::candidates::{Candidates, Found, RecordAge};
use super::proof::{Evidence, ProofError};
use crate::cache::records::Records;
use crate::domain::decision::{Denied, Tier};
use crate::domain::deny_list::DenyList;
use crate::domain::explain::{self, Explained};
use crate::domain::policy::{self, Permit};
use crate::domain::proof::Proven;
use crate::domain::record::{Candidate, KeyId};
use crate::domain::request::Request;
use crate::domain::rules::PolicyRules;
use crate::domain::time::Timestamp;

/// Where a look-up ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum LookedUp {
    /// Memory knew.
    InMemory,
    /// Something had to be asked.
    WithBackends,
}

/// Goes along with a check.
pub(super) trait Witness: Send {
    /// What the look-up found.
    fn found(&mut self, _found: &Found, _where_from: LookedUp) {}

    /// The key has the form of those that are made here and not their checksum, so nothing was asked.
    fn mistyped(&mut self) {}

    /// Whether the key matched.
    fn proof(&mut self, _proof: &Result<Proven, ProofError>, _evidence: Evidence) {}

    /// Has policy decide.
    fn judge(
        &mut self,
        proven: Proven,
        deny_list: &DenyList,
        rules: &PolicyRules,
        request: &Request<'_>,
        now: Timestamp,
    ) -> Result<Permit, Denied> {
        policy::evaluate(proven, deny_list, rules, request, now)
    }
}

/// Sees nothing.
pub(super) struct Nobody;

impl Witness for Nobody {}

/// The steps of one check; those that it did not reach are not there.
#[derive(Debug, Default)]
pub struct Explanation {
    /// Its checksum is wrong: a key that can't exist.
    pub is_mistyped: bool,
    /// The look-up.
    pub lookup: Option<Lookup>,
    /// The comparison with the candidates' hashes.
    pub proof: Option<Proof>,
    /// The steps of policy.
    pub policy: Vec<Explained>,
}

/// What the look-up found.
#[derive(Debug)]
pub struct Lookup {
    /// Where the answer came from. "None" is remembered in memory, and never in Redis.
    pub tier: Tier,
    /// Empty where there is no key with this prefix.
    pub candidates: Vec<CandidateSeen>,
    /// `None` where there is no record.
    pub age: Option<RecordAge>,
    /// Should have been read again, and the store can't be asked: it may allow and not refuse.
    pub is_suspect: bool,
}

/// A key that has the prefix; whether it is the presented one is not known yet.
#[derive(Debug)]
pub struct CandidateSeen {
    /// `id`
    pub id: KeyId,
    /// Why its hash can't match anything.
    pub hash_defect: Option<String>,
}

/// How the comparison ended.
#[derive(Debug)]
pub struct Proof {
    /// Where the answer came from; `None` where there was nothing to compare with.
    pub by: Option<ProofSource>,
    /// The key that was proven.
    pub result: Result<ProvenKey, ProofError>,
}

/// Where a proof came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProofSource {
    /// A verdict that was remembered in memory.
    Memory,
    /// A verdict that Redis had kept.
    Redis,
    /// bcrypt, computed for this check or for another one at the same time.
    Bcrypt,
    /// SHA-256, which is computed each time.
    Sha256,
}

impl ProofSource {
    /// The word in output.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Redis => "redis",
            Self::Bcrypt => "bcrypt",
            Self::Sha256 => "sha256",
        }
    }
}

/// Whose key it is.
#[derive(Debug)]
pub struct ProvenKey(Arc<Candidate>);

impl ProvenKey {
    /// The record.
    pub fn candidate(&self) -> &Candidate {
        &self.0
    }
}

/// Writes everything down.
pub(super) struct Recorder {
    candidates: Arc<Candidates>,
    records: Option<Arc<Records>>,
    explanation: Explanation,
}

impl Recorder {
    /// Knows nothing yet.
    pub(super) fn new(candidates: Arc<Candidates>) -> Self {
        Self { candidates, records: None, explanation: Explanation::default() }
    }

    /// What was written down.
    pub(super) fn finish(self) -> Explanation {
        self.explanation
    }
}

impl Witness for Recorder {
    fn found(&mut self, found: &Found, where_from: LookedUp) {
        let (records, tier, is_suspect) = match found {
            Found::Records(records, tier) => (Some(records), *tier, false),
            Found::Suspect(records, tier) => (Some(records), *tier, true),
            Found::Absent => {
                (None, if where_from == LookedUp::InMemory { Tier::Memory } else { Tier::Store }, false)
            }
        };
        let seen = |candidate: &Arc<Candidate>| CandidateSeen {
            id: candidate.key.id,
            hash_defect: candidate.key.hash.as_ref().err().map(ToString::to_string),
        };
        self.explanation.lookup = Some(Lookup {
            tier,
            candidates: records
                .map(|records| records.candidates.iter().map(seen).collect())
                .unwrap_or_default(),
            age: records.map(|records| self.candidates.age(records)),
            is_suspect,
        });
        self.records = records.cloned();
    }

    fn mistyped(&mut self) {
        // What memory was asked before that is beside the point.
        self.explanation = Explanation { is_mistyped: true, ..Explanation::default() };
    }

    fn proof(&mut self, proof: &Result<Proven, ProofError>, evidence: Evidence) {
        let tried = self.records.as_ref().map(|records| records.candidates.as_slice()).unwrap_or_default();
        let is_bcrypt = |candidate: &Arc<Candidate>| {
            candidate.key.hash.as_ref().is_ok_and(|hash| hash.bcrypt_cost().is_some())
        };
        // A proven key has one hash; of several that do not match, those that cost something are what was done.
        let needed_bcrypt = match proof {
            Ok(proven) => is_bcrypt(proven.candidate()),
            Err(_) => tried.iter().any(is_bcrypt),
        };
        let by = match evidence {
            _ if tried.iter().all(|candidate| candidate.key.hash.is_err()) => None,
            _ if !needed_bcrypt => Some(ProofSource::Sha256),
            Evidence::Memory => Some(ProofSource::Memory),
            Evidence::Redis => Some(ProofSource::Redis),
            Evidence::Computed => Some(ProofSource::Bcrypt),
        };
        let result = match proof {
            Ok(proven) => Ok(ProvenKey(Arc::clone(proven.candidate()))),
            Err(error) => Err(*error),
        };
        self.explanation.proof = Some(Proof { by, result });
    }

    fn judge(
        &mut self,
        proven: Proven,
        deny_list: &DenyList,
        rules: &PolicyRules,
        request: &Request<'_>,
        now: Timestamp,
    ) -> Result<Permit, Denied> {
        let (decision, steps) = explain::explain(proven, deny_list, rules, request, now);
        self.explanation.policy = steps;
        decision
    }
}
