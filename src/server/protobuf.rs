//! Protocol Buffers' wire format, as far as a check needs it: fields are read where they lie, and written where they go.
//!
//! <https://protobuf.dev/programming-guides/encoding/>. Generated code makes a tree of strings and maps of every message;
//! for a check that costs more than deciding it, and most of the tree is never looked at.

use thiserror::Error;

/// The bytes are no message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum Malformed {
    /// They end in the middle of a field.
    #[error("the message is cut short")]
    CutShort,
    /// A number of more than 64 bits, a field without a number, a wire type that does not exist.
    #[error("the message has a field that is none")]
    NoField,
    /// A field of another type than its number has.
    #[error("the message has a field of another type")]
    OtherType,
    /// A group: deprecated before Envoy was written, so no sender of ours has any.
    #[error("the message has a group")]
    Group,
    /// A text that is no UTF-8.
    #[error("the message has a text that is not UTF-8")]
    NoText,
}

/// The value of one field.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Value<'a> {
    /// Text, bytes, or a message.
    Bytes(&'a [u8]),
    /// A number of whatever form.
    Number,
}

impl<'a> Value<'a> {
    /// Of a field that holds bytes or a message.
    pub fn bytes(self) -> Result<&'a [u8], Malformed> {
        match self {
            Self::Bytes(bytes) => Ok(bytes),
            Self::Number => Err(Malformed::OtherType),
        }
    }

    /// Of a field that holds text.
    pub fn text(self) -> Result<&'a str, Malformed> {
        std::str::from_utf8(self.bytes()?).map_err(|_| Malformed::NoText)
    }

    /// The fields of a field that holds a message.
    pub fn message(self) -> Result<Fields<'a>, Malformed> {
        self.bytes().map(Fields::new)
    }
}

/// The fields of one message, as they come. A number may come several times: of single fields the last one counts, of
/// messages all do, one on top of the other.
#[derive(Debug, Clone)]
pub struct Fields<'a> {
    rest: &'a [u8],
}

impl<'a> Fields<'a> {
    /// Of these bytes.
    pub const fn new(message: &'a [u8]) -> Self {
        Self { rest: message }
    }

    fn number(&mut self) -> Result<u64, Malformed> {
        if let [byte @ 0..=0x7f, rest @ ..] = self.rest {
            self.rest = rest;
            return Ok(u64::from(*byte));
        }
        self.long_number()
    }

    fn long_number(&mut self) -> Result<u64, Malformed> {
        let mut number = 0_u64;
        for shift in (0..64).step_by(7) {
            let [byte, rest @ ..] = self.rest else { return Err(Malformed::CutShort) };
            self.rest = rest;
            let bits = u64::from(byte & 0x7f);
            if shift == 63 && *byte > 1 {
                return Err(Malformed::NoField);
            }
            number |= bits << shift;
            if byte & 0x80 == 0 {
                return Ok(number);
            }
        }
        Err(Malformed::NoField)
    }

    fn take(&mut self, length: u64) -> Result<&'a [u8], Malformed> {
        let length = usize::try_from(length).map_err(|_| Malformed::CutShort)?;
        let (taken, rest) = self.rest.split_at_checked(length).ok_or(Malformed::CutShort)?;
        self.rest = rest;
        Ok(taken)
    }

    fn field(&mut self) -> Result<(u32, Value<'a>), Malformed> {
        let key = u32::try_from(self.number()?).map_err(|_| Malformed::NoField)?;
        let value = match key & 7 {
            0 => {
                self.number()?;
                Value::Number
            }
            1 => {
                self.take(8)?;
                Value::Number
            }
            2 => {
                let length = self.number()?;
                Value::Bytes(self.take(length)?)
            }
            3 | 4 => return Err(Malformed::Group),
            5 => {
                self.take(4)?;
                Value::Number
            }
            _ => return Err(Malformed::NoField),
        };
        match key >> 3 {
            0 => Err(Malformed::NoField),
            number => Ok((number, value)),
        }
    }
}

