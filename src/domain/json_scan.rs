//! JSON (RFC 8259) read in one pass where it lies: what is asked for is handed out, everything else is checked and passed
//! over. No heap but for texts with escapes.
//!
//! A whole parser would do; for a prompt of some hundred kilobytes it takes ten times as long, and a check waits for it.
//! Tests hold this one against `serde_json`.

use std::borrow::Cow;

/// Deeper documents are refused: upstreams give up at very different depths.
pub(super) const MAX_DEPTH: usize = 128;

/// The bytes are not JSON, or nested too deeply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct NotJson;

/// A text as it stands between its quotes, escapes and all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct RawText<'a> {
    text: &'a str,
    has_escapes: bool,
}

impl<'a> RawText<'a> {
    /// What it means. Half of a surrogate pair means nothing.
    pub(super) fn decode(self) -> Result<Cow<'a, str>, NotJson> {
        if !self.has_escapes {
            return Ok(Cow::Borrowed(self.text));
        }
        let mut decoded = String::with_capacity(self.text.len());
        let mut rest = self.text;
        while let Some((plain, escape)) = rest.split_once('\\') {
            decoded.push_str(plain);
            let mut behind = escape.chars();
            let character = match behind.next().ok_or(NotJson)? {
                'b' => '\u{8}',
                'f' => '\u{c}',
                'n' => '\n',
                'r' => '\r',
                't' => '\t',
                'u' => {
                    let (character, length) = escaped_character(behind.as_str())?;
                    behind = behind.as_str().get(length..).ok_or(NotJson)?.chars();
                    character
                }
                itself => itself,
            };
            decoded.push(character);
            rest = behind.as_str();
        }
        decoded.push_str(rest);
        Ok(Cow::Owned(decoded))
    }
}

/// The character behind `\u`, and how many bytes that took.
fn escaped_character(behind: &str) -> Result<(char, usize), NotJson> {
    let unit = |text: Option<&str>| u16::from_str_radix(text.ok_or(NotJson)?, 16).map_err(|_| NotJson);
    let first = unit(behind.get(..4))?;
    if let Some(character) = char::from_u32(u32::from(first)) {
        return Ok((character, 4));
    }
    if behind.get(4..6) != Some("\\u") {
        return Err(NotJson);
    }
    let pair = [first, unit(behind.get(6..10))?];
    match char::decode_utf16(pair).next() {
        Some(Ok(character)) => Ok((character, 10)),
        _ => Err(NotJson),
    }
}

/// A place in a document.
#[derive(Debug, Clone)]
pub(super) struct Scanner<'a> {
    document: &'a str,
    at: usize,
    depth: usize,
}

impl<'a> Scanner<'a> {
    /// At its beginning.
    pub(super) fn new(document: &'a str) -> Self {
        Self { document, at: 0, depth: 0 }
    }

    /// The byte behind blanks, not yet taken; `None` at the end.
    pub(super) fn peek(&mut self) -> Option<u8> {
        let rest = self.document.as_bytes().get(self.at..)?;
        let blanks = rest.iter().position(|byte| !matches!(byte, b' ' | b'\t' | b'\n' | b'\r'))?;
        self.at += blanks;
        rest.get(blanks).copied()
    }

    /// Nothing but blanks is left.
    pub(super) fn end(&mut self) -> Result<(), NotJson> {
        if self.peek().is_none() { Ok(()) } else { Err(NotJson) }
    }

    /// Goes into an object or a list that begins with this byte.
    pub(super) fn enter(&mut self, opening: u8) -> Result<(), NotJson> {
        self.take(opening)?;
        self.depth += 1;
        if self.depth > MAX_DEPTH { Err(NotJson) } else { Ok(()) }
    }

    /// Whether there is another member or item; otherwise the object or list has been left, which ends with this byte.
    pub(super) fn goes_on(&mut self, closing: u8, is_first: bool) -> Result<bool, NotJson> {
        match self.peek() {
            Some(byte) if byte == closing => {
                self.at += 1;
                self.depth = self.depth.saturating_sub(1);
                Ok(false)
            }
            Some(_) if is_first => Ok(true),
            Some(b',') => {
                self.at += 1;
                // What stands behind a comma is no end.
                if self.peek() == Some(closing) { Err(NotJson) } else { Ok(true) }
            }
            _ => Err(NotJson),
        }
    }

