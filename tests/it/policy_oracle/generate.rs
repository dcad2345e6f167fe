//! Keys, requests and settings at random: what they mean, for the oracle, and what is written of it, for Keyward.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use keyward::domain::body::Body;
use keyward::domain::record::Candidate;
use keyward::domain::request::{Request, RouteOptions};
use keyward::domain::row::CandidateRow;
use keyward::domain::rules::PolicyRules;

use super::NOW;
use super::bodies::Written;
use super::oracle::network;

pub(super) const DENIED_ID: i64 = 13;
pub(super) const DENIED_PREFIX: &str = "kw_denyd";

#[derive(Clone, Debug)]
pub(super) enum Column {
    Open(Option<&'static str>),
    Only(Vec<String>),
    Broken(String),
}

impl Column {
    pub(super) fn entries(&self) -> &[String] {
        match self {
            Self::Only(entries) => entries,
            Self::Open(_) | Self::Broken(_) => &[],
        }
    }

    pub(super) fn is_restricting(&self) -> bool {
        !self.entries().is_empty()
    }
}

#[derive(Clone, Debug)]
pub(super) struct Lists {
    pub(super) scopes: Column,
    pub(super) models: Column,
    pub(super) endpoints: Column,
    pub(super) ips: Column,
    pub(super) others: [Column; 2],
}

impl Lists {
    pub(super) fn all(&self) -> [&Column; 6] {
        let [chatbots, agents] = &self.others;
        [&self.scopes, &self.models, &self.endpoints, &self.ips, chatbots, agents]
    }

    pub(super) fn each(&mut self) -> [&mut Column; 6] {
        let [chatbots, agents] = &mut self.others;
        [&mut self.scopes, &mut self.models, &mut self.endpoints, &mut self.ips, chatbots, agents]
    }
}

/// The list columns of `row` are only filled in by [`Key::written`].
#[derive(Clone)]
pub(super) struct Key {
    pub(super) row: CandidateRow,
    pub(super) lists: Lists,
    pub(super) networks: std::cell::OnceCell<Vec<(u128, u32)>>,
}

#[derive(Debug)]
pub(super) struct Ask {
    pub(super) method: &'static str,
    pub(super) path: String,
    pub(super) client: Option<IpAddr>,
    pub(super) scopes: Vec<&'static str>,
    /// The same as the route has it.
    pub(super) required: String,
    pub(super) model: &'static str,
    pub(super) body: Written,
}

/// What an operator chose.
#[derive(Debug, Default)]
pub(super) struct Settings {
    pub(super) shadow: Vec<&'static str>,
    pub(super) scope_paths: Vec<(&'static str, &'static str)>,
}

impl Settings {
    /// As Keyward reads them.
    pub(super) fn written(&self) -> PolicyRules {
        let table: Vec<String> =
            self.scope_paths.iter().map(|(rule, scope)| format!("{rule}={scope}")).collect();
        let or_none = |text: String| if text.is_empty() { "none".to_owned() } else { text };
        PolicyRules {
            shadow: or_none(self.shadow.join(",")).parse().unwrap(),
            scope_paths: or_none(table.join(", ")).parse().unwrap(),
            ..PolicyRules::default()
        }
    }
}

impl Ask {
    /// As the server would read it from the wire.
    pub(super) fn written(&self) -> Request<'_> {
        let route =
            RouteOptions { required_scopes: &self.required, model: self.model, ..RouteOptions::default() };
        let Written { bytes, is_whole, encoding, content_type, .. } = &self.body;
        let bytes = bytes.as_deref();
        let body = Body { bytes, is_whole: *is_whole, encoding, content_type };
        Request { method: self.method, path: &self.path, client: self.client, route, body }
    }
}

