//! The one path that a request takes: candidates, proof, policy, decision.
//!
//! [`Authorizer::check`] is the story. A key whose record and verdict are in memory is decided without waiting for
//! anything; whatever needs Redis, the store or bcrypt runs under the check's deadline and ends as `unavailable` when
//! it can't answer, never as a refusal.

pub mod admin;
pub mod attempts;
pub mod background;
pub mod bcrypt_pool;
pub mod canary;
pub mod candidates;
pub mod deny;
mod deny_file;
pub mod explain;
pub mod feed;
pub mod flight;
pub mod freshness;
pub mod lookups;
pub mod outage;
pub mod proof;
pub mod uses;

use std::sync::Arc;
use std::time::Duration;

use tokio::time::timeout;
use tracing::Instrument;

use self::attempts::{Attempt, Attempts};
use self::candidates::{Candidates, Found};
use self::deny::DenyControl;
use self::explain::{Explanation, LookedUp, Nobody, Recorder, Witness};
use self::proof::{Evidence, ProofError, Prover};
use self::uses::UseRecorder;
use crate::clock;
use crate::domain::decision::{Cause, Decision, Denied, Tier};
use crate::domain::denial::Denial;
use crate::domain::deny_list::DenyList;
use crate::domain::key::{PrefixLength, PresentedKey};
use crate::domain::key_format::KeyForm;
use crate::domain::request::Request;
use crate::domain::rules::PolicyRules;
use crate::domain::time::Now;
use crate::telemetry::traces;

/// Decides checks. One for the process, shared by all doors.
pub struct Authorizer {
    /// Where records come from.
    candidates: Arc<Candidates>,
    /// Where verdicts come from.
    prover: Arc<Prover>,
    /// Keys that are refused whatever their record says.
    deny: Arc<DenyControl>,
    /// Who has sent how many wrong secrets.
    attempts: Arc<Attempts>,
    /// What the operator chose about policy.
    rules: PolicyRules,
    /// Told of each allowed use, for `last_used_at`.
    uses: UseRecorder,
    form: KeyForm,
}

/// A decision, and where the record behind it came from (`None` where no record was looked up).
#[derive(Debug)]
pub struct Checked {
    /// The answer.
    pub decision: Decision,
    /// For metrics and metadata.
    pub tier: Option<Tier>,
}

impl Authorizer {
    /// Puts the parts together.
    pub fn new(
        candidates: Arc<Candidates>,
        prover: Arc<Prover>,
        deny: Arc<DenyControl>,
        attempts: Arc<Attempts>,
        rules: PolicyRules,
        uses: UseRecorder,
        form: KeyForm,
    ) -> Self {
        Self { candidates, prover, deny, attempts, rules, uses, form }
    }

    /// Decides whether the presented key may make the request, where nothing has to be asked: no waiting, and nothing is
    /// allocated. `None` where it takes [`Self::check_by_asking`].
    pub fn check_at_once(&self, key: &PresentedKey, request: &Request<'_>, now: Now) -> Option<Checked> {
        let checked = self.decide_at_once(key, request, now, Some(&self.attempts), &mut Nobody)?;
        self.note_use(&checked, now);
        Some(checked)
    }

    /// Decides, within `deadline` where something has to be asked.
    pub async fn check(&self, key: &PresentedKey, request: &Request<'_>, deadline: Duration) -> Checked {
        match self.check_at_once(key, request, clock::now()) {
            Some(checked) => checked,
            None => self.check_by_asking(key, request, deadline).await,
        }
    }

    /// Decides what could not be decided at once, within `deadline`.
    ///
    /// Dropping the future drops the answer alone: look-ups and verifications that began are finished and kept.
    pub async fn check_by_asking(
        &self,
        key: &PresentedKey,
        request: &Request<'_>,
        deadline: Duration,
    ) -> Checked {
        let attempts = Some(&self.attempts);
        let checked = self.decide_by_asking(key, request, deadline, attempts, &mut Nobody).await;
        self.note_use(&checked, clock::now());
        checked
    }

