//! The emergency deny list: a key on it is refused at once and until it is taken off, whatever else is broken.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tempfile::{TempDir, tempdir};

use crate::program::run;
use crate::support::eventually;
use crate::support::grpc::{Answer, Authorizer, Check, Encoding};
use crate::support::http::{Request, Response};
use crate::support::keyward::{Builder, Key, Keyward};
use crate::support::postgres::Postgres;

/// A sidecar with a user, and a folder for its deny file.
struct Rig {
    keyward: Keyward,
    authorizer: Authorizer,
    folder: TempDir,
}

impl Rig {
    /// With this text as its deny file.
    async fn with_file(text: &str) -> Self {
        let folder = tempdir().unwrap();
        fs::write(folder.path().join("deny"), text).unwrap();
        Self::start(folder, Keyward::new()).await
    }

    async fn without_file() -> Self {
        Self::start(tempdir().unwrap(), Keyward::new()).await
    }

    async fn start(folder: TempDir, mut builder: Builder) -> Self {
        let file = folder.path().join("deny");
        if file.exists() {
            builder = builder.arg("--deny-file", &file.display().to_string());
        }
        // A long one, so that what takes effect sooner is not the store's doing.
        let keyward = builder.arg("--record-ttl-without-feed", "300s").start().await;
        let authorizer = Authorizer::connect(keyward.grpc_addr()).await;
        Self { keyward, authorizer, folder }
    }

    /// The first ids of an empty store are 1, 2, 3.
    fn keys<const N: usize>(&self) -> [Key; N] {
        self.keyward.create_user("ada", &[]);
        std::array::from_fn(|_| self.keyward.create_key("ada", "ci", &["--hash", "sha256"]))
    }

    fn file(&self) -> PathBuf {
        self.folder.path().join("deny")
    }

    /// As an editor or a script does that leaves no half-written file behind.
    fn write(&self, text: &str, mode: u32) {
        let copy = self.folder.path().join("copy");
        fs::write(&copy, text).unwrap();
        fs::set_permissions(&copy, fs::Permissions::from_mode(mode)).unwrap();
        fs::rename(&copy, self.file()).unwrap();
    }

    async fn check(&self, check: Check) -> Answer {
        self.authorizer.check(check.build(Encoding::Raw)).await
    }

    async fn ask(&self, secret: &str) -> Answer {
        self.check(Check::new("GET", "/v1/models").bearer(secret)).await
    }

    async fn is_allowed(&self, key: &Key) -> bool {
        let answer = self.ask(&key.secret).await;
        if !answer.allows() {
            assert_eq!(
                (answer.http_status(), answer.header("x-keyward-reason")),
                (401, Some("key_inactive"))
            );
        }
        answer.allows()
    }

    async fn becomes(&self, key: &Key, allowed: bool) {
        let done = eventually(async || (self.is_allowed(key).await == allowed).then_some(()));
        assert!(done.await.is_some(), "key {} stays as it was: {}", key.id, self.keyward.log());
    }

    async fn admin(&self, method: &str, query: &str) -> Response {
        Request::new(method, &format!("/deny{query}")).send(self.keyward.admin_addr()).await
    }

    async fn deny(&self, query: &str) -> Value {
        let response = self.admin("POST", query).await;
        assert_eq!(response.status, 200, "{}", response.text());
        response.json()
    }

    async fn listed(&self) -> Value {
        self.admin("GET", "").await.json()["entries"].clone()
    }

    async fn logs(&self, text: &str) {
        let done = eventually(async || self.keyward.log().contains(text).then_some(()));
        assert!(done.await.is_some(), "nothing is logged of {text}: {}", self.keyward.log());
    }

    async fn reload_failed(&self) -> bool {
        self.keyward.count("keyward_deny_list_reload_failed", &[]).await == 1
    }
}

