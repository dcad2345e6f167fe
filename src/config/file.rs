//! The settings file: YAML, nested at the first word of each name, read into texts with their lines.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_saphyr::{Spanned, UserMessageFormatter};

use super::nearest::nearest;
use super::settings::{Setting, TABLE};

/// A settings file is a few kilobytes; a larger one is another file.
const MOST_BYTES: u64 = 1 << 20;

/// A text of the file.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) text: String,
    pub(super) line: u64,
}

/// Reads the file: what it says of each setting (by flag), or everything that is wrong with its form.
pub(super) fn read(path: &Path) -> Result<BTreeMap<&'static str, Entry>, Vec<String>> {
    let name = path.display();
    if path.as_os_str().is_empty() {
        return Err(vec!["the path in --config or KEYWARD_CONFIG is empty, expected a YAML file".to_owned()]);
    }
    let mut bytes = Vec::new();
    // The bound is in the reading, because a device or a pipe has no length to ask for.
    let reading = File::open(path).and_then(|file| file.take(MOST_BYTES + 1).read_to_end(&mut bytes));
    let length = reading.map_err(|error| vec![format!("{name}: can't be read: {error}")])?;
    if u64::try_from(length).is_ok_and(|length| length > MOST_BYTES) {
        return Err(vec![format!("{name}: is larger than 1 MiB, expected a settings file")]);
    }
    let text = String::from_utf8(bytes).map_err(|_| vec![format!("{name}: is not UTF-8 text")])?;
    parse(&name.to_string(), &text)
}

pub(super) fn parse(name: &str, text: &str) -> Result<BTreeMap<&'static str, Entry>, Vec<String>> {
    let options = serde_saphyr::options! {
        strict_booleans: true,
        leading_zero_numbers_as_strings: true,
        underscored_numbers_as_strings: true,
        with_snippet: false,
    };
    let root: Spanned<Node> = serde_saphyr::from_str_with_options(text, options).map_err(|error| {
        let message = error.without_snippet().render_with_formatter(&UserMessageFormatter);
        vec![format!("{name}: is not the expected YAML: {}", message.trim().replace('\n', " "))]
    })?;
    let mut walk = Walk { name, entries: BTreeMap::new(), mistakes: Vec::new() };
    match root.value {
        Node::Map(pairs) => pairs.into_iter().for_each(|(key, node)| walk.top(&key, node)),
        Node::Null => {}
        Node::Scalar(_) | Node::List(_) => {
            walk.mistakes.push(format!("{name}: expected keys and values, such as `grpc: {{listen: …}}`"));
        }
    }
    if walk.mistakes.is_empty() { Ok(walk.entries) } else { Err(walk.mistakes) }
}

struct Walk<'a> {
    name: &'a str,
    entries: BTreeMap<&'static str, Entry>,
    mistakes: Vec<String>,
}

