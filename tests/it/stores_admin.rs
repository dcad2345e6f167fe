//! Both stores: what the command line writes and reads.

use std::sync::Arc;
use std::time::Duration;

use keyward::domain::key::KeyPrefix;
use keyward::domain::record::{KeyId, UserId};
use keyward::domain::time::Timestamp;
use keyward::store::StoreError;
use keyward::store::admin::{
    HistoryEntry, ImportMode, KeyChange, KeyFilter, KeySettings, NewKey, NewUser, Rotation, UserRef,
};
use zeroize::Zeroizing;

use crate::stores::{ACTOR, Bed, HASH, new_key, new_user, on_both_stores};

on_both_stores!(
    users_and_keys_are_created_shown_and_revoked,
    what_exists_is_a_conflict_and_what_does_not_is_not_found,
    a_setting_without_a_column_is_refused,
    a_change_sets_and_clears_what_it_names_and_nothing_else,
    keys_are_listed_by_owner_prefix_end_and_use,
    an_old_secret_is_a_candidate_of_its_key_until_its_end,
    a_second_rotation_keeps_the_first_ones_secret_and_one_without_grace_ends_all,
    an_old_secret_ends_when_somebody_else_changes_the_hash_or_takes_the_id,
    without_its_tables_rotation_has_no_grace_and_changes_no_history,
    changes_are_noted_with_who_and_what_and_without_secrets,
    an_import_is_all_or_nothing_and_names_the_row_that_is_refused,
);

async fn users_and_keys_are_created_shown_and_revoked(kind: &str) {
    let bed = Bed::bare(kind).await;
    bed.store.migrate().await.unwrap();
    let superuser = NewUser { role: "admin".into(), is_superuser: true, ..new_user("root") };
    let root = bed.store.create_user(&superuser).await.unwrap();
    let ada = bed.store.create_user(&new_user("ada")).await.unwrap();
    assert!(root.is_superuser && root.is_active && root.role.as_deref() == Some("admin"));
    assert!(!ada.is_superuser && ada.is_active && ada.created_at.is_some());
    assert_eq!(bed.store.list_users().await.unwrap().len(), 2);
    let by_name = UserRef::Username("ada".into());
    assert_eq!(bed.store.user(&by_name).await.unwrap().id, ada.id);
    assert_eq!(bed.store.user(&UserRef::Id(ada.id)).await.unwrap().username, "ada");

    let at = Timestamp::from_microseconds(4_000_000_000_000_001);
    let mut key = new_key(by_name.clone(), HASH);
    key.settings = KeySettings {
        description: Some("it's 5 % \\".into()),
        allowed_models: vec!["gpt-4o".into(), "ü\"".into()],
        tags: vec!["t".into()],
        rate_limit_per_minute: Some(60),
        budget_limit_cents: Some(500),
        budget_type: Some("monthly".into()),
        expires_at: Some(at),
        ..KeySettings::default()
    };
    let made = bed.store.create_key(&key).await.unwrap();
    assert_eq!((made.user_id, made.username.as_deref()), (Some(ada.id), Some("ada")));
    assert!(made.is_active && made.defects.is_none() && made.last_used_at.is_none());
    assert_eq!(made.settings.allowed_models, key.settings.allowed_models);
    assert_eq!(made.settings.description, key.settings.description);
    assert_eq!(made.settings.expires_at, Some(at));
    assert_eq!(
        (made.settings.tags.clone(), made.settings.scopes.clone()),
        (vec!["t".to_owned()], Vec::new())
    );
    let row = bed.row("kw_01234").await;
    assert_eq!((row.key_hash.as_deref(), row.total_cost), (Some(HASH), Some(0)));
    assert!(row.scopes.is_none() && row.allowed_ips.is_none());
    for expires_at in [Timestamp::INFINITY, Timestamp::from_microseconds(253_402_300_799_999_999)] {
        let mut other = new_key(UserRef::Id(root.id), &format!("{HASH}{}", expires_at.as_microseconds()));
        other.settings.expires_at = Some(expires_at);
        let shown = bed.store.create_key(&other).await.unwrap();
        assert_eq!(shown.settings.expires_at, Some(expires_at));
        assert!(shown.defects.unwrap().contains("key_hash"));
    }

    assert_eq!(bed.store.list_keys(&KeyFilter::default()).await.unwrap().len(), 3);
    assert_eq!(bed.store.list_keys(&of_user(&by_name)).await.unwrap().len(), 1);
    bed.store.set_key_active(made.id, false).await.unwrap();
    let revoked = bed.store.key(made.id).await.unwrap();
    assert!(!revoked.is_active && revoked.updated_at >= made.updated_at);
    assert!(!bed.store.set_user_active(&by_name, false).await.unwrap().is_active);
    assert_eq!(bed.rows("kw_01234").await.unwrap()[0].user_is_active, Some(false));
    assert!(bed.store.set_user_active(&UserRef::Id(ada.id), true).await.unwrap().is_active);
}

