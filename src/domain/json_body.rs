//! The models that a JSON body names: one pass over the bytes, nothing is kept but the names.
//!
//! Strict, because leniency is where two readers differ: exactly one object, UTF-8, nothing behind it, no name twice that
//! any reader could take for `model`. Readers that compare names without case (Go's) are taken into account.

use std::borrow::Cow;

use super::body::BodyDefect;
use super::json_scan::{NotJson, Scanner};

/// Longest name of a model.
const MAX_MODEL_BYTES: usize = 512;

/// Most models in a list of fallbacks.
const MAX_FALLBACKS: usize = 64;

/// The fields that name models: the one that is asked for, and those that routers may turn to instead.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Field {
    Model,
    /// `models` as `OpenRouter` has it, `fallbacks` as `LiteLLM` does.
    Fallbacks(usize),
}

const FALLBACKS: [&str; 2] = ["models", "fallbacks"];

impl From<NotJson> for BodyDefect {
    fn from(NotJson: NotJson) -> Self {
        Self::Unreadable
    }
}

/// Calls `each` with every model that the body names, the one in `model` first; also with fallbacks of a body without it,
/// because path or route may name the main one.
pub(super) fn models(bytes: &[u8], each: &mut dyn FnMut(&str)) -> Result<(), BodyDefect> {
    let text = std::str::from_utf8(bytes).map_err(|_| BodyDefect::Unreadable)?;
    let mut found = Found::default();
    let mut scanner = Scanner::new(text);
    scanner.enter(b'{')?;
    let mut is_first = true;
    while scanner.goes_on(b'}', is_first)? {
        is_first = false;
        found.read_member(&mut scanner)?;
    }
    scanner.end()?;
    found.model.iter().chain(&found.fallbacks).for_each(|model| each(model));
    found.model.map(drop).ok_or(BodyDefect::NoModel)
}

#[derive(Default)]
struct Found<'a> {
    model: Option<Cow<'a, str>>,
    fallbacks: Vec<Cow<'a, str>>,
    has_fallbacks: [bool; FALLBACKS.len()],
}

impl<'a> Found<'a> {
    fn read_member(&mut self, scanner: &mut Scanner<'a>) -> Result<(), BodyDefect> {
        let name = scanner.name()?.decode()?;
        match field(&name) {
            None => scanner.skip()?,
            Some((_, is_exact)) if !is_exact => return Err(BodyDefect::Duplicate),
            Some((Field::Model, _)) => {
                if self.model.is_some() {
                    return Err(BodyDefect::Duplicate);
                }
                self.model = Some(model(scanner)?);
            }
            Some((Field::Fallbacks(which), _)) => {
                let seen = self.has_fallbacks.get_mut(which);
                if seen.is_none_or(|seen| std::mem::replace(seen, true)) {
                    return Err(BodyDefect::Duplicate);
                }
                self.read_fallbacks(scanner)?;
            }
        }
        Ok(())
    }

    fn read_fallbacks(&mut self, scanner: &mut Scanner<'a>) -> Result<(), BodyDefect> {
        if scanner.peek() != Some(b'[') {
            scanner.skip()?;
            return Err(BodyDefect::WrongType);
        }
        scanner.enter(b'[')?;
        let mut count = 0;
        while scanner.goes_on(b']', count == 0)? {
            count += 1;
            let model = model(scanner)?;
            if count > MAX_FALLBACKS {
                return Err(BodyDefect::WrongType);
            }
            self.fallbacks.push(model);
        }
        Ok(())
    }
}

/// The name of a model: a text that is not too long.
fn model<'a>(scanner: &mut Scanner<'a>) -> Result<Cow<'a, str>, BodyDefect> {
    if scanner.peek() != Some(b'"') {
        scanner.skip()?;
        return Err(BodyDefect::WrongType);
    }
    let model = scanner.text()?.decode()?;
    if model.len() > MAX_MODEL_BYTES { Err(BodyDefect::WrongType) } else { Ok(model) }
}

/// Which field a name is to the most generous reader, and whether it is spelled as it should be.
fn field(name: &str) -> Option<(Field, bool)> {
    let is = |field: &str| folds_to(name, field);
    if is("model") {
        return Some((Field::Model, name == "model"));
    }
    let which = FALLBACKS.iter().position(|field| is(field))?;
    Some((Field::Fallbacks(which), FALLBACKS.get(which).is_some_and(|field| *field == name)))
}

