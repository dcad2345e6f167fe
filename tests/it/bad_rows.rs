//! Rows that can't be used as they stand: that key alone suffers, and it is reported once.

use rusqlite::Connection;

use crate::support::grpc::{Answer, Authorizer, Check, Encoding};
use crate::support::keyward::{Key, Keyward};

struct Rig {
    keyward: Keyward,
    authorizer: Authorizer,
    good: Key,
    bad: Key,
}

impl Rig {
    /// Two keys on one prefix; `damage` is what happens to the row of the second.
    async fn start(damage: &str) -> Self {
        let keyward = Keyward::new().start().await;
        keyward.create_user("ada", &[]);
        let good = keyward.create_key("ada", "good", &["--hash", "sha256"]);
        let bad = keyward.create_key("ada", "bad", &["--hash", "sha256"]);
        let file = Connection::open(keyward.sqlite_file()).unwrap();
        // The good key moves to the other one's prefix, under a hash that the test makes itself.
        let secret = format!("{}-the-good-key", &bad.secret[..8]);
        let hash = bcrypt::hash(&secret, 4).unwrap();
        let row = (&bad.secret[..8], &hash, good.id);
        file.execute("UPDATE api_keys SET key_prefix = ?1, key_hash = ?2 WHERE id = ?3", row).unwrap();
        file.execute(&format!("UPDATE api_keys SET {damage} WHERE id = ?1"), [bad.id]).unwrap();
        let authorizer = Authorizer::connect(keyward.grpc_addr()).await;
        Self { keyward, authorizer, good: Key { id: good.id, secret }, bad }
    }

    async fn ask(&self, secret: &str) -> Answer {
        self.authorizer.check(Check::new("GET", "/v1/models").bearer(secret).build(Encoding::Raw)).await
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_row_disables_its_key_and_no_other_and_is_reported_once() {
    let cost_31 = format!("key_hash = '{}'", bcrypt::hash("x", 4).unwrap().replace("$04$", "$31$"));
    let form_x = format!("key_hash = '{}'", bcrypt::hash("x", 4).unwrap().replace("$2b$", "$2x$"));
    let unknown = "invalid_api_key";
    for (damage, reason) in [
        (cost_31.as_str(), unknown),
        (&form_x, unknown),
        ("key_hash = NULL", unknown),
        ("key_hash = 'plain'", unknown),
        ("key_hash = '$2b$10$é'", unknown),
        ("key_hash = x'ff00'", unknown),
        ("allowed_models = '{}'", "policy_invalid"),
        ("allowed_models = '[1]'", "policy_invalid"),
        ("allowed_models = 'gpt-4o'", "policy_invalid"),
        ("allowed_models = 7", "policy_invalid"),
        ("allowed_ips = '[\"10.0.0.0/8\", \"here\"]'", "policy_invalid"),
        ("scopes = '\"chat\"'", "policy_invalid"),
        ("rate_limit_per_minute = -1", "policy_invalid"),
        ("rate_limit_per_minute = 'many'", "policy_invalid"),
        ("expires_at = 'soon'", "policy_invalid"),
        ("budget_limit_cents = -5", "policy_invalid"),
    ] {
        let rig = Rig::start(damage).await;
        for _ in 0..2 {
            assert_eq!(rig.ask(&rig.bad.secret).await.header("x-keyward-reason"), Some(reason), "{damage}");
            assert!(rig.ask(&rig.good.secret).await.allows(), "{damage}");
            rig.keyward.cli_ok(&["cache", "flush"]);
        }
        let log = rig.keyward.log();
        let reports = log.lines().filter(|line| line.contains("can't be used as it stands")).count();
        assert_eq!(reports, 1, "{damage}: {log}");
        assert_eq!(rig.keyward.count("keyward_invalid_rows_total", &[]).await, 1, "{damage}");
        assert!(!log.contains(&rig.bad.secret) && !log.contains(&rig.good.secret));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_null_restricts_nothing_but_is_active() {
    let nulls = "name = NULL, scopes = NULL, allowed_models = NULL, allowed_endpoints = NULL, allowed_ips = NULL, \
        allowed_chatbots = NULL, allowed_agents = NULL, rate_limit_per_minute = NULL, is_unlimited = NULL, \
        budget_limit_cents = NULL, budget_type = NULL, total_cost = NULL, expires_at = NULL, tags = NULL";
    let rig = Rig::start(nulls).await;
    assert!(rig.ask(&rig.bad.secret).await.allows());
    for (null, reason) in [("is_active = NULL", "key_inactive"), ("user_id = NULL", "user_inactive")] {
        let rig = Rig::start(null).await;
        assert_eq!(rig.ask(&rig.bad.secret).await.header("x-keyward-reason"), Some(reason), "{null}");
        assert_eq!(rig.good.id, 1);
    }
}
