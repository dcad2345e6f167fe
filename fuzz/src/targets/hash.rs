//! Stored hashes, against the words of the contract, and whether `bcrypt` takes what is accepted.

use keyward::domain::hash::KeyHash;
use keyward::domain::key::PresentedKey;
use sha2::{Digest as _, Sha256};

pub(crate) fn run(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let key = PresentedKey::parse(b"kw_0123456789").expect("a key");
    let digits = text.strip_prefix("sha256:");
    let is_sha256 =
        digits.is_some_and(|rest| rest.len() == 64 && rest.bytes().all(|byte| byte.is_ascii_hexdigit()));
    let cost = naive_cost(text);
    let Ok(hash) = KeyHash::parse(text) else {
        assert!(!is_sha256 && cost.is_none(), "refused: {text:?}");
        return;
    };
    assert_eq!(hash.expose_secret(), text);
    assert_eq!((hash.bcrypt_cost(), hash.matches_sha256(&key).is_some()), (cost, is_sha256), "{text:?}");
    if let Some(digits) = digits {
        let own: String =
            Sha256::digest(key.expose_secret()).iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hash.matches_sha256(&key), Some(digits.to_ascii_lowercase() == own));
    } else if cost == Some(4) {
        // The dearer ones are of the same form.
        let _ = bcrypt::verify(key.expose_secret(), text);
    }
}

/// `$2b$10$` and 53 characters.
fn naive_cost(text: &str) -> Option<u32> {
    let mut parts = text.split('$');
    let ("", kind, cost, rest, None) =
        (parts.next()?, parts.next()?, parts.next()?, parts.next()?, parts.next())
    else {
        return None;
    };
    let alphabet = "./ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789";
    let is_good = ["2a", "2b", "2y"].contains(&kind)
        && cost.len() == 2
        && cost.bytes().all(|byte| byte.is_ascii_digit())
        && rest.len() == 53
        && rest.chars().all(|letter| alphabet.contains(letter));
    cost.parse().ok().filter(|cost| is_good && (4..=14).contains(cost))
}