    /// A member's name, with the colon behind it.
    pub(super) fn name(&mut self) -> Result<RawText<'a>, NotJson> {
        let name = self.text()?;
        self.take(b':')?;
        Ok(name)
    }

    /// A text.
    pub(super) fn text(&mut self) -> Result<RawText<'a>, NotJson> {
        self.take(b'"')?;
        let (start, mut has_escapes) = (self.at, false);
        loop {
            let rest = self.document.as_bytes().get(self.at..).ok_or(NotJson)?;
            let length = memchr::memchr2(b'"', b'\\', rest).ok_or(NotJson)?;
            let (plain, behind) = rest.split_at_checked(length).ok_or(NotJson)?;
            if has_control(plain) {
                return Err(NotJson);
            }
            self.at += length;
            if let [b'"', ..] = behind {
                let text = self.document.get(start..self.at).ok_or(NotJson)?;
                self.at += 1;
                return Ok(RawText { text, has_escapes });
            }
            has_escapes = true;
            self.at += match behind {
                [_, b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't', ..] => 2,
                [_, b'u', digits @ ..] => {
                    let digits = digits.first_chunk::<4>().ok_or(NotJson)?;
                    if !digits.iter().all(u8::is_ascii_hexdigit) {
                        return Err(NotJson);
                    }
                    6
                }
                _ => return Err(NotJson),
            };
        }
    }

    /// Passes over a value of any kind.
    pub(super) fn skip(&mut self) -> Result<(), NotJson> {
        match self.peek().ok_or(NotJson)? {
            b'"' => self.text().map(drop),
            b'{' => {
                self.enter(b'{')?;
                let mut is_first = true;
                while self.goes_on(b'}', is_first)? {
                    is_first = false;
                    self.name()?;
                    self.skip()?;
                }
                Ok(())
            }
            b'[' => {
                self.enter(b'[')?;
                let mut is_first = true;
                while self.goes_on(b']', is_first)? {
                    is_first = false;
                    self.skip()?;
                }
                Ok(())
            }
            b't' => self.word("true"),
            b'f' => self.word("false"),
            b'n' => self.word("null"),
            _ => self.number(),
        }
    }

    fn take(&mut self, expected: u8) -> Result<(), NotJson> {
        if self.peek() != Some(expected) {
            return Err(NotJson);
        }
        self.at += 1;
        Ok(())
    }

    fn word(&mut self, word: &str) -> Result<(), NotJson> {
        let rest = self.document.as_bytes().get(self.at..).unwrap_or_default();
        if !rest.starts_with(word.as_bytes()) {
            return Err(NotJson);
        }
        self.at += word.len();
        Ok(())
    }

    fn number(&mut self) -> Result<(), NotJson> {
        if self.next_is(b"-") {
            self.at += 1;
        }
        if self.next_is(b"0") {
            self.at += 1;
        } else {
            self.digits()?;
        }
        if self.next_is(b".") {
            self.at += 1;
            self.digits()?;
        }
        if self.next_is(b"eE") {
            self.at += 1;
            if self.next_is(b"+-") {
                self.at += 1;
            }
            self.digits()?;
        }
        Ok(())
    }

    fn digits(&mut self) -> Result<(), NotJson> {
        let rest = self.document.as_bytes().get(self.at..).unwrap_or_default();
        let count = rest.iter().take_while(|byte| byte.is_ascii_digit()).count();
        self.at += count;
        if count == 0 { Err(NotJson) } else { Ok(()) }
    }

    fn next_is(&self, one_of: &[u8]) -> bool {
        self.document.as_bytes().get(self.at).is_some_and(|byte| one_of.contains(byte))
    }
}

