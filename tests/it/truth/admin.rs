//! The administrator: takes rights away in raw SQL, in every form that there is, and gives them back.
//!
//! It talks to Postgres directly and tells no sidecar anything: whoever writes to the tables knows nothing of Keyward.

use std::sync::Arc;
use std::time::Duration;

use sha2::{Digest as _, Sha256};
use tokio_postgres::Client;

use super::fleet::{Clock, SLOTS, Slots};
use super::history::{Effect, Micros, Operation};

/// Rows that are changed together with a key in the mass update.
const FILLER: usize = 1500;
/// How long a transaction stays open after its update.
const HOLD: Duration = Duration::from_millis(300);

/// A way to take a right away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    Deactivate,
    NullActive,
    Expire,
    Delete,
    ReplaceHash,
    ChangePrefix,
    DeactivateUser,
    LockUser,
    DeleteUser,
    Orphan,
    Mass,
    NarrowEndpoints,
    LateCommit,
    ReplicaRole,
    BackAndForth,
    Function,
    Cte,
    Prepared,
}

impl Form {
    /// All but TRUNCATE, which leaves nothing to give back.
    pub(crate) const ALL: [Self; 18] = [
        Self::Deactivate,
        Self::NullActive,
        Self::Expire,
        Self::Delete,
        Self::ReplaceHash,
        Self::ChangePrefix,
        Self::DeactivateUser,
        Self::LockUser,
        Self::DeleteUser,
        Self::Orphan,
        Self::Mass,
        Self::NarrowEndpoints,
        Self::LateCommit,
        Self::ReplicaRole,
        Self::BackAndForth,
        Self::Function,
        Self::Cte,
        Self::Prepared,
    ];

    /// Whether nothing is left to be restored, so that a new key takes its place.
    fn destroys(self) -> bool {
        matches!(self, Self::Delete | Self::DeleteUser)
    }
}

/// A key and its owner. Each slot has an owner of its own.
#[derive(Debug, Clone)]
struct Row {
    key: usize,
    owner: usize,
    secret: String,
}

impl Row {
    /// The owners of slots begin where no other user is.
    fn new(slot: usize, key: usize) -> Self {
        // The prefix is the first eight characters, and no two keys share one.
        Self { key, owner: 1000 + slot, secret: format!("t{key:07}_a-secret-part") }
    }

    fn id(&self) -> usize {
        100_000 + self.key
    }

    fn hash(&self) -> String {
        let digest = Sha256::digest(self.secret.as_bytes());
        let digits: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        format!("sha256:{digits}")
    }

    fn prefix(&self) -> &str {
        &self.secret[..8]
    }

    fn insert_user(&self) -> String {
        let id = self.owner;
        format!("INSERT INTO users (id, username, hashed_password) VALUES ({id}, 'owner-{id}', '-');")
    }

    fn insert_key(&self) -> String {
        format!(
            "INSERT INTO api_keys (id, name, key_hash, key_prefix, user_id) VALUES ({}, 'probed', '{}', '{}', {});",
            self.id(),
            self.hash(),
            self.prefix(),
            self.owner
        )
    }