impl Key {
    /// As Keyward would read it from a store.
    pub(super) fn written(&self, random: &mut Random) -> Arc<Candidate> {
        let mut row = self.row.clone();
        let [scopes, models, endpoints, ips, chatbots, agents] =
            self.lists.all().map(|column| json(column, random));
        (row.scopes, row.allowed_models, row.allowed_endpoints) = (scopes, models, endpoints);
        (row.allowed_ips, row.allowed_chatbots, row.allowed_agents) = (ips, chatbots, agents);
        Arc::new(Candidate::from_row(&row))
    }

    pub(super) fn networks(&self) -> &[(u128, u32)] {
        self.networks.get_or_init(|| self.lists.ips.entries().iter().map(|text| network(text)).collect())
    }
}

/// Any of the ways to write the same JSON.
pub(super) fn json(column: &Column, random: &mut Random) -> Option<String> {
    let entries = match column {
        Column::Open(form) => return form.map(str::to_owned),
        Column::Broken(text) => return Some(text.clone()),
        Column::Only(entries) => entries,
    };
    let entries: Vec<String> = entries.iter().map(|entry| quoted(entry, random)).collect();
    Some(format!("[{}]", entries.join(random.pick(&[",", ", ", "\n\t,"]))))
}

/// Any of the ways to write a string in JSON.
pub(super) fn quoted(text: &str, random: &mut Random) -> String {
    let escape_one_in = random.pick(&[1, 5, 1000]);
    let mut written = "\"".to_owned();
    for letter in text.chars() {
        match letter {
            _ if random.one_in(escape_one_in) => {
                written.extend(letter.encode_utf16(&mut [0; 2]).iter().map(|unit| format!("\\u{unit:04x}")));
            }
            '/' if random.one_in(4) => written.push_str("\\/"),
            '"' | '\\' => written.extend(['\\', letter]),
            _ => written.push(letter),
        }
    }
    written + "\""
}