/// The least byte of all, so that many are looked at at once.
fn has_control(bytes: &[u8]) -> bool {
    bytes.iter().copied().fold(u8::MAX, u8::min) < b' '
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::Value;

    use super::*;

    fn whole(document: &str) -> Result<(), NotJson> {
        let mut scanner = Scanner::new(document);
        scanner.skip()?;
        scanner.end()
    }

    /// Of what is passed over, numbers of any size and halves of surrogate pairs are left to the upstream.
    fn is_json(document: &str) -> Option<bool> {
        match serde_json::from_str::<Value>(document) {
            Ok(_) => Some(true),
            Err(error) => {
                let text = error.to_string();
                let is_left = text.starts_with("number out of range")
                    || text.starts_with("lone leading surrogate")
                    || text.starts_with("unexpected end of hex escape")
                    || text.starts_with("recursion limit");
                (!is_left).then_some(false)
            }
        }
    }

    #[test]
    fn numbers_words_and_blanks_are_those_of_the_rfc() {
        for good in [
            "0",
            "-0",
            "10.50",
            "1e5",
            "1E+5",
            "-1.2e-3",
            " true ",
            "\r\n\tnull",
            "false",
            "[]",
            "{}",
            "[ ]",
            "1e999",
        ] {
            assert_eq!(whole(good), Ok(()), "{good:?}");
        }
        for bad in [
            "01",
            "+1",
            "1.",
            ".5",
            "1e",
            "1e+",
            "-",
            "0x1",
            "tru",
            "nul",
            "True",
            "[1,]",
            "[,1]",
            "[1 2]",
            "{\"a\"}",
            "{\"a\":1,}",
            "{,}",
            "\u{a0}1",
            "\u{c}1",
            "",
            " ",
            "1 1",
        ] {
            assert_eq!(whole(bad), Err(NotJson), "{bad:?}");
        }
    }

    #[test]
    fn texts_are_decoded() {
        let decoded = |document: &'static str| Scanner::new(document).text().and_then(RawText::decode);
        assert_eq!(decoded(r#""plain""#), Ok(Cow::Borrowed("plain")));
        assert_eq!(decoded(r#""\"\\\/\b\f\n\r\t""#).as_deref(), Ok("\"\\/\u{8}\u{c}\n\r\t"));
        assert_eq!(decoded(r#""\u00e9\ud83e\udd80x""#).as_deref(), Ok("é🦀x"));
        for bad in [r#""\ud800""#, r#""\udc00""#, r#""\ud800\u0041""#, r#""\ud800x""#] {
            assert_eq!(decoded(bad), Err(NotJson), "{bad}");
        }
        for bad in [r#""\x""#, r#""\u12""#, r#""\u+123""#, r#""\u12é4""#, "\"\n\"", "\"", r#""\"#] {
            assert!(Scanner::new(bad).text().is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn agrees_with_a_whole_parser(document in r#"[\[\]{}",:\\u0-9a-f eE.+\-trlsn\x00-\x1f]{0,24}"#) {
            if let Some(expected) = is_json(&document) {
                prop_assert_eq!(whole(&document).is_ok(), expected, "{:?}", document);
            }
        }

        #[test]
        fn agrees_with_a_whole_parser_about_damaged_documents(
            at in any::<prop::sample::Index>(), byte in any::<char>(), cut in any::<bool>(),
        ) {
            let good = r#"{"a":[1,-2.5e+3,true,null,"x\n\u00e9"],"b":{"c":{},"d":[[],[0]]},"":"é"}"#;
            let mut characters: Vec<char> = good.chars().collect();
            let at = at.index(characters.len());
            if cut { characters.truncate(at) } else { characters[at] = byte }
            let document: String = characters.into_iter().collect();
            if let Some(expected) = is_json(&document) {
                prop_assert_eq!(whole(&document).is_ok(), expected, "{:?}", document);
            }
        }

        #[test]
        fn texts_mean_what_a_whole_parser_says(text in "\\PC*|[\\x00-\\x7f]*", escaped in any::<bool>()) {
            let written = serde_json::to_string(&text).unwrap();
            let written = if escaped {
                let units: String = text.encode_utf16().map(|unit| format!("\\u{unit:04x}")).collect();
                format!("\"{units}\"")
            } else {
                written
            };
            let decoded = Scanner::new(&written).text().and_then(RawText::decode);
            prop_assert_eq!(decoded.as_deref(), Ok(text.as_str()));
        }
    }
}