    /// The statement that takes the right away, less what the form does around it.
    fn revoke(&self, form: Form) -> String {
        let (id, owner) = (self.id(), self.owner);
        let set = |what: &str| format!("UPDATE api_keys SET {what} WHERE id = {id};");
        let set_user = |what: &str| format!("UPDATE users SET {what} WHERE id = {owner};");
        let off = "UPDATE api_keys SET is_active = false";
        match form {
            Form::Deactivate | Form::LateCommit | Form::BackAndForth => set("is_active = false"),
            Form::NullActive => set("is_active = NULL"),
            Form::Expire => set("expires_at = timezone('utc', now()) - interval '1 minute'"),
            Form::Delete => format!("DELETE FROM api_keys WHERE id = {id};"),
            Form::ReplaceHash => set("key_hash = 'sha256:' || repeat('0', 56) || lpad(id::text, 8, '0')"),
            Form::ChangePrefix => set("key_prefix = 'x' || substr(key_prefix, 2)"),
            Form::DeactivateUser => set_user("is_active = false"),
            Form::LockUser => set_user("account_locked = true"),
            Form::DeleteUser => format!(
                "BEGIN; DELETE FROM api_keys WHERE user_id = {owner}; DELETE FROM users WHERE id = {owner}; COMMIT;"
            ),
            Form::Orphan => set("user_id = NULL"),
            Form::Mass => format!("{off} WHERE name = 'filler' OR id = {id};"),
            Form::NarrowEndpoints => set(r#"allowed_endpoints = '["/v1/nothing-that-is-probed"]'"#),
            Form::ReplicaRole => {
                format!(
                    "SET session_replication_role = replica; {off} WHERE id = {id}; RESET session_replication_role;"
                )
            }
            Form::Function => format!("SELECT truth_revoke({id});"),
            Form::Cte => format!("WITH gone AS ({off} WHERE id = {id} RETURNING id) SELECT id FROM gone;"),
            Form::Prepared => format!(
                "PREPARE truth_off (int) AS {off} WHERE id = $1; EXECUTE truth_off({id}); DEALLOCATE truth_off;"
            ),
        }
    }

    /// Whatever was changed is as it was.
    fn restore(&self, form: Form) -> String {
        let filler = if form == Form::Mass {
            "UPDATE api_keys SET is_active = true WHERE name = 'filler';"
        } else {
            ""
        };
        format!(
            "{filler} UPDATE users SET is_active = true, account_locked = false WHERE id = {owner}; \
             UPDATE api_keys SET is_active = true, expires_at = NULL, key_hash = '{hash}', key_prefix = '{prefix}', \
             user_id = {owner}, allowed_endpoints = NULL WHERE id = {id};",
            owner = self.owner,
            hash = self.hash(),
            prefix = self.prefix(),
            id = self.id(),
        )
    }
}

/// How a right is given back.
pub(crate) enum Return {
    Restored,
    /// By a new key, which has to be unknown everywhere before it is created with [`Admin::create`].
    Replaced,
}

/// The writer, and what it has written.
pub(crate) struct Admin {
    session: Client,
    clock: Clock,
    slots: Arc<Slots>,
    rows: Vec<Row>,
    keys: usize,
    pub(crate) operations: Vec<Operation>,
}

impl Admin {
    /// Makes a key for each slot.
    pub(crate) async fn start(session: Client, clock: Clock, slots: Arc<Slots>) -> Self {
        let filler = format!(
            "INSERT INTO users (id, username, hashed_password) VALUES (1, 'filler', '-');
             INSERT INTO api_keys (name, key_hash, key_prefix, user_id)
             SELECT 'filler', 'sha256:' || md5(n::text) || md5('f' || n), 'f' || lpad(n::text, 7, '0'), 1
             FROM generate_series(1, {FILLER}) n;
             CREATE FUNCTION truth_revoke(integer) RETURNS void LANGUAGE plpgsql AS
             $$ BEGIN UPDATE api_keys SET is_active = false WHERE id = $1; END $$;"
        );
        session.batch_execute(&filler).await.unwrap();
        let mut admin = Self { session, clock, slots, rows: Vec::new(), keys: 0, operations: Vec::new() };
        for slot in 0..SLOTS {
            let row = admin.new_row(slot);
            admin.rows.push(row.clone());
            admin
                .commit(&format!("{}{}", row.insert_user(), row.insert_key()), row.key, Effect::Create)
                .await;
        }
        admin
    }

    /// Goes on in another session, where the one that it had is gone.
    pub(crate) fn go_on_in(&mut self, session: Client) {
        self.session = session;
    }

    /// Aims the slot at a key that does not exist yet.
    fn new_row(&mut self, slot: usize) -> Row {
        let row = Row::new(slot, self.keys);
        self.keys += 1;
        self.slots.aim(slot, row.key, &row.secret);
        row
    }

    /// Takes the right of a slot's key away; when the reply to the last commit had arrived.
    pub(crate) async fn revoke(&mut self, slot: usize, form: Form) -> Micros {
        let row = self.rows[slot].clone();
        let sql = row.revoke(form);
        match form {
            Form::LateCommit => {
                self.session.batch_execute(&format!("BEGIN; {sql}")).await.unwrap();
                // The time that the transaction is open is what this form is about.
                tokio::time::sleep(HOLD).await;
                self.commit("COMMIT", row.key, Effect::Revoke).await
            }
            Form::BackAndForth => {
                self.commit(&sql, row.key, Effect::Revoke).await;
                self.commit(&row.restore(form), row.key, Effect::Restore).await;
                self.commit(&sql, row.key, Effect::Revoke).await
            }
            _ => self.commit(&sql, row.key, Effect::Revoke).await,
        }
    }

    /// Gives it back. A slot whose key is gone is aimed at its successor.
    pub(crate) async fn give_back(&mut self, slot: usize, form: Form) -> Return {
        if form.destroys() {
            self.rows[slot] = self.new_row(slot);
            return Return::Replaced;
        }
        let row = self.rows[slot].clone();
        self.commit(&row.restore(form), row.key, Effect::Restore).await;
        Return::Restored
    }

    /// Creates the key that a slot is aimed at.
    pub(crate) async fn create(&mut self, slot: usize) {
        let row = self.rows[slot].clone();
        let user = format!("{} ON CONFLICT DO NOTHING;", row.insert_user().trim_end_matches(';'));
        self.commit(&format!("{user}{}", row.insert_key()), row.key, Effect::Create).await;
    }

    /// Takes all rights away at once.
    pub(crate) async fn truncate(&mut self) -> Micros {
        let start = self.clock.now();
        self.session.batch_execute("TRUNCATE api_keys").await.unwrap();
        let end = self.clock.now();
        let gone = self.rows.iter().map(|row| Operation { key: row.key, start, end, effect: Effect::Revoke });
        self.operations.extend(gone);
        end
    }

    async fn commit(&mut self, sql: &str, key: usize, effect: Effect) -> Micros {
        let start = self.clock.now();
        self.session.batch_execute(sql).await.unwrap_or_else(|error| panic!("{sql}: {error:?}"));
        let end = self.clock.now();
        self.operations.push(Operation { key, start, end, effect });
        end
    }
}
