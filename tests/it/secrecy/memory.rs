//! The process' own memory: who may read it, and what is left in it of a key that passed through.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, chown};
use std::path::Path;

use memchr::memmem;

use crate::support::eventually;
use crate::support::grpc::{Authorizer, Check, Encoding};
use crate::support::http::Request;
use crate::support::keyward::{Key, Keyward};
use crate::support::port::free_addr;
use crate::support::process::Process;

/// The user `nobody` of every Linux.
const NOBODY: u32 = 65534;

/// The kernel gives the files of a process that may not be looked into to root.
#[tokio::test(flavor = "multi_thread")]
async fn no_core_is_written_and_no_debugger_of_the_same_user_is_let_in() {
    let folder = tempfile::tempdir().unwrap();
    let root = rustix::process::geteuid().is_root();
    let own = if root { NOBODY } else { rustix::process::geteuid().as_raw() };
    let own_group = if root { NOBODY } else { rustix::process::getegid().as_raw() };
    chown(folder.path(), Some(own), Some(own_group)).unwrap();
    let (grpc, admin_addr) = (free_addr().to_string(), free_addr());
    let admin = admin_addr.to_string();
    let user = [format!("--reuid={own}"), format!("--regid={own_group}"), "--clear-groups".to_owned()];
    let serve = [env!("CARGO_BIN_EXE_keyward"), "serve", "--grpc-listen", &grpc, "--admin-listen", &admin];
    let args: Vec<String> = if root { user.into() } else { Vec::new() };
    // A change of user makes the kernel forget whose end it was to share, so it is told again.
    let args = args
        .into_iter()
        .chain(["--pdeathsig", "KILL", "--"].map(str::to_owned))
        .chain(serve.map(str::to_owned));
    let keyward = Process::start("keyward", Path::new("setpriv"), folder.path(), &args.collect::<Vec<_>>());
    let own_files = format!("/proc/{}", keyward.id());
    let ready = eventually(async || {
        let response = Request::get("/readyz").try_send(admin_addr).await.ok()?;
        (response.status == 200).then_some(())
    });
    assert!(ready.await.is_some(), "keyward did not become ready:\n{}", keyward.stderr());
    let owner = |path: String| fs::metadata(path).unwrap().uid();
    assert_eq!(owner(own_files.clone()), own);
    assert_eq!(owner(format!("{own_files}/mem")), 0, "its memory can be read by its user");
    let limits = fs::read_to_string(format!("{own_files}/limits")).unwrap();
    let core = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap();
    let values: Vec<&str> = core.split_ascii_whitespace().skip(4).take(2).collect();
    assert_eq!(values, ["0", "0"], "soft and hard limit");
}

/// How often bytes are in the writable memory of a process.
fn copies(pid: u32, wanted: &[u8]) -> usize {
    let memory = File::open(format!("/proc/{pid}/mem")).unwrap();
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let ranges =
        maps.lines().filter(|line| line.split(' ').nth(1).is_some_and(|rights| rights.starts_with("rw")));
    let mut found = 0;
    for range in ranges {
        let (start, end) = range.split(' ').next().unwrap().split_once('-').unwrap();
        let [start, end] = [start, end].map(|hex| u64::from_str_radix(hex, 16).unwrap());
        let mut bytes = vec![0; usize::try_from(end - start).unwrap()];
        // What is given back in between, or was never touched, can't be read.
        let Ok(read) = memory.read_at(&mut bytes, start) else { continue };
        found += memmem::find_iter(&bytes[..read], wanted).count();
    }
    found
}

async fn use_it(keyward: &Keyward, key: &Key, times: usize) {
    let authorizer = Authorizer::connect(keyward.grpc_addr()).await;
    for _ in 0..times {
        let check = Check::new("GET", "/v1/models").bearer(&key.secret).build(Encoding::Raw);
        assert!(authorizer.check(check).await.allows());
    }
}

/// The buffers of the connection are not ours and are not wiped; what is promised is that they are all there is: nothing
/// keeps a key, so a thousand more uses leave no more copies, and other traffic writes over them.
#[tokio::test(flavor = "multi_thread")]
async fn copies_of_a_key_in_memory_do_not_grow_with_its_use() {
    if !rustix::process::geteuid().is_root() {
        // Refused to everybody else, which the test above holds.
        return;
    }
    let keyward = Keyward::new().arg("--worker-threads", "1").start().await;
    keyward.create_user("ada", &[]);
    let key = keyward.create_key("ada", "hot", &["--hash", "sha256"]);
    let other = keyward.create_key("ada", "other", &["--hash", "sha256"]);
    let secret = &key.secret.as_bytes()[8..];
    use_it(&keyward, &key, 20).await;
    let after_20 = copies(keyward.id(), secret);
    use_it(&keyward, &key, 1000).await;
    let after_1000 = copies(keyward.id(), secret);
    use_it(&keyward, &other, 1000).await;
    let after_others = copies(keyward.id(), secret);
    println!(
        "copies of a key: {after_20} after 20 uses, {after_1000} after 1000 more, {after_others} after 1000 of another"
    );
    // The prefix is public and kept: where it is not found, the search is what fails.
    assert!(copies(keyward.id(), &key.secret.as_bytes()[..8]) > 0, "the search finds nothing");
    assert!(after_1000 < 200, "{after_1000} copies after 1020 uses: something keeps them");
    assert!(after_others <= 8, "{after_others} copies are left when others have used the same buffers");
}