async fn what_exists_is_a_conflict_and_what_does_not_is_not_found(kind: &str) {
    let bed = Bed::bare(kind).await;
    bed.store.migrate().await.unwrap();
    let ada = bed.store.create_user(&new_user("ada")).await.unwrap();
    let message = |error: StoreError| {
        assert!(!error.is_unavailable());
        error.to_string()
    };
    let same_name = NewUser { email: "other".into(), ..new_user("ada") };
    let same_address = NewUser { username: "bo".into(), ..new_user("ada") };
    let of = |user| bed.store.create_user(user);
    assert_eq!(message(of(&same_name).await.unwrap_err()), "a user with this username exists");
    assert_eq!(message(of(&same_address).await.unwrap_err()), "a user with this email exists");
    let key = new_key(UserRef::Id(ada.id), HASH);
    bed.store.create_key(&key).await.unwrap();
    let twice = bed.store.create_key(&key).await.unwrap_err();
    assert_eq!(message(twice), "a key with this hash exists");
    let nobody = UserRef::Username("nobody".into());
    let no_user = "no such user";
    assert_eq!(message(bed.store.user(&nobody).await.unwrap_err()), no_user);
    assert_eq!(message(bed.store.list_keys(&of_user(&nobody)).await.unwrap_err()), no_user);
    assert_eq!(message(bed.store.set_user_active(&nobody, true).await.unwrap_err()), no_user);
    assert_eq!(message(bed.store.create_key(&new_key(nobody, "x")).await.unwrap_err()), no_user);
    assert_eq!(message(bed.store.key(KeyId::new(99)).await.unwrap_err()), "no such key");
    assert_eq!(message(bed.store.set_key_active(KeyId::new(99), false).await.unwrap_err()), "no such key");
}

/// A restriction must not get lost on an older database.
async fn a_setting_without_a_column_is_refused(kind: &str) {
    let bed = Bed::new(kind).await;
    bed.sql("ALTER TABLE api_keys DROP COLUMN allowed_agents").await;
    let mut key = new_key(UserRef::Id(UserId::new(3)), HASH);
    key.settings.allowed_agents = vec!["a".into()];
    let error = bed.store.create_key(&key).await.unwrap_err();
    assert!(matches!(&error, StoreError::Refused(what) if what.contains("allowed_agents")), "{error}");
    assert!(bed.store.list_keys(&KeyFilter::default()).await.unwrap().is_empty());
    key.settings.allowed_agents.clear();
    bed.store.create_key(&key).await.unwrap();
}

async fn a_change_sets_and_clears_what_it_names_and_nothing_else(kind: &str) {
    let bed = Bed::new(kind).await;
    let id = KeyId::new(7);
    let columns = [
        ("name", "'ci'"),
        ("allowed_models", "'[\"gpt-*\"]'"),
        ("allowed_ips", "'[\"10.0.0.0/8\"]'"),
        ("rate_limit_per_minute", "60"),
        ("is_unlimited", "true"),
        ("description", "'d'"),
    ];
    bed.key(7, "kw_01234", &columns).await;
    let change = KeyChange {
        is_active: Some(false),
        settings: KeySettings {
            allowed_models: vec!["claude-*".into()],
            permissions: vec!["read".into()],
            expires_at: Some(Timestamp::from_microseconds(4_000_000_000_000_001)),
            ..KeySettings::default()
        },
        clear: vec!["allowed_ips", "is_unlimited", "rate_limit_per_minute"],
        ..KeyChange::default()
    };
    bed.store.update_key(id, &change).await.unwrap();
    let key = bed.store.key(id).await.unwrap();
    assert!(!key.is_active);
    assert_eq!((key.name.as_deref(), key.settings.description.as_deref()), (Some("ci"), Some("d")));
    assert_eq!(key.settings.allowed_models, ["claude-*"]);
    assert_eq!(key.settings.permissions, ["read"]);
    assert_eq!(key.settings.expires_at, Some(Timestamp::from_microseconds(4_000_000_000_000_001)));
    assert!(key.settings.allowed_ips.is_empty() && !key.settings.is_unlimited);
    assert_eq!(key.settings.rate_limit_per_minute, None);
    let row = bed.row("kw_01234").await;
    assert_eq!((row.allowed_ips.as_deref(), row.is_unlimited), (None, Some(false)));
    let unknown = bed.store.update_key(KeyId::new(99), &change).await;
    assert!(matches!(unknown, Err(StoreError::NotFound("key"))));
}