/// splitmix64: the same numbers in every run.
pub(super) struct Random(pub u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    pub(super) fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.next() % u64::try_from(end).unwrap()).unwrap()
    }

    pub(super) fn one_in(&mut self, chances: usize) -> bool {
        self.below(chances) == 0
    }

    pub(super) fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }

    fn some<T: Copy>(&mut self, from: &[T]) -> Option<T> {
        (!self.one_in(4)).then(|| self.pick(from))
    }

    fn column(&mut self, mut good: impl FnMut(&mut Self) -> String, bad: &[&str]) -> Column {
        match self.below(60) {
            0 => Column::Broken(self.pick(&BROKEN).to_owned()),
            1 => {
                let spoiled = vec![good(self), self.pick(bad).to_owned(), good(self)];
                Column::Broken(json(&Column::Only(spoiled), self).unwrap())
            }
            2..30 => Column::Open(self.pick(&[None, None, Some("null"), Some("[]"), Some(" [ ] ")])),
            _ => {
                let count = 1 + self.below(4);
                Column::Only((0..count).map(|_| good(self)).collect())
            }
        }
    }

    pub(super) fn key(&mut self) -> Key {
        let lists = Lists {
            scopes: match self.column(|random| random.pick(&SCOPES).to_owned(), &[""]) {
                // Most keys have some scope, or few requests would come past this rule.
                Column::Open(_) if self.one_in(2) => Column::Only(SCOPES.map(str::to_owned).into()),
                column => column,
            },
            models: self.column(|random| random.pick(&MODEL_RULES).to_owned(), &[""]),
            endpoints: self.column(|random| random.pick(&ENDPOINT_RULES).to_owned(), &BAD_ENDPOINT_RULES),
            ips: self.column(Self::network, &BAD_NETWORKS),
            others: [(); 2].map(|()| {
                // They decide nothing here, but a broken one makes the policy invalid.
                let broken = self.one_in(120);
                if broken { Column::Broken("{}".into()) } else { Column::Only(vec!["x".into()]) }
            }),
        };
        Key { row: self.row(), lists, networks: std::cell::OnceCell::new() }
    }

    fn row(&mut self) -> CandidateRow {
        let flag = |random: &mut Self| random.pick(&[None, Some(false), Some(true)]);
        let mostly = |random: &mut Self| if random.one_in(12) { flag(random) } else { Some(true) };
        let limit = |random: &mut Self| random.some(&[0, 60]).map(|n| if random.one_in(80) { -1 } else { n });
        CandidateRow {
            key_id: i64::try_from(self.below(40)).unwrap(),
            key_name: None,
            key_hash: None,
            key_prefix: Some(if self.one_in(60) { DENIED_PREFIX } else { "kw_01234" }.to_owned()),
            is_active: mostly(self),
            expires_at: self.pick(&[
                None,
                None,
                None,
                Some(NOW + 1),
                Some(NOW),
                Some(NOW - 1),
                Some(i64::MAX),
            ]),
            scopes: None,
            allowed_models: None,
            allowed_endpoints: None,
            allowed_ips: None,
            allowed_chatbots: None,
            allowed_agents: None,
            rate_limit_per_minute: limit(self),
            rate_limit_per_hour: limit(self),
            rate_limit_per_day: limit(self),
            is_unlimited: flag(self),
            budget_limit_cents: limit(self),
            budget_type: match self.below(80) {
                0 => Some("weekly".into()),
                1..20 => Some("total".into()),
                20..50 => Some("monthly".into()),
                _ => None,
            },
            total_cost: self.some(&[-5, 0, 59, 60, 61]),
            month_cost: self.some(&[-5, 0, 59, 60, 61]),
            user_id: (!self.one_in(60)).then_some(3),
            username: None,
            email: None,
            user_is_active: mostly(self),
            is_superuser: self.pick(&[None, Some(false), Some(false), Some(true)]),
            role: None,
            account_locked: if self.one_in(10) { flag(self) } else { None },
            account_locked_until: if self.one_in(10) { self.some(&[0, NOW - 1, NOW, NOW + 1]) } else { None },
            unreadable: if self.one_in(200) { vec!["is_superuser".into()] } else { Vec::new() },
        }
    }

    pub(super) fn ask(&mut self) -> Ask {
        let path = match self.below(60) {
            0 => self.pick(&["", "*", "v1/chat", "/", "//", "http://x/v1/chat"]).to_owned(),
            1..24 => {
                self.pick(&["/v1/chat", "/v1/chat/completions", "/v1/messages", "/v1/models"]).to_owned()
            }
            24..30 => format!("/model/{}/invoke", self.pick(&["gpt-4o", "gpt-4o%2dmini", "GPT-4o", "x%3a0"])),
            shape => {
                let odd_one_in = if shape < 45 { 3 } else { 1000 };
                let count = 1 + self.below(4);
                let one = |random: &mut Self| {
                    let from: &[&str] = if random.one_in(odd_one_in) { &ODD_SEGMENTS } else { &SEGMENTS };
                    format!("/{}", random.pick(from))
                };
                (0..count).map(|_| one(self)).collect()
            }
        };
        let scopes: Vec<&str> = (0..self.below(3)).map(|_| self.pick(&SCOPES)).collect();
        let required = scopes
            .iter()
            .map(|scope| format!("{}{scope}{}", self.pick(&["", " ", ", "]), self.pick(&[",", " ,"])));
        let required = required.collect();
        let (method, model) = (self.pick(&["GET", "POST", "DELETE"]), self.pick(&MODELS));
        let client = (!self.one_in(30)).then(|| self.address());
        Ask { method, path, client, scopes, required, model, body: Written::at_random(self) }
    }

    pub(super) fn settings(&mut self) -> Settings {
        let table = [("/v1/chat/**", "chat"), ("GET /v1/*", "embed"), ("post /**", "Chat")];
        let some = |random: &mut Self| random.one_in(8);
        Settings {
            shadow: ["ips", "endpoints", "scopes", "models", "budget"]
                .into_iter()
                .filter(|_| some(self))
                .collect(),
            scope_paths: table.into_iter().filter(|_| some(self)).collect(),
        }
    }

    /// Few enough bits vary that addresses and networks often meet, at their borders too.
    fn address(&mut self) -> IpAddr {
        let low = u32::try_from(self.below(8)).unwrap();
        let v4 = Ipv4Addr::from(0x0a00_0000 + (low << 22) + low);
        match self.below(4) {
            0 => IpAddr::V6(Ipv6Addr::from((0x2001_0db8 << 96) + (u128::from(low) << 93) + u128::from(low))),
            1 => IpAddr::V6(v4.to_ipv6_mapped()),
            _ => IpAddr::V4(v4),
        }
    }

    pub(super) fn network(&mut self) -> String {
        let full_v6 = |v6: Ipv6Addr| v6.segments().map(|group| format!("{group:04X}")).join(":");
        let (v4, v6) = match self.address() {
            IpAddr::V4(v4) => (Some(v4), v4.to_ipv6_mapped()),
            IpAddr::V6(v6) => (None, v6),
        };
        let length = self.pick(&[0, 8, 9, 10, 30, 31, 32]);
        match (self.below(5), v4) {
            (0, Some(v4)) => v4.to_string(),
            (1, Some(v4)) => format!("::ffff:{v4}/{}", 96 + length),
            (2, Some(_)) => format!("{}/{}", full_v6(v6), 96 + length),
            (_, Some(v4)) => format!("{v4}/{length}"),
            (0, None) => v6.to_string(),
            (1, None) => full_v6(v6),
            (_, None) => format!("{v6}/{}", self.pick(&[0, 32, 33, 34, 35, 80, 95, 126, 127, 128])),
        }
    }
}

