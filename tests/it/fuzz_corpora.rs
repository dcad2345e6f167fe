//! The fuzz targets, without libFuzzer: every input that is kept in `fuzz/corpus` and `fuzz/regressions` is tried again, and
//! some thousand mutations of them, the same ones each time.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use keyward::server::response::allowed as allowed_by;

#[path = "../../fuzz/src/targets/mod.rs"]
mod targets;

/// How many mutations are tried: a second or three of them, at most.
const MUTATIONS: usize = 8000;

/// As long as inputs get.
const MAX_BYTES: usize = 4096;

macro_rules! replayed {
    ($($name:ident)+) => {
        const REPLAYED: &[&str] = &[$(stringify!($name)),+];
        $(
            #[test]
            fn $name() {
                replay(stringify!($name), targets::$name::run);
            }
        )+
    };
}

replayed! {
    change_feed check check_text check_view client_ip credentials deny_list endpoint hash json_body model_path
    multipart_body network original path query redis_url row sealed_entry snapshot store_url
}

fn folder(kind: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz").join(kind)
}

fn names(folder: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(folder).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

/// By their names, so that the order is that of every machine.
fn inputs(folder: &Path) -> Vec<(String, Vec<u8>)> {
    if !folder.exists() {
        return Vec::new();
    }
    names(folder).into_iter().map(|name| (name.clone(), fs::read(folder.join(name)).unwrap())).collect()
}

fn replay(name: &str, target: targets::Target) {
    let mut all = inputs(&folder("corpus").join(name));
    all.extend(inputs(&folder("regressions").join(name)));
    let passes = |input: &[u8]| std::panic::catch_unwind(|| target(input)).is_ok();
    for (file, input) in &all {
        assert!(passes(input), "{file}");
    }
    let all: Vec<Vec<u8>> = all.into_iter().map(|(_, input)| input).collect();
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    for _ in 0..MUTATIONS {
        let input = random.mutation(&all);
        assert!(passes(&input), "found by mutation: {}", input.escape_ascii());
    }
}

#[test]
fn every_target_is_replayed_has_a_corpus_and_a_door_for_libfuzzer() {
    let known: BTreeSet<String> = targets::ALL.iter().map(|(name, _)| (*name).to_owned()).collect();
    let replayed: BTreeSet<String> = REPLAYED.iter().map(|name| (*name).to_owned()).collect();
    assert_eq!(known, replayed);
    assert_eq!(known, names(&folder("corpus")), "corpora");
    let doors: BTreeSet<String> = known.iter().map(|name| format!("{name}.rs")).collect();
    assert_eq!(doors, names(&folder("fuzz_targets")), "doors");
    let manifest = fs::read_to_string(folder("Cargo.toml")).unwrap();
    for name in &known {
        assert!(!names(&folder("corpus").join(name)).is_empty(), "the corpus of {name} is empty");
        assert!(
            manifest.contains(&format!("\nname = \"{name}\"\npath = \"fuzz_targets/{name}.rs\"\n")),
            "{name}"
        );
        let door = fs::read_to_string(folder("fuzz_targets").join(format!("{name}.rs"))).unwrap();
        assert!(
            door.contains(&format!("keyward_fuzz::run(\"{name}\", data)")),
            "the door of {name} leads elsewhere"
        );
    }
    let orphans: Vec<String> = names(&folder("regressions")).difference(&known).cloned().collect();
    assert_eq!(orphans, [""; 0], "regressions of no target");
}

/// Together they are what a reader looks through, not an archive.
#[test]
fn the_corpora_stay_small() {
    let all: Vec<usize> = ["corpus", "regressions"]
        .iter()
        .flat_map(|kind| {
            names(&folder(kind)).into_iter().flat_map(move |name| inputs(&folder(kind).join(name)))
        })
        .map(|(_, input)| input.len())
        .collect();
    assert!(all.len() <= 250, "{} files", all.len());
    assert!(all.iter().sum::<usize>() <= 300 * 1024);
}

/// The oracle of whole checks looks at allows alone, so there have to be some, of every key that may do anything.
#[test]
fn whole_checks_of_the_corpus_are_allowed_and_denied() {
    let mut allowed = BTreeSet::new();
    let mut denied = 0;
    for (_, input) in inputs(&folder("corpus").join("check_text")) {
        let message = targets::check_text::written(&input).unwrap();
        let response = targets::check::decided(&message).unwrap();
        match allowed_by(&response) {
            Some(allow) => {
                let headers = allow.headers.iter().filter_map(|option| option.header.as_ref());
                let name = headers.into_iter().find(|header| header.key == "x-keyward-key-name");
                allowed.insert(name.map(|header| header.value.clone()).unwrap_or_default());
            }
            None => denied += 1,
        }
    }
    let expected = ["", "bcrypt", "endpoint", "models", "networks", "plain", "scopes", "super"];
    assert_eq!(allowed, expected.map(str::to_owned).into());
    assert!(denied >= 8, "{denied} denials");
}

/// `SplitMix64`.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// 0 where there is nothing to choose from.
    fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.next() % u64::try_from(end.max(1)).unwrap()).unwrap()
    }

    /// One input, changed in one to four places.
    fn mutation(&mut self, all: &[Vec<u8>]) -> Vec<u8> {
        const TELLING: &[&[u8]] = &[
            b"\"",
            b"\\",
            b"/",
            b"..",
            b"%2e",
            b"%2F",
            b"\r\n",
            b"\n",
            b"\0",
            b",",
            b":",
            b";",
            b"=",
            b"&",
            b"?",
            b"#",
            b"{",
            b"}",
            b"[",
            b"]",
            b" ",
            b"\t",
            b"\xff",
            b"\xc0\xaf",
            b"\xc2\xa0",
            b"0",
            b"1",
            b"\"model\":\"x\",",
            b"Bearer ",
            b"--b1",
            b"null",
        ];
        let mut input = all[self.below(all.len())].clone();
        for _ in 0..=self.below(4) {
            let at = self.below(input.len() + 1);
            let end = at + self.below((input.len() - at).min(16) + 1);
            match self.below(6) {
                0 if at < input.len() => input[at] ^= 1 << self.below(8),
                1 => drop(input.drain(at..end)),
                2 => {
                    let part = input[at..end].to_vec();
                    let to = self.below(input.len() + 1);
                    drop(input.splice(to..to, part));
                }
                3 => {
                    let other = &all[self.below(all.len())];
                    let from = self.below(other.len() + 1);
                    let length = self.below((other.len() - from).min(64) + 1);
                    drop(input.splice(at..end, other[from..from + length].iter().copied()));
                }
                _ => drop(input.splice(at..at, TELLING[self.below(TELLING.len())].iter().copied())),
            }
        }
        input.truncate(MAX_BYTES);
        input
    }
}