async fn keys_are_listed_by_owner_prefix_end_and_use(kind: &str) {
    let bed = Bed::new(kind).await;
    bed.sql("INSERT INTO users (id, email, username, hashed_password) VALUES (4, 'bo@x', 'bo', '!')").await;
    let old = ("created_at", "'2001-01-01 00:00:00'");
    bed.key(1, "kw_a", &[old, ("expires_at", "'2002-01-01 00:00:00'")]).await;
    bed.key(2, "kw_b", &[old, ("last_used_at", "'2020-01-01 00:00:00'"), ("expires_at", "NULL")]).await;
    bed.key(3, "kw_a", &[("expires_at", "'2100-01-01 00:00:00'")]).await;
    bed.sql("UPDATE api_keys SET user_id = 4 WHERE id = 3").await;
    let ids = async |filter: KeyFilter| {
        let keys = bed.store.list_keys(&filter).await.unwrap();
        keys.iter().map(|key| key.id.get()).collect::<Vec<_>>()
    };
    let none = KeyFilter::default;
    assert_eq!(ids(none()).await, [1, 2, 3]);
    assert_eq!(ids(KeyFilter { prefix: Some("kw_a".into()), ..none() }).await, [1, 3]);
    assert_eq!(ids(KeyFilter { prefix: Some("kw_".into()), ..none() }).await, Vec::<i64>::new());
    assert_eq!(ids(of_user(&UserRef::Username("bo".into()))).await, [3]);
    let year_2010 = Timestamp::from_microseconds(1_262_304_000_000_000);
    assert_eq!(ids(KeyFilter { expiring_until: Some(year_2010), ..none() }).await, [1]);
    assert_eq!(ids(KeyFilter { unused_since: Some(year_2010), ..none() }).await, [1]);
    let year_2030 = Timestamp::from_microseconds(1_893_456_000_000_000);
    assert_eq!(ids(KeyFilter { unused_since: Some(year_2030), ..none() }).await, [1, 2, 3]);
    let both = KeyFilter { prefix: Some("kw_b".into()), unused_since: Some(year_2030), ..none() };
    assert_eq!(ids(both).await, [2]);
}

fn of_user(user: &UserRef) -> KeyFilter {
    KeyFilter { user: Some(user.clone()), ..KeyFilter::default() }
}

const PREFIX: &str = "kw_01234";

fn hash(number: u8) -> String {
    format!("sha256:{}", format!("{number:02x}").repeat(32))
}

async fn with_key(kind: &str) -> (Bed, KeyId) {
    let bed = Bed::new(kind).await;
    let id = bed.store.create_key(&new_key(UserRef::Id(UserId::new(3)), &hash(0))).await.unwrap().id;
    (bed, id)
}

async fn rotate(bed: &Bed, id: KeyId, number: u8, grace: Option<Duration>) -> Result<(), StoreError> {
    let now = keyward::clock::wall();
    let rotation = Rotation {
        id,
        prefix: KeyPrefix::new(PREFIX).unwrap(),
        hash: Zeroizing::new(hash(number)),
        keep_until: grace.map(|grace| now.saturating_add(grace)),
    };
    bed.store.rotate_key(&rotation).await
}

/// The hashes that prove the key, and whether each of them has an end.
async fn secrets(bed: &Bed) -> Vec<(String, bool)> {
    let rows = bed.rows(PREFIX).await.unwrap();
    rows.iter().map(|row| (row.key_hash.clone().unwrap(), row.expires_at.is_some())).collect()
}

const HOUR: Duration = Duration::from_hours(1);