pub(super) const SCOPES: [&str; 3] = ["chat", "embed", "Chat"];
pub(super) const MODELS: [&str; 8] =
    ["", "", "", "gpt-4o", "gpt-4o-mini", "bedrock/x", "bedrockz/x", "GPT-4o"];
pub(super) const MODEL_RULES: [&str; 8] =
    ["gpt-4o", "gpt-4o*", "*-mini", "bedrock/*", "*", "g*4*o", "gpt-4o**i", "\u{1d11e}"];
pub(super) const ENDPOINT_RULES: [&str; 14] = [
    "/v1/chat",
    "POST /v1/chat",
    "post /v1/chat/*",
    "get /v1/models",
    "/v1/*",
    "/v1/**",
    "/**/completions",
    "/**",
    "/",
    "/*/chat",
    "/**/chat/**",
    "/v1/%63hat",
    "/v1//chat",
    "/v1/\u{e9}",
];
const BAD_ENDPOINT_RULES: [&str; 9] =
    ["", "v1/chat", "GET", "GET  /v1", "G3T /v1", "/v1/chat*", "/v1?x", "*", "/**/a/**/b/**"];
const BAD_NETWORKS: [&str; 8] =
    ["", "10.1", "010.0.0.1", "10.0.0.0/33", "10.0.0.0/-1", "fe80::1%eth0", "example.com", " 10.0.0.1"];
const BROKEN: [&str; 11] =
    ["", "{}", "\"x\"", "1", "true", "[1]", "[null]", "[[\"/v1/**\"]]", "[\"a\"", "[\"a\",]", "nul"];
const SEGMENTS: [&str; 6] = ["v1", "v1", "chat", "completions", "models", "..."];
const ODD_SEGMENTS: [&str; 28] = [
    "..%20", "%20.", "", "", ".", "..", "%2e", "%2E%2e", ".%2e", "a%2fb", "a%5Cb", "a;b", "a%3Bb", "a%23",
    "a#b", "a%3f", "%zz", "%2", "a%00", "a\\b", "%252e", "a%7f", "%c0%af", "V1", "%63hat", "%c3%a9",
    "\u{e9}", "a%20b",
];