/// Go's rule: letters in any case, and the two that fold to ASCII letters from outside (the long s and the Kelvin sign).
fn folds_to(name: &str, field: &str) -> bool {
    let folded = name.chars().map(|letter| match letter {
        '\u{17f}' => 's',
        '\u{212a}' => 'k',
        other => other.to_ascii_lowercase(),
    });
    folded.eq(field.chars())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::Value;

    use super::*;

    fn of(body: &[u8]) -> Result<Vec<String>, BodyDefect> {
        let mut found = Vec::new();
        models(body, &mut |model| found.push(model.to_owned()))?;
        Ok(found)
    }

    fn named(body: &str) -> Result<Vec<String>, BodyDefect> {
        of(body.as_bytes())
    }

    #[test]
    fn the_model_is_found_in_any_order_and_through_escapes() {
        for (body, expected) in [
            (r#"{"model":"gpt-4o"}"#, vec!["gpt-4o"]),
            (r#" { "messages" : [{"model":"inner","x":{"model":1}}], "model" : "gpt-4o" } "#, vec!["gpt-4o"]),
            (r#"{"\u006dodel":"gpt\u002d4o"}"#, vec!["gpt-4o"]),
            (r#"{"a":"\"model\":\"x\"","model":"m"}"#, vec!["m"]),
            (r#"{"models":["a","b"],"model":"m","fallbacks":["c"]}"#, vec!["m", "a", "b", "c"]),
            (r#"{"model":"","n":-1.5e3,"t":true,"u":null}"#, vec![""]),
        ] {
            assert_eq!(named(body), Ok(expected.iter().map(ToString::to_string).collect()), "{body}");
        }
    }

    #[test]
    fn what_two_readers_could_read_differently_is_refused() {
        use BodyDefect::{Duplicate, NoModel, Unreadable, WrongType};
        for (body, expected) in [
            (r#"{"model":"a","model":"b"}"#, Duplicate),
            (r#"{"model":"a","model":"a"}"#, Duplicate),
            (r#"{"model":"a","\u006dodel":"b"}"#, Duplicate),
            (r#"{"model":"a","MODEL":"b"}"#, Duplicate),
            (r#"{"Model":"a"}"#, Duplicate),
            (r#"{"model":"a","model\u017f":["b"]}"#, Duplicate),
            (r#"{"model":"a","fallbac\u212as":["b"]}"#, Duplicate),
            (r#"{"model":"a","models":["b"],"models":["c"]}"#, Duplicate),
            (r#"{"model":null}"#, WrongType),
            (r#"{"model":["a"]}"#, WrongType),
            (r#"{"model":{"model":"a"}}"#, WrongType),
            (r#"{"model":7}"#, WrongType),
            (r#"{"model":"a","models":"b"}"#, WrongType),
            (r#"{"model":"a","fallbacks":[{"gpt":["b"]}]}"#, WrongType),
            (r#"{"model":"a","models":["b",1]}"#, WrongType),
            (r#"{"messages":[]}"#, NoModel),
            (r#"{"models":["a"]}"#, NoModel),
            ("", Unreadable),
            ("[]", Unreadable),
            (r#""model""#, Unreadable),
            (r#"{"model":"a"} {"model":"b"}"#, Unreadable),
            (r#"{"model":"a"}x"#, Unreadable),
            (r#"{"model":"a",}"#, Unreadable),
            (r#"{"model":"a"/* */}"#, Unreadable),
            (r"{'model':'a'}", Unreadable),
            (r#"{model:"a"}"#, Unreadable),
            (r#"{"model":"a","x":NaN}"#, Unreadable),
            (r#"{"model":"a","x":01}"#, Unreadable),
            ("{\"model\":\"a\",\"x\":\"\n\"}", Unreadable),
            (r#"{"model":"\ud800"}"#, Unreadable),
            ("\u{feff}{\"model\":\"a\"}", Unreadable),
            (r#"{"model":"a""#, Unreadable),
        ] {
            assert_eq!(named(body), Err(expected), "{body}");
        }
        assert_eq!(of(b"{\"model\":\"a\",\"x\":\"\xff\"}"), Err(Unreadable));
        assert_eq!(of(b"{\0\"\0m\0"), Err(Unreadable), "UTF-16");
        assert_eq!(named(&format!(r#"{{"model":"{}"}}"#, "x".repeat(513))), Err(WrongType));
    }

    #[test]
    fn depth_is_bounded_and_brackets_in_strings_do_not_count() {
        let nested =
            |depth: usize| format!(r#"{{"x":{}{},"model":"m"}}"#, "[".repeat(depth), "]".repeat(depth));
        assert!(named(&nested(127)).is_ok());
        assert_eq!(named(&nested(128)), Err(BodyDefect::Unreadable));
        let quoted = format!(r#"{{"x":"{}","y":"\\\"{{{{","model":"m"}}"#, "[".repeat(1000));
        assert!(named(&quoted).is_ok());
    }

    fn any_json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            "[a-c\"\\\\{}\\[\\]é]{0,6}".prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 32, 4, |inner| {
            let name = prop_oneof![Just("model".to_owned()), Just("models".to_owned()), "[a-cM\"\\\\]{0,4}"];
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::vec((name, inner), 0..5)
                    .prop_map(|members| Value::Object(members.into_iter().collect())),
            ]
        })
    }

    proptest! {
        /// A whole parser as the second reader.
        #[test]
        fn agrees_with_a_whole_parse(document in any_json(), pretty in any::<bool>()) {
            let text = if pretty { serde_json::to_string_pretty(&document) } else { serde_json::to_string(&document) }.unwrap();
            let expected = document.get("model").and_then(Value::as_str);
            match named(&text) {
                Ok(found) => prop_assert_eq!(found.first().map(String::as_str), expected),
                Err(BodyDefect::NoModel) => prop_assert!(document.is_object() && document.get("model").is_none()),
                Err(BodyDefect::Unreadable) => prop_assert!(!document.is_object()),
                Err(_) => {}
            }
        }

        #[test]
        fn any_bytes_are_refused_without_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = of(&bytes);
        }

        /// A cut document never names a model.
        #[test]
        fn no_part_of_a_document_is_one(document in any_json(), keep in 0.0_f64..1.0) {
            let text = serde_json::to_string(&document).unwrap();
            let length = text.len();
            #[allow(clippy::as_conversions, clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss, reason = "a share of a short text")]
            let cut = (length as f64 * keep) as usize;
            if cut < length && document.is_object() {
                prop_assert!(of(&text.as_bytes()[..cut]).is_err());
            }
        }
    }
}
