//! Keys that share their prefix: every owner is accepted as itself, and nothing else is accepted at all.

use std::time::Duration;

use tokio::task::JoinSet;

use crate::support::grpc::{Answer, Authorizer, Check, Encoding};
use crate::support::keyward::Keyward;

/// The prefix of every key here.
const PREFIX: &str = "kw_share";

#[tokio::test(flavor = "multi_thread")]
async fn two_owners_on_one_prefix_are_each_accepted_as_themselves() {
    each_owner_is_itself(2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn five_owners_on_one_prefix_are_each_accepted_as_themselves() {
    each_owner_is_itself(5).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_key_does_not_darken_the_others_on_its_prefix() {
    let keyward = Keyward::new().start().await;
    let owners = owners_on_one_prefix(&keyward, 3);
    let file = rusqlite::Connection::open(keyward.sqlite_file()).unwrap();
    file.busy_timeout(Duration::from_secs(10)).unwrap();
    file.execute("UPDATE api_keys SET is_active = 0 WHERE user_id = ?1", [owners[1].user_id]).unwrap();
    let authorizer = Authorizer::connect(keyward.grpc_addr()).await;
    for _ in 0..2 {
        for (index, owner) in owners.iter().enumerate() {
            let answer = ask(&authorizer, &owner.secret).await;
            if index == 1 {
                assert_eq!(answer.header("x-keyward-reason"), Some("key_inactive"));
            } else {
                assert_eq!(answer.header("x-keyward-user-id"), Some(&*owner.user_id.to_string()));
            }
        }
    }
}

/// The old service cached by prefix: whoever knew the public first characters of a warm key was let in.
#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_wrong_suffixes_of_a_warm_key_are_refused_without_bcrypt() {
    const TASKS: usize = 8;
    const EACH: usize = 1250;
    let keyward = Keyward::new().start().await;
    let owner = owners_on_one_prefix(&keyward, 1).remove(0);
    let authorizer = Authorizer::connect(keyward.grpc_addr()).await;
    assert!(ask(&authorizer, &owner.secret).await.allows());
    let runs = keyward.bcrypt_runs().await;
    let mut tasks = JoinSet::new();
    for task in 0..TASKS {
        let authorizer = authorizer.clone();
        tasks.spawn(async move {
            for number in 0..EACH {
                // Same prefix and same length as the right one.
                let wrong = format!("{PREFIX}-wrong-secret-{task:02}-{number:04}");
                assert!(!ask(&authorizer, &wrong).await.allows(), "{wrong} was let in");
            }
        });
    }
    tasks.join_all().await;
    assert_eq!(keyward.bcrypt_runs().await, runs);
    assert!(ask(&authorizer, &owner.secret).await.allows(), "the owner is not to suffer for it");
}

struct Owner {
    user_id: i64,
    secret: String,
}

async fn each_owner_is_itself(count: usize) {
    let keyward = Keyward::new().start().await;
    let owners = owners_on_one_prefix(&keyward, count);
    let authorizer = Authorizer::connect(keyward.grpc_addr()).await;
    // Cold, then warm, then from the other end.
    for owner in owners.iter().chain(&owners).chain(owners.iter().rev()) {
        let answer = ask(&authorizer, &owner.secret).await;
        assert!(answer.allows(), "{answer:?}");
        assert_eq!(answer.header("x-keyward-user-id"), Some(&*owner.user_id.to_string()));
    }
    let stranger = ask(&authorizer, &format!("{PREFIX}-nobodys-secret-00-0000")).await;
    assert_eq!(stranger.header("x-keyward-reason"), Some("invalid_api_key"));
}

/// Users with one key each, written the way any other program would: straight into the tables.
fn owners_on_one_prefix(keyward: &Keyward, count: usize) -> Vec<Owner> {
    let file = rusqlite::Connection::open(keyward.sqlite_file()).unwrap();
    file.busy_timeout(Duration::from_secs(10)).unwrap();
    let owners = (0..count).map(|number| {
        let user_id = keyward.create_user(&format!("owner{number}"), &[]);
        let secret = format!("{PREFIX}-right-secret-00-{number:04}");
        let hash = bcrypt::hash(&secret, 4).unwrap();
        file.execute(
            "INSERT INTO api_keys (name, key_hash, key_prefix, user_id, is_active) VALUES (?1, ?2, ?3, ?4, 1)",
            (format!("key {number}"), hash, PREFIX, user_id),
        )
        .unwrap();
        Owner { user_id, secret }
    });
    owners.collect()
}

async fn ask(authorizer: &Authorizer, key: &str) -> Answer {
    authorizer.check(Check::new("GET", "/v1/models").bearer(key).build(Encoding::Raw)).await
}
