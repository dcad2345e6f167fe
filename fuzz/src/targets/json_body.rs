//! The models of a JSON body, against `serde_json`.

use std::fmt;

use keyward::domain::body::{self, Body, BodyDefect};
use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, Visitor};

pub(crate) fn run(data: &[u8]) {
    let mut found = Vec::new();
    let body = Body { bytes: Some(data), is_whole: true, encoding: "", content_type: "application/json" };
    let outcome = body::models(&body, false, &mut |model| found.push(model.to_owned()));
    if let Some((models, has_main)) = expected(data) {
        let wanted = if has_main { Ok(()) } else { Err(BodyDefect::NoModel) };
        assert_eq!((outcome, found), (wanted, models));
    } else {
        let defect = outcome.expect_err("a body that serde_json or the rules refuse");
        assert!(found.is_empty(), "{found:?} although {defect:?}");
        assert_ne!(defect, BodyDefect::NoModel, "a body that can't be read is not one that names no model");
    }
}

/// The models in their order, and whether `model` itself is there; `None` where the body has to be refused.
fn expected(data: &[u8]) -> Option<(Vec<String>, bool)> {
    let text = std::str::from_utf8(data).ok()?;
    if depth(text) > 128 {
        return None;
    }
    let Names(names) = serde_json::from_str(text).ok()?;
    for field in ["model", "models", "fallbacks"] {
        let spellings: Vec<&String> = names.iter().filter(|name| folded(name) == field).collect();
        if spellings.len() > 1 || spellings.iter().any(|name| *name != field) {
            return None;
        }
    }
    let Values { model, models, fallbacks } = serde_json::from_str(text).ok()?;
    let has_main = names.iter().any(|name| name == "model");
    // The lists come in the order of the document.
    let mut found: Vec<String> = model.into_iter().collect();
    for name in &names {
        let list = match name.as_str() {
            "models" => &models,
            "fallbacks" => &fallbacks,
            _ => continue,
        };
        if list.len() > 64 {
            return None;
        }
        found.extend(list.iter().cloned());
    }
    found.iter().all(|model| model.len() <= 512).then_some((found, has_main))
}

/// Without case in any script, as the most generous reader does it.
fn folded(name: &str) -> String {
    name.to_uppercase().to_lowercase()
}

/// How deeply objects and lists stand in each other, if this is JSON.
fn depth(text: &str) -> usize {
    let (mut depth, mut deepest, mut in_text, mut escaped) = (0_usize, 0, false, false);
    for byte in text.bytes() {
        match (in_text, byte) {
            (true, _) if escaped => escaped = false,
            (true, b'\\') => escaped = true,
            (_, b'"') => in_text = !in_text,
            (false, b'{' | b'[') => {
                depth += 1;
                deepest = deepest.max(depth);
            }
            (false, b'}' | b']') => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    deepest
}

/// The names of an object, each as often as it is there.
struct Names(Vec<String>);

impl<'de> Deserialize<'de> for Names {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Object;
        impl<'de> Visitor<'de> for Object {
            type Value = Names;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut members: A) -> Result<Names, A::Error> {
                let mut names = Vec::new();
                while let Some((name, IgnoredAny)) = members.next_entry()? {
                    names.push(name);
                }
                Ok(Names(names))
            }
        }
        deserializer.deserialize_map(Object)
    }
}

#[derive(Deserialize)]
struct Values {
    #[serde(default, deserialize_with = "text")]
    model: Option<String>,
    #[serde(default)]
    models: Vec<String>,
    #[serde(default)]
    fallbacks: Vec<String>,
}

/// A text that is there; `null` is none.
fn text<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    String::deserialize(deserializer).map(Some)
}