fn prefix_of(key: &Key) -> &str {
    &key.secret[..8]
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_in_the_file_is_refused_from_the_start_on_every_route() {
    let rig = Rig::with_file("# leaked on Monday\n\nkey-id 1 # the build server\n").await;
    let [denied, other] = rig.keys();
    for round in 0..2 {
        assert!(!rig.is_allowed(&denied).await, "cold and then from memory: {round}");
        assert!(rig.is_allowed(&other).await);
    }
    let with = |name, value| Check::new("GET", "/v1/models").context_extension(name, value);
    for (name, value) in [("consistency", "strict"), ("anonymous", "allow")] {
        let answer = rig.check(with(name, value).bearer(&denied.secret)).await;
        assert_eq!(answer.header("x-keyward-reason"), Some("key_inactive"), "{name}: {value}");
        assert!(rig.check(with(name, value).bearer(&other.secret)).await.allows(), "{name}: {value}");
    }
    assert!(rig.check(with("anonymous", "allow")).await.allows(), "nobody is on no list");
    assert_eq!(rig.keyward.count("keyward_deny_list_entries", &[]).await, 1);
    let refused = rig.keyward.count("keyward_checks_total", &[("reason", "key_inactive")]).await;
    assert_eq!(refused, 4);
}

/// Or the list could be used to find out which prefixes are on it.
#[tokio::test(flavor = "multi_thread")]
async fn only_who_proved_the_key_hears_that_it_is_denied() {
    let rig = Rig::without_file().await;
    let [key] = rig.keys();
    rig.deny(&format!("?prefix={}", prefix_of(&key))).await;
    for _ in 0..2 {
        let wrong = rig.ask(&key.wrong()).await;
        assert_eq!((wrong.http_status(), wrong.header("x-keyward-reason")), (401, Some("invalid_api_key")));
        assert!(!rig.is_allowed(&key).await);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_of_the_file_takes_effect_without_a_restart() {
    let rig = Rig::with_file("").await;
    let [one, two] = rig.keys();
    assert!(rig.is_allowed(&one).await && rig.is_allowed(&two).await);
    rig.write(&format!("prefix {}\n", prefix_of(&one)), 0o644);
    rig.becomes(&one, false).await;
    assert!(rig.is_allowed(&two).await);
    // In place too, and of the same size.
    fs::write(rig.file(), format!("prefix {}\n", prefix_of(&two))).unwrap();
    rig.becomes(&two, false).await;
    assert!(rig.is_allowed(&one).await);
    rig.logs(&format!("denied no longer prefix=\"{}\"", prefix_of(&one))).await;
}

/// As Kubernetes updates a `ConfigMap`: the file is a link into `..data`, and `..data` is swapped.
fn publish(folder: &Path, version: &str, text: &str) {
    fs::create_dir(folder.join(version)).unwrap();
    fs::write(folder.join(version).join("deny"), text).unwrap();
    symlink(version, folder.join("..data_tmp")).unwrap();
    fs::rename(folder.join("..data_tmp"), folder.join("..data")).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_swapped_link_is_a_change_every_time() {
    let folder = tempdir().unwrap();
    publish(folder.path(), "..1", "key-id 1\n");
    symlink("..data/deny", folder.path().join("deny")).unwrap();
    let rig = Rig::start(folder, Keyward::new()).await;
    let [one, two] = rig.keys();
    assert!(!rig.is_allowed(&one).await && rig.is_allowed(&two).await);
    for (version, denied, allowed) in [(2, &two, &one), (3, &one, &two)] {
        publish(rig.folder.path(), &format!("..{version}"), &format!("key-id {}\n", denied.id));
        fs::remove_dir_all(rig.folder.path().join(format!("..{}", version - 1))).unwrap();
        rig.becomes(denied, false).await;
        assert!(rig.is_allowed(allowed).await);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_is_bad_or_gone_keeps_what_it_said_and_says_so() {
    let rig = Rig::with_file("key-id 1\n").await;
    let [one, two] = rig.keys();
    assert!(!rig.is_allowed(&one).await && !rig.reload_failed().await);

    rig.write("key-id 2\nkey-id 2x\n", 0o644);
    rig.logs("line 2: expected a whole number").await;
    assert!(rig.reload_failed().await);
    assert!(!rig.is_allowed(&one).await && rig.is_allowed(&two).await);
    let shown = rig.admin("GET", "").await.json();
    assert_eq!(shown["entries"], json!([{ "key_id": 1, "source": "file" }]));
    assert!(shown["file_error"].as_str().unwrap().starts_with("line 2: "), "{shown}");
    let listed = rig.keyward.cli(&["deny", "list"]);
    assert!(String::from_utf8_lossy(&listed.stderr).contains("line 2: "));

    // The same mistake in another version is the same news. Who removes an entry looks at the file first.
    rig.write("key-id 3\nkey-id 3x\n", 0o644);
    assert_eq!(rig.admin("DELETE", "?key_id=99").await.status, 404);
    fs::remove_file(rig.file()).unwrap();
    rig.logs("it can't be found").await;
    assert!(rig.reload_failed().await && !rig.is_allowed(&one).await);
    // Who denies now does not make a file with a single entry of it.
    assert_eq!(rig.deny("?key_id=77").await["persistent"], false);
    assert!(!rig.file().exists());

    rig.write("key-id 2\n", 0o644);
    rig.becomes(&two, false).await;
    assert!(rig.is_allowed(&one).await && !rig.reload_failed().await);
    let log = rig.keyward.log();
    assert_eq!(log.matches("the deny file can't be used").count(), 2, "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_file_the_admin_port_denies_until_the_end_and_says_so() {
    let rig = Rig::without_file().await;
    let [one, two] = rig.keys();
    assert!(rig.is_allowed(&one).await && rig.is_allowed(&two).await);

    let answer = rig.deny("?key_id=1").await;
    assert_eq!((&answer["denied"], &answer["persistent"]), (&json!(true), &json!(false)));
    assert!(answer["note"].as_str().unwrap().contains("until this process ends; add it to --deny-file"));
    assert!(!rig.is_allowed(&one).await && rig.is_allowed(&two).await, "at once, and nobody else");
    let prefix = prefix_of(&two);
    rig.deny(&format!("?prefix={prefix}")).await;
    assert!(!rig.is_allowed(&two).await);
    let expected = json!([{ "key_id": 1, "source": "admin" }, { "prefix": prefix, "source": "admin" }]);
    assert_eq!(rig.listed().await, expected);
    // Neither an empty cache nor another answer of the store changes it.
    rig.keyward.cli_ok(&["cache", "flush"]);
    assert!(!rig.is_allowed(&one).await);

    assert_eq!(rig.admin("DELETE", "?key_id=1").await.status, 200);
    assert!(rig.is_allowed(&one).await);
    assert_eq!(rig.admin("DELETE", "?key_id=1").await.status, 404);
    for bad in
        ["", "?key_id=1&prefix=kw_abcde", "?key_id=x", "?user_id=1", "?prefix=kw_", "?prefix=kw_abcdef"]
    {
        for method in ["POST", "DELETE"] {
            assert_eq!(rig.admin(method, bad).await.status, 400, "{method} {bad}");
        }
    }
    let too_long = rig.admin("POST", &format!("?prefix={}", one.secret)).await.text();
    assert!(too_long.contains("8 characters") && !too_long.contains(&one.secret), "{too_long}");
    assert_eq!(rig.keyward.count("keyward_deny_list_entries", &[]).await, 1);
    let log = rig.keyward.log();
    for line in ["denied from now on key_id=1 source=\"admin\"", "denied no longer key_id=1 source=\"admin\""]
    {
        assert_eq!(log.matches(line).count(), 1, "{line}: {log}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_denied_by_command_is_in_the_file_and_outlives_the_process() {
    let home = tempdir().unwrap();
    let store = format!("sqlite:{}", home.path().join("keyward.db").display());
    let folder = tempdir().unwrap();
    fs::write(folder.path().join("deny"), "# keep me\nkey-id 3 # and me").unwrap();
    fs::set_permissions(folder.path().join("deny"), fs::Permissions::from_mode(0o640)).unwrap();
    let rig = Rig::start(folder, Keyward::new().store(&store)).await;
    let [one, two, three] = rig.keys();
    assert!(rig.is_allowed(&one).await);

    let added = rig.keyward.cli_json(&["deny", "add", "--key-id", "1"]);
    assert_eq!(added, json!({ "denied": true, "persistent": true }));
    assert!(!rig.is_allowed(&one).await);
    let prefix = prefix_of(&two);
    rig.keyward.cli_ok(&["deny", "add", "--prefix", prefix]);
    // Again is no second line.
    rig.keyward.cli_ok(&["deny", "add", "--prefix", prefix]);
    let text = format!("# keep me\nkey-id 3 # and me\nkey-id 1\nprefix {prefix}\n");
    assert_eq!(fs::read_to_string(rig.file()).unwrap(), text);
    rig.keyward.cli_ok(&["deny", "remove", "--key-id", "3"]);
    assert_eq!(fs::read_to_string(rig.file()).unwrap(), format!("# keep me\nkey-id 1\nprefix {prefix}\n"));
    assert_eq!(fs::metadata(rig.file()).unwrap().permissions().mode() & 0o777, 0o640);
    assert_eq!(fs::read_dir(rig.folder.path()).unwrap().count(), 1, "a copy was left behind");
    assert!(rig.is_allowed(&three).await);
    let listed = rig.keyward.cli_json(&["deny", "list"]);
    assert_eq!(listed[0], json!({ "key_id": 1, "prefix": null, "source": "file" }));
    assert_eq!(listed[1]["prefix"], prefix);
    let refused = rig.keyward.cli(&["deny", "remove", "--key-id", "3"]);
    assert_eq!(refused.status.code(), Some(1));

    let Rig { keyward, folder, .. } = rig;
    assert!(keyward.sigterm_and_wait().await.success());
    let rig = Rig::start(folder, Keyward::new().store(&store)).await;
    assert!(!rig.is_allowed(&one).await && !rig.is_allowed(&two).await && rig.is_allowed(&three).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_may_not_be_written_is_left_alone_and_what_was_added_survives_its_reloads() {
    let rig = Rig::with_file("key-id 1\n").await;
    let [one, two, three] = rig.keys();
    rig.write("key-id 1\n", 0o444);
    let answer = rig.deny("?key_id=2").await;
    assert_eq!(answer["persistent"], false);
    assert!(answer["note"].as_str().unwrap().contains(&rig.file().display().to_string()), "{answer}");
    assert!(!rig.is_allowed(&two).await);

    rig.write("key-id 3\nkey-id 1\n", 0o444);
    rig.becomes(&three, false).await;
    assert!(!rig.is_allowed(&one).await && !rig.is_allowed(&two).await);
    let sources = |source| move |entry: &&Value| entry["source"] == source;
    let listed = rig.listed().await;
    assert_eq!(listed.as_array().unwrap().iter().filter(sources("file")).count(), 2, "{listed}");
    assert_eq!(listed.as_array().unwrap().iter().filter(sources("admin")).count(), 1, "{listed}");

    let refused = rig.admin("DELETE", "?key_id=1").await;
    assert_eq!(refused.status, 409);
    assert!(refused.text().contains(&rig.file().display().to_string()), "{}", refused.text());
    assert!(!rig.is_allowed(&one).await);
    assert_eq!(rig.admin("DELETE", "?key_id=2").await.status, 200);
    assert!(rig.is_allowed(&two).await);
    assert_eq!(fs::read_to_string(rig.file()).unwrap(), "key-id 3\nkey-id 1\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn it_holds_and_can_be_changed_while_the_database_is_gone() {
    let mut postgres = Postgres::start().await;
    postgres.create_database("platform").await;
    let folder = tempdir().unwrap();
    fs::write(folder.path().join("deny"), "").unwrap();
    let url = postgres.url("platform");
    run(folder.path(), &["migrate", "--store", &url]);
    let rig = Rig::start(folder, Keyward::new().store(&url)).await;
    let [one, two] = rig.keys();
    assert!(rig.is_allowed(&one).await && rig.is_allowed(&two).await);
    postgres.kill();
    assert!(rig.is_allowed(&one).await, "it is in memory");
    assert_eq!(rig.deny(&format!("?key_id={}", one.id)).await["persistent"], true);
    assert!(!rig.is_allowed(&one).await && rig.is_allowed(&two).await);
    rig.write(&format!("key-id {}\nprefix {}\n", one.id, prefix_of(&two)), 0o644);
    rig.becomes(&two, false).await;
    assert_eq!(rig.admin("DELETE", &format!("?key_id={}", one.id)).await.status, 200);
    assert!(rig.is_allowed(&one).await && !rig.is_allowed(&two).await);
}

#[test]
fn a_file_that_can_not_be_used_is_a_usage_error_at_the_start() {
    let folder = tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    fs::write(Path::new(&path("bad")), "key-id 1\nprefix kw_\nkey 7\n").unwrap();
    for (name, expected) in [
        ("missing", &["create it", "--deny-file off"][..]),
        ("", &["not a regular file"]),
        ("bad", &["line 2: expected a prefix of 8 characters", "line 3: expected `key-id 42`"]),
    ] {
        let ended = run(folder.path(), &["serve", "--deny-file", &path(name)]);
        assert_eq!(ended.code, 2, "{}", ended.stderr);
        let errors: Vec<&str> = ended.stderr.lines().filter(|line| line.starts_with("error: ")).collect();
        assert_eq!(errors.len(), 1, "{}", ended.stderr);
        for word in expected.iter().chain([&&*path(name), &"--deny-file"]) {
            assert!(errors[0].contains(word), "{word}: {}", errors[0]);
        }
    }
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "a store was made before the refusal");
}