impl Walk<'_> {
    fn top(&mut self, key: &Spanned<String>, node: Spanned<Node>) {
        let is_group =
            TABLE.iter().any(|setting| setting.file_key().0 == key.value && setting.file_key().1.is_some());
        match node.value {
            Node::Map(pairs) if is_group => {
                for (inner, node) in pairs {
                    self.leaf(&format!("{}.{}", key.value, inner.value), &inner, node);
                }
            }
            Node::Null if is_group => {}
            _ if is_group => {
                let example = keys_of(&key.value).join(", ");
                self.complain(key, &format!("{}: expected a map with keys of {example}", key.value));
            }
            _ => self.leaf(&key.value, key, node),
        }
    }

    fn leaf(&mut self, path: &str, key: &Spanned<String>, node: Spanned<Node>) {
        let Some(setting) = TABLE.iter().find(|setting| setting.file_path() == path) else {
            return self.unknown(path, key);
        };
        match text_of(node.value) {
            Some(text) => {
                self.entries.insert(setting.flag, Entry { text, line: line_of(key) });
            }
            None => self
                .complain(key, &format!("{path}: expected {}, in one value or a plain list", setting.form)),
        }
    }

    fn unknown(&mut self, path: &str, key: &Spanned<String>) {
        let known: Vec<String> = TABLE.iter().map(|setting| setting.file_path()).collect();
        // A misspelt group is named alone.
        let groups = known.iter().filter_map(|path| path.split_once('.')).map(|(group, _)| group);
        let advice = match nearest(path, known.iter().map(String::as_str).chain(groups)) {
            Some(near) => format!("did you mean {near}{}?", nesting(near)),
            None => match path.split_once('.').map(|(group, _)| keys_of(group)) {
                Some(keys) => format!("expected one of {}", keys.join(", ")),
                None => format!("expected one of {}", known.join(", ")),
            },
        };
        self.complain(key, &format!("unknown key {path}; {advice}"));
    }

    fn complain(&mut self, key: &Spanned<String>, what: &str) {
        self.mistakes.push(format!("{}: {what}", place(self.name, line_of(key))));
    }
}

/// `FILE:LINE`, or the file alone where the line is not known.
pub(super) fn place(name: &str, line: u64) -> String {
    if line == 0 { name.to_owned() } else { format!("{name}:{line}") }
}

fn line_of<T>(spanned: &Spanned<T>) -> u64 {
    spanned.referenced.line()
}

/// ` (listen under grpc)` for the path `grpc.listen`.
fn nesting(path: &str) -> String {
    path.split_once('.').map_or_else(String::new, |(group, key)| format!(" ({key} under {group})"))
}

fn keys_of(group: &str) -> Vec<String> {
    let in_group = |setting: &&&Setting| setting.file_key().0 == group;
    TABLE.iter().filter(in_group).filter_map(|setting| setting.file_key().1).collect()
}

/// A list is joined by commas, so an item can't have one.
fn text_of(node: Node) -> Option<String> {
    match node {
        Node::Scalar(text) => Some(text),
        Node::Null => Some("off".to_owned()),
        Node::List(nodes) if nodes.is_empty() => Some("none".to_owned()),
        Node::List(nodes) => {
            let items: Option<Vec<String>> = nodes.into_iter().map(|node| item_of(node.value)).collect();
            Some(items?.join(","))
        }
        Node::Map(_) => None,
    }
}

fn item_of(node: Node) -> Option<String> {
    match node {
        Node::Scalar(text) if !text.contains(',') => Some(text),
        Node::Scalar(_) | Node::Null | Node::List(_) | Node::Map(_) => None,
    }
}

enum Node {
    Null,
    Scalar(String),
    List(Vec<Spanned<Node>>),
    Map(Vec<(Spanned<String>, Spanned<Node>)>),
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(NodeVisitor)
    }
}

struct NodeVisitor;