/// Number and value. After an error there is nothing more.
impl<'a> Iterator for Fields<'a> {
    type Item = Result<(u32, Value<'a>), Malformed>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let field = self.field();
        if field.is_err() {
            self.rest = &[];
        }
        Some(field)
    }
}

/// How many bytes a field takes that holds so many.
pub fn field_length(number: u32, length: usize) -> usize {
    number_length(key(number)).saturating_add(number_length(as_number(length))).saturating_add(length)
}

/// Writes a field that holds bytes, text or a message.
pub fn put_bytes(to: &mut Vec<u8>, number: u32, bytes: &[u8]) {
    put_head(to, number, bytes.len());
    to.extend_from_slice(bytes);
}

/// Writes what stands before so many bytes of a field.
pub fn put_head(to: &mut Vec<u8>, number: u32, length: usize) {
    put_number(to, key(number));
    put_number(to, as_number(length));
}

fn put_number(to: &mut Vec<u8>, mut number: u64) {
    while number > 0x7f {
        to.push(low_bits(number) | 0x80);
        number >>= 7;
    }
    to.push(low_bits(number));
}

/// The key of a field whose value has a length.
fn key(number: u32) -> u64 {
    u64::from(number) << 3 | 2
}

fn low_bits(number: u64) -> u8 {
    u8::try_from(number & 0x7f).unwrap_or_default()
}

fn as_number(length: usize) -> u64 {
    u64::try_from(length).unwrap_or(u64::MAX)
}

fn number_length(number: u64) -> usize {
    let bits = usize::try_from((number | 1).ilog2()).unwrap_or_default();
    bits / 7 + 1
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn fields(bytes: &[u8]) -> Result<Vec<(u32, Value<'_>)>, Malformed> {
        Fields::new(bytes).collect()
    }

    #[test]
    fn what_is_no_message_is_refused_by_name() {
        for (bytes, expected) in [
            (&[0x0a][..], Malformed::CutShort),
            (&[0x0a, 2, 1], Malformed::CutShort),
            (&[0x80], Malformed::CutShort),
            (&[0x09, 1, 2, 3], Malformed::CutShort),
            (&[0x02, 0], Malformed::NoField),
            (&[0x0e], Malformed::NoField),
            (&[0x0b, 0x0c], Malformed::Group),
            (&[0x0c], Malformed::Group),
            (&[8, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2], Malformed::NoField),
            (&[0xff, 0xff, 0xff, 0xff, 0x7f, 0], Malformed::NoField),
        ] {
            assert_eq!(fields(bytes), Err(expected), "{bytes:x?}");
        }
        assert_eq!(Value::Number.bytes(), Err(Malformed::OtherType));
        assert_eq!(Value::Bytes(&[0xff]).text(), Err(Malformed::NoText));
    }

    #[test]
    fn after_an_error_there_is_nothing_more() {
        let mut fields = Fields::new(&[0x0e, 0x0a, 1, b'x']);
        assert!(fields.next().is_some_and(|field| field.is_err()));
        assert!(fields.next().is_none());
    }

    #[test]
    fn numbers_of_every_form_are_passed_over() {
        let bytes = [8, 0xff, 1, 0x11, 1, 2, 3, 4, 5, 6, 7, 8, 0x1d, 1, 2, 3, 4, 0x22, 1, b'x'];
        let expected =
            vec![(1, Value::Number), (2, Value::Number), (3, Value::Number), (4, Value::Bytes(b"x"))];
        assert_eq!(fields(&bytes), Ok(expected));
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_and_as_long_as_announced(
            number in 1_u32..=0x1fff_ffff, bytes in prop::collection::vec(any::<u8>(), 0..300),
        ) {
            let mut written = Vec::new();
            put_bytes(&mut written, number, &bytes);
            prop_assert_eq!(written.len(), field_length(number, bytes.len()));
            prop_assert_eq!(fields(&written), Ok(vec![(number, Value::Bytes(&bytes))]));
        }

        #[test]
        fn foreign_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            let _ = fields(&bytes);
        }
    }
}
