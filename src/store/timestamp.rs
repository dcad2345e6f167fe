//! Timestamps as text, for SQLite: `YYYY-MM-DD HH:MM:SS.ffffff` in UTC, as the platform writes them.
//!
//! `T`, a missing fraction and `Z` or an offset are read too, and PostgreSQL's `infinity`. What can't be read is `None`
//! and never a guess.

use jiff::SignedDuration;
use jiff::civil::DateTime;

use crate::domain::time::Timestamp;

const EPOCH: DateTime = DateTime::constant(1970, 1, 1, 0, 0, 0, 0);

/// Reads a column's text.
pub(super) fn parse(text: &str) -> Option<Timestamp> {
    match text {
        "infinity" => return Some(Timestamp::INFINITY),
        "-infinity" => return Some(Timestamp::NEGATIVE_INFINITY),
        _ => {}
    }
    let (local, offset) = split_offset(text)?;
    // jiff's own type for moments ends at 9999-12-30, short of the 9999-12-31 that means "never" in many tables.
    let since_epoch = local.parse::<DateTime>().ok()?.duration_since(EPOCH).checked_sub(offset)?;
    i64::try_from(since_epoch.as_micros()).ok().map(Timestamp::from_microseconds)
}

/// Writes a column's text; what lies outside the years 1 to 9999 is infinite.
pub(super) fn format(timestamp: Timestamp) -> String {
    let microseconds = timestamp.as_microseconds();
    match EPOCH.checked_add(SignedDuration::from_micros(microseconds)) {
        Ok(at) if at.year() >= 1 => {
            let micros = at.subsec_nanosecond() / 1000;
            let (date, time) = (at.date(), at.time());
            let (hour, minute, second) = (time.hour(), time.minute(), time.second());
            format!("{date} {hour:02}:{minute:02}:{second:02}.{micros:06}")
        }
        _ if microseconds < 0 => "-infinity".to_owned(),
        _ => "infinity".to_owned(),
    }
}

/// The local part, and what it is ahead of UTC.
fn split_offset(text: &str) -> Option<(&str, SignedDuration)> {
    if !text.is_ascii() || text.contains('[') {
        return None;
    }
    if let Some(local) = text.strip_suffix(['Z', 'z']) {
        return Some((local, SignedDuration::ZERO));
    }
    // Behind the date: the hyphens within it are no signs.
    let Some(at) = text.rfind(['+', '-']).filter(|at| *at > 10) else {
        return Some((text, SignedDuration::ZERO));
    };
    let (local, offset) = text.split_at_checked(at)?;
    let (sign, digits) = offset.split_at_checked(1)?;
    let digits: String = digits.chars().filter(|c| *c != ':').collect();
    let (hours, minutes) = match digits.len() {
        2 => (digits.parse::<u8>().ok()?, 0),
        4 => (digits.get(..2)?.parse::<u8>().ok()?, digits.get(2..)?.parse::<u8>().ok()?),
        _ => return None,
    };
    if hours > 23 || minutes > 59 {
        return None;
    }
    let ahead = SignedDuration::from_mins(i64::from(hours) * 60 + i64::from(minutes));
    Some((local, if sign == "-" { -ahead } else { ahead }))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn all_forms_are_utc() {
        let micros = |text: &str| parse(text).map(Timestamp::as_microseconds);
        let expected = Some(1_700_000_000_000_000);
        for text in [
            "2023-11-14 22:13:20",
            "2023-11-14 22:13:20.000000",
            "2023-11-14T22:13:20",
            "2023-11-14T22:13:20Z",
            "2023-11-14T22:13:20.0Z",
            "2023-11-14 23:13:20+01:00",
            "2023-11-14 17:13:20-05",
            "2023-11-15T03:43:20.000+0530",
        ] {
            assert_eq!(micros(text), expected, "{text}");
        }
        assert_eq!(micros("2023-11-14 22:13:20.000001"), expected.map(|at| at + 1));
        assert_eq!(micros("2023-11-14"), Some(1_699_920_000_000_000));
        assert_eq!(micros("9999-12-31 23:59:59.999999"), Some(253_402_300_799_999_999));
        assert_eq!(parse("infinity"), Some(Timestamp::INFINITY));
        assert_eq!(parse("-infinity"), Some(Timestamp::NEGATIVE_INFINITY));
        for text in ["", "never", "1700000000", "2023-13-01 00:00:00", "2023-11-14 25:00:00", "14.11.2023"] {
            assert_eq!(micros(text), None, "{text}");
        }
    }

    #[test]
    fn the_ends_are_infinite() {
        assert_eq!(format(Timestamp::INFINITY), "infinity");
        assert_eq!(format(Timestamp::NEGATIVE_INFINITY), "-infinity");
        assert_eq!(format(Timestamp::from_microseconds(1_700_000_000_000_001)), "2023-11-14 22:13:20.000001");
        assert_eq!(format(Timestamp::from_microseconds(-1)), "1969-12-31 23:59:59.999999");
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_back(micros in -62_135_596_800_000_000_i64..253_402_300_799_999_999) {
            let at = Timestamp::from_microseconds(micros);
            prop_assert_eq!(parse(&format(at)), Some(at));
        }

        #[test]
        fn any_text_is_read_or_refused(text in "\\PC{0,40}") {
            let _ = parse(&text);
        }
    }
}
