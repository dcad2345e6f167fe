//! "Did you mean …": the known name that is nearest to a misspelt one.

/// The nearest of the known names, unless none is near: a third of the letters may differ.
pub fn nearest<'a>(text: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let (distance, name) =
        known.map(|name| (distance(text, name), name)).min_by_key(|(distance, _)| *distance)?;
    (distance <= (text.chars().count() / 3).max(1)).then_some(name)
}

/// Levenshtein's distance, without regard to case and to which separator stands between words.
fn distance(left: &str, right: &str) -> usize {
    let letters = |text: &str| -> Vec<char> {
        text.chars().map(|c| if matches!(c, '-' | '.') { '_' } else { c.to_ascii_lowercase() }).collect()
    };
    let (left, right) = (letters(left), letters(right));
    let mut row: Vec<usize> = (0..=right.len()).collect();
    for (i, a) in left.iter().enumerate() {
        let mut last = i + 1;
        let mut next = vec![last];
        for ((b, above_left), above) in right.iter().zip(&row).zip(row.iter().skip(1)) {
            last = (above_left + usize::from(a != b)).min(above + 1).min(last + 1);
            next.push(last);
        }
        row = next;
    }
    row.last().copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances() {
        for (left, right, expected) in
            [("", "", 0), ("abc", "", 3), ("kitten", "sitting", 3), ("a-b", "A_b", 0), ("ab", "ba", 2)]
        {
            assert_eq!(distance(left, right), expected, "{left} {right}");
            assert_eq!(distance(right, left), expected, "{right} {left}");
        }
    }

    #[test]
    fn far_names_are_not_proposed() {
        let known = ["cache.record_ttl", "cache.verdict_ttl"];
        assert_eq!(nearest("cache.recordttl", known.into_iter()), Some("cache.record_ttl"));
        assert_eq!(nearest("nonsense", known.into_iter()), None);
    }
}