    /// The same with every step on the way, and without counting as a use of the key or as an attempt: whoever may ask
    /// may flush the caches as well.
    pub async fn explain(
        &self,
        key: &PresentedKey,
        request: &Request<'_>,
        deadline: Duration,
    ) -> (Checked, Explanation) {
        let mut recorder = Recorder::new(Arc::clone(&self.candidates));
        let checked = match self.decide_at_once(key, request, clock::now(), None, &mut recorder) {
            Some(checked) => checked,
            None => self.decide_by_asking(key, request, deadline, None, &mut recorder).await,
        };
        (checked, recorder.finish())
    }

    /// How many characters of a key are looked up.
    pub fn prefix_length(&self) -> PrefixLength {
        self.form.prefix_length
    }

    fn note_use(&self, checked: &Checked, now: Now) {
        if let Decision::Allow(permit) = &checked.decision {
            self.uses.note(permit.key().id, now);
        }
    }

    /// The whole path where memory knows everything; `None` where it does not.
    fn decide_at_once(
        &self,
        key: &PresentedKey,
        request: &Request<'_>,
        now: Now,
        attempts: Option<&Arc<Attempts>>,
        witness: &mut impl Witness,
    ) -> Option<Checked> {
        let Ok(prefix) = key.prefix(self.form.prefix_length) else {
            return Some(refused(Denial::MalformedCredentials));
        };
        let checked = match self.check_in_memory(key, prefix, request, now, witness) {
            Some(checked) => checked,
            // Nobody is asked for a key that can't exist. The answer is that to any wrong key.
            None if self.form.is_mistyped(key) => {
                witness.mistyped();
                refused(Denial::InvalidApiKey)
            }
            None => return None,
        };
        if is_wrong(&checked) {
            return Some(counted(checked, &mut Attempt::new(attempts, prefix, request.client)));
        }
        Some(checked)
    }

    async fn decide_by_asking(
        &self,
        key: &PresentedKey,
        request: &Request<'_>,
        deadline: Duration,
        attempts: Option<&Arc<Attempts>>,
        witness: &mut impl Witness,
    ) -> Checked {
        let Ok(prefix) = key.prefix(self.form.prefix_length) else {
            return refused(Denial::MalformedCredentials);
        };
        let mut attempt = Attempt::new(attempts, prefix, request.client);
        let checked =
            timeout(deadline, self.check_with_backends(key, prefix, request, &mut attempt, witness))
                .await
                .unwrap_or(Checked { decision: Decision::Unavailable(Cause::Deadline), tier: None });
        counted(checked, &mut attempt)
    }

    fn check_in_memory(
        &self,
        key: &PresentedKey,
        prefix: &str,
        request: &Request<'_>,
        now: Now,
        witness: &mut impl Witness,
    ) -> Option<Checked> {
        if request.route.is_strict {
            return None;
        }
        let found = self.candidates.recall(prefix, now)?;
        let proof = match &found {
            Found::Records(records, _) | Found::Suspect(records, _) => {
                self.prover.recall(key, records, now)?
            }
            Found::Absent => Err(ProofError::NoMatch),
        };
        witness.found(&found, LookedUp::InMemory);
        witness.proof(&proof, Evidence::Memory);
        Some(decide(&found, proof, &self.deny.in_force(), &self.rules, request, now, witness))
    }

