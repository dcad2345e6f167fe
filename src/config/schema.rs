//! The JSON Schema of the settings file, from the same table as everything else.
//!
//! It says what keys there are, how they nest and what forms values have; what a value may be in detail is for
//! `keyward config check`, which reads it.

use serde_json::{Map, Value, json};

use super::settings::{Setting, TABLE};

/// Draft 2020-12.
pub fn schema() -> Value {
    let mut properties = Map::new();
    for setting in TABLE {
        let (group, key) = setting.file_key();
        let Some(key) = key else {
            properties.insert(group.to_owned(), property(setting));
            continue;
        };
        let group = properties.entry(group).or_insert_with(|| object(Map::new()));
        if let Some(members) = group.get_mut("properties").and_then(Value::as_object_mut) {
            members.insert(key, property(setting));
        }
    }
    let mut schema = object(properties);
    if let Some(members) = schema.as_object_mut() {
        members.insert("$schema".to_owned(), json!("https://json-schema.org/draft/2020-12/schema"));
        members.insert("title".to_owned(), json!("Settings of Keyward"));
    }
    schema
}

fn object(properties: Map<String, Value>) -> Value {
    json!({ "type": "object", "additionalProperties": false, "properties": properties })
}

fn property(setting: &Setting) -> Value {
    // YAML reads some texts as numbers or booleans; lists may be written as lists.
    let types = match setting.form {
        form if form.ends_with("|off") => json!(["string", "boolean"]),
        form if form.starts_with("LIST") => json!(["string", "array"]),
        _ => json!(["string", "integer"]),
    };
    let mut property = json!({
        "description": setting.help(),
        "type": types,
        "default": setting.default,
        "examples": [setting.form],
    });
    if let Some(members) = property.as_object_mut() {
        if setting.form.starts_with("LIST") {
            members.insert("items".to_owned(), json!({ "type": "string" }));
        }
        let words: Vec<&str> = setting.form.split('|').collect();
        let is_choice = words.len() > 1 && words.iter().all(|word| *word == word.to_lowercase());
        if is_choice && !words.contains(&"off") {
            members.insert("enum".to_owned(), json!(words));
        }
    }
    property
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_setting_is_in_its_place_with_its_help() {
        let schema = schema();
        for setting in TABLE {
            let pointer = match setting.file_key() {
                (group, Some(key)) => format!("/properties/{group}/properties/{key}"),
                (key, None) => format!("/properties/{key}"),
            };
            let found = schema.pointer(&pointer).unwrap_or_else(|| panic!("{pointer} is missing"));
            assert_eq!(found["description"], setting.help(), "{pointer}");
        }
        assert_eq!(schema["additionalProperties"], false);
        assert_eq!(schema.pointer("/properties/log/properties/format/enum"), Some(&json!(["text", "json"])));
    }
}
