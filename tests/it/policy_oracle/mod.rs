//! Policy against a second, naive implementation of it: the same verdict and the same reason for a million random pairs
//! of key and request, and the properties that any such policy has.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;

use keyward::domain::denial::Denial;
use keyward::domain::deny_list::DenyList;
use keyward::domain::key::PrefixLength;
use keyward::domain::policy::evaluate;
use keyward::domain::proof::{Proven, Verdict};
use keyward::domain::record::Candidate;
use keyward::domain::rules::PolicyRules;
use keyward::domain::time::Timestamp;

use generate::{
    Ask, Column, DENIED_ID, DENIED_PREFIX, ENDPOINT_RULES, Key, MODEL_RULES, Random, SCOPES, Settings,
};

mod bodies;
mod generate;
mod oracle;

const NOW: i64 = 1_700_000_000_000_000;

/// What decides besides key and request.
struct Setting {
    meant: Settings,
    written: PolicyRules,
    deny_list: DenyList,
}

impl Setting {
    fn new(meant: Settings) -> Self {
        let text = format!("key-id {DENIED_ID}\nprefix {DENIED_PREFIX}");
        let deny_list = DenyList::parse(text.as_bytes(), PrefixLength::DEFAULT).unwrap();
        Self { written: meant.written(), meant, deny_list }
    }

    fn decide(&self, candidate: &Arc<Candidate>, ask: &Ask) -> Option<Denial> {
        let proven = Proven::from_verdict(candidate, Verdict::Match).unwrap();
        let now = Timestamp::from_microseconds(NOW);
        let decided = evaluate(proven, &self.deny_list, &self.written, &ask.written(), now);
        decided.err().map(|denied| denied.reason)
    }
}

#[test]
fn a_million_decisions_and_their_reasons_are_those_of_the_oracle() {
    let random = &mut Random(1);
    let asks: Vec<Ask> = (0..8192).map(|_| random.ask()).collect();
    let settings: Vec<Setting> = (0..64).map(|_| Setting::new(random.settings())).collect();
    let mut counts: BTreeMap<Option<Denial>, u32> = BTreeMap::new();
    for _ in 0..40_000 {
        let key = random.key();
        let candidate = key.written(random);
        for _ in 0..25 {
            let (ask, setting) = (&asks[random.below(asks.len())], &settings[random.below(settings.len())]);
            let (expected, decided) =
                (oracle::decide(&setting.meant, &key, ask), setting.decide(&candidate, ask));
            assert_eq!(decided, expected, "{}", described(&setting.meant, &key, ask));
            *counts.entry(decided).or_default() += 1;
        }
    }
    for outcome in oracle::FAILURES.map(|(reason, ..)| Some(reason)).into_iter().chain([None]) {
        let count = counts.get(&outcome).copied().unwrap_or_default();
        assert!(count > 1000, "{outcome:?} came only {count} times: {counts:?}");
    }
    assert_eq!(counts.values().sum::<u32>(), 1_000_000);
}

fn described(settings: &Settings, key: &Key, ask: &Ask) -> String {
    let row = serde_json::to_string(&key.row).unwrap();
    let body = ask.body.bytes.as_deref().map(String::from_utf8_lossy);
    format!("{ask:?}\nbody {body:?}\n{settings:?}\n{:?}\n{row}", key.lists)
}

/// Changes each of many keys in some way that must not matter, or must only ever take away.
fn compare(
    seed: u64,
    change: impl Fn(&mut Key, &mut Random),
    holds: impl Fn(Option<Denial>, Option<Denial>) -> bool,
) {
    let random = &mut Random(seed);
    let asks: Vec<Ask> = (0..1024).map(|_| random.ask()).collect();
    let settings: Vec<Setting> = (0..64).map(|_| Setting::new(random.settings())).collect();
    let mut allowed = 0;
    for _ in 0..10_000 {
        let key = random.key();
        let mut changed = key.clone();
        changed.networks.take();
        change(&mut changed, random);
        let candidates = [key.written(random), changed.written(random)];
        for _ in 0..8 {
            let (ask, setting) = (&asks[random.below(asks.len())], &settings[random.below(settings.len())]);
            let [before, after] = candidates.each_ref().map(|candidate| setting.decide(candidate, ask));
            assert!(
                holds(before, after),
                "{before:?}, then {after:?}: {}\n{:?}",
                described(&setting.meant, &key, ask),
                changed.lists
            );
            allowed += usize::from(after.is_none());
        }
    }
    assert!(allowed > 1000, "only {allowed} were allowed");
}

#[test]
fn narrowing_a_list_never_allows_more() {
    let narrow = |key: &mut Key, random: &mut Random| {
        let added = [
            random.pick(&SCOPES).to_owned(),
            random.pick(&MODEL_RULES).to_owned(),
            random.pick(&ENDPOINT_RULES).to_owned(),
            random.network(),
        ];
        let which = random.below(4);
        match key.lists.each().into_iter().nth(which).unwrap() {
            Column::Only(entries) if entries.len() > 1 => {
                entries.remove(random.below(entries.len()));
            }
            // A key without scopes has none, so one scope more would not be narrower.
            column @ Column::Open(_) if which > 0 => *column = Column::Only(vec![added[which].clone()]),
            column => *column = Column::Broken("{}".to_owned()),
        }
    };
    compare(2, narrow, |before, after| before.is_none() || after.is_some());
}

#[test]
fn the_order_and_repetition_of_entries_is_irrelevant() {
    let shuffle = |key: &mut Key, random: &mut Random| {
        for column in key.lists.each() {
            if let Column::Only(entries) = column {
                entries.push(entries[random.below(entries.len())].clone());
                for last in (1..entries.len()).rev() {
                    entries.swap(last, random.below(last + 1));
                }
            }
        }
    };
    compare(3, shuffle, |before, after| before == after);
}

/// JSON is written anew in any case, so this is also about escapes and blanks.
#[test]
fn an_entry_in_another_spelling_means_the_same() {
    let respell = |key: &mut Key, random: &mut Random| {
        if let Column::Only(entries) = &mut key.lists.ips {
            for entry in entries.iter_mut() {
                let (base, length) = oracle::network(entry);
                let v6 = Ipv6Addr::from(base);
                *entry = match v6.to_ipv4_mapped() {
                    Some(v4) if length >= 96 && random.one_in(2) => format!("{v4}/{}", length - 96),
                    _ => format!("{v6}/{length}"),
                };
            }
        }
        if let Column::Only(entries) = &mut key.lists.endpoints {
            for entry in entries.iter_mut() {
                if let Some((method, path)) = entry.split_once(' ') {
                    *entry = format!("{} {path}", method.to_lowercase());
                }
            }
        }
    };
    compare(4, respell, |before, after| before == after);
}

#[test]
fn a_client_s_two_spellings_are_one_client() {
    let random = &mut Random(5);
    let setting = Setting::new(Settings::default());
    for _ in 0..20_000 {
        let (key, mut ask) = (random.key(), random.ask());
        let candidate = key.written(random);
        let before = setting.decide(&candidate, &ask);
        ask.client = ask.client.map(|client| match client {
            IpAddr::V4(v4) => IpAddr::V6(v4.to_ipv6_mapped()),
            IpAddr::V6(v6) => v6.to_ipv4_mapped().map_or(client, IpAddr::V4),
        });
        assert_eq!(setting.decide(&candidate, &ask), before, "{}", described(&setting.meant, &key, &ask));
    }
}