async fn an_old_secret_is_a_candidate_of_its_key_until_its_end(kind: &str) {
    let (bed, id) = with_key(kind).await;
    rotate(&bed, id, 1, Some(HOUR)).await.unwrap();
    assert_eq!(secrets(&bed).await, [(hash(1), false), (hash(0), true)]);
    let shown = bed.store.key(id).await.unwrap().old_secrets;
    let end = shown[0].expires_at.unwrap();
    assert_eq!(shown.len(), 1);
    let kept = end.saturating_since(shown[0].rotated_at.unwrap());
    assert!(kept <= HOUR && kept > HOUR / 2, "{kept:?}");
    let rows = bed.rows(PREFIX).await.unwrap();
    assert_eq!(rows[1].expires_at, Some(end.as_microseconds()), "it is the same key with an earlier end");
    assert_eq!((rows[1].key_id, rows[1].user_id), (id.get(), Some(3)));

    // The key's own end counts where it is earlier.
    let early = Timestamp::from_microseconds(5);
    let change = KeyChange {
        settings: KeySettings { expires_at: Some(early), ..KeySettings::default() },
        ..KeyChange::default()
    };
    bed.store.update_key(id, &change).await.unwrap();
    assert!(bed.rows(PREFIX).await.unwrap().iter().all(|row| row.expires_at == Some(5)));

    bed.store.set_key_active(id, false).await.unwrap();
    let rows = bed.rows(PREFIX).await.unwrap();
    assert!(rows.len() == 2 && rows.iter().all(|row| row.is_active == Some(false)), "revoking revokes both");

    assert_eq!(bed.store.end_old_secrets(id).await.unwrap(), 1);
    assert_eq!(secrets(&bed).await.len(), 1);
    assert_eq!(bed.store.end_old_secrets(id).await.unwrap(), 0);
    assert!(matches!(bed.store.end_old_secrets(KeyId::new(99)).await, Err(StoreError::NotFound("key"))));
}

async fn a_second_rotation_keeps_the_first_ones_secret_and_one_without_grace_ends_all(kind: &str) {
    let (bed, id) = with_key(kind).await;
    rotate(&bed, id, 1, Some(HOUR)).await.unwrap();
    rotate(&bed, id, 2, Some(HOUR)).await.unwrap();
    let hashes = async || secrets(&bed).await.into_iter().map(|(hash, _)| hash).collect::<Vec<_>>();
    assert_eq!(hashes().await, [hash(2), hash(0), hash(1)]);
    rotate(&bed, id, 3, Some(HOUR)).await.unwrap();
    rotate(&bed, id, 4, Some(HOUR)).await.unwrap();
    let error = rotate(&bed, id, 5, Some(HOUR)).await.unwrap_err();
    assert!(matches!(&error, StoreError::Refused(why) if why.contains("4 old secrets")), "{error}");
    assert_eq!(hashes().await.len(), 5, "and nothing was changed");
    rotate(&bed, id, 5, None).await.unwrap();
    assert_eq!(hashes().await, [hash(5)]);
    // One that has ended makes room.
    rotate(&bed, id, 6, Some(Duration::ZERO)).await.unwrap();
    rotate(&bed, id, 7, Some(HOUR)).await.unwrap();
    assert_eq!(hashes().await, [hash(7), hash(6)]);

    let other = Rotation {
        id,
        prefix: KeyPrefix::new("kw_other").unwrap(),
        hash: Zeroizing::new(hash(8)),
        keep_until: None,
    };
    assert!(matches!(bed.store.rotate_key(&other).await, Err(StoreError::Refused(_))));
    assert!(matches!(rotate(&bed, KeyId::new(99), 1, None).await, Err(StoreError::NotFound("key"))));
}

async fn an_old_secret_ends_when_somebody_else_changes_the_hash_or_takes_the_id(kind: &str) {
    let (bed, id) = with_key(kind).await;
    rotate(&bed, id, 1, Some(HOUR)).await.unwrap();
    bed.sql(&format!("UPDATE api_keys SET key_hash = '{}' WHERE id = {id}", hash(9))).await;
    assert_eq!(secrets(&bed).await, [(hash(9), false)]);

    rotate(&bed, id, 1, Some(HOUR)).await.unwrap();
    bed.sql(&format!("DELETE FROM api_keys WHERE id = {id}")).await;
    assert!(secrets(&bed).await.is_empty());
    bed.key(id.get(), PREFIX, &[]).await;
    assert_eq!(secrets(&bed).await, [(format!("hash {id}"), false)], "another key of the same id");
    bed.store.delete_key(id).await.unwrap();
    assert!(matches!(bed.store.delete_key(id).await, Err(StoreError::NotFound("key"))));
}

