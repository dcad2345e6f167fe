//! The pages that follow from the table: `docs/settings.md` and `config/keyward.yaml`. They are compared here, and
//! written anew with `KEYWARD_REGENERATE=1 cargo test --lib config`.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::path::{Path, PathBuf};

use super::{Given, TABLE, file, load};

fn settings_page() -> String {
    let mut page = String::from(
        "# Settings\n\n\
         <!-- Written by `KEYWARD_REGENERATE=1 cargo test --lib config` from src/config/settings.rs. -->\n\n\
         Every setting is a flag, an environment variable and a key of the YAML file that `--config` or\n\
         `KEYWARD_CONFIG` names. A flag beats the environment, which beats the file, which beats the default. The file\n\
         nests at the first word: `grpc.listen` is `listen` under `grpc`. `keyward config print` shows what is in force\n\
         and where each value came from; `keyward config check` names every mistake.\n\n\
         Durations are written as `180ms`, `5s`, `24h`; sizes as `8MiB` or bytes; lists with commas, in the file as YAML\n\
         lists too.\n",
    );
    for setting in TABLE {
        write!(
            page,
            "\n## {}\n\n{}\n\n| flag | environment | file | default |\n| --- | --- | --- | --- |\n\
             | `--{} {}` | `{}` | `{}` | `{}` |\n",
            setting.flag,
            setting.help(),
            setting.flag,
            setting.form.replace('|', "\\|"),
            setting.variable(),
            setting.file_path(),
            setting.default,
        )
        .unwrap();
    }
    page
}

fn settings_file() -> String {
    let mut text = String::from(
        "# Every setting of Keyward with its default. Copy what you change and leave out the rest.\n\
         # Written by `KEYWARD_REGENERATE=1 cargo test --lib config` from src/config/settings.rs.\n",
    );
    let mut written = BTreeSet::new();
    for first in TABLE {
        let (group, key) = first.file_key();
        if !written.insert(group) {
            continue;
        }
        let indent = if key.is_some() { "  " } else { "" };
        text.push('\n');
        if key.is_some() {
            writeln!(text, "{group}:").unwrap();
        }
        for setting in TABLE.iter().filter(|setting| setting.file_key().0 == group) {
            let name = setting.file_key().1.unwrap_or_else(|| group.to_owned());
            comment(&mut text, indent, &setting.help());
            if setting.form == "LIST" {
                writeln!(text, "{indent}{name}:").unwrap();
                for item in setting.default.split(',') {
                    writeln!(text, "{indent}  - {item}").unwrap();
                }
            } else {
                writeln!(text, "{indent}{name}: {}", setting.default).unwrap();
            }
        }
    }
    text
}

/// The words in comment lines of at most 110 characters.
fn comment(text: &mut String, indent: &str, words: &str) {
    let mut line = format!("{indent}#");
    for word in words.split(' ') {
        if line.len() + 1 + word.len() > 110 {
            writeln!(text, "{line}").unwrap();
            line = format!("{indent}#");
        }
        line.push(' ');
        line.push_str(word);
    }
    writeln!(text, "{line}").unwrap();
}

fn in_repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn compare(path: &str, expected: &str) {
    let full = in_repository(path);
    if std::env::var_os("KEYWARD_REGENERATE").is_some() {
        std::fs::write(&full, expected).unwrap();
    }
    let found = std::fs::read_to_string(&full).unwrap_or_default();
    assert!(found == expected, "{path} is out of date: run KEYWARD_REGENERATE=1 cargo test --lib config");
}

#[test]
fn the_settings_page_says_what_the_table_says() {
    compare("docs/settings.md", &settings_page());
}

#[test]
fn the_example_file_says_what_the_table_says() {
    compare("config/keyward.yaml", &settings_file());
}

#[test]
fn the_example_file_has_every_key_and_equals_the_defaults() {
    let path = in_repository("config/keyward.yaml");
    let entries = file::read(&path).unwrap();
    for setting in TABLE {
        assert!(entries.contains_key(setting.flag), "{} is missing", setting.file_path());
    }
    let from_file = load(Given { file: Some(path), ..Given::default() }).unwrap().settings;
    let defaults = load(Given::default()).unwrap().settings;
    assert_eq!(format!("{from_file:?}"), format!("{defaults:?}"));
}