impl<'de> Visitor<'de> for NodeVisitor {
    type Value = Node;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value, a list or a map")
    }

    fn visit_unit<E>(self) -> Result<Node, E> {
        Ok(Node::Null)
    }

    fn visit_none<E>(self) -> Result<Node, E> {
        Ok(Node::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Node, E> {
        Ok(Node::Scalar(value.to_string()))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Node, E> {
        Ok(Node::Scalar(value.to_string()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Node, E> {
        Ok(Node::Scalar(value.to_string()))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Node, E> {
        Ok(Node::Scalar(value.to_string()))
    }

    fn visit_str<E>(self, value: &str) -> Result<Node, E> {
        Ok(Node::Scalar(value.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Node, A::Error> {
        let mut nodes = Vec::new();
        while let Some(node) = items.next_element()? {
            nodes.push(node);
        }
        Ok(Node::List(nodes))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut pairs: A) -> Result<Node, A::Error> {
        let mut nodes = Vec::new();
        while let Some(pair) = pairs.next_entry()? {
            nodes.push(pair);
        }
        Ok(Node::Map(nodes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(text: &str) -> Vec<(&'static str, String, u64)> {
        let entries = parse("k.yaml", text).unwrap();
        entries.into_iter().map(|(flag, entry)| (flag, entry.text, entry.line)).collect()
    }

    fn mistakes(text: &str) -> String {
        parse("k.yaml", text).unwrap_err().join("\n")
    }

    #[test]
    fn values_of_every_kind_become_texts() {
        assert_eq!(texts(""), []);
        assert_eq!(texts("# nothing\n"), []);
        assert_eq!(texts("grpc:\n"), []);
        assert_eq!(texts("\ngrpc:\n  listen: 127.0.0.1:1\n"), [("grpc-listen", "127.0.0.1:1".into(), 3)]);
        assert_eq!(texts("key: {prefix_length: 12}"), [("key-prefix-length", "12".into(), 1)]);
        assert_eq!(texts("forward: {credentials: true}"), [("forward-credentials", "true".into(), 1)]);
        assert_eq!(texts("forward: {credentials: off}"), [("forward-credentials", "off".into(), 1)]);
        assert_eq!(texts("new: {key_prefix: 007}"), [("new-key-prefix", "007".into(), 1)]);
        assert_eq!(texts("redis: null"), [("redis", "off".into(), 1)]);
        assert_eq!(texts("redis:"), [("redis", "off".into(), 1)]);
        assert_eq!(texts("on: {unavailable: error}"), [("on-unavailable", "error".into(), 1)]);
        assert_eq!(
            texts("credential:\n  sources: [bearer, api-key]"),
            [("credential-sources", "bearer,api-key".into(), 2)]
        );
        assert_eq!(texts("response: {headers: []}"), [("response-headers", "none".into(), 1)]);
    }

    #[test]
    fn unknown_keys_are_all_named_with_their_line_and_the_nearest_known_one() {
        let text = mistakes("cache:\n  recrd_ttl: 1s\ngrcp: {listen: x}\ngrpc_listen: y\nstor: z\n");
        assert_eq!(text.lines().count(), 4, "{text}");
        assert!(
            text.contains("k.yaml:2: unknown key cache.recrd_ttl; did you mean cache.record_ttl"),
            "{text}"
        );
        assert!(
            text.contains("k.yaml:4: unknown key grpc_listen; did you mean grpc.listen (listen under grpc)?"),
            "{text}"
        );
        assert!(text.contains("k.yaml:5: unknown key stor; did you mean store?"), "{text}");
        assert!(mistakes("cache: {zzzzzzzz: 1}").contains("expected one of secret_file, record_ttl"));
    }

    /// The file may hold passwords, and errors go to logs.
    #[test]
    fn errors_about_the_form_name_the_line_and_repeat_no_value() {
        for (text, line) in [
            ("store: a\nredis: \"redis://:hunter2@h", 2),
            ("store: hunter2\n bad: x", 2),
            ("store: !!int hunter2", 1),
            ("store: hunter2\nstore: hunter2", 2),
            ("{a: hunter2: b}", 1),
            ("store: {a: hunter2}", 1),
        ] {
            let text = mistakes(text);
            assert!(!text.contains("hunter2"), "{text}");
            assert!(text.contains(&format!("line {line}")) || text.contains(&format!(":{line}:")), "{text}");
        }
    }

    #[test]
    fn forms_that_mean_nothing_are_refused() {
        for text in [
            "- a",
            "x",
            "grpc: 5",
            "store: {a: b}",
            "grpc: {listen: {a: b}}",
            "grpc: {listen: [[a]]}",
            "credential: {sources: ['a,b']}",
            "grpc: {listen: a, listen: b}",
            "grpc: {",
            "store: a\nstore: b",
            "\t- :",
            "a: 1\n---\nb: 2",
        ] {
            assert!(parse("k.yaml", text).is_err(), "{text:?}");
        }
    }
}