/// A database that another program made, and that we may not add to.
async fn without_its_tables_rotation_has_no_grace_and_changes_no_history(kind: &str) {
    let (bed, id) = with_key(kind).await;
    bed.sql("DROP TABLE keyward_old_secrets; DROP TABLE keyward_history").await;
    let error = rotate(&bed, id, 1, Some(HOUR)).await.unwrap_err();
    assert!(matches!(&error, StoreError::Refused(why) if why.contains("keyward migrate")), "{error}");
    assert_eq!(secrets(&bed).await, [(hash(0), false)]);
    rotate(&bed, id, 1, None).await.unwrap();
    assert_eq!(secrets(&bed).await, [(hash(1), false)]);
    assert!(bed.store.key(id).await.unwrap().old_secrets.is_empty());
    assert_eq!(bed.store.end_old_secrets(id).await.unwrap(), 0);
    let error = bed.store.key_history(id).await.unwrap_err();
    assert!(matches!(&error, StoreError::Refused(why) if why.contains("keyward migrate")), "{error}");
    bed.store.delete_key(id).await.unwrap();
}

async fn changes_are_noted_with_who_and_what_and_without_secrets(kind: &str) {
    let (bed, id) = with_key(kind).await;
    let change = KeyChange {
        name: Some("new".into()),
        settings: KeySettings { allowed_models: vec!["gpt-*".into()], ..KeySettings::default() },
        clear: vec!["allowed_ips"],
        ..KeyChange::default()
    };
    bed.store.update_key(id, &change).await.unwrap();
    rotate(&bed, id, 1, Some(HOUR)).await.unwrap();
    bed.store.end_old_secrets(id).await.unwrap();
    bed.store.set_key_active(id, false).await.unwrap();
    bed.store.delete_key(id).await.unwrap();
    let history = bed.store.key_history(id).await.unwrap();
    let actions: Vec<&str> = history.iter().map(|entry| entry.action.as_deref().unwrap()).collect();
    let expected = ["key create", "key update", "key rotate", "key rotate --now", "key revoke", "key delete"];
    assert_eq!(actions, expected);
    assert!(history.iter().all(|entry| entry.actor.as_deref() == Some(ACTOR)));
    let now = keyward::clock::wall();
    let is_recent = |entry: &HistoryEntry| now.saturating_since(entry.at.unwrap()) < HOUR;
    assert!(history.iter().all(is_recent));
    let changes = |which: usize| -> serde_json::Value {
        serde_json::from_str(history[which].changes.as_deref().unwrap()).unwrap()
    };
    let expected = serde_json::json!({"name": "new", "allowed_models": ["gpt-*"], "allowed_ips": null});
    assert_eq!(changes(1), expected);
    assert!(changes(2)["old_secret_expires_at"].is_string());
    let all: String = history.iter().filter_map(|entry| entry.changes.as_deref()).collect();
    assert!(!all.contains("sha256") && !all.contains("hash"), "{all}");
}

async fn an_import_is_all_or_nothing_and_names_the_row_that_is_refused(kind: &str) {
    let bed = Bed::new(kind).await;
    let keys = |users: &[i64]| -> Arc<[NewKey]> {
        let number = |place: usize| u8::try_from(place).unwrap();
        let key =
            |(place, user): (usize, &i64)| new_key(UserRef::Id(UserId::new(*user)), &hash(number(place)));
        users.iter().enumerate().map(key).collect()
    };
    let count = async || bed.store.list_keys(&KeyFilter::default()).await.unwrap().len();
    let (index, error) = bed.store.import_keys(&keys(&[3, 3, 99, 3]), ImportMode::Commit).await.unwrap_err();
    assert!(index == 2 && matches!(error, StoreError::NotFound("user")), "{index} {error}");
    assert_eq!(count().await, 0);
    bed.store.import_keys(&keys(&[3, 3]), ImportMode::DryRun).await.unwrap();
    assert_eq!(count().await, 0);
    bed.store.import_keys(&keys(&[3, 3]), ImportMode::Commit).await.unwrap();
    assert_eq!(count().await, 2);
    let (index, error) = bed.store.import_keys(&keys(&[3]), ImportMode::DryRun).await.unwrap_err();
    assert!(index == 0 && matches!(error, StoreError::Conflict(_)), "{index} {error}");
    let id = bed.store.list_keys(&KeyFilter::default()).await.unwrap()[0].id;
    assert_eq!(bed.store.key_history(id).await.unwrap()[0].action.as_deref(), Some("key import"));
}