    /// The same path where something has to be asked.
    async fn check_with_backends(
        &self,
        key: &PresentedKey,
        prefix: &str,
        request: &Request<'_>,
        attempt: &mut Attempt<'_>,
        witness: &mut impl Witness,
    ) -> Checked {
        let looked_up = if request.route.is_strict {
            self.candidates.read_strictly(prefix, attempt.source()).instrument(traces::lookup()).await
        } else {
            self.candidates.find(prefix, key, attempt.source()).instrument(traces::lookup()).await
        };
        let (found, redis_verdict) = match looked_up {
            Ok(answer) => answer,
            Err(cause) => return Checked { decision: Decision::Unavailable(cause), tier: None },
        };
        witness.found(&found, LookedUp::WithBackends);
        let (proof, evidence) = match &found {
            Found::Records(records, _) | Found::Suspect(records, _) => {
                self.prover.prove(key, records, redis_verdict, attempt).await
            }
            Found::Absent => (Err(ProofError::NoMatch), Evidence::Memory),
        };
        witness.proof(&proof, evidence);
        // Read again: a verification may have taken a while, and expiry is judged at the moment of the answer. So is the
        // deny list.
        decide(&found, proof, &self.deny.in_force(), &self.rules, request, clock::now(), witness)
    }
}

fn refused(reason: Denial) -> Checked {
    Checked { decision: Decision::Deny(Denied::unproven(reason)), tier: None }
}

/// Whether no key was proven. Policy never says this of a proven one.
fn is_wrong(checked: &Checked) -> bool {
    matches!(&checked.decision, Decision::Deny(denied) if denied.reason == Denial::InvalidApiKey)
}

/// Every wrong key counts, whatever it cost: else the count would tell which prefixes exist.
fn counted(checked: Checked, attempt: &mut Attempt<'_>) -> Checked {
    if is_wrong(&checked)
        && let Err(wait) = attempt.count_wrong()
    {
        return Checked { decision: Decision::Deny(Denied::too_many_attempts(wait)), ..checked };
    }
    checked
}

fn decide(
    found: &Found,
    proof: Result<crate::domain::proof::Proven, ProofError>,
    deny_list: &DenyList,
    rules: &PolicyRules,
    request: &Request<'_>,
    now: Now,
    witness: &mut impl Witness,
) -> Checked {
    let decision = match proof {
        Ok(proven) => match witness.judge(proven, deny_list, rules, request, now.wall) {
            Ok(permit) => Decision::Allow(permit),
            Err(denied) => Decision::Deny(denied),
        },
        Err(ProofError::NoMatch) => Decision::Deny(Denied::unproven(Denial::InvalidApiKey)),
        Err(ProofError::TooManyAttempts(wait)) => Decision::Deny(Denied::too_many_attempts(wait)),
        Err(ProofError::Undecided(cause)) => Decision::Unavailable(cause),
    };
    match found {
        // The store might say by now that this is wrong, and nobody is accused because it can't be asked.
        Found::Suspect(_, tier) if matches!(decision, Decision::Deny(_)) => {
            Checked { decision: Decision::Unavailable(Cause::Store), tier: Some(*tier) }
        }
        Found::Records(_, tier) | Found::Suspect(_, tier) => Checked { decision, tier: Some(*tier) },
        Found::Absent => Checked { decision, tier: None },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::body::Body;
    use crate::domain::request::RouteOptions;

    /// What can't be decided is never a refusal, and what is refused is never "try again".
    #[test]
    fn an_open_question_is_unavailable_and_a_mismatch_is_a_denial() {
        let request = Request {
            method: "GET",
            path: "/",
            client: None,
            route: RouteOptions::default(),
            body: Body::default(),
        };
        let of = |proof| {
            decide(
                &Found::Absent,
                proof,
                &DenyList::default(),
                &PolicyRules::default(),
                &request,
                clock::now(),
                &mut Nobody,
            )
            .decision
        };
        for cause in [Cause::Overload, Cause::Verification, Cause::Store] {
            let decision = of(Err(ProofError::Undecided(cause)));
            assert!(matches!(decision, Decision::Unavailable(own) if own == cause), "{decision:?}");
        }
        let decision = of(Err(ProofError::NoMatch));
        assert!(matches!(&decision, Decision::Deny(denied) if denied.reason == Denial::InvalidApiKey));
    }
}
