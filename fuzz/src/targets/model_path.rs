//! Which paths take a model, against a slow reading of the same patterns.
//!
//! The first line is the list of patterns (empty: the standard ones), the second one the path.

use keyward::domain::model_path::{ModelPaths, STANDARD_MODEL_PATHS, TakesModel};
use keyward::domain::path::is_ambiguous;

use super::{decoded, lines};

pub(crate) fn run(data: &[u8]) {
    let Some((patterns, path)) = lines(data) else { return };
    let path = path.split('\n').next().unwrap_or_default();
    let patterns = if patterns.is_empty() { STANDARD_MODEL_PATHS } else { patterns };
    let parsed: Result<ModelPaths, _> = patterns.parse();
    let read = naive_patterns(patterns);
    assert_eq!(parsed.is_ok(), read.is_some(), "{patterns:?}");
    let (Ok(parsed), Some(read)) = (parsed, read) else { return };
    assert_eq!(parsed.to_string().parse(), Ok(parsed.clone()), "what is printed is read again");
    if is_ambiguous(path) {
        // Nobody asks then, but nothing may panic.
        let _ = parsed.of(path);
        return;
    }
    let means = String::from_utf8(decoded(path).expect("not ambiguous")).expect("not ambiguous");
    let expected = read.iter().find_map(|pattern| naive_match(pattern, &means));
    assert_eq!(parsed.of(path), expected, "{patterns:?} {path:?}");
}

fn naive_patterns(text: &str) -> Option<Vec<Vec<String>>> {
    if text.trim() == "none" {
        return Some(Vec::new());
    }
    text.split(',').map(|pattern| naive_pattern(pattern.trim())).collect()
}

fn naive_pattern(pattern: &str) -> Option<Vec<String>> {
    let segments: Vec<String> = pattern.strip_prefix('/')?.split('/').map(str::to_owned).collect();
    let mut models = 0;
    for (index, segment) in segments.iter().enumerate() {
        match segment.as_str() {
            "" => return None,
            "{model}" | "{model}:*" => models += 1,
            "*" => {}
            "**" if index + 1 == segments.len() => {}
            literal if literal.contains(['*', '{', '}', '?', '#', '%', ' ']) => return None,
            _ => {}
        }
    }
    (models <= 1).then_some(segments)
}

fn naive_match(pattern: &[String], path: &str) -> Option<TakesModel> {
    let path = path.strip_prefix('/')?.trim_end_matches('/');
    let segments: Vec<&str> = path.split('/').collect();
    let takes_rest = pattern.last().is_some_and(|last| last == "**");
    let pattern = if takes_rest { &pattern[..pattern.len() - 1] } else { pattern };
    if segments.len() < pattern.len() || (!takes_rest && segments.len() > pattern.len()) {
        return None;
    }
    let mut named = None;
    for (wanted, segment) in pattern.iter().zip(&segments) {
        match wanted.as_str() {
            "*" | "{model}" | "{model}:*" if segment.is_empty() => return None,
            "*" => {}
            "{model}" => named = Some((*segment).to_owned()),
            "{model}:*" => {
                let colon = segment.rfind(':').filter(|colon| *colon > 0)?;
                named = Some(segment[..colon].to_owned());
            }
            literal if literal.eq_ignore_ascii_case(segment) => {}
            _ => return None,
        }
    }
    let lower: Vec<String> = segments.iter().map(|segment| segment.to_ascii_lowercase()).collect();
    let takes_forms = lower.iter().any(|segment| segment == "images" || segment == "audio");
    Some(TakesModel { named, takes_forms })
}
